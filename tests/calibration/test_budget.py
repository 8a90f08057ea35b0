"""What no longer fits into its time is left out, and small cases never are."""

import pytest
from moetuner.calibration.budget import MIN_POINTS, SHARES, Allowance, Part
from moetuner.calibration.options import SHAPES, SIZES, CalibrationOptions
from moetuner.calibration.samples import LayerShape
from moetuner.errors import InvalidProblemError


class Watch:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self):
        return self.now


def run(allowance, watch, series, seconds_of_size):
    """Sizes that were measured."""
    done = []
    for size, seconds in seconds_of_size:
        if allowance.has_room(series, size):
            watch.now += 4 * seconds
            allowance.took(series, size, seconds)
            done.append(size)
    return done


def test_everything_is_measured_while_there_is_time():
    watch = Watch()
    own = Allowance(seconds=100, num_cases=4, clock=watch)
    sizes = [(size, 0.1) for size in (1, 2, 3, 4)]
    assert run(own, watch, "a", sizes) == [1, 2, 3, 4]
    assert not own.left_out
    assert 0 < 4 * own.case_seconds < 100  # the largest cases need more


def test_the_largest_are_left_out_first_and_said():
    watch = Watch()
    own = Allowance(seconds=10, num_cases=5, clock=watch)
    sizes = [(size, size * 0.1) for size in (1, 2, 4, 8, 16)]
    assert run(own, watch, "a", sizes) == [1, 2, 4, 8]
    assert list(own.left_out) == ["a"]
    assert own.left_out["a"] == "nothing of size 16 and above, for want of time"


def test_two_points_of_each_series_come_whatever_the_time():
    watch = Watch()
    watch.now = 1000
    own = Allowance(seconds=1, num_cases=9, clock=watch)
    for series in "ab":
        sizes = [(1, 5.0), (2, 5.0), (3, 5.0), (4, 5.0)]
        assert run(own, watch, series, sizes) == [1, 2]
    assert list(own.left_out) == ["a", "b"]
    assert "size 3" in own.left_out["b"]
    assert MIN_POINTS == 2


def test_every_part_has_a_share_and_all_together_are_one():
    assert set(SHARES) == set(Part)
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_sizes_rise_and_the_shapes_without_a_word_differ(kind):
    sizes = SIZES[kind]
    for series in (sizes.messages, sizes.tokens, sizes.rows_per_expert):
        assert list(series) == sorted(set(series))
    assert sizes.messages[0] == 8192
    first, second = SHAPES[kind]
    assert first.hidden_size != second.hidden_size
    assert first.inner_size != second.inner_size
    assert first.num_experts != second.num_experts


def test_messages_between_gpus_go_up_to_256_megabytes():
    assert SIZES["cuda"].messages[-1] == 256 << 20


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (CalibrationOptions, {"seconds": 0}, "seconds must be positive"),
        (CalibrationOptions, {"ranks_per_node": 0}, "ranks_per_node must be"),
        (CalibrationOptions, {"device": "tpu"}, "device must be one of auto, cuda"),
        (LayerShape, {"top_k": 9}, "top_k 9 is more than num_experts 8"),
        (LayerShape, {"hidden_size": 0}, "hidden_size must be a positive"),
    ],
)
def test_what_makes_no_sense_is_refused(kind, fields, said):
    shape = {"hidden_size": 8, "inner_size": 8, "num_experts": 8, "top_k": 2}
    with pytest.raises(InvalidProblemError, match=said):
        kind(**((shape if kind is LayerShape else {}) | fields))
