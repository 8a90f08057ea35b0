"""The way back of residency `follow` against that of `combine`: the same bits."""

import contextlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from exchange import CASES, make_slots, make_tokens, run_experts  # noqa: E402
from layers import make_placement  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.evaluation.cost import Homes, Wire  # noqa: E402
from moetuner.evaluation.links import link_rows  # noqa: E402
from moetuner.evaluation.tally import tally  # noqa: E402
from moetuner.nn import ExchangeOptions, gather_counts, return_home  # noqa: E402
from moetuner.nn.exchange import Exchange  # noqa: E402
from moetuner.nn.follow import follow_back, keys_of  # noqa: E402
from moetuner.ops import (  # noqa: E402
    combine,
    describe_transport,
    dispatch,
    node_groups,
)
from moetuner.ops._collectives import group_named, slots_of  # noqa: E402
from moetuner.placement.topology import Topology  # noqa: E402
from moetuner.trace import Trace  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

# Ranks, and of those on several nodes the ranks of a node: then rows take two levels.
WORLDS = [("cpu", *world, "gloo") for world in ((1, 0), (2, 0), (4, 0), (4, 2))]
WORLDS += [
    pytest.param("cuda", *world, backend, marks=pytest.mark.gpu)
    for backend, world in (
        *product(("nccl",), ((1, 0), (2, 0), (4, 0), (8, 0), (4, 2), (8, 4))),
        *product(("gloo",), ((2, 0), (4, 0), (4, 2))),
    )
]


def _equals_combine(rank, num_ranks, device, in_node):
    """Layer after layer, each with tokens where the one before left them."""
    group = dist.group.WORLD.group_name
    nodes = node_groups(group, in_node) if in_node else None
    for case in CASES:
        slots = make_slots(case, rank, num_ranks, device)
        tables = slots.candidates, slots.num_candidates, slots.slots_per_rank
        for dtype in (torch.float32, torch.bfloat16):
            first, ids, weights = make_tokens(case, rank, device, dtype)
            count, keys = len(first), keys_of(len(first), group, first.device)
            x = first
            for layer in range(3):
                ids = ids.roll(layer, dims=1).contiguous()
                sent = dispatch(x, ids, weights, *tables, group, nodes=nodes)
                done = run_experts(slots, sent).to(dtype)
                wanted = combine(done, sent.handle)
                came = follow_back(x, ids, keys, sent, done, tables)
                mapped = "mapped memory of the ranks, " in describe_transport(group)
                if nodes:
                    assert "mapped" not in describe_transport(nodes.between)
                if mapped and not in_node:
                    with _no_wait_of_torch():
                        again = follow_back(x, ids, keys, sent, done, tables)
                    assert all(map(torch.equal, again, came))
                _ended_at_first_expert(came.keys, keys, ids, tables)
                home = return_home(wanted, keys, count, group)
                assert torch.equal(
                    return_home(came.sums, came.keys, count, group), home
                ), (case, layer)
                # Whatever else belongs to a token goes with it.
                where = [return_home(t, keys, count, group) for t in (ids, weights)]
                x, keys = came.tokens, came.keys
                assert torch.equal(return_home(x, keys, count, group), first)
                ids, weights = (_move(t, keys) for t in where)


@contextlib.contextmanager
def _no_wait_of_torch():
    """The waits, for sizes and an event, are none of those that torch refuses."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _ended_at_first_expert(ended, keys, ids, tables):
    """Keys on each rank, against what every rank says of its tokens."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    slot = slots_of(ids[:, :1], tables[0], tables[1])[:, 0]
    ends_at = torch.where(slot < 0, rank, slot // tables[2]).tolist()
    said = [None] * num_ranks
    mine = list(zip(ends_at, map(tuple, keys.tolist()), strict=True))
    dist.all_gather_object(said, mine)
    wanted = sorted(key for every in said for at, key in every if at == rank)
    assert list(map(tuple, ended.tolist())) == wanted


def _move(at_home, keys):
    """Lines of tokens, from their homes to where their keys are."""
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, at_home.cpu())
    lines = [said[home][row] for home, row in keys.tolist()]
    return torch.stack(lines).to(at_home.device) if lines else at_home[:0]


def _refuses_strangers(rank, device):
    group = dist.group.WORLD.group_name
    values = torch.ones(2, 3, device=device)
    for rows, count in (((0, 0), 2), ((0, 2), 2), ((-1, 0), 2), ((0, 1), 0)):
        keys = torch.tensor([(rank, row) for row in rows], device=device)
        with pytest.raises(InvalidTraceError, match="2 tokens came home, wanted each"):
            return_home(values, keys, count, group)


def _refuses_a_key_twice(rank, device, in_node):
    """Where parts are told apart by keys; on one level they need none."""
    group = dist.group.WORLD.group_name
    case = CASES[0]
    slots = make_slots(case, rank, dist.get_world_size(), device)
    tables = slots.candidates, slots.num_candidates, slots.slots_per_rank
    x, weights = torch.ones(2, 4, device=device), torch.ones(2, 2, device=device)
    ids = torch.tensor([[-1, 0], [-1, 5]], device=device)  # they stay
    keys = torch.tensor([[rank, 1], [rank, 1]], device=device)
    nodes = node_groups(group, in_node)
    sent = dispatch(x, ids, weights, *tables, group, nodes=nodes)
    with pytest.raises(InvalidTraceError, match="follow: keys name a token twice"):
        follow_back(x, ids, keys, sent, run_experts(slots, sent), tables)


def _everything(rank, num_ranks, device, in_node):
    _equals_combine(rank, num_ranks, device, in_node)
    _refuses_strangers(rank, device)
    if in_node:
        _refuses_a_key_twice(rank, device, in_node)


