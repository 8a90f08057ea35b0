"""A model beside a recording: what is refused, and what is only told."""

import dataclasses
import re

import numpy as np
import pytest
from moetuner.errors import InvalidTraceError
from moetuner.evaluation.models import Model, ModelShape
from moetuner.evaluation.models.model import spans
from moetuner.trace import CountTrace, Trace

MODEL = Model(
    name="mine",
    shape=ModelShape(hidden_size=8, expert_hidden_size=4),
    num_experts=4,
    top_k=2,
    num_layers=6,
    moe_layers=(2, 3, 4, 5),
    num_mtp_layers=1,
)


def recording(layers, top_k=2, num_experts=4):
    ids = np.tile(np.arange(top_k, dtype=np.int16), (3, len(layers), 1))
    return Trace(
        topk_ids=ids,
        num_experts=num_experts,
        layer_ids=np.array(layers, np.int32),
    )


@pytest.mark.parametrize("layers", [[2, 3, 4, 5], [2, 3, 4, 5, 6]])
def test_its_own_recording_differs_in_nothing(layers):
    MODEL.check_experts(recording(layers))
    assert MODEL.differences(recording(layers)) == ()


def test_another_number_of_experts_is_refused():
    with pytest.raises(
        InvalidTraceError, match=r"mine has 4 routed .* recording 5: it"
    ):
        MODEL.check_experts(recording([2, 3], num_experts=5))
    either = dataclasses.replace(MODEL, num_experts=None)
    either.check_experts(recording([2, 3], num_experts=5))


@pytest.mark.parametrize(
    ("layers", "top_k", "said"),
    [
        ([2, 3, 4, 5], 3, "a token of the recording has 3 experts, one of mine 2"),
        ([0, 1, 2, 3], 2, "numbers its layers 0-3, mine has its experts in 2-5"),
        ([1, 2], 2, "layers 1 of the recording have no experts in mine, .* in 2-5"),
        ([2, 3, 7], 2, "layers 7 of the recording have no experts"),
        ([3, 5], 2, "2 of the 4 layers with experts of mine were recorded"),
    ],
)
def test_other_differences_are_told(layers, top_k, said):
    (difference,) = MODEL.differences(recording(layers, top_k))
    assert re.search(said, difference), difference


def test_counts_that_do_not_tell_the_top_k_differ_in_none():
    counts = CountTrace(
        counts=np.full((1, 4, 4), 3),
        num_tokens=np.array([12]),
        layer_ids=np.array([2, 3, 4, 5], np.int32),
        tokens_known=False,
    )
    assert MODEL.differences(counts) == ()


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([3, 4, 5], "3-5"),
        ([1, 3, 5], "1,3,5"),
        ([0, 1, 5, 7, 8], "0-1,5,7-8"),
        (list(range(0, 40, 2)), "0,2,4,6,8,10,12,14,..."),
    ],
)
def test_spans(numbers, text):
    assert spans(numbers) == text
