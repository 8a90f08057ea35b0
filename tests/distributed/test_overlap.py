"""A layer whose tokens go in two halves, against the same layer in one piece."""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from layers import (  # noqa: E402
    HIDDEN,
    KINDS,
    TOKENS,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import (  # noqa: E402
    ExchangeOverflowError,
    InvalidPlacementError,
    InvalidProblemError,
)
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    MoELayer,
    TopKRouter,
    gather_counts,
    per_expert,
    record_run,
)
from moetuner.ops import describe_transport, set_transport  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

# Halves may be less even than the whole.
ROOM = {"capacity": max(TOKENS), "max_rows": 8 * max(TOKENS) * TOP_K}
FORMS = [{}, ROOM, {"levels": "one"}]


class Scaled(torch.nn.Module):
    """Experts that make of a row the same bits whatever rows are beside it."""

    def __init__(self, num_slots):
        super().__init__()
        scale = torch.linspace(0.5, 2.0, num_slots * HIDDEN)
        self.scale = torch.nn.Parameter(scale.view(num_slots, HIDDEN))

    def forward(self, rows, end_offsets):
        return rows * per_expert(self.scale, len(rows), end_offsets).to(rows.dtype)


def _scaled_layer(placement, device="cpu", **options):
    torch.manual_seed(3)
    layer = MoELayer(
        TopKRouter(HIDDEN, placement.num_experts, TOP_K),
        Scaled(placement.slots_per_rank),
        placement,
        layer=int(placement.layer_ids[0]),
        options=ExchangeOptions(**options),
    )
    return layer.to(device)


def _run(layer, x):
    """Sums, gradients of tokens, of the router and of experts, counters."""
    x = x.clone().requires_grad_()
    out = layer(x)
    layer.zero_grad()
    out.square().sum().backward()
    layer.exchange.check_overflow()
    router, experts = layer.router.linear.weight.grad, layer.experts.scale.grad
    return [out.detach(), x.grad, router, layer.exchange.counters], experts


def _the_same_bits(rank, num_ranks, device="cpu", **transport):
    for kind, form in itertools.product(KINDS, FORMS):
        placement = make_placement(kind, num_ranks)
        for step in range(2):
            x = tokens_of(rank, step).to(device)
            plain, plain_experts = _run(_scaled_layer(placement, device, **form), x)
            layer = _scaled_layer(placement, device, overlap=True, **form, **transport)
            found, experts = _run(layer, x)
            for ours, other in zip(found, plain, strict=True):
                assert torch.equal(ours, other), (kind, form, step)
            # Rows of the two halves are added up in another order.
            torch.testing.assert_close(experts, plain_experts, rtol=1e-5, atol=1e-6)
    assert "two halves" in layer.exchange.describe()


def _counted_as_predicted(rank, num_ranks):
    """Also where turns are taken between replicas, and passes are computed again."""
    placement = make_placement("replicated", num_ranks)
    options = ExchangeOptions(overlap=True)
    layers = placed_layers(whole_layers(), placement, rank, options=options)
    with record_run(layers) as run:
        x = tokens_of(rank, requires_grad=True)
        for layer in layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        x.sum().backward()
    assert verify(run.trace(), placement, gather_counts(layers)) == []


def _refusals(rank, num_ranks):
    placement = make_placement("contiguous", num_ranks)
    with pytest.raises(InvalidPlacementError, match=r"auto, overlap, rank 0 says"):
        _scaled_layer(placement, overlap=rank == 1)
    for options in (ROOM, {"overlap": True}):  # nothing has been sent yet
        layer = _scaled_layer(placement, **options)
        x = tokens_of(rank)
        with pytest.raises(
            InvalidProblemError, match=r"residency='follow'\), got home"
        ):
            layer.exchange.follow(x, *layer.router(x), layer.experts)
    tight = _scaled_layer(placement, capacity=1, max_rows=2, overlap=True)
    tight(torch.ones(9, HIDDEN))
    with pytest.raises(ExchangeOverflowError, match="found no room"):
        tight.exchange.check_overflow()


def _everything(rank, num_ranks):
    _the_same_bits(rank, num_ranks)
    _counted_as_predicted(rank, num_ranks)
    if num_ranks == 2:
        _refusals(rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_halves_make_the_same_bits_and_counts(num_ranks):
    run_on_ranks(num_ranks, _everything)


def _cannot_be_compiled(_rank, num_ranks):
    layer = _scaled_layer(make_placement("contiguous", num_ranks), overlap=True)
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"overlap=True.* cannot be compiled"):
        whole(tokens_of(0))
    x = tokens_of(0)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def test_a_whole_graph_is_refused_by_name():
    run_on_ranks(1, _cannot_be_compiled)


def _few_blocks(_rank, _num_ranks):
    group = dist.group.WORLD.group_name
    with pytest.raises(ValueError, match="blocks must be 4 to 65536, or 0"):
        set_transport(group, blocks=3)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(InvalidProblemError, match="overlap needs residency=home"):
        ExchangeOptions(residency="follow", overlap=True)
    with pytest.raises(InvalidProblemError, match="blocks must be a positive"):
        ExchangeOptions(blocks=0)
    with pytest.raises(InvalidProblemError, match="overlap must be True or False"):
        ExchangeOptions(overlap="no")
    run_on_ranks(1, _few_blocks)


def _over_peers(rank, num_ranks):
    _the_same_bits(rank, num_ranks, "cuda", transport="peers")
    assert "mapped memory" in describe_transport(dist.group.WORLD.group_name)
    _runs_beside(rank, num_ranks)
    _is_captured(rank, num_ranks)


def _runs_beside(rank, num_ranks):
    """The second half has been sent while experts of the first are at work."""
    layer = _scaled_layer(make_placement("contiguous", num_ranks), "cuda", overlap=True)
    x, ends = tokens_of(2).cuda().repeat(50, 1), []

    def slow(rows, end_offsets):
        if ends:  # whose sizes the host knows
            assert not ends[0].query(), "the first half was waited for"
        torch.cuda._sleep(2_000_000_000)
        ends.append(torch.cuda.current_stream().record_event())
        return layer.experts(rows, end_offsets)

    with torch.no_grad():
        wanted = layer(x)
        dist.barrier()
        out = layer.exchange(x, *layer.router(x), slow)
        assert torch.equal(out, wanted)
    assert len(ends) == 2


def _is_captured(rank, num_ranks):
    # Between nodes Gloo would carry rows, which no graph captures.
    layer = _scaled_layer(
        make_placement("shuffled", num_ranks),
        "cuda",
        overlap=True,
        levels="one",
        **ROOM,
    )
    x = tokens_of(rank).cuda()
    with torch.no_grad():
        wanted = layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        for scale in (1.0, -2.0):
            x.copy_(scale * tokens_of(rank).cuda())
            graph.replay()
            assert torch.equal(out, layer(x))
    assert wanted.shape == out.shape


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_halves_over_mapped_memory_make_the_same_bits(num_ranks):
    run_on_ranks(num_ranks, _over_peers, device="cuda", backend="gloo")


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_halves_over_nccl_make_the_same_bits(num_ranks):
    run_on_ranks(num_ranks, _the_same_bits, "cuda", device="cuda")
