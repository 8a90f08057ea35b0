"""The verdict claims a gain exactly when the interval proves one."""

import dataclasses

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import GainInterval
from moetuner.placement.topology import Topology
from moetuner.planning.baselines import Rival
from moetuner.planning.comparison import compare_placements, comparison_of_plan
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.report.verdict import verdict
from moetuner.solver import SolverOptions
from moetuner.trace import TraceMetadata
from strategies import make_trace, random_ids


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


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (
            interval(0.02, 0.01, 0.03),
            "It needs 2.0% less than the best baseline, chain",
        ),
        (interval(0.02, -0.01, 0.03), "chain, no gain is certain: 2.0% less"),
        (interval(-0.02, -0.03, 0.01), "chain, no gain is certain: 2.0% more"),
        (interval(-0.02, -0.03, -0.01), "chain, is better: the result takes 2.0%"),
    ],
)
def test_the_best_baseline_has_its_own_sentence(make_report, gain, wanted):
    report = with_gain(make_report(), interval(0.1, 0.05, 0.15))
    report = dataclasses.replace(report, rival=Rival(name="chain", gain=gain))
    text = verdict(report)
    assert wanted in text
    assert text.startswith("lpt needs 10.0% less modelled time than contiguous blocks")
    itself = dataclasses.replace(report, rival=Rival(name="contiguous", gain=gain))
    assert "best baseline" not in verdict(itself)


def test_the_best_baseline_is_the_fastest_that_is_not_the_result(make_report):
    report = make_report(solver="random")
    seconds = {c.name: c.evaluation.modelled_seconds for c in report.candidates}
    del seconds["random"]
    best = min(seconds, key=seconds.get)
    assert report.rival.name == best != "random"
    own = report.result.evaluation.modelled_seconds
    assert report.rival.gain.gain == pytest.approx(1 - own / seconds[best])
    assert f"best baseline, {best}" in verdict(report)


@pytest.mark.parametrize(
    ("share", "words"), [(0.8, "25.0% MORE"), (1.25, "20.0% less")]
)
def test_batches_are_compared_with_the_best_in_batches(make_report, share, words):
    report = make_report(solver="random", batch_tokens=100)
    own = report.result.evaluation.batch_seconds_mean
    candidates = tuple(
        dataclasses.replace(
            candidate,
            evaluation=dataclasses.replace(
                candidate.evaluation,
                batch_seconds_mean=own * (share if candidate.name == "eplb" else 2),
            ),
        )
        for candidate in report.candidates[:-1]
    )
    candidates = (*candidates, report.result)
    text = verdict(dataclasses.replace(report, candidates=candidates))
    wanted = f"100 tokens takes {words} than with the best of the others, eplb."
    assert wanted in text
    assert "The mean batch" not in verdict(make_report(batch_tokens=0))


def test_other_files_that_are_better_are_named(rng):
    trace = make_trace(
        random_ids(rng, 600, 3, 16, 2), 16, sequence=np.arange(600, dtype=np.int32)
    )
    machine = Topology(num_ranks=4, ranks_per_node=2)
    found = [
        plan_trace(trace, machine, PlanOptions(solver=name)).result.placement
        for name in ("random", "lpt")
    ]
    pair = dict(zip(("mine", "theirs"), found, strict=True))
    assert "theirs scored better still." in verdict(
        compare_placements(trace, pair, CostModel())
    )


def test_every_trace_has_its_say(rng):
    traces = [
        make_trace(
            random_ids(rng, 600, 3, 16, 2, skew=2.0),
            16,
            sequence=(np.arange(600) // 20).astype(np.int32),
            metadata=TraceMetadata(dataset=name),
        )
        for name in ("prose", "code")
    ]
    report = plan_trace(
        traces[0],
        Topology(num_ranks=4, ranks_per_node=2),
        PlanOptions(solver="lpt", solver_options=SolverOptions(time_limit=1)),
        others=traces[1:],
    )
    text, gain = verdict(report), report.domains[0].gain
    assert "on held-out data of the first trace" in text
    assert f"On trace 2 (code): {abs(gain.gain):.1%}" in text
    assert f"a held-out batch takes {abs(report.overall.gain):.1%}" in text
    assert verdict(comparison_of_plan(traces[0], report)) == text
