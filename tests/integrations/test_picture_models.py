"""Whole tiny models that read pictures: on our ops, recorded and counted."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from picture_models import (  # noqa: E402
    INSTALLED,
    MAKE,
    make_picture_model,
    picture_inputs,
)

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
FOLLOWED = [family for family in INSTALLED if family not in ours.ONLY_RUN]


def routers_of(model):
    """Routers of the text model by layer; each tells logits, weights and ids."""
    return {
        int(name.split("layers.")[1].split(".")[0]): module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("topkrouter") and ".layers." in name
    }


@pytest.mark.skipif(VERSION < (5, 24), reason="older: not all of them were there")
def test_every_family_is_there():
    assert list(MAKE) == INSTALLED


@pytest.mark.parametrize("family", INSTALLED)
def test_logits_and_gradients_equal_eager(family):
    model, results = make_picture_model(family), []
    for implementation in ("eager", "moetuner"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(**picture_inputs(family)).logits
        logits.square().mean().backward()
        results.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (logits, gradients), (found, found_gradients) = results
    assert logits.isfinite().all()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is None:
            assert found_gradients[name] is None, name
            continue
        scale = gradient.abs().max().clamp(min=1e-6)
        close = {"rtol": 1e-3, "atol": 1e-4, "msg": name}
        torch.testing.assert_close(
            found_gradients[name] / scale, gradient / scale, **close
        )
    ran = [n for n, g in found_gradients.items() if "experts.gate_up" in n and g.any()]
    assert ran


@pytest.mark.parametrize("family", FOLLOWED)
@pytest.mark.parametrize("implementation", ["eager", "moetuner"])
def test_what_is_recorded_and_counted_is_what_routers_chose(family, implementation):
    model, seen = make_picture_model(family), {}
    model.set_experts_implementation(implementation)
    inputs, routers = picture_inputs(family), routers_of(model)
    for layer, router in routers.items():
        router.register_forward_hook(
            lambda _, __, out, layer=layer: seen.update({layer: out})
        )
    tokens = inputs["input_ids"].numel()
    with (
        ours.record(model) as recording,
        ours.count(model, max_tokens=tokens) as counter,
        torch.no_grad(),
    ):
        model(**inputs)
    trace, statistics = recording.trace(), counter.statistics()
    assert trace.layer_ids.tolist() == sorted(routers)
    assert trace.position.tolist() == list(range(tokens))
    assert (trace.num_experts, statistics.num_tokens) == (8, tokens)
    for row, layer in enumerate(sorted(routers)):
        _, weights, ids = seen[layer]
        order = weights.argsort(dim=1, descending=True, stable=True)
        assert np.array_equal(trace.topk_ids[:, row], ids.gather(1, order).numpy())
        load = np.bincount(ids.flatten(), minlength=8)
        assert np.array_equal(statistics.load[row], load)


@pytest.mark.parametrize("family", FOLLOWED)
def test_generates_on_our_ops_and_is_recorded(family):
    """One sequence; pictures are read once, and text goes on behind them."""
    model, told = make_picture_model(family), []
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for implementation in ("eager", "moetuner"):
        model.set_experts_implementation(implementation)
        with ours.record(model) as recording:
            told.append(model.generate(**picture_inputs(family), **options))
    assert torch.equal(*told)
    trace, read = recording.trace(), picture_inputs(family)["input_ids"].numel()
    assert trace.sequence.tolist() == [0] * (read + 3)
    assert trace.position.tolist() == list(range(read + 3))
    assert trace.phase.tolist() == [0] * read + [1] * 3


def test_a_tower_with_experts_of_its_own_is_left_alone():
    """Also within another module, as a wrapper is; nobody guesses which of two."""
    if "dots3_note" not in INSTALLED:
        pytest.skip("this Transformers has no dots3_note")
    model = make_picture_model("dots3_note")
    text = set(model.model.language_model.modules())
    assert set(ours.experts_of(model).values()) <= text
    assert set(ours.experts_of(model.model).values()) <= text
    two = torch.nn.ModuleDict({"a": model, "b": copy.deepcopy(model)})
    with pytest.raises(
        InvalidTraceError, match=r"is a second experts module of layer 1, after a\."
    ):
        ours.experts_of(two)


@pytest.mark.parametrize("family", ours.ONLY_RUN)
def test_two_routings_of_a_layer_are_refused_with_the_reason(family):
    from moetuner.nn import contiguous_placement

    model, why = make_picture_model(family), ours.ONLY_RUN[family]
    for use in (ours.record(model), ours.count(model, max_tokens=9)):
        with pytest.raises(InvalidTraceError, match=f"is not covered: {why}"), use:
            pass
    with pytest.raises(InvalidTraceError, match=f"is not covered: {why}"):
        ours.parallelize(model, contiguous_placement(3, 8, 1))
