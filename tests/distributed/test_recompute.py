"""Activation checkpointing: the same gradients, and what is counted is counted once."""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    HIDDEN,
    TOKENS,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    ExpertOptions,
    RoutingCounter,
    TopKRouter,
    gather_counts,
    keep_routing,
    recomputing,
    record_run,
)
from ranks import run_on_ranks  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

FIXED = ExchangeOptions(capacity=max(TOKENS), max_rows=4 * max(TOKENS) * TOP_K)
WAYS = [
    {"use_reentrant": True},
    {"use_reentrant": False},
    {"use_reentrant": False, "context_fn": keep_routing},
]


def _train(layers, rank, way):
    """One step of all layers, each computed again or not; output and gradients."""
    x = tokens_of(rank, requires_grad=True)
    out = torch.tanh(x)
    for layer in layers:
        layer.zero_grad(set_to_none=True)
        out = out + (layer(out) if way is None else checkpoint(layer, out, **way))
    out.square().sum().backward()
    return [out, x.grad, *[p.grad for p in layers.parameters()]]


def _same_gradients_counted_once(rank, num_ranks):
    placement = make_placement("replicated", num_ranks)
    whole = whole_layers(ExpertOptions(bias=True))
    for options in (ExchangeOptions(), FIXED):
        layers = placed_layers(whole, placement, rank, options=options)
        wanted = _train(layers, rank, None)
        for way in WAYS:
            with record_run(layers) as run:
                found = _train(layers, rank, way)
            torch.testing.assert_close(found, wanted)
            trace, record = run.trace(), gather_counts(layers)
            assert trace.num_tokens == sum(TOKENS[:num_ranks])
            assert verify(trace, placement, record) == []
            assert layers[0].exchange.counts().tokens == TOKENS[rank]
            layers[0].exchange.check_overflow()


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_checkpointing_changes_nothing(num_ranks):
    run_on_ranks(num_ranks, _same_gradients_counted_once)


EXACT = ExchangeOptions()
# torch keeps nothing of compiled code: no third way
COMPILED = list(itertools.product((EXACT, FIXED), WAYS[:2]))
SOME = [COMPILED[0], COMPILED[-1]]  # each form, and each way


def _compiled_within(rank, num_ranks, cases):
    placement = make_placement("replicated", num_ranks)
    whole = whole_layers(ExpertOptions(bias=True))
    for options, way in cases:
        layers = placed_layers(whole, placement, rank, options=options)
        wanted = _train(layers, rank, None)
        torch._dynamo.reset()
        with record_run(layers) as run:
            compiled = [
                torch.compile(layer, backend="aot_eager", fullgraph=True)
                for layer in layers
            ]
            found = _train(torch.nn.ModuleList(compiled), rank, way)
        torch.testing.assert_close(found, wanted)
        trace, record = run.trace(), gather_counts(layers)
        assert trace.num_tokens == sum(TOKENS[:num_ranks])
        assert verify(trace, placement, record) == []
        assert layers[0].exchange.counts().tokens == TOKENS[rank]
        layers[0].exchange.check_overflow()


@pytest.mark.parametrize(
    ("num_ranks", "cases"),
    [
        pytest.param(2, SOME, id="2-some"),
        *(
            pytest.param(ranks, COMPILED, id=f"{ranks}-all", marks=pytest.mark.slow)
            for ranks in (1, 2)
        ),
    ],
)
def test_compiled_layers_count_once_where_checkpointing_surrounds_them(
    num_ranks, cases
):
    run_on_ranks(num_ranks, _compiled_within, cases)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_compiled_counter_counts_once(reentrant):
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 4, (6, 2), generator=made) for _ in range(2)]
    plain, counter = (
        RoutingCounter([0, 1], num_experts=4, max_tokens=8, top_k=2) for _ in range(2)
    )
    x, outs = torch.ones(3, requires_grad=True), []
    for layer in (0, 1):
        plain.add(layer, ids[layer])

        @torch.compile(backend="aot_eager", fullgraph=True)
        def run(x, layer=layer):
            counter.add(layer, ids[layer])
            return x.sin().cos()

        outs.append(checkpoint(run, x, use_reentrant=reentrant))
    torch.cat(outs).sum().backward()
    found, wanted = counter.statistics(), plain.statistics()
    assert found.num_tokens == 6
    for name in ("load", "coactivation", "transitions"):
        assert (getattr(found, name) == getattr(wanted, name)).all(), name


class Moody(TopKRouter):
    """Chooses other experts each time."""

    def __init__(self, seen):
        super().__init__(HIDDEN, 8, TOP_K)
        self.seen = seen

    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.neg_()
        ids, weights = super().forward(x)
        self.seen.append((ids, recomputing()))
        return ids, weights


def test_what_routers_chose_is_kept():
    """A second pass with other chances keeps the experts of the first."""
    for keeps in (True, False):
        seen = []
        router, x = Moody(seen), torch.randn(64, HIDDEN, requires_grad=True)
        context = {"context_fn": keep_routing} if keeps else {}
        options = {"use_reentrant": False, "early_stop": False, **context}
        _, weights = checkpoint(router, x, **options)
        weights.square().sum().backward()
        (first, before), (second, after) = seen
        assert (before, after) == (False, True)
        assert torch.equal(first, second) == keeps
