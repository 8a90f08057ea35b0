"""Bytes of weights and rows by type, and shapes that keep both together."""

import dataclasses

import pytest
from moetuner._plain import from_plain, to_plain
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.models import DEFAULT_SHAPE, ModelShape, ValueType
from moetuner.evaluation.models.value_type import ROW_TYPES
from moetuner.placement.topology import Topology

SHAPE = ModelShape(hidden_size=7168, expert_hidden_size=2048)


@pytest.mark.parametrize(
    ("kind", "weight", "row"),
    [
        ("fp32", 4, 4),
        ("bf16", 2, 2),
        ("fp16", 2, 2),
        ("fp8", 1 + 4 / 16384, 1 + 4 / 128),
        ("mxfp8", 1 + 1 / 32, 1 + 1 / 32),
        ("int8", 1, 1 + 4 / 7168),
        ("nvfp4", 0.5 + 1 / 16, 0.5 + 1 / 16),
        ("mxfp4", 0.5 + 1 / 32, 0.5 + 1 / 32),
    ],
)
def test_scales_are_counted(kind, weight, row):
    kind = ValueType(kind)
    assert kind.weight_bytes() == weight
    assert kind.row_bytes(7168) == row


def test_a_last_group_that_is_not_full_has_a_scale_too():
    """gpt-oss: 2880 values are 22.5 groups of 128, with 23 scales."""
    assert ValueType.FP8.row_bytes(2880) * 2880 == pytest.approx(2880 + 23 * 4)


def test_groups_of_a_checkpoint_count_as_they_are():
    assert ValueType.INT4.weight_bytes() == 0.5 + 2 / 128
    assert ValueType.INT4.weight_bytes(group=32, scale_bytes=2.5) == 0.5 + 2.5 / 32


def test_no_exchange_sends_int4():
    assert ValueType.INT4 not in ROW_TYPES
    with pytest.raises(InvalidProblemError, match="no exchange sends int4"):
        ValueType.INT4.row_bytes(128)


def test_types_set_the_bytes_that_are_priced():
    """DeepEP: FP8 rows with a 32-bit scale per 128 values out, BF16 back."""
    shape = SHAPE.with_types(
        weights=ValueType.FP8, rows_out=ValueType.FP8, rows_back=ValueType.BF16
    )
    assert shape.dispatch_bytes * 7168 == 7168 + 56 * 4
    assert shape.combine_bytes == 2
    assert shape.expert_bytes == 3 * 7168 * 2048 * (1 + 4 / 16384)
    assert shape.flops_per_row == SHAPE.flops_per_row
    rates = CostModel(shape=shape).rates(Topology(num_ranks=2, ranks_per_node=2))
    plain = CostModel(shape=SHAPE).rates(Topology(num_ranks=2, ranks_per_node=2))
    assert rates.dispatch.rank_row / plain.dispatch.rank_row == 1.03125 / 2
    assert rates.combine.rank_row == plain.combine.rank_row
    assert rates.compute.expert / plain.compute.expert == (1 + 4 / 16384) / 2


def test_what_is_not_said_stays():
    shape = SHAPE.with_types(rows_out=ValueType.NVFP4)
    assert (shape.weight_bytes, shape.combine_bytes) == (2, 2)
    assert shape.weight_type is None
    assert SHAPE.with_types() == SHAPE


def test_bytes_that_are_not_of_the_type_are_refused():
    with pytest.raises(InvalidProblemError, match="weight_bytes of fp8 must be 1 and"):
        dataclasses.replace(SHAPE, weight_type="fp8")
    with pytest.raises(InvalidProblemError, match="dispatch_type must be one of fp32"):
        dataclasses.replace(SHAPE, dispatch_type="fp7")
    with pytest.raises(InvalidProblemError, match="shared_values must be >= 0"):
        dataclasses.replace(SHAPE, shared_values=-1)


def test_a_shape_is_written_and_read_back():
    shape = dataclasses.replace(DEFAULT_SHAPE, shared_values=7)
    shape = shape.with_types(weights=ValueType.MXFP4, rows_out=ValueType.FP8)
    assert from_plain(ModelShape, to_plain(shape), "shape") == shape
    old = {"hidden_size": 4, "expert_hidden_size": 2, "dispatch_bytes": 1}
    assert from_plain(ModelShape, old, "shape").combine_bytes == 2


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (SHAPE, "experts of 7168 x 2048"),
        (DEFAULT_SHAPE, "experts of 4096 x 2048 (assumed)"),
        (SHAPE.with_types(weights=ValueType.BF16), "experts of 7168 x 2048"),
        (
            SHAPE.with_types(weights=ValueType.FP8, rows_out=ValueType.FP8),
            "experts of 7168 x 2048 in fp8 and rows in fp8, back in bf16",
        ),
        (
            dataclasses.replace(SHAPE, dispatch_bytes=1),
            "experts of 7168 x 2048 and rows in 1 bytes a value, back in bf16",
        ),
    ],
)
def test_words_say_what_is_not_usual(shape, words):
    assert shape.words() == words
