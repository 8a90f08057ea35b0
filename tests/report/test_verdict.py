"""The verdict claims a gain exactly when the interval proves one."""

import dataclasses

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import GainInterval
from moetuner.placement.topology import Topology
from moetuner.planning.baselines import Rival
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.report.verdict import verdict
from moetuner.solver import SolverOptions
from moetuner.trace import TraceMetadata
from strategies import make_trace, random_ids


def with_gains(report, over_best, over_blocks=None, rival="chain"):
    """The report with these gains; the second one over contiguous blocks."""
    result = dataclasses.replace(report.result, gain=over_blocks or over_best)
    return dataclasses.replace(
        report,
        candidates=(*report.candidates[:-1], result),
        result=result,
        rival=Rival(name=rival, gain=over_best),
    )


def interval(gain, low, high):
    return GainInterval(gain=gain, low=low, high=high, confidence=0.95)


@pytest.mark.parametrize(
    ("gain", "wanted"),
    [
        (
            interval(0.1, 0.05, 0.15),
            "With lpt, one batch of all held-out tokens takes 10",
        ),
        (interval(0.1, -0.05, 0.15), "No gain to be had over the best baseline, chain"),
        (interval(0.1, 0.0, 0.15), "No gain to be had"),
        (interval(0.0, 0.0, 0.0), "one batch of all held-out tokens takes as long"),
        (interval(0.0004, 0.0002, 0.0006), "No gain to be had"),
        (
            interval(-0.1, -0.2, 0.1),
            "takes 10.0% MORE, but zero lies in the 95% interv",
        ),
        (interval(-0.1, -0.2, -0.05), "lpt is WORSE than the best baseline, chain"),
        (None, "no gain claimed"),
    ],
)
def test_the_headline_follows_the_interval_over_the_best_baseline(
    make_report, gain, wanted
):
    text = verdict(with_gains(make_report(), gain))
    assert wanted in text
    claimed = text.startswith("With lpt")
    assert claimed == (gain is not None and gain.low > 0.001)


def test_the_reference_comes_second_and_once(make_report):
    good, bad = interval(0.1, 0.05, 0.15), interval(-0.02, -0.03, 0.01)
    text = verdict(with_gains(make_report(), bad, good))
    assert text.index("chain") < text.index("contiguous blocks")
    assert "Against contiguous blocks it takes 10.0% less (+5.0% to +15.0%)." in text
    unsure = verdict(with_gains(make_report(), good, bad))
    assert "it takes 2.0% MORE (-3.0% to +1.0%, not certain)." in unsure
    itself = verdict(with_gains(make_report(), good, good, rival="contiguous"))
    assert itself.count("contiguous") == 1


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
    assert report.cost.homes is Homes.UNIFORM


def test_the_baseline_itself_gains_nothing(make_report):
    text = verdict(make_report(solver="contiguous"))
    assert "nothing to gain by definition" in text


def test_the_best_baseline_has_the_fastest_mean_batch(make_report):
    report = make_report(solver="random", batch_tokens=100)
    seconds = {c.name: c.evaluation.batch_seconds_mean for c in report.candidates}
    del seconds["random"]
    best = min(seconds, key=seconds.get)
    assert report.rival.name == best != "random"
    own = report.result.evaluation.batch_seconds_mean
    assert report.rival.gain.gain == pytest.approx(1 - own / seconds[best])
    assert f"best baseline, {best}" in verdict(report)


def test_several_batches_are_a_mean_batch(make_report):
    assert "the mean held-out batch takes" in verdict(make_report(batch_tokens=100))
    assert "one batch of all held-out" in verdict(make_report(batch_tokens=0))


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
    text, (other,) = verdict(report), report.others
    assert "one batch of all held-out tokens of the first trace" in text
    assert "On trace 2 (code) it takes " in text
    for gain in (other.result.gain, other.rival.gain):
        less = f"{abs(gain.gain):.1%} {'less' if gain.gain >= 0 else 'MORE'}"
        assert (less if abs(gain.gain) >= 5e-4 else "as long") in text
    assert f"{abs(report.overall.gain):.1%}" in text
