"""The exchange over mapped memory: a Gloo group for control, rows on the GPU.

On two levels Gloo carries the rows between nodes too.
"""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from exchange import (
    CASES,
    Case,
    fixed_sizes,
    make_slots,
    make_tokens,
    run_layer,
    without_ranks,
)
from layers import make_placement, placed_layers, tokens_of, whole_layers
from moetuner.nn import ExchangeOptions
from moetuner.ops import (
    Transport,
    check_overflow,
    describe_transport,
    node_groups,
    set_transport,
)
from moetuner.ops._collectives import group_named
from ranks import run_on_ranks
from test_dispatch_and_combine import _every_check

pytestmark = pytest.mark.gpu


def _group():
    return dist.group.WORLD.group_name


def _levels(in_node):
    """Options of two levels, where a node has ranks, and the group that maps memory."""
    if not in_node:
        return {}, _group()
    nodes = node_groups(_group(), in_node)
    return {"nodes": nodes}, nodes.inside


def _over_peers(rank, num_ranks, in_node):
    _, group = _levels(in_node)
    set_transport(group, Transport.PEERS)
    _every_check(rank, num_ranks, "cuda", in_node)
    assert "mapped memory" in describe_transport(group)


WORLDS = [(1, 0), (2, 0), (4, 0), (8, 0), (4, 2), (8, 2), (8, 4)]


@pytest.mark.parametrize(("num_ranks", "in_node"), WORLDS)
def test_the_exchange_over_peers_equals_one_rank_counts_and_repeats(num_ranks, in_node):
    run_on_ranks(num_ranks, _over_peers, in_node, device="cuda", backend="gloo")


@pytest.mark.parametrize(("num_ranks", "in_node"), [(4, 2), (8, 4)])
def test_two_levels_over_nccl_and_peers_are_captured(num_ranks, in_node):
    run_on_ranks(num_ranks, _over_peers, in_node, device="cuda")


def _on_two_machines(rank, _num_ranks):
    """As NCCL is told, so are we."""
    os.environ["NCCL_HOSTID"] = f"node-{rank}"
    case = CASES[0]
    slots = make_slots(case, rank, 2, "cuda")
    tokens = make_tokens(case, rank, "cuda")
    set_transport(_group(), Transport.PEERS)
    with pytest.raises(ValueError, match=f"rank {1 - rank} is on another machine"):
        run_layer(slots, *tokens)
    set_transport(_group(), Transport.AUTO)
    run_layer(slots, *tokens)
    assert "on another machine" in describe_transport(_group())


def test_ranks_that_nccl_has_on_two_machines_map_nothing():
    run_on_ranks(2, _on_two_machines, device="cuda", backend="gloo")


def _layer_and_gradients(case, slots, rank, dtype, options):
    x, ids, weights = make_tokens(case, rank, "cuda", dtype)
    for leaf in (x, weights):
        leaf.requires_grad_()
    num_ranks = dist.get_world_size()
    counted = 1 + num_ranks + 1 + num_ranks * slots.slots_per_rank
    if "nodes" in options:
        in_node = group_named(options["nodes"].inside).size()
        counted += num_ranks // in_node - 1 + in_node
    counters = torch.zeros(counted, dtype=torch.int64, device="cuda")
    out, sent = run_layer(slots, x, ids, weights, counters=counters, **options)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank))
    grads = torch.autograd.grad(out, (x, weights), toward.to("cuda", dtype))
    filled = int(sent.end_offsets[-1])
    handle = sent.handle
    return [
        out.detach(),
        sent.rows[:filled].detach(),
        sent.end_offsets,
        handle.recv_map.clamp(min=-1),  # peers tell rows that did not come by -2
        handle.recv_weights.detach(),
        *handle.send_maps,
        *handle.all_splits,
        counters,
        *grads,
    ]


