import json

from moetuner.report.json import comparison_json
from moetuner.report.verdict import verdict


def test_json_holds_what_the_table_shows_in_full_precision(make_report):
    report = make_report(solver="ilp2")
    value = json.loads(json.dumps(comparison_json(report), allow_nan=False))
    assert value["verdict"] == verdict(report)
    assert value["solver"] == "ilp2"
    assert value["plan_tokens"] + value["score_tokens"] == 1000
    assert (value["num_ranks"], value["ranks_per_node"]) == (4, 2)
    for row, candidate in zip(value["placements"], report.candidates, strict=True):
        assert row["name"] == candidate.name
        assert row["modelled_seconds"] == candidate.evaluation.modelled_seconds
        assert row["imbalance"] == candidate.evaluation.imbalance.tolist()
        assert row["value"] == candidate.solution.value
        assert row["lower_bound"] == candidate.solution.lower_bound
        assert (row["gain"] is None) == (candidate.gain is None)
    stages = value["placements"][-1]["stages"]
    assert [stage["name"] for stage in stages] == ["ilp1", "ilp2 on these clusters"]
    assert all(0 <= stage["gap"] <= 1 for stage in stages)


def test_options_are_the_resolved_ones(make_report):
    report = make_report(plan_fraction=0.25)
    options = comparison_json(report)["options"]
    assert options["plan_fraction"] == 0.25
    assert options["slots_per_rank"] == 4  # asked for "just enough"
    assert options["cost"]["shape"]["hidden_size"] == report.cost.shape.hidden_size
