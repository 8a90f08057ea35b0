"""The exchange over mapped memory: a Gloo group for control, rows on the GPU."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from exchange import CASES, Case, fixed_sizes, make_slots, make_tokens, run_layer
from moetuner.ops import Transport, check_overflow, describe_transport, set_transport
from ranks import run_on_ranks
from test_dispatch_and_combine import _every_check

pytestmark = pytest.mark.gpu


def _group():
    return dist.group.WORLD.group_name


def _over_peers(rank, num_ranks):
    set_transport(_group(), Transport.PEERS)
    _every_check(rank, num_ranks, "cuda", 0)
    assert "mapped memory" in describe_transport(_group())


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_exchange_over_peers_equals_one_rank_counts_and_repeats(num_ranks):
    run_on_ranks(num_ranks, _over_peers, device="cuda", backend="gloo")


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
    out, sent = run_layer(slots, x, ids, weights, **options)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(rank))
    grads = torch.autograd.grad(out, (x, weights), toward.to("cuda", dtype))
    filled = int(sent.end_offsets[-1])
    return [out.detach(), sent.rows[:filled].detach(), sent.end_offsets, *grads]


def _same_bits(rank, num_ranks):
    for case in [*CASES, Case(64, 8, (1000, 700), hidden=2048)]:
        slots = make_slots(case, rank, num_ranks, "cuda")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            forms = [{}]
            if max(case.tokens) > 0:
                forms.append(fixed_sizes(case, num_ranks))
            for options in forms:
                found = []
                for way in (Transport.COLLECTIVES, Transport.PEERS, Transport.PEERS):
                    set_transport(_group(), way)
                    found.append(
                        _layer_and_gradients(case, slots, rank, dtype, options)
                    )
                for of_peers in found[1:]:
                    for ours, other in zip(of_peers, found[0], strict=True):
                        assert torch.equal(ours, other), (case, dtype, options)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_peers_and_collectives_give_the_same_bits(num_ranks):
    run_on_ranks(num_ranks, _same_bits, device="cuda")


def _grows(rank, num_ranks):
    set_transport(_group(), Transport.PEERS)
    slots = make_slots(Case(8, 2, (5,)), rank, num_ranks, "cuda")
    for tokens in ((5, 3), (0, 300), (700, 1), (2, 2)):
        case = Case(8, 2, tokens)
        x, ids, weights = make_tokens(case, rank, "cuda")
        out, _ = run_layer(slots, x, ids, weights)
        again, sent = run_layer(
            slots,
            x,
            ids,
            weights,
            capacity=max(tokens),
            max_rows=2 * sum(tokens) * num_ranks,
        )
        check_overflow(sent.handle.overflow)
        assert torch.equal(out, again)


def test_windows_grow_when_any_rank_has_more_tokens():
    run_on_ranks(2, _grows, device="cuda", backend="gloo")


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
