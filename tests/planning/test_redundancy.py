"""Redundant experts are counted as engines do."""

import pytest
from moetuner.errors import InvalidProblemError
from moetuner.planning.redundancy import slots_with_redundant


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "slots"),
    [
        (256, 64, 64, 5),
        (256, 32, 32, 9),  # DeepSeek's own: 288 on 32
        (256, 64, 0, 4),
        (60, 16, 4, 4),  # fills what the ranks do not share evenly
        (8, 4, 24, 8),
    ],
)
def test_slots_are_those_of_all_physical_experts(experts, ranks, redundant, slots):
    assert slots_with_redundant(experts, ranks, redundant) == slots
    assert ranks * slots == experts + redundant


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "nearest"),
    [
        (256, 64, 10, r"0 \(4 slots a rank\) or 64 \(5 slots a rank\)$"),
        (256, 64, 100, r"64 \(5 slots a rank\) or 128 \(6 slots a rank\)$"),
        (60, 16, 0, r"Nearest: 4 \(4 slots a rank\)$"),
        (8, 4, 30, r"Nearest: 24 \(8 slots a rank\)$"),
        (8, 4, 400, r"Nearest: 24 \(8 slots a rank\)$"),
    ],
)
def test_others_are_refused_with_the_nearest(experts, ranks, redundant, nearest):
    with pytest.raises(InvalidProblemError, match=nearest):
        slots_with_redundant(experts, ranks, redundant)
