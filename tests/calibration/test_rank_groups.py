"""Ranks that compute at different paces: told apart, written, priced."""

import pytest
from made_machine import ONE_NODE, SEED, TWO_NODES, Made
from moetuner.calibration.fit import Origin, fit_hardware
from moetuner.calibration.rank_groups import rank_groups
from moetuner.calibration.samples import Form
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.hardware_file import read_hardware, write_hardware

ORIGIN = Origin(name="mixed", date="2026-11-30", command="a test")


def groups_of(*slow, noise=0.02):
    made = Made(ONE_NODE, noise=noise, slow=slow)
    return [(g.ranks, g.ratio) for g in rank_groups(list(made.expert_samples()))]


def test_ranks_that_are_alike_are_one_group():
    assert groups_of(1, 1, 1, 1) == [((), 1.0)]
    assert groups_of(1, 1.04, 1, 1.02, noise=0.0) == [((), 1.0)]


def test_what_the_spread_explains_tells_nothing_apart():
    assert groups_of(1, 1.2, 1, 1, noise=0.3) == [((), 1.0)]


def test_the_largest_group_is_the_usual_one():
    found = groups_of(1, 1.5, 1, 1)
    assert [ranks for ranks, _ in found] == [(0, 2, 3), (1,)]
    assert found[1][1] == pytest.approx(1.5, rel=0.05)
    found = groups_of(2, 2, 1, 2)
    assert [ranks for ranks, _ in found] == [(0, 1, 3), (2,)]
    assert found[1][1] == pytest.approx(0.5, rel=0.05)


def test_of_two_groups_as_large_the_faster_one_is_the_usual_one():
    found = groups_of(2, 1, 2, 1)
    assert [ranks for ranks, _ in found] == [(1, 3), (0, 2)]


def test_three_kinds_are_three_groups():
    assert [ranks for ranks, _ in groups_of(1, 2, 1, 3)] == [(0, 2), (1,), (3,)]


@pytest.mark.parametrize("topology", [ONE_NODE, TWO_NODES])
def test_they_are_written_and_their_times_are_told(tmp_path, topology):
    made = Made(topology, slow=(1, 1, 2.5, 1))
    like = HARDWARE["h100"]
    found = fit_hardware(made.measurements(), ORIGIN, like, Form.EXACT, SEED)
    (others,) = found.hardware.other_ranks
    assert others.ranks == (2,)
    assert others.matmul_rate == pytest.approx(made.matmul / 2.5, rel=0.02)
    assert found.hardware.matmul_rate == pytest.approx(made.matmul, rel=0.02)
    assert "experts of ranks 2: 2.50 times as long" in found.notes[-1]
    parts = {each.part: each for each in found.hardware.calibration.residuals}
    for part in ("experts", "experts of ranks 2", "layer", "all"):
        assert parts[part].worst < 0.1, parts[part]
    write_hardware(found.hardware, tmp_path / "mixed.toml")
    assert read_hardware(tmp_path / "mixed.toml") == found.hardware
