"""What may be put around layers, times form, dtype and biases: cells of a matrix.

Each cell takes one step and compares outputs and all gradients with the same layers
on one process that has the tokens of all ranks; what is exported, outputs alone.
Undefined memory is full of NaN, but where a compiler is at work.
"""

import contextlib
import copy
import functools
import json
import pickle
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from layers import (
    EXPERTS,
    TOKENS,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.nn import (
    ExchangeOptions,
    ExpertOptions,
    apply_placement,
    average_gradients,
    expert_parameters,
    keep_routing,
    ready_for_ddp,
)
from poison import poisoned
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

FORMS = {
    "exact": ExchangeOptions(),
    "fixed": ExchangeOptions(capacity=max(TOKENS), max_rows=5 * max(TOKENS) * TOP_K),
}
CLOSE = {  # products are rounded to the dtype, and there are few of them
    "float32": {"rtol": 1e-3, "atol": 1e-4},
    "float16": {"rtol": 2e-2, "atol": 2e-2},
    "bfloat16": {"rtol": 1e-1, "atol": 1e-1},
}
CLEAR = 0.1
"""By how much the last expert chosen is ahead of the next: more than roundings."""


class Cell(NamedTuple):
    """Names, as the table of the run has them."""

    feature: str
    form: str
    dtype: str
    bias: bool

    @property
    def kind(self):
        """Of placement: experts with biases have replicas and empty slots."""
        return "replicated" if self.bias else "shuffled"


class Stack(torch.nn.Module):
    """Layers with residuals, each called in some way."""

    def __init__(self, layers, call=lambda layer, x: layer(x)):
        super().__init__()
        self.layers, self.call = layers, call

    def forward(self, x):
        for layer in self.layers:
            x = x + self.call(layer, x)
        return x


def _checkpointed(**options):
    return lambda layers: Stack(layers, lambda la, x: checkpoint(la, x, **options))


def _compiled(backend, dynamic=None):
    def wrap(layers):
        torch._dynamo.reset()
        model = Stack(layers)
        model.forward = torch.compile(
            model.forward, backend=backend, fullgraph=True, dynamic=dynamic
        )
        return model

    return wrap


def _sharded(layers):
    model = Stack(layers)
    device = next(layers.parameters()).device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model).values()))
    return model


def _to_empty(layers):
    state = copy.deepcopy(layers.state_dict())
    device = next(layers.parameters()).device
    empty = layers.to("meta").to_empty(device=device)
    empty.load_state_dict(state)
    return Stack(empty)


def _assigned(layers):
    state = copy.deepcopy(layers.state_dict())
    empty = layers.to("meta")
    empty.load_state_dict(state, assign=True)
    return Stack(empty.requires_grad_())


def _moved(layers):
    """By another placement first, then back by its own."""
    own = layers[0].exchange.placement
    slots = own.slot_experts.reshape(len(own.slot_experts), own.topology.num_ranks, -1)
    turned = slots[:, ::-1].reshape(own.slot_experts.shape).copy()
    apply_placement(layers, replace(own, slot_experts=turned))
    apply_placement(layers, own)
    return Stack(layers)


def _exported(layers):
    example = torch.zeros(6, layers[0].experts.down.shape[1])
    like = next(layers.parameters())
    program = torch.export.export(
        Stack(layers),
        (example.to(like),),
        dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}},
        strict=False,
    )
    return program.module()


FEATURES = {
    "plain": Stack,
    "deepcopy": lambda layers: Stack(copy.deepcopy(layers)),
    "pickle": lambda layers: Stack(pickle.loads(pickle.dumps(layers))),
    "to_empty": _to_empty,
    "assign=True": _assigned,
    "apply_placement": _moved,
    "DDP": lambda layers: DistributedDataParallel(ready_for_ddp(Stack(layers))),
    "FSDP2": _sharded,
    "checkpoint, reentrant": _checkpointed(use_reentrant=True),
    "checkpoint": _checkpointed(use_reentrant=False),
    "keep_routing": _checkpointed(use_reentrant=False, context_fn=keep_routing),
    "export": _exported,
    "compile, eager": _compiled("eager"),
    "compile, aot_eager": _compiled("aot_eager"),
    "compile, inductor": _compiled("inductor"),
    "compile, inductor, dynamic": _compiled("inductor", dynamic=True),
}
INDUCTOR = tuple(name for name in FEATURES if "inductor" in name)
AVERAGES_BY_ITSELF = ("DDP", "FSDP2")
COMPILES = tuple(name for name in FEATURES if "compile" in name or name == "export")


