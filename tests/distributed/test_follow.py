"""The way back of residency `follow` against that of `combine`: the same bits."""

import contextlib
from itertools import product

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from exchange import CASES, make_slots, make_tokens, run_experts  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.nn import return_home  # noqa: E402
from moetuner.nn.follow import follow_back, keys_of  # noqa: E402
from moetuner.ops import (  # noqa: E402
    combine,
    describe_transport,
    dispatch,
    node_groups,
)
from moetuner.ops._collectives import slots_of  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

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


def _everything(rank, num_ranks, device, in_node):
    _equals_combine(rank, num_ranks, device, in_node)
    _refuses_strangers(rank, device)


@pytest.mark.parametrize(("device", "num_ranks", "in_node", "backend"), WORLDS)
def test_sums_are_those_of_combine_where_the_first_expert_is(
    device, num_ranks, in_node, backend
):
    args = num_ranks, _everything, device, in_node
    run_on_ranks(*args, device=device, backend=backend)
