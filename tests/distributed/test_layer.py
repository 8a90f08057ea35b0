"""MoELayer between Gloo processes against the same layer on one rank."""

import itertools
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from layers import (  # noqa: E402
    EXPERTS,
    KINDS,
    TOKENS,
    TOP_K,
    make_placement,
    one_layer,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import (  # noqa: E402
    ExchangeOverflowError,
    InvalidPlacementError,
    InvalidProblemError,
    InvalidTraceError,
)
from moetuner.evaluation.cost import Homes, Wire  # noqa: E402
from moetuner.evaluation.links import link_rows  # noqa: E402
from moetuner.evaluation.tally import tally  # noqa: E402
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    Activation,
    ExchangeOptions,
    ExpertOptions,
    MoELayer,
    gather_counts,
    record_run,
    return_home,
)
from moetuner.ops import Transport, node_groups  # noqa: E402
from moetuner.placement.topology import Topology  # noqa: E402
from moetuner.trace import Trace  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

WORLDS = [1, 2, 4]
VARIANTS = [
    ExpertOptions(activation=activation, bias=bias)
    for activation, bias in itertools.product(Activation, (False, True))
]
FIXED = ExchangeOptions(capacity=max(TOKENS), max_rows=4 * max(TOKENS) * TOP_K)


def _equals_one_rank(rank, num_ranks):
    for kind, variant in itertools.product(KINDS, VARIANTS):
        whole = whole_layers(variant)
        placement = make_placement(kind, num_ranks)
        for options in (ExchangeOptions(), FIXED):
            layers = placed_layers(whole, placement, rank, options=options)
            ours, exact = tokens_of(rank, 0, True), tokens_of(rank, 0, True)
            out, wanted = ours, exact
            for layer, (router, experts) in zip(layers, whole, strict=True):
                out = out + layer(out)
                wanted = wanted + one_layer(router, experts, wanted)
                layer.exchange.check_overflow()
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
            for tensor, leaf in ((out, ours), (wanted, exact)):
                tensor.square().sum().backward()
                assert leaf.grad is not None
            torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-3, atol=1e-4)


def _weight_gradients(rank, num_ranks):
    """Summed over the slots of an expert, they are those of one rank."""
    whole = whole_layers(VARIANTS[1])
    for kind in KINDS:
        placement = make_placement(kind, num_ranks)
        layers = placed_layers(whole, placement, rank)
        layer, (router, experts) = layers[0], whole[0]
        layer.router.zero_grad()
        layer(tokens_of(rank)).square().sum().backward()
        router_grad = layer.router.linear.weight.grad.clone()
        every = torch.cat([tokens_of(r) for r in range(num_ranks)])
        # take() copies, so gradients reach the copies: make the whole layer the copy
        single = experts.take(np.arange(EXPERTS, dtype=np.int32))
        _loop(router, single, every).square().sum().backward()
        width = placement.slots_per_rank
        mine = placement.slot_experts[0, rank * width :][:width]
        for own, other in zip(
            layer.experts.parameters(), single.parameters(), strict=True
        ):
            total = torch.zeros_like(other)
            for slot, expert in enumerate(mine):
                if expert >= 0:
                    total[expert] += own.grad[slot]
                else:
                    assert not own.grad[slot].any()
            dist.all_reduce(total)
            torch.testing.assert_close(total, other.grad, rtol=1e-3, atol=1e-4)
        summed = router_grad
        dist.all_reduce(summed)
        router.zero_grad()
        _loop(router, single, every).square().sum().backward()
        torch.testing.assert_close(
            summed, router.linear.weight.grad, rtol=1e-3, atol=1e-4
        )
        router.zero_grad()


