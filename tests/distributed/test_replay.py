"""Routing that is given: ids and weights of another run, as RL training does."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    HIDDEN,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.nn import (  # noqa: E402
    GivenRouting,
    TopKRouter,
    record_run,
    replay_routing,
)
from ranks import run_on_ranks  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402


def _chosen(layers, x):
    """What each layer's router chooses for what it gets, and the output."""
    found = {}
    for layer in layers:
        ids, weights = layer.router(x)
        found[layer.exchange.layer] = GivenRouting(topk_ids=ids, topk_weights=weights)
        x = x + layer(x)
    return found, x


def _run(layers, x):
    for layer in layers:
        x = x + layer(x)
    return x


def _replays(rank, num_ranks):
    placement = make_placement("replicated", num_ranks)
    layers = placed_layers(whole_layers(), placement, rank)
    x = tokens_of(rank, requires_grad=True)
    found, wanted = _chosen(layers, x)
    wanted.square().sum().backward()
    gradient = layers[0].router.linear.weight.grad.clone()
    # Routers change; the ids stay, and weights are those of the new routers.
    with torch.no_grad():
        for layer in layers:
            layer.router.linear.weight.neg_()
    with replay_routing(layers, found), record_run(layers) as run:
        torch.testing.assert_close(_run(layers, x), wanted)
    assert run.trace().num_tokens == sum(
        len(tokens_of(other)) for other in range(num_ranks)
    )
    bare = {n: GivenRouting(topk_ids=given.topk_ids) for n, given in found.items()}
    with torch.no_grad():
        for layer in layers:
            layer.router.linear.weight.neg_()
    for way in (None, {"use_reentrant": False}):
        layers.zero_grad()
        with replay_routing(layers, bare):
            out = _run(layers, x) if way is None else checkpoint(_run, layers, x, **way)
            out.square().sum().backward()
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(layers[0].router.linear.weight.grad, gradient)
    assert layers[0].given is None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_given_routing_is_taken(num_ranks):
    run_on_ranks(num_ranks, _replays)


def test_given_experts_are_weighted_by_the_router():
    router, x = TopKRouter(HIDDEN, 8, TOP_K), torch.randn(5, HIDDEN)
    ids, weights = router(x)
    _, again = router(x, topk_ids=ids)
    torch.testing.assert_close(again, weights)
    padded = ids.clone()
    padded[0, 1], padded[1] = 99, -1
    _, found = router(x, topk_ids=padded)
    assert found[0, 1] == 0
    assert not found[1].any()
    torch.testing.assert_close(found[0].sum(), torch.tensor(1.0))
    torch.testing.assert_close(found[2:], weights[2:])


class _Own(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1)


def _refused(rank, num_ranks):
    placement = make_placement("contiguous", num_ranks)
    layers = placed_layers(whole_layers(), placement, rank)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    given = GivenRouting(topk_ids=ids)
    with (
        pytest.raises(InvalidTraceError, match=r"layers \[3, 4\], got routing for \[9"),
        replay_routing(layers, {9: given}),
    ):
        pass
    with replay_routing(layers, {3: given}):
        with pytest.raises(InvalidTraceError, match="for 4 tokens, the layer has 5"):
            layers[0](torch.randn(5, HIDDEN))
        layers[0].router = _Own()
        with pytest.raises(InvalidTraceError, match=r"_Own cannot weight given"):
            layers[0](torch.randn(4, HIDDEN))
    with pytest.raises(InvalidTraceError, match=r"wanted ids .* that shape, got"):
        GivenRouting(topk_ids=ids, topk_weights=torch.ones(4, 3))


def test_what_does_not_fit_is_refused():
    run_on_ranks(1, _refused)