@pytest.mark.parametrize(("device", "num_ranks", "in_node", "backend"), WORLDS)
def test_sums_are_those_of_combine_where_the_first_expert_is(
    device, num_ranks, in_node, backend
):
    args = num_ranks, _everything, device, in_node
    run_on_ranks(*args, device=device, backend=backend)


TOKENS, EXPERTS, TOP_K, LAYERS = (70, 0, 33, 1), 8, 3, 3
LINKS = ("rank_egress", "rank_ingress", "node_egress", "node_ingress")


def _routing(num_ranks):
    """Every rank's tokens, one behind the other, and the first number of each rank.

    After the first layer a first choice may be padding, or all are.
    """
    first = np.cumsum([0, *(TOKENS[rank % len(TOKENS)] for rank in range(num_ranks))])
    rng = np.random.default_rng(num_ranks)
    ids = rng.random((first[-1], LAYERS, EXPERTS)).argsort(axis=-1)[..., :TOP_K]
    hide = rng.random(ids.shape) < 0.3
    hide[:, 0, 0] = False
    ids[hide] = -1
    trace = Trace(
        topk_ids=np.ascontiguousarray(ids.astype(np.int16)),
        num_experts=EXPERTS,
        layer_ids=np.arange(3, 3 + LAYERS, dtype=np.int32),
        ranked=True,
    )
    return trace, first


class _PartsSent(TorchDispatchMode):
    """Counts rows of parts by the ranks that they are sent to: each has one lane."""

    def __init__(self):
        super().__init__()
        self.rows = torch.zeros(dist.get_world_size(), dtype=torch.int64)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.moetuner.dispatch.default and args[1].shape[1] == 1:
            lanes, lanes_per_rank, (group,) = args[1], args[5], args[6]
            ranks = dist.get_process_group_ranks(group_named(group))
            to = torch.tensor(ranks)[lanes.flatten() // lanes_per_rank]
            self.rows += to.bincount(minlength=len(self.rows))
        return op(*args, **(kwargs or {}))


def _links_are_those_of_the_evaluator(rank, num_ranks, in_node):
    """Out and back, layer after layer, on two levels and on one."""
    topology = Topology(num_ranks=num_ranks, ranks_per_node=in_node)
    for kind, levels in product(("contiguous", "shuffled"), ("auto", "one")):
        placement = replace(
            make_placement(kind, num_ranks, LAYERS, EXPERTS), topology=topology
        )
        trace, first = _routing(num_ranks)
        options = ExchangeOptions(residency="follow", levels=levels)
        exchanges = torch.nn.ModuleList(
            Exchange(placement, layer=int(layer), options=options)
            for layer in placement.layer_ids
        )
        x, keys = torch.ones(first[rank + 1] - first[rank], 20), None
        number, back = np.arange(first[rank], first[rank + 1]), []
        for layer, exchange in enumerate(exchanges):
            ids = torch.from_numpy(trace.topk_ids[number, layer].astype(np.int64))
            with _PartsSent() as sent:
                weights = torch.ones(ids.shape)
                came = exchange.follow(x, ids, weights, lambda rows, _: rows, keys)
            assert torch.equal(came.sums[:, 0], _choices(trace, first, came, layer))
            waits = "the host waits again, for the rows of each hop too"
            assert (waits in exchange.describe()) == (levels == "auto")
            x, keys, back = came.tokens, came.keys, [*back, sent.rows]
            number = first[keys[:, 0].numpy()] + keys[:, 1].numpy()
        wire = Wire.DEDUP if levels == "auto" else Wire.DEDUP_RANKS
        told = tally(trace, placement, wire=wire, homes=Homes.FOLLOW)
        counted = link_rows(gather_counts(exchanges), topology)
        counted_back = _by_link(torch.stack(back), topology)
        for link in LINKS:
            of_link = getattr(told, link)[0]  # at first homes are nobody's in a trace
            assert np.array_equal(getattr(counted, link)[1:], of_link[1:]), link
            assert np.array_equal(
                counted_back[link], getattr(told, f"return_{link}")[0]
            )
        assert counted_back["node_egress"].any()
        assert counted_back["rank_egress"].any()


def _choices(trace, first, came, layer):
    """How many choices of each token are none of padding: experts return its row."""
    number = first[came.keys[:, 0].numpy()] + came.keys[:, 1].numpy()
    return torch.from_numpy((trace.topk_ids[number, layer] >= 0).sum(1)).float()


def _by_link(rows, topology):
    """Rows int64 [L, G] that each rank has sent to each, by the link that they took."""
    every = [torch.empty_like(rows) for _ in range(topology.num_ranks)]
    dist.all_gather(every, rows)
    sent = torch.stack(every, dim=1).numpy()  # [L, from, to]
    inside = topology.same_node()
    in_node = np.where(inside & ~np.eye(len(inside), dtype=bool), sent, 0)
    across = np.where(inside, 0, sent)
    nodes = topology.num_nodes, topology.ranks_per_node
    return {
        "rank_egress": in_node.sum(axis=2),
        "rank_ingress": in_node.sum(axis=1),
        "node_egress": across.sum(axis=2).reshape(-1, *nodes).sum(axis=2),
        "node_ingress": across.sum(axis=1).reshape(-1, *nodes).sum(axis=2),
    }


@pytest.mark.parametrize(("num_ranks", "in_node"), [(4, 2), (8, 4), (8, 2)])
def test_rows_on_each_link_are_those_of_the_evaluator(num_ranks, in_node):
    run_on_ranks(num_ranks, _links_are_those_of_the_evaluator, in_node)