def _loop(router, experts, x):
    """One rank by grouped rows of every expert."""
    ids, weights = router(x)
    flat = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
    done = experts(x[flat // TOP_K], ends) * weights.flatten()[flat, None]
    return torch.zeros_like(x).index_add(0, flat // TOP_K, done)


def _follows(rank, num_ranks):
    for kind in KINDS:
        whole = whole_layers()
        placement = make_placement(kind, num_ranks)
        options = ExchangeOptions(residency="follow")
        layers = placed_layers(whole, placement, rank, options=options)
        x, exact = tokens_of(rank, 0, True), tokens_of(rank, 0, True)
        here, keys, wanted, routing = x, None, exact, []
        group = layers[0].exchange.group_name
        for layer, (router, experts) in zip(layers, whole, strict=True):
            with torch.no_grad():
                routing.append(router(wanted)[0].numpy())
            came = layer(here, keys)
            here, keys = came.tokens + came.sums, came.keys
            wanted = wanted + one_layer(router, experts, wanted)
            # Each token is where its first expert is.
            first = layer.exchange.candidates[:, 0] // placement.slots_per_rank
            assert keys.tolist() == sorted(keys.tolist())
            if kind != "replicated" and len(came.tokens):
                chosen = layer.router(came.tokens)[0][:, 0]
                assert (first[chosen] == rank).all()
        home = return_home(here, keys, len(x), group)
        torch.testing.assert_close(home, wanted, rtol=1e-4, atol=1e-5)
        for tensor, leaf in ((home, x), (wanted, exact)):
            tensor.square().sum().backward()
            assert leaf.grad is not None
        torch.testing.assert_close(x.grad, exact.grad, rtol=1e-3, atol=1e-4)
        if kind != "replicated":
            _counted_as_predicted(layers, placement, routing, num_ranks)


def _counted_as_predicted(layers, placement, routing, num_ranks):
    """Rows from rank to rank after the first layer, where homes are experts' ranks."""
    every = [None] * num_ranks
    dist.all_gather_object(every, np.stack(routing, axis=1))
    ids = np.ascontiguousarray(np.concatenate(every).astype(np.int16))
    weights = np.tile(np.arange(TOP_K, 0, -1, dtype=np.float32), (*ids.shape[:2], 1))
    trace = Trace(
        topk_ids=ids,
        topk_weights=weights,
        num_experts=EXPERTS,
        layer_ids=placement.layer_ids,
        ranked=True,
    )
    told = tally(trace, placement, homes=Homes.FOLLOW).traffic
    counted = gather_counts(layers).counts[:, :, 1 : 1 + num_ranks]
    assert np.array_equal(counted[1:], told[1:])


def _stays_with_padding(rank, num_ranks):
    """A first choice that is padding: the token stays; other choices still count."""

    class Fixed(torch.nn.Module):
        def forward(self, x):
            ids = torch.tensor([[-1, 0], [-1, -1], [5, 99]])[: len(x)]
            return ids, torch.full(ids.shape, 0.5)

    placement = make_placement("shuffled", num_ranks)
    (_, experts), _ = whole_layers()
    width = placement.slots_per_rank
    mine = experts.take(placement.slot_experts[0, rank * width :][:width])
    layer = MoELayer(
        Fixed(),
        mine,
        placement,
        layer=3,
        options=ExchangeOptions(residency="follow"),
    )
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(rank))
    came = layer(x)
    owner = int(placement.rank_of()[0, 5])
    here = [(rank, 0), (rank, 1)]
    if owner == rank:
        here += [(other, 2) for other in range(num_ranks)]
    assert list(map(tuple, came.keys.tolist())) == sorted(here)
    home = return_home(came.sums, came.keys, 3, layer.exchange.group_name)
    ends = torch.tensor([1], dtype=torch.int32)
    for row, expert in ((0, 0), (2, 5)):
        done = experts.take(np.array([expert], np.int32))(x[row : row + 1], ends)
        torch.testing.assert_close(home[row], 0.5 * done[0], rtol=1e-4, atol=1e-5)
    assert not home[1].any()
    tokens = return_home(came.tokens, came.keys, 3, layer.exchange.group_name)
    assert torch.equal(tokens, x)
    with pytest.raises(InvalidTraceError, match="tokens came home, wanted"):
        return_home(came.tokens, came.keys, 4, layer.exchange.group_name)


def _counts(rank, num_ranks):
    """Equal to the evaluator's prediction over several steps, padding included."""
    for kind, options in itertools.product(KINDS, (ExchangeOptions(), FIXED)):
        placement = make_placement(kind, num_ranks)
        layers = placed_layers(whole_layers(), placement, rank, options=options)
        layers[0](tokens_of(rank, 9))  # before the recording: not counted
        with record_run(layers) as run, torch.no_grad():
            for step in range(3):
                x = tokens_of(rank, step)
                for layer in layers:
                    x = x + layer(x)
        trace, record = run.trace(), gather_counts(layers)
        assert trace.num_tokens == sum(
            len(tokens_of(r, s)) for r in range(num_ranks) for s in range(3)
        )
        assert verify(trace, placement, record) == []
        _links_as_priced(trace, placement, record)
        if trace.num_tokens:
            spoiled = record.counts.copy()
            spoiled[1, 0, 2] += 1
            wrong = type(record)(
                counts=spoiled,
                layer_ids=record.layer_ids,
                placement_fingerprint=record.placement_fingerprint,
            )
            (difference,) = verify(trace, placement, wrong)
            assert (difference.layer, difference.rank) == (4, 0)
            assert difference.counted == difference.predicted + 1
        told = layers[0].exchange.counts()
        assert told.tokens == sum(len(tokens_of(rank, s)) for s in range(3))
        assert told.rank_load.sum() == told.tokens * TOP_K
        assert told.remote_bytes == told.remote_rows * 16 * 4
        assert 1 <= told.ranks_per_token <= num_ranks or not told.tokens


def _links_as_priced(trace, placement, record, wire=Wire.DEDUP):
    """Rows on each link are those that the evaluator prices."""
    if placement.has_replicas:
        return  # turns go by the row in a step: `verify` knows, `tally` does not
    told = tally(trace, placement, wire=wire, homes=Homes.RECORDED)
    counted = link_rows(record, placement.topology)
    for name in ("rank_egress", "rank_ingress", "node_egress", "node_ingress"):
        assert np.array_equal(getattr(counted, name), getattr(told, name)[0]), name


def _one_level(rank, num_ranks):
    """Forced: a row crosses to each rank, and the counters say so."""
    placement = make_placement("shuffled", num_ranks)
    options = ExchangeOptions(levels="one")
    results = []
    for chosen in (ExchangeOptions(), options):
        layers = placed_layers(whole_layers(), placement, rank, options=chosen)
        with record_run(layers) as run, torch.no_grad():
            out = layers[0](tokens_of(rank))
            layers[1](out)
        results.append((layers[0].exchange, out, run.trace(), gather_counts(layers)))
    (two, out, *_), (one, wanted, trace, record) = results
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    assert verify(trace, placement, record) == []
    assert two.describe().startswith("two levels on 2 nodes of 2 ranks: over GLOO")
    assert one.describe().startswith("one level on 2 nodes of 2 ranks: over GLOO")
    counts = [exchange.counts() for exchange in (two, one)]
    assert [len(c.rows_passed_on) for c in counts] == [2, 0]
    assert counts[0].node_rows <= counts[1].node_rows
    _links_as_priced(trace, placement, record, Wire.DEDUP_RANKS)
    other = Topology(num_ranks=2, ranks_per_node=1)
    with pytest.raises(InvalidTraceError, match="wanted counters of 2 ranks"):
        link_rows(record, other)


def _transport_is_that_of_a_node(rank, num_ranks):
    """On two levels a layer chooses it for the ranks that can map memory."""
    placement, told = make_placement("shuffled", num_ranks), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "moetuner.nn.exchange.set_transport",
            lambda group, *_, **__: told.append(group),
        )
        for levels in ("auto", "one"):
            options = ExchangeOptions(levels=levels, transport="collectives")
            placed_layers(whole_layers(), placement, rank, options=options)
    world = dist.group.WORLD.group_name
    inside = node_groups(world, placement.topology.ranks_per_node).inside
    assert told == [inside, inside, world, world]
    made_in = sys.modules[node_groups.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_in, "set_transport", lambda *args: told.append(args))
        nodes = node_groups(dist.new_group().group_name, 2)
    assert told[-1] == (nodes.between, Transport.COLLECTIVES)


def _records_only_what_a_trace_can_say(rank, num_ranks):
    """Ids outside the experts are padding; trouble of one rank is said on all."""
    placement = make_placement("shuffled", num_ranks)
    layers = placed_layers(whole_layers(), placement, rank)
    wide = torch.tensor([[1, 2**32 + 1]])
    said = "dispatch: topk_ids must be within int32, got 4294967297 for token 0"
    with record_run(layers), pytest.raises(ValueError, match=said):
        layers[0].exchange(torch.ones(1, 16), wide, torch.ones(1, 2), layers[0].experts)
    ids = torch.tensor([[1, 2**16 + 1], [2**31 - 1, -(2**31)]])
    with record_run(layers) as run:
        for layer in layers:
            layer.exchange(torch.ones(2, 16), ids, torch.ones(2, 2), layer.experts)
    trace, record = run.trace(), gather_counts(layers)
    assert trace.topk_ids[0].tolist() == [[1, -1]] * 2
    assert verify(trace, placement, record) == []
    with record_run(layers) as run:
        for number, layer in enumerate(layers):
            layer(torch.ones(2 + number * rank, 16))
    with pytest.raises(InvalidTraceError, match="rank 1: layers saw different tokens"):
        run.trace()
    follow = ExchangeOptions(residency="follow")
    layers = placed_layers(whole_layers(), placement, rank, options=follow)
    with record_run(layers):
        came = layers[0](torch.ones(1, 16))
        with pytest.raises(InvalidTraceError, match="not at home at layer 4"):
            layers[1](came.sums, came.keys)


def _keeps_whole_passes(rank, num_ranks):
    """Ctrl-C between two layers: what went before and came after is recorded."""
    placement = make_placement("shuffled", num_ranks)
    layers = placed_layers(whole_layers(), placement, rank)
    rows = [torch.ones(2, 16), tokens_of(rank), torch.ones(3, 16)]
    with record_run(layers) as run:
        for number, x in enumerate(rows):
            for layer in layers:
                if number in (0, 2) and layer is layers[-1]:
                    break
                layer(x)
    trace, record = run.trace(), gather_counts(layers)
    assert trace.num_tokens == sum(len(tokens_of(r)) for r in range(num_ranks))
    assert verify(trace, placement, record) == []
    with record_run(layers) as run:
        for layer in reversed(layers):  # no order that tells passes
            layer(rows[0])
        layers[0](rows[0])
    with pytest.raises(InvalidTraceError, match="layers saw different tokens"):
        run.trace()


def _refusals(rank, num_ranks):
    whole = whole_layers()
    good = make_placement("contiguous", num_ranks)
    other = make_placement("shuffled", num_ranks, seed=rank)

    def layer(placement, **options):
        return placed_layers(whole, placement, rank, **options)

    with pytest.raises(InvalidPlacementError, match="is for 4 ranks, the group has 2"):
        layer(make_placement("contiguous", 4))
    with pytest.raises(InvalidPlacementError, match="rank 1 has another placement"):
        layer(other)
    # One rank alone has something wrong: all of them say so.
    mine = good if rank == 0 else make_placement("contiguous", num_ranks, num_layers=1)
    with pytest.raises(InvalidPlacementError, match=r"rank 1: .*\[3\], not layer 4"):
        MoELayer(whole[0][0], whole[0][1].take(np.arange(4)), mine, layer=4)
    few = make_placement("contiguous", num_ranks, num_experts=6)
    with pytest.raises(InvalidPlacementError, match="has 6 experts, the model has 8"):
        MoELayer(whole[0][0], whole[0][1].take(np.arange(3)), few, layer=3)
    with pytest.raises(InvalidPlacementError, match="say which one this is, by layer="):
        MoELayer(whole[0][0], whole[0][1].take(np.arange(4)), good)
    experts = whole[0][1].take(np.arange(4))
    with pytest.raises(InvalidPlacementError, match="rank 1 says layer 4, home, trans"):
        MoELayer(whole[0][0], experts, good, layer=3 + rank)
    unequal = ExchangeOptions(capacity=2 + rank, max_rows=9)
    with pytest.raises(InvalidPlacementError, match=r"capacity 3, .*home, capacity 2"):
        MoELayer(whole[0][0], experts, good, layer=3, options=unequal)
    count = 4 if rank else 8
    with pytest.raises(InvalidPlacementError, match=r"rank 0: experts.up is \[8, 48"):
        MoELayer(whole[0][0], whole[0][1].take(np.arange(count)), good, layer=3)
    right = layer(good)[0]
    with pytest.raises(ValueError, match="x"):
        right.exchange(
            torch.zeros(3, 16),
            torch.zeros(2, 2, dtype=torch.int64),
            torch.zeros(2, 2),
            right.experts,
        )
    with pytest.raises(InvalidProblemError, match="layer 3 returned 5 rows, wanted 6"):
        right.exchange(
            torch.zeros(3, 16),
            torch.tensor([[0, 4]] * 3),
            torch.zeros(3, 2),
            lambda rows, _: rows[:-1],
        )
    tight = layer(good, options=ExchangeOptions(capacity=1, max_rows=2))[0]
    tight(torch.randn(9, 16))
    with pytest.raises(ExchangeOverflowError, match="found no room"):
        tight.exchange.check_overflow()
    tight.exchange.reset()
    tight.exchange.check_overflow()


def _everything(rank, num_ranks):
    """In one start of the processes, which costs more than what they do."""
    _equals_one_rank(rank, num_ranks)
    _follows(rank, num_ranks)
    _counts(rank, num_ranks)
    if num_ranks == 4:
        _one_level(rank, num_ranks)
        _transport_is_that_of_a_node(rank, num_ranks)
    if num_ranks == 2:
        _weight_gradients(rank, num_ranks)
        _stays_with_padding(rank, num_ranks)
        _refusals(rank, num_ranks)
        _records_only_what_a_trace_can_say(rank, num_ranks)
        _keeps_whole_passes(rank, num_ranks)


@pytest.mark.parametrize("num_ranks", WORLDS)
def test_the_layer_equals_one_rank_follows_counts_and_refuses(num_ranks):
    run_on_ranks(num_ranks, _everything)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(InvalidProblemError, match="go together"):
        ExchangeOptions(capacity=3)
    for sizes in ({"capacity": 0}, {"max_rows": -1}, {"capacity": 2.5}):
        with pytest.raises(InvalidProblemError, match="must be a positive whole num"):
            ExchangeOptions(**{"capacity": 3, "max_rows": 4} | sizes)
    with pytest.raises(InvalidProblemError, match="needs exact sizes"):
        ExchangeOptions(residency="follow", capacity=3, max_rows=4)
    with pytest.raises(InvalidProblemError, match="must be one of home, follow"):
        ExchangeOptions(residency="away")
    with pytest.raises(InvalidProblemError, match="must be one of auto, one"):
        ExchangeOptions(levels="three")
