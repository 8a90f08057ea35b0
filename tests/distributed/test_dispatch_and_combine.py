"""dispatch and combine between processes: Gloo on the CPU, NCCL on GPUs."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from exchange import (
    CASES,
    Case,
    dispatch_rows,
    fixed_sizes,
    make_slots,
    make_tokens,
    run_layer,
    without_ranks,
)
from moetuner.errors import ExchangeOverflowError
from moetuner.ops import check_overflow, combine, dispatch, node_groups
from moetuner.ops._collectives import all_to_all_rows, group_named, slots_of
from ranks import run_on_ranks

# Ranks, and of those on several nodes the ranks of a node: then rows take two levels.
WORLDS = [("cpu", 1, 0), ("cpu", 2, 0), ("cpu", 4, 0), ("cpu", 4, 2)]
WORLDS += [
    pytest.param("cuda", *world, marks=pytest.mark.gpu)
    for world in ((1, 0), (2, 0), (4, 0), (8, 0), (4, 2), (8, 2), (8, 4))
]

# Of the largest magnitude: float32 sums in another order; in bfloat16 the experts rows,
# what travels and the result are rounded, and the terms may exceed their sum.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 6 * 2**-8}


def _forms(case, num_ranks, levels):
    if max(case.tokens) == 0:
        return [{**levels}]
    return [{**levels}, {**levels, **fixed_sizes(case, num_ranks)}]


def _in_node(levels):
    """Ranks of a node where there are two levels; else 0."""
    return group_named(levels["nodes"].inside).size() if levels else 0


def _assert_close(ours, exact, dtype, what):
    assert ours.shape == exact.shape, what
    if not exact.numel():
        return
    scale = exact.abs().max().clamp(min=1e-30)
    error = float(((ours.double() - exact) / scale).abs().max())
    assert error <= TOLERANCE[dtype], (what, error)


def _equals_one_rank(rank, num_ranks, device, levels):
    for case in CASES:
        slots = make_slots(case, rank, num_ranks, device)
        for dtype in TOLERANCE:
            x, ids, weights = make_tokens(case, rank, device, dtype)
            for leaf in (x, weights):
                leaf.requires_grad_()
            exact = without_ranks(case, x, ids, weights)
            seed = torch.Generator().manual_seed(rank)
            toward = torch.randn(exact.shape, generator=seed).to(device, dtype)
            wanted = torch.autograd.grad(exact, (x, weights), toward.double())
            for options in _forms(case, num_ranks, levels):
                what = (case, dtype, options)
                out, sent = run_layer(slots, x, ids, weights, **options)
                _assert_close(out.detach(), exact.detach(), dtype, what)
                if "capacity" in options:
                    check_overflow(sent.handle.overflow)
                grads = torch.autograd.grad(out, (x, weights), toward)
                for ours, other in zip(grads, wanted, strict=True):
                    _assert_close(ours, other, dtype, what)


def _rows_and_counters(rank, num_ranks, device, levels):
    in_node = _in_node(levels)
    for case in CASES:
        slots = make_slots(case, rank, num_ranks, device)
        size = slots.slots_per_rank
        per_node = in_node or case.ranks_per_node or num_ranks
        num_nodes = num_ranks // per_node
        arrivals = []  # (slot, order of the sender, sender, token) of what belongs here
        passed_on = np.zeros(in_node, np.int64)
        wanted = None
        for sender in range(num_ranks):
            _, ids, _ = make_tokens(case, sender)
            table = make_slots(case, sender, num_ranks)
            here = (ids >= 0) & (ids < case.num_experts)
            token = torch.arange(len(ids))[:, None]
            expert = ids.clamp(0, case.num_experts - 1)
            turn = token % table.num_candidates[expert]
            slot = torch.where(here, table.candidates[expert, turn], -1).numpy()
            # With two levels a gateway sends, for the ranks of its place in all nodes.
            order = (
                sender % in_node * num_nodes + sender // in_node if levels else sender
            )
            for t, k in np.argwhere((slot >= 0) & (slot // size == rank)):
                arrivals.append((slot[t, k], order, sender, t))
            ranks = [set((s[s >= 0] // size).tolist()) for s in slot]
            if levels and sender % in_node == rank % in_node:
                first = rank // in_node * in_node
                passed_on += [
                    sum(first + d in f for f in ranks) for d in range(in_node)
                ]
            if sender == rank:
                nodes = [{r // per_node for r in found} for found in ranks]
                wanted = np.concatenate(
                    [
                        [len(ids)],
                        [sum(r in f for f in ranks) for r in range(num_ranks)],
                        [sum(n in f for f in nodes) for n in range(num_nodes)],
                        np.bincount(slot[slot >= 0], minlength=num_ranks * size),
                    ]
                )
        wanted = np.concatenate([wanted, passed_on])
        arrivals.sort()
        x, ids, weights = make_tokens(case, rank, device)
        sent_by = [make_tokens(case, sender)[0] for sender in range(num_ranks)]
        for options in _forms(case, num_ranks, levels):
            counters = torch.zeros(len(wanted), dtype=torch.int64, device=device)
            options |= {"counters": counters}
            if not levels:
                options |= {"ranks_per_node": case.ranks_per_node}
            runs = [run_layer(slots, x, ids, weights, **options) for _ in "ab"]
            assert (counters.cpu().numpy() == 2 * wanted).all(), case
            (out, sent), (again, _) = runs
            assert torch.equal(out, again), case
            ends = np.searchsorted(
                [a[0] for a in arrivals], rank * size + 1 + np.arange(size)
            )
            assert sent.end_offsets.tolist() == ends.tolist(), case
            rows = [sent_by[sender][token] for *_, sender, token in arrivals]
            filled = sent.rows[: len(rows)].cpu()
            assert not rows or torch.equal(filled, torch.stack(rows)), case


def _gateways_dispatch_on_one_level(rank, num_ranks, device, levels):
    """What came to a node, dispatched there by its slots, is what two levels give."""
    inside = group_named(levels["nodes"].inside)
    between = group_named(levels["nodes"].between)
    for case in CASES:
        slots = make_slots(case, rank, num_ranks, device)
        size = slots.slots_per_rank
        x, ids, weights = make_tokens(case, rank, device)
        wanted = dispatch_rows(slots, x, ids, weights, **levels)
        hop = wanted.handle.between
        token = torch.empty(int(hop.splits[0].sum()), dtype=torch.long, device=device)
        row_of = hop.send_map.long()
        token[row_of[row_of >= 0]] = (row_of >= 0).nonzero()[:, 0]
        slot = slots_of(ids, slots.candidates, slots.num_candidates)
        rows, slot, weights = (
            all_to_all_rows(sent[token], *hop.splits, between)
            for sent in (x, slot, weights)
        )
        slots_of_node = inside.size() * size
        local = slot - between.rank() * slots_of_node
        local[(slot < 0) | (local < 0) | (local >= slots_of_node)] = -1
        table = torch.arange(slots_of_node, dtype=torch.int32, device=device)[:, None]
        ones = torch.ones_like(table[:, 0])
        found = dispatch(rows, local, weights, table, ones, size, inside.group_name)
        for ours, other in (
            (found.rows, wanted.rows),
            (found.end_offsets, wanted.end_offsets),
            (found.handle.recv_map, wanted.handle.recv_map),
            (found.handle.recv_weights, wanted.handle.recv_weights),
            (found.handle.send_map, wanted.handle.send_map),
            (found.handle.splits, wanted.handle.splits),
        ):
            assert torch.equal(ours, other), case


def _overflows(rank, num_ranks, device, levels):
    case = Case(8, 2, (12,))
    slots = make_slots(case, rank, num_ranks, device)
    x, ids, weights = make_tokens(case, rank, device)
    wide = fixed_sizes(case, num_ranks) | levels
    ranks_per_place = _in_node(levels) or 1  # where the first hop goes
    _, sent = run_layer(slots, x, ids, weights, **wide)
    check_overflow(sent.handle.overflow)
    num_rows = int(sent.end_offsets[-1])
    to_each = torch.zeros(num_ranks // ranks_per_place, dtype=torch.int64)
    table = slots.candidates[ids, 0] // (slots.slots_per_rank * ranks_per_place)
    for of_token in table.tolist():
        for other in set(of_token):
            to_each[other] += 1
    narrow = wide | {"capacity": 4}
    less, sent = run_layer(slots, x, ids, weights, **narrow)
    assert int(sent.handle.overflow) == int((to_each - 4).clamp(min=0).sum())
    assert torch.isfinite(less).all()
    few = wide | {"max_rows": 5}
    _, sent = run_layer(slots, x, ids, weights, **few)
    assert int(sent.handle.overflow) == max(num_rows - 5, 0)
    assert int(sent.end_offsets[-1]) == min(num_rows, 5)
    if num_rows > 5:
        with pytest.raises(ExchangeOverflowError, match="rows found no room"):
            check_overflow(sent.handle.overflow)


def _fp8_rows(rank, num_ranks, device, levels):
    """What arrives, times its scales, is what plain rows bring; answers in bfloat16."""
    for case in CASES:
        slots = make_slots(case, rank, num_ranks, device)
        x, ids, weights = make_tokens(case, rank, device)
        for per_row in (1, case.hidden // 8):
            blocks = x.unflatten(1, (per_row, -1))
            scales = blocks.abs().amax(dim=2).clamp(min=1e-3) / 448
            quantised = (blocks / scales[..., None]).to(torch.float8_e4m3fn)
            plain = (quantised.float() * scales[..., None]).view_as(x)
            for options in _forms(case, num_ranks, levels):
                wanted, direct = run_layer(slots, plain, ids, weights, **options)
                wanted = combine(direct.rows.bfloat16(), direct.handle)
                sent = dispatch_rows(
                    slots,
                    quantised.view(x.shape),
                    ids,
                    weights,
                    scales=scales,
                    **options,
                )
                arrived = sent.rows.unflatten(1, (per_row, -1)).float()
                rows = (arrived * sent.row_scales[..., None]).flatten(1)
                filled = int(sent.end_offsets[-1])
                assert torch.equal(sent.end_offsets, direct.end_offsets)
                assert torch.equal(rows[:filled], direct.rows[:filled]), case
                assert sent.rows.stride(0) % 16 == 0
                back = combine(rows.bfloat16(), sent.handle)
                assert torch.equal(back, wanted), case


def _replays(rank, num_ranks, device, levels):
    case = Case(16, 4, (32,), hidden=64)
    slots = make_slots(case, rank, num_ranks, device)
    x, ids, weights = make_tokens(case, rank, device)
    sizes = fixed_sizes(case, num_ranks) | levels
    run_layer(slots, x, ids, weights, **sizes)  # makes the communicator
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, sent = run_layer(slots, x, ids, weights, **sizes)
    for turn in range(3):
        fresh, fresh_ids, _ = make_tokens(case, rank + 8 * turn, device)
        x.copy_(fresh)
        ids.copy_(fresh_ids)
        graph.replay()
        torch.cuda.synchronize()
        exact = without_ranks(case, x, ids, weights)
        _assert_close(out, exact, torch.float32, turn)
        check_overflow(sent.handle.overflow)
    dist.barrier()
    del graph


def _every_check(rank, num_ranks, device, in_node):
    """One start of the processes for all: it takes longer than the checks."""
    levels = {}
    if in_node:
        levels["nodes"] = node_groups(dist.group.WORLD.group_name, in_node)
    checks = [_equals_one_rank, _rows_and_counters, _fp8_rows, _overflows]
    if levels:
        checks.append(_gateways_dispatch_on_one_level)
    for check in checks:
        check(rank, num_ranks, device, levels)
    if device == "cuda" and not (levels and dist.get_backend() == "gloo"):
        # Gloo, between nodes, waits on the host.
        _replays(rank, num_ranks, device, levels)


@pytest.mark.parametrize(("device", "num_ranks", "in_node"), WORLDS)
def test_the_exchange_equals_one_rank_counts_and_repeats(device, num_ranks, in_node):
    run_on_ranks(num_ranks, _every_check, device, in_node, device=device)
