"""Ranks that compute at different paces: told apart, written, priced."""

import pytest
from made_machine import ONE_NODE, SEED, TWO_NODES, Made
from moetuner.calibration.fit import Origin, fit_hardware
from moetuner.calibration.pair_links import slow_pairs
from moetuner.calibration.rank_groups import rank_groups
from moetuner.calibration.samples import Form, Level, PairSample, Timing
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.hardware_file import read_hardware, write_hardware
from moetuner.placement.topology import Topology

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


def test_others_stand_by_their_pace_however_many_they_are():
    eight = Topology(num_ranks=8, ranks_per_node=8)
    made = Made(eight, noise=0.02, slow=(2, 1, 2, 3, 2, 3, 2, 3))
    found = rank_groups(list(made.expert_samples()))
    assert [g.ranks for g in found] == [(0, 2, 4, 6), (1,), (3, 5, 7)]


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


def pairs(seconds, spread=0.0, level=Level.RANK):
    """One message for each pair of four ranks; `seconds` of those that differ."""
    return [
        PairSample(
            level=level,
            source=a,
            target=b,
            num_bytes=1 << 21,
            timing=Timing(seconds=seconds.get((a, b), 1.0), spread=spread, repeats=3),
        )
        for a in range(4)
        for b in range(4)
        if a != b
    ]


def test_pairs_that_are_slower_than_most_are_said():
    assert slow_pairs([]) == slow_pairs(pairs({})) == []
    assert slow_pairs(pairs({(1, 2): 1.2})) == []
    assert slow_pairs(pairs({(1, 2): 1.9}, spread=0.3)) == []
    assert slow_pairs(pairs({(1, 2): 0.2})) == []
    (said,) = slow_pairs(pairs({(1, 2): 1.9, (3, 0): 1.5}, spread=0.1))
    assert "links between ranks: 2 of 12 pairs are slower" in said
    assert "most from rank 1 to 2, 1.90 times" in said
    both = pairs({}) + pairs({(0, 1): 2.0}, level=Level.NODE)
    (said,) = slow_pairs(both)
    assert said.startswith("links between nodes: 1 of 12")