def run_cells(rank, num_ranks, cells, device, folder):
    """Each cell on this rank; what became of it goes to a file in `folder`.

    Ranks stay together: what is compared, is compared behind the cell's collectives.
    """
    outcomes = []
    for given in cells:
        cell = Cell(*given)
        wrong = ""
        try:
            _run(cell, rank, num_ranks, device)
        except Exception:
            wrong = f"rank {rank}: {traceback.format_exc(limit=-4)}"
        outcomes.append(cell._asdict() | {"wrong": wrong})
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(outcomes))


def outcomes_in(folder, num_ranks):
    """Cells with what went wrong on any rank; empty where nothing did."""
    ranks = [
        json.loads(Path(folder, f"rank-{rank}.json").read_text())
        for rank in range(num_ranks)
    ]
    return [
        same[0]
        | {"ranks": num_ranks, "wrong": "\n".join(filter(None, map(_wrong, same)))}
        for same in zip(*ranks, strict=True)
    ]


def _wrong(outcome):
    return outcome["wrong"]


def _run(cell, rank, num_ranks, device):
    options = ExpertOptions(bias=cell.bias)
    dtype = getattr(torch, cell.dtype)
    whole, same = (
        [
            (router.to(device), experts.to(device))
            for router, experts in whole_layers(options, dtype=dtype)
        ]
        for _ in range(2)
    )
    placement = make_placement(cell.kind, num_ranks)
    layers = placed_layers(same, placement, rank, options=FORMS[cell.form])
    wanted, x_grad = _one_process(whole, num_ranks, cell.bias)[rank]
    x = _clear_tokens(rank, cell.bias).to(device, dtype, copy=True).requires_grad_()
    strict = torch.device(device).type != "cuda"
    hides = contextlib.nullcontext() if cell.feature in COMPILES else poisoned(strict)
    with hides:
        model = FEATURES[cell.feature](layers)
        if cell.feature == "export":
            with torch.no_grad():
                _near(model(x), wanted, cell)
            return
        out = model(x)
        out.float().square().sum().backward()
        average_gradients(model, shared=cell.feature not in AVERAGES_BY_ITSELF)
    _near(out, wanted, cell)
    if len(x):
        _close(x.grad, x_grad, cell)
    _check_gradients(getattr(model, "module", model).layers, whole, placement, cell)


def _check_gradients(layers, whole, placement, cell):
    width, rank = placement.slots_per_rank, torch.distributed.get_rank()
    for row, layer in enumerate(layers):
        layer.exchange.check_overflow()
        router, experts = whole[row]
        _close(layer.router.linear.weight.grad, router.linear.weight.grad, cell)
        mine = placement.slot_experts[row, rank * width :][:width]
        for own, other in zip(
            layer.experts.parameters(), experts.parameters(), strict=True
        ):
            for slot, expert in enumerate(mine):
                if expert >= 0:
                    _close(own.grad[slot], other.grad[expert], cell)
                else:
                    assert not own.grad[slot].any()


def _one_process(whole, num_ranks, bias):
    """Outputs of each rank's tokens; gradients of the mean of the ranks' losses."""
    outputs = []
    for rank in range(num_ranks):
        x = given = _clear_tokens(rank, bias).to(whole[0][1].up, copy=True)
        given.requires_grad_()
        for layer in whole:
            x = x + _by_expert(layer, x)
        (x.float().square().sum() / num_ranks).backward()
        grad = given.grad if given.grad is None else given.grad * num_ranks
        outputs.append((x, grad))
    return outputs


def _by_expert(layer, x):
    """What one layer adds, its rows sorted by expert."""
    if not len(x):
        return x
    router, experts = layer
    ids, weights = router(x)
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
    done = experts(x[order // TOP_K], ends).float()
    done = done * weights.flatten()[order, None]
    return done.new_zeros(x.shape).index_add(0, order // TOP_K, done).to(x.dtype)


@functools.cache
def _clear_tokens(rank, bias):
    """As many as `tokens_of`, whose experts no rounding changes: float32, CPU."""
    count = len(tokens_of(rank))
    made = torch.Generator().manual_seed(rank)
    whole = whole_layers(ExpertOptions(bias=bias))
    x = tokens = torch.randn(16 * count, whole[0][1].down.shape[1], generator=made)
    clear = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        for layer in whole:
            best = layer[0].linear(x).sort(dim=1, descending=True).values
            clear &= best[:, TOP_K - 1] - best[:, TOP_K] > CLEAR
            x = x + _by_expert(layer, x)
    assert clear.sum() >= count
    return tokens[clear][:count]


def _near(found, wanted, cell):
    torch.testing.assert_close(found, wanted, **CLOSE[cell.dtype])


def _close(found, wanted, cell):
    """Against the largest value of the gradient: what cancels is rounded too."""
    found = found.full_tensor() if hasattr(found, "full_tensor") else found
    scale = wanted.abs().max().clamp(min=1e-3)
    _near(found / scale, wanted / scale, cell)
