"""The verdict claims a gain exactly when the interval proves one."""

import dataclasses

import pytest
from moetuner.cost import CostModel, Homes, Wire
from moetuner.evaluation import GainInterval
from moetuner.report.verdict import verdict


def with_gain(report, gain):
    result = dataclasses.replace(report.result, gain=gain)
    return dataclasses.replace(report, candidates=(*report.candidates[:-1], result))


def interval(gain, low, high):
    return GainInterval(gain=gain, low=low, high=high, confidence=0.95)


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (interval(0.1, 0.05, 0.15), "lpt needs 10.0% less modelled time"),
        (interval(0.1, -0.05, 0.15), "No gain to be had: lpt is 10.0% faster"),
        (interval(0.1, 0.0, 0.15), "No gain to be had"),
        (interval(0.0, 0.0, 0.0), "No gain to be had"),
        (interval(-0.1, -0.2, 0.1), "No gain to be had: lpt is 10.0% slower"),
        (interval(-0.1, -0.2, -0.05), "lpt is WORSE than contiguous blocks by 10.0%"),
        (None, "no gain claimed"),
    ],
)
def test_verdict_follows_the_interval(make_report, gain, wanted):
    text = verdict(with_gain(make_report(), gain))
    assert wanted in text
    assert ("less modelled time" in text) == (gain is not None and gain.low > 0)


def test_one_rank_has_nothing_to_gain(make_report):
    text = verdict(make_report(ranks=1, per_node=1))
    assert text.startswith("No gain to be had: on one rank")


def test_one_expert_per_rank_has_nothing_to_gain_where_links_are_alike(make_report):
    for per_node in (4, 1):
        report = make_report(ranks=4, per_node=per_node, experts=4)
        assert "only renames ranks" in verdict(report)
        assert report.result.gain.gain == pytest.approx(0, abs=0.02)


def test_one_expert_per_rank_can_gain_between_nodes(make_report):
    """Which experts share a node changes what leaves it."""
    report = make_report(ranks=8, per_node=4, experts=8, solver="random")
    assert "renames" not in verdict(report)
    nodes = [c.evaluation.remote_nodes_per_token for c in report.candidates]
    assert len(set(nodes)) > 1
    allgather = CostModel(wire=Wire.ALLGATHER)
    report = make_report(ranks=8, per_node=4, experts=8, cost=allgather)
    assert "renames" in verdict(report)


def test_aligning_layers_on_one_node_claims_no_traffic(make_report):
    report = make_report(per_node=4, solver="chain")
    assert "aligning layers moves no row less" in verdict(report)
    assert report.options.cost.homes is Homes.UNIFORM


def test_the_baseline_itself_gains_nothing(make_report):
    text = verdict(make_report(solver="contiguous"))
    assert "nothing to gain by definition" in text


def test_a_baseline_is_named_exactly_when_it_is_better(make_report):
    report = make_report(solver="random")
    seconds = report.result.evaluation.modelled_seconds
    for share, named in ((0.9, True), (1.1, False)):
        candidates = [
            dataclasses.replace(
                candidate,
                evaluation=dataclasses.replace(
                    candidate.evaluation,
                    modelled_seconds=seconds * (share if name == "lpt" else 1),
                ),
            )
            for candidate in report.candidates
            for name in (candidate.name,)
        ]
        text = verdict(dataclasses.replace(report, candidates=tuple(candidates)))
        assert ("The baseline lpt scored better" in text) == named