def _same_bits(rank, num_ranks, in_node):
    levels, group = _levels(in_node)
    long = [Case(64, 8, (1000, 700), hidden=2048)]  # rows of one piece and of two
    long += [Case(64, 8, tokens, hidden=2320) for tokens in ((40, 33), (300, 257))]
    for case in CASES + long:  # the last have rows of two pieces and of four
        slots = make_slots(case, rank, num_ranks, "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            forms = [levels]
            if max(case.tokens) > 0:
                forms.append(levels | fixed_sizes(case, num_ranks))
            for options in forms:
                found = []
                for way in (Transport.COLLECTIVES, Transport.PEERS, Transport.PEERS):
                    set_transport(group, way)
                    found.append(
                        _layer_and_gradients(case, slots, rank, dtype, options)
                    )
                for of_peers in found[1:]:
                    for ours, other in zip(of_peers, found[0], strict=True):
                        assert torch.equal(ours, other), (case, dtype, options)


@pytest.mark.parametrize(
    ("num_ranks", "in_node", "backend"),
    [(1, 0, "nccl"), (2, 0, "nccl"), (4, 2, "gloo"), (8, 4, "gloo")],
)
def test_peers_and_collectives_give_the_same_bits(num_ranks, in_node, backend):
    run_on_ranks(num_ranks, _same_bits, in_node, device="cuda", backend=backend)


def _hundred_runs(rank, num_ranks, in_node):
    """Rows, sums, counters and gradients, whoever of the ranks was first each time."""
    levels, group = _levels(in_node)
    set_transport(group, Transport.PEERS)
    case = Case(64, 8, (1000, 700), hidden=2048)
    slots = make_slots(case, rank, num_ranks, "cuda")
    forms = levels, levels | fixed_sizes(case, num_ranks)
    first = [_layer_and_gradients(case, slots, rank, torch.bfloat16, f) for f in forms]
    for run in range(100):
        for options, wanted in zip(forms, first, strict=True):
            found = _layer_and_gradients(case, slots, rank, torch.bfloat16, options)
            assert all(map(torch.equal, found, wanted)), (run, options)


@pytest.mark.parametrize(("num_ranks", "in_node"), [(1, 0), (2, 0), (4, 2)])
def test_a_hundred_runs_make_the_same_bits(num_ranks, in_node):
    run_on_ranks(num_ranks, _hundred_runs, in_node, device="cuda", backend="gloo")


def _grows(rank, num_ranks, in_node):
    levels, group = _levels(in_node)
    set_transport(group, Transport.PEERS)
    slots = make_slots(Case(8, 2, (5,)), rank, num_ranks, "cuda")
    for tokens in ((5, 3), (0, 300), (700, 1), (2, 2)):
        case = Case(8, 2, tokens)
        x, ids, weights = make_tokens(case, rank, "cuda")
        out, _ = run_layer(slots, x, ids, weights, **levels)
        again, sent = run_layer(
            slots,
            x,
            ids,
            weights,
            capacity=max(tokens),
            max_rows=2 * sum(tokens) * num_ranks,
            **levels,
        )
        check_overflow(sent.handle.overflow)
        assert torch.equal(out, again)


@pytest.mark.parametrize(("num_ranks", "in_node"), [(2, 0), (4, 2)])
def test_windows_grow_when_any_rank_has_more_tokens(num_ranks, in_node):
    run_on_ranks(num_ranks, _grows, in_node, device="cuda", backend="gloo")


def _other_routing(rank, num_ranks, in_node):
    """As many tokens, and other numbers of rows than the call before has seen."""
    levels, group = _levels(in_node)
    set_transport(group, Transport.PEERS)
    case = Case(8, 2, (600,))
    slots = make_slots(case, rank, num_ranks, "cuda")
    x, ids, weights = make_tokens(case, rank, "cuda")
    nowhere, crowded = torch.full_like(ids, -1), torch.zeros_like(ids)
    crowded[:, 1] = -1
    room = {"capacity": 600, "max_rows": 2 * 600 * num_ranks}
    for chosen in (nowhere, ids, ids, crowded, crowded, ids, nowhere, ids):
        out, sent = run_layer(slots, x, chosen, weights, **levels)
        again, fixed = run_layer(slots, x, chosen, weights, **levels, **room)
        check_overflow(fixed.handle.overflow)
        assert torch.equal(out, again)
        assert len(sent.rows) == int(sent.end_offsets[-1]) == int(fixed.end_offsets[-1])
        assert torch.equal(sent.rows, fixed.rows[: len(sent.rows)])
        assert len(sent.handle.recv_map) == int(sent.handle.splits[1].sum())


@pytest.mark.parametrize(("num_ranks", "in_node"), [(1, 0), (2, 0), (4, 2)])
def test_rows_differ_from_what_the_last_call_let_expect(num_ranks, in_node):
    run_on_ranks(num_ranks, _other_routing, in_node, device="cuda", backend="gloo")


def _one_dies(rank, num_ranks, dies_at):
    set_transport(_group(), Transport.PEERS, timeout=timedelta(seconds=3))
    case = Case(16, 4, (64,), hidden=256)
    slots = make_slots(case, rank, num_ranks, "cuda")
    x, ids, weights = make_tokens(case, rank, "cuda")
    run_layer(slots, x, ids, weights)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == num_ranks - 1:
        if dies_at == "combine":
            from moetuner.ops import dispatch

            tables = (slots.candidates, slots.num_candidates, slots.slots_per_rank)
            dispatch(x, ids, weights, *tables, _group())
            torch.cuda.synchronize()
        os._exit(0)
    begin = time.monotonic()
    with pytest.raises(dist.DistBackendError, match=f"of rank {num_ranks - 1}"):
        for _ in range(2):
            run_layer(slots, x, ids, weights)
            torch.cuda.synchronize()
    assert time.monotonic() - begin < 60
    os._exit(0)


@pytest.mark.parametrize("dies_at", ["dispatch", "combine"])
def test_a_rank_that_dies_is_named_on_all_others(dies_at):
    run_on_ranks(3, _one_dies, dies_at, device="cuda", backend="gloo")


def _one_dies_in_a_node(rank, num_ranks):
    """Of ranks 0 and 1 on a node, 2 and 3 on another, the last one ends."""
    nodes = node_groups(_group(), 2)
    set_transport(nodes.inside, Transport.PEERS, timeout=timedelta(seconds=3))
    case = Case(16, 4, (64,), hidden=256)
    slots = make_slots(case, rank, num_ranks, "cuda")
    x, ids, weights = make_tokens(case, rank, "cuda")
    run_layer(slots, x, ids, weights, nodes=nodes)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 3:
        os._exit(0)
    # Rank 1 meets it between nodes, by Gloo, and rank 0 then waits for rank 1.
    error, said = {
        0: (dist.DistBackendError, "rank 0 waited 3 s for .* of rank 1"),
        1: (RuntimeError, ""),
        2: (dist.DistBackendError, "rank 2 waited 3 s for .* of rank 3"),
    }[rank]
    begin = time.monotonic()
    with pytest.raises(error, match=said):
        for _ in range(2):
            run_layer(slots, x, ids, weights, nodes=nodes)
            torch.cuda.synchronize()
    assert time.monotonic() - begin < 60
    os._exit(0)


def test_a_rank_that_dies_in_a_node_is_named_by_its_number_among_all():
    run_on_ranks(4, _one_dies_in_a_node, device="cuda", backend="gloo")


def _refused(rank, num_ranks):
    """As if each rank were on a machine of its own."""
    os.environ["NCCL_HOSTID"] = f"node-{rank}"
    levels, group = _levels(2)
    case = Case(16, 4, (64,))
    slots = make_slots(case, rank, num_ranks, "cuda")
    tokens = make_tokens(case, rank, "cuda")
    other = f"rank {rank ^ 1} is on another machine"
    set_transport(group, Transport.PEERS)
    with pytest.raises(ValueError, match=f"memory was asked for .* {other}"):
        run_layer(slots, *tokens, **levels)
    set_transport(group, Transport.AUTO)
    out, _ = run_layer(slots, *tokens, **levels)
    assert describe_transport(group) == f"the group's communicator, as {other}"
    exact = without_ranks(case, *tokens).float()
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


def test_memory_that_a_node_cannot_map_is_refused_by_name_or_left():
    run_on_ranks(4, _refused, device="cuda", backend="gloo")


def _layers(rank, num_ranks):
    placement = make_placement("shuffled", num_ranks)
    found = []
    for way, said in (
        ("collectives", "each rank, over the group's communicator"),
        ("peers", "each rank, over mapped memory of the ranks"),
    ):
        options = ExchangeOptions(transport=way)
        layers = placed_layers(whole_layers(), placement, rank, options=options)
        layers.to("cuda")
        with torch.no_grad():
            found.append(layers[1](layers[0](tokens_of(rank).cuda())))
        told = layers[0].exchange.describe()
        assert told.startswith("two levels on 2 nodes of 2 ranks: over GLOO"), told
        assert said in told
    assert torch.equal(*found)


def test_a_layer_chooses_and_tells_what_carries_rows_inside_a_node():
    run_on_ranks(4, _layers, device="cuda", backend="gloo")
