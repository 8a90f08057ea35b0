"""What else is done to modules: meta devices, loading, copying, moving."""

import copy
import io
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    EXPERTS,
    HIDDEN,
    INNER,
    LAYERS,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import InvalidPlacementError  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    ExpertOptions,
    Experts,
    MoELayer,
    TopKRouter,
    logical_order,
)
from moetuner.placement.model import Placement  # noqa: E402
from moetuner.placement.topology import Topology  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from torch import distributed as dist  # noqa: E402

FIXED = ExchangeOptions(capacity=12, max_rows=12 * 4 * TOP_K)


def _layer(placement, rank, options):
    return placed_layers(whole_layers(BIASED), placement, rank, options=options)[0]


BIASED = ExpertOptions(bias=True)


def _empty(placement, options, device="meta"):
    """The same layer without its weights."""
    with torch.device(device):
        experts = Experts(placement.slots_per_rank, HIDDEN, INNER, BIASED)
        router = TopKRouter(HIDDEN, EXPERTS, TOP_K)
    return MoELayer(router, experts, placement, layer=3, options=options)


def _made_on_meta(rank, num_ranks):
    for kind in ("shuffled", "replicated"):
        placement = make_placement(kind, num_ranks)
        for options in (ExchangeOptions(), FIXED):
            layer = _layer(placement, rank, options)
            x, state = tokens_of(rank), layer.state_dict()
            wanted = layer(x)

            made = _empty(placement, options).to_empty(device="cpu")
            made.load_state_dict(state)
            assert torch.equal(made(x), wanted)
            assert made.exchange.counts().tokens == len(x)

            assigned = _empty(placement, options)
            assigned.load_state_dict(state, assign=True)
            assert torch.equal(assigned(x), wanted)

            there_and_back = _layer(placement, rank, options).to("meta")
            there_and_back.to_empty(device="cpu").load_state_dict(state)
            assert torch.equal(there_and_back(x), wanted)

            emptied = _layer(placement, rank, options)
            emptied(x)
            emptied.to_empty(device="cpu").load_state_dict(state)
            assert torch.equal(emptied(x), wanted)
            assert emptied.exchange.counts().tokens == 2 * len(x)


def _copied(rank, num_ranks):
    placement = make_placement("replicated", num_ranks)
    layer = _layer(placement, rank, ExchangeOptions())
    x = tokens_of(rank)
    wanted = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(twin(x), wanted)
        assert twin.exchange.counts().tokens == 2 * len(x)
    assert layer.exchange.counts().tokens == len(x)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast(x.to(dtype)).dtype is dtype
        assert cast.exchange.counters.dtype is torch.int64


def _loaded_whole(rank, num_ranks):
    """A checkpoint of all experts, read inside `logical_order(whole=True)`."""
    placement = make_placement("replicated", num_ranks)
    layers = placed_layers(whole_layers(BIASED), placement, rank)
    x = tokens_of(rank)
    wanted = layers[0](x)
    with logical_order(layers, whole=True):
        state = {name: value.clone() for name, value in layers.state_dict().items()}
    for assign in (False, True):
        width = placement.slots_per_rank
        mine = placement.slot_experts[:, rank * width :][:, :width]
        torch.manual_seed(9)
        others = torch.nn.ModuleList(
            MoELayer(
                TopKRouter(HIDDEN, EXPERTS, TOP_K),
                Experts(EXPERTS, HIDDEN, INNER, BIASED).take(mine[row]),
                placement,
                layer=3 + row,
            )
            for row in range(len(layers))
        )
        given = {name: value.clone() for name, value in state.items()}
        with logical_order(others, whole=True):
            others.load_state_dict(given, assign=assign)
        assert torch.equal(others[0](x), wanted)
        with logical_order(others, whole=True):  # read alone: nothing changes
            for name, value in others.state_dict().items():
                assert torch.equal(value, state[name]), name
        assert torch.equal(others[0](x), wanted)
        shapes = {len(p) for p in others[0].experts.parameters()}
        assert shapes == {width}


def _of_another_rank(rank, num_ranks):
    """All ranks have the same names: who mixes their state dicts is told."""
    placement = make_placement("replicated", num_ranks)
    layer = _layer(placement, rank, ExchangeOptions())
    x, mine = tokens_of(rank), copy.deepcopy(layer.state_dict())
    wanted = layer(x)
    every = [None] * num_ranks
    dist.all_gather_object(every, mine)
    said = f"layer 3 of rank {rank} is loaded from the experts of rank {1 - rank}: save"
    for assign in (False, True):
        with pytest.raises(InvalidPlacementError, match=said):
            layer.load_state_dict(every[1 - rank], assign=assign)
        assert torch.equal(layer(x), wanted)
    before_ranks_were_told = mine | {"_extra_state": mine["_extra_state"][:-1]}
    layer.load_state_dict(before_ranks_were_told)
    layer.load_state_dict(mine)
    assert torch.equal(layer(x), wanted)


def _of_a_rank_with_the_same(rank, num_ranks):
    """Every rank has all experts, in one order: any of their files is right."""
    placement = Placement(
        slot_experts=np.tile(np.arange(EXPERTS, dtype=np.int32), (LAYERS, num_ranks)),
        layer_ids=np.arange(3, 3 + LAYERS, dtype=np.int32),
        num_experts=EXPERTS,
        topology=Topology(num_ranks=num_ranks, ranks_per_node=num_ranks),
    )
    layer, x = _layer(placement, rank, ExchangeOptions()), tokens_of(rank)
    wanted, every = layer(x), [None] * num_ranks
    dist.all_gather_object(every, layer.state_dict())
    layer.load_state_dict(every[1 - rank])
    assert torch.equal(layer(x), wanted)
    longer = torch.cat([every[1 - rank]["_extra_state"]] * 2)
    with pytest.raises(InvalidPlacementError, match="a state dict whose slots hold"):
        layer.load_state_dict(every[rank] | {"_extra_state": longer})


def test_the_state_dict_of_another_rank_is_refused():
    run_on_ranks(2, _of_another_rank)


def test_the_state_dict_of_a_rank_with_the_same_experts_is_taken():
    run_on_ranks(2, _of_a_rank_with_the_same)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_weights_may_come_later(num_ranks):
    run_on_ranks(num_ranks, _made_on_meta)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_copies_are_layers_of_their_own(num_ranks):
    run_on_ranks(num_ranks, _copied)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_is_loaded_whole_is_kept(num_ranks):
    run_on_ranks(num_ranks, _loaded_whole)
