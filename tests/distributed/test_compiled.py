"""Compiled layers on ranks whose graphs differ: they meet at every exchange."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from exchange import Case, fixed_sizes, make_slots, make_tokens, run_layer  # noqa: E402
from moetuner.ops import node_groups  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

TOKENS = (6, 0, 1, 5)  # of rank 0, step by step; rank 1 begins at another


def _steps(rank, num_ranks, exact, backend, steps):
    """Trains on other numbers of tokens than the other ranks, none and one included.

    On four ranks rows take two levels: each exchange is two.
    """
    exchanges = 1 if num_ranks > 2 and steps == 2 else 2
    case = Case(8, 2, TOKENS)
    slots = make_slots(case, rank, num_ranks)
    sizes = {} if exact else fixed_sizes(case, num_ranks)
    if num_ranks > 2:
        sizes["nodes"] = node_groups(dist.group.WORLD.group_name, 2)

    def layer(x, ids, weights):
        given = x
        for _ in range(exchanges):
            out = run_layer(slots, given, ids, weights, **sizes)[0].tanh()
            given = out + x
        return out

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for step in range(steps):
        x, ids, weights = make_tokens(case, step + rank)
        leaves = [x.requires_grad_(), weights.requires_grad_()]
        found = []
        for run in (layer, compiled):
            out = run(x, ids, weights)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for ours, eager in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager)


def _unread(rank, num_ranks, backend):
    """Only the first rank reads what comes back: the exchange happens on all."""
    case = Case(8, 2, (4,))
    slots = make_slots(case, rank, num_ranks)
    given = make_tokens(case, rank)

    def layer(x, ids, weights):
        out, _ = run_layer(slots, x, ids, weights)
        return x if rank else out

    torch.compile(layer, fullgraph=True, backend=backend)(*given)


WORLDS = [(False, 2, "inductor", 2), (True, 4, "aot_eager", 2)]
WORLDS += [
    pytest.param(exact, *world, 3, marks=pytest.mark.slow)
    for world in ((2, "inductor"), (4, "aot_eager"))
    for exact in (False, True)
]


def _every_check(rank, num_ranks, exact, backend, steps):
    """One start of the compiler for both."""
    _steps(rank, num_ranks, exact, backend, steps)
    _unread(rank, num_ranks, backend)


@pytest.mark.parametrize(("exact", "num_ranks", "backend", "steps"), WORLDS)
def test_ranks_meet_whatever_their_graphs_leave_out(exact, num_ranks, backend, steps):
    run_on_ranks(num_ranks, _every_check, exact, backend, steps)
