"""Made-up routing with a model's character: what its knobs do, and its calibration."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.errors import InvalidTraceError
from moetuner.evaluation.models import shape_for_model
from moetuner.trace import TOPIC_PRESETS, TopicRouting, read_trace, topic_trace
from moetuner.trace.description import describe
from strategies import examples

SMALL = TopicRouting(num_layers=4, num_experts=32, top_k=4)


@examples(18)
@given(
    st.builds(
        TopicRouting,
        num_layers=st.integers(1, 3),
        num_experts=st.integers(4, 9),
        top_k=st.integers(1, 4),
        specificity=st.floats(0, 1e3),
        spread=st.floats(0, 1e3),
        dimensions=st.integers(1, 5),
        drift=st.floats(0, 1),
        topics=st.integers(1, 5),
        topic_share=st.floats(0, 1),
        focus=st.floats(0, 1),
        sequence_length=st.integers(1, 50),
    ),
    st.integers(1, 60),
    st.integers(0, 2**32 - 1),
)
def test_any_legal_routing_gives_a_legal_trace(routing, num_tokens, seed):
    trace = topic_trace(routing, num_tokens=num_tokens, seed=seed)
    shape = (num_tokens, routing.num_layers, routing.top_k)
    assert trace.topk_ids.shape == shape
    assert trace.topk_ids.min() >= 0
    assert trace.num_sequences == -(-num_tokens // routing.sequence_length)
    again = topic_trace(routing, num_tokens=num_tokens, seed=seed)
    assert again.sha256() == trace.sha256()


def lifts(**changes):
    found = describe(topic_trace(replace(SMALL, **changes), num_tokens=8000))
    return found.load_skew.median, found.coactivation_lift, found.transition_lift


def test_each_knob_moves_what_it_is_named_for():
    plain = lifts(specificity=0.0, spread=0.0)
    assert plain[0] < 1.15
    assert plain[1].median == pytest.approx(1, abs=0.02)
    assert plain[2].median == pytest.approx(1, abs=0.02)
    assert lifts(specificity=0.0, spread=0.8)[0] > 2
    close = lifts(specificity=3.0)
    assert close[1].median > 1.3
    assert close[2].median > 1.3
    # Directions that are new at every layer leave co-activation, not transitions.
    new = lifts(specificity=3.0, drift=1.0, topic_share=0.0)
    assert new[1].median > 1.2
    assert new[2].median == pytest.approx(1, abs=0.05)


def test_batches_of_focused_sequences_are_uneven():
    def peak(focus):
        routing = replace(
            SMALL, specificity=3.0, focus=focus, topic_share=0.9, sequence_length=500
        )
        trace = topic_trace(routing, num_tokens=16_000)
        rows = [
            np.bincount(ids.ravel(), minlength=32).max()
            for ids in np.split(trace.topk_ids[:, 0], 32)
        ]
        return np.mean(rows)

    assert peak(1.0) > 1.3 * peak(0.0)


def test_the_strongest_expert_comes_first():
    """With little noise the first choice is the one with the largest logit."""
    trace = topic_trace(
        replace(SMALL, specificity=0.0, spread=50.0), num_tokens=500, seed=3
    )
    first = trace.topk_ids[:, :, 0]
    assert (first == first[0]).mean() > 0.9


def test_memory_does_not_grow_with_experts_times_tokens():
    routing = TopicRouting(num_layers=1, num_experts=4096, top_k=2)
    tracemalloc.start()
    topic_trace(routing, num_tokens=20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000 * 4096  # a fourth of the logits in single precision


def test_presets_are_models_whose_sizes_are_known():
    for routing in TOPIC_PRESETS.values():
        assert shape_for_model(routing.model) is not None


@pytest.mark.parametrize(
    ("preset", "file"),
    [
        ("deepseek-v2-lite", "deepseek-v2-lite-chat-moe-beyond/prompts.npz"),
        ("gpt-oss", "gpt-oss-20b-fingerprinting/mmlu.npz"),
    ],
)
def test_calibration_holds(traces_dir, preset, file):
    """Within a third of the recording, where uncalibrated routing is off by half."""
    real = describe(read_trace(traces_dir / file))
    made = describe(topic_trace(TOPIC_PRESETS[preset], num_tokens=20_000, seed=5))
    for figure in ("load_skew", "coactivation_lift", "transition_lift"):
        wanted, got = getattr(real, figure).median, getattr(made, figure).median
        assert got == pytest.approx(wanted, rel=1 / 3)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_experts": 40_000},
        {"top_k": 33},
        {"specificity": -1.0},
        {"spread": float("inf")},
        {"dimensions": 0},
        {"drift": 1.5},
        {"topics": 0},
        {"topic_share": -0.1},
        {"focus": float("nan")},
        {"sequence_length": 0},
    ],
)
def test_senseless_routing_is_refused(change):
    (name,) = change
    with pytest.raises(InvalidTraceError, match=f"TopicRouting: {name} makes no sense"):
        replace(SMALL, **change)
    with pytest.raises(InvalidTraceError, match="num_tokens must be >= 1: 0"):
        topic_trace(SMALL, num_tokens=0)
