"""Made-up layers on several ranks, their placements, and the same layers on one."""

import numpy as np
import torch
from moetuner.nn import ExpertOptions, Experts, MoELayer, TopKRouter
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.placement.topology import Topology

HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 16, 24, 8, 3, 2
TOKENS = (7, 0, 12, 3)
KINDS = ("contiguous", "shuffled", "replicated")


def make_placement(kind, num_ranks, num_layers=LAYERS, num_experts=EXPERTS, seed=0):
    """Layers 3, 4, ...; two nodes from 4 ranks on."""
    per_node = max(num_ranks // 2, 1) if num_ranks > 2 else num_ranks
    topology = Topology(num_ranks=num_ranks, ranks_per_node=per_node)
    layer_ids = np.arange(3, 3 + num_layers, dtype=np.int32)
    ranks = contiguous_rank_of(num_layers, num_experts, num_ranks)
    if kind == "contiguous":
        return Placement.from_rank_of(ranks, layer_ids=layer_ids, topology=topology)
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(ranks, axis=1)
    spare = 1 if kind == "replicated" else 0
    width = -(-num_experts // num_ranks) + 2 * spare
    plain = Placement.from_rank_of(
        ranks, layer_ids=layer_ids, topology=topology, slots_per_rank=width
    )
    slots = plain.slot_experts.reshape(num_layers, num_ranks, width).copy()
    for layer, rank in np.ndindex(num_layers, num_ranks if spare else 0):
        others = np.setdiff1d(np.arange(num_experts), slots[layer, rank])
        if others.size:  # one replica, and one slot that stays empty
            slots[layer, rank, -1] = rng.choice(others)
    return Placement(
        slot_experts=slots.reshape(num_layers, -1),
        layer_ids=layer_ids,
        num_experts=num_experts,
        topology=topology,
    )


def whole_layers(options=None, num_layers=LAYERS, dtype=torch.float32):
    """Router and all experts of each layer, the same on every rank."""
    torch.manual_seed(5)
    layers = []
    for _ in range(num_layers):
        router = TopKRouter(HIDDEN, EXPERTS, TOP_K)
        experts = Experts(EXPERTS, HIDDEN, INNER, options or ExpertOptions())
        for name, parameter in experts.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        layers.append((router.to(dtype), experts.to(dtype)))
    return layers


def placed_layers(whole, placement, rank, **options):
    """The same layers, each rank with the experts of its own slots."""
    layers, width = torch.nn.ModuleList(), placement.slots_per_rank
    for row, (router, experts) in enumerate(whole):
        mine = placement.slot_experts[row, rank * width :][:width]
        layer_id = int(placement.layer_ids[row])
        layers.append(
            MoELayer(router, experts.take(mine), placement, layer=layer_id, **options)
        )
    return layers


def one_layer(router, experts, x):
    """The layer without ranks, expert by expert."""
    ids, weights = router(x)
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, k = (ids == expert).nonzero(as_tuple=True)
        end = torch.tensor([len(token)], dtype=torch.int32)
        only = experts.take(np.array([expert], np.int32))
        done = only(x[token], end) if len(token) else x[token]
        out = out.index_add(0, token, done * weights[token, k, None].to(x.dtype))
    return out


def tokens_of(rank, step=0, requires_grad=False, dtype=torch.float32):
    count = TOKENS[(rank + step) % len(TOKENS)]
    rng = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(count, HIDDEN, generator=rng).to(dtype)
    return x.requires_grad_(requires_grad)
