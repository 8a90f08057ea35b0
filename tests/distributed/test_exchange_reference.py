"""The ops against their readable twins: the same rows, the same maps, close sums."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from exchange import CASES, make_slots, make_tokens, run_experts  # noqa: E402
from moetuner.ops import combine, dispatch, reference_exchange  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

HANDLE = ("recv_map", "recv_weights", "send_map", "splits")


def _equal_the_twins(rank, num_ranks):
    group = dist.group.WORLD.group_name
    for case in CASES:
        slots = make_slots(case, rank, num_ranks)
        results = []
        for send, back in (
            (dispatch, combine),
            (reference_exchange.dispatch, reference_exchange.combine),
        ):
            x, ids, weights = make_tokens(case, rank)
            leaves = [leaf.requires_grad_() for leaf in (x, weights)]
            tables = slots.candidates, slots.num_candidates, slots.slots_per_rank
            sent = send(x, ids, weights, *tables, group)
            out = back(run_experts(slots, sent), sent.handle)
            toward = torch.linspace(-1, 1, out.numel()).view_as(out)
            grads = torch.autograd.grad(out, leaves, toward)
            results.append((sent, out, grads))
        (sent, out, grads), (twin, twin_out, twin_grads) = results
        for which, names in (
            ((sent, twin), ("rows", "end_offsets")),
            ((sent.handle, twin.handle), HANDLE),
        ):
            for name in names:
                ours, theirs = (getattr(one, name) for one in which)
                assert ours.dtype == theirs.dtype, name
                assert torch.equal(ours, theirs), (case, name)
        torch.testing.assert_close(out, twin_out, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(grads, twin_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ops_equal_their_readable_twins(num_ranks):
    run_on_ranks(num_ranks, _equal_the_twins)
