"""Whole models that read pictures, their experts spread over Gloo ranks."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    average_gradients,
    contiguous_placement,
    expert_parameters,
    gather_counts,
    logical_order,
    record_run,
)
from moetuner.placement.model import Placement  # noqa: E402
from picture_models import INSTALLED, make_picture_model, picture_inputs  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FOLLOWED = [family for family in INSTALLED if family not in ours.ONLY_RUN]


def _backwards(model, num_ranks):
    """Experts in falling order, one empty slot on each rank."""
    layers = sorted(ours.experts_of(model))
    plain = contiguous_placement(len(layers), 8, num_ranks)
    width = plain.slots_per_rank
    slots = plain.slot_experts[:, ::-1].reshape(len(layers), num_ranks, width)
    empty = torch.full((len(layers), num_ranks, 1), -1, dtype=torch.int32).numpy()
    both = torch.cat([torch.from_numpy(slots.copy()), torch.from_numpy(empty)], dim=2)
    return Placement(
        slot_experts=both.reshape(len(layers), -1).numpy(),
        layer_ids=torch.tensor(layers, dtype=torch.int32).numpy(),
        num_experts=8,
        topology=plain.topology,
    )


def _equal_eager(rank, num_ranks, family):
    eager = make_picture_model(family)
    placement = _backwards(eager, num_ranks)
    mine = picture_inputs(family, seed=rank, words=3 + rank)
    for shared, inputs in ((True, picture_inputs(family)), (False, mine)):
        with torch.no_grad():
            wanted = eager(**inputs).logits
        model = make_picture_model(family)
        ours.parallelize(model, placement, shared_batch=shared)
        with record_run(model) as run, torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, wanted, **CLOSE)
        assert verify(run.trace(), placement, gather_counts(model)) == []
        whole = dict(eager.named_parameters())
        with logical_order(model, whole=True):
            for name, value in model.named_parameters():
                assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("family", FOLLOWED)
def test_spread_models_equal_eager_ones(family):
    run_on_ranks(2, _equal_eager, family)


def _trains(rank, num_ranks, family):
    """Each rank has a picture of its own; gradients of the mean of their losses."""
    eager = make_picture_model(family)
    for other in range(num_ranks):
        inputs = picture_inputs(family, seed=other, words=3 + other)
        (eager(**inputs).logits.square().mean() / num_ranks).backward()
    whole = {name: p.grad for name, p in eager.named_parameters()}

    model = make_picture_model(family)
    placement = _backwards(eager, num_ranks)
    ours.parallelize(model, placement)
    inputs = picture_inputs(family, seed=rank, words=3 + rank)
    model(**inputs).logits.square().mean().backward()
    average_gradients(model)
    owned, width = expert_parameters(model), placement.slots_per_rank
    assert owned
    for name, parameter in model.named_parameters():
        wanted, found = whole[name], parameter.grad
        if wanted is None:  # of no use to any rank
            assert found is None or not found.any(), name
            continue
        if name in owned:
            layer = int(name.split("layers.")[1].split(".")[0])
            row = placement.layer_ids.tolist().index(layer)
            slots = placement.slot_experts[row, rank * width :][:width].tolist()
            wanted = torch.stack(
                [wanted[e] if e >= 0 else torch.zeros_like(wanted[0]) for e in slots]
            )
        scale = whole[name].abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            found / scale, wanted / scale, rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("family", ["dots3_note"])
def test_experts_of_text_and_tower_train_like_one_process(family):
    """The tower's experts are whole on each rank, and averaged as all else is."""
    if family not in INSTALLED:
        pytest.skip(f"this Transformers has no {family}")
    run_on_ranks(2, _trains, family)
