"""The page as a file: well formed, alone, honest, and of bounded size."""

import dataclasses
import re

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.placement.model import ProgressPoint
from moetuner.placement.topology import Topology
from moetuner.planning.comparison import compare_placements
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.skew import measure_skew
from moetuner.report.html import render_page, write_report
from moetuner.report.quantities import (
    flow_levels,
    rank_flows,
    relative_load,
    together,
    traffic_per_token,
)
from moetuner.report.skew import skew_words
from moetuner.report.verdict import verdict
from moetuner.report.words import gain_cell
from moetuner.trace import CountTrace, read_trace
from moetuner.trace.model import TraceMetadata
from moetuner.trace.split import select
from strategies import make_trace, random_ids, random_placement

SECTIONS = [
    *("verdict", "scores", "load", "traffic", "together", "flow"),
    *("convergence", "moves", "method"),
]


def test_every_section_is_there_and_every_link_leads_to_one(make_comparison, parse):
    page = parse(render_page(make_comparison(solver="ilp2")))
    sections = [attrs["id"] for attrs in page.attributes("section")]
    assert sections == SECTIONS
    links = [attrs["href"] for attrs in page.attributes("a")]
    assert links == [f"#{name}" for name in SECTIONS[1:]]
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)


def test_experts_that_no_scored_token_chose_are_named(make_comparison, parse):
    used = make_comparison()
    assert "No scored token chose" not in render_page(used)
    rare = dataclasses.replace(used, scored=select(used.scored, rows_without(used, 5)))
    page = parse(render_page(rare))
    assert "No scored token chose 3 of 48 experts, in 3 of 3 layers." in page.text
    head, rows = page.table("unused")
    assert head == ["layer", "experts", "ids"]
    assert rows == [["0", "1", "5"], ["1", "1", "5"], ["2", "1", "5"]]


def rows_without(comparison, expert):
    return ~(comparison.scored.topk_ids == expert).any(axis=(1, 2))


def test_the_page_needs_nothing_from_outside(make_comparison, parse):
    text = render_page(make_comparison())
    for _, attrs in parse(text).elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp|src=\"//", text)
    policies = [attrs.get("content", "") for attrs in parse(text).attributes("meta")]
    assert any(policy.startswith("default-src 'none'; ") for policy in policies)


def test_verdict_and_every_score_are_shown(make_comparison, parse):
    comparison = make_comparison()
    page = parse(render_page(comparison))
    assert verdict(comparison) in page.text
    for scored in comparison.candidates:
        scores = scored.evaluation
        for value in (
            scores.imbalance_mean,
            scores.imbalance_worst,
            scores.remote_ranks_per_token,
            scores.remote_nodes_per_token,
            scores.bottleneck_receive,
        ):
            assert f"{value:.3f}" in page.text
        assert f"{scores.batch_seconds_mean * 1e3:.3f}" in page.text
        if scored.gain is not None:
            assert gain_cell(scored.gain) in page.text


def test_percentiles_are_shown_of_several_batches_alone(make_comparison):
    several = make_comparison(batch_tokens=100)
    tails = several.result.evaluation.batch_seconds_p99
    assert f"{tails * 1e3:.3f}" in render_page(several)
    one = render_page(make_comparison(batch_tokens=0))
    none = "<td>-</td><td>-</td>"  # p95 and p99
    assert one.count(none) == len(several.candidates)


def test_what_was_planned_on_every_token_is_said(make_comparison, parse):
    page = parse(render_page(make_comparison(plan_fraction=1.0)))
    assert "scored on the same: nothing was held out" in page.text
    assert "of tokens that it was planned on" in page.text


def test_tables_hold_the_numbers_of_the_evaluator(make_comparison, parse):
    comparison = make_comparison(solver="chain")
    page = parse(render_page(comparison))
    statistics = comparison.statistics
    for scored in (comparison.baseline, comparison.result):
        flows = rank_flows(scored.placement, statistics.transitions)
        wanted = {
            "load": relative_load(scored.evaluation),
            "traffic": traffic_per_token(scored.evaluation),
            "together": together(scored.placement, statistics.coactivation),
            "flows": flows.sum(axis=0) / flows.sum(axis=0).mean(),
        }
        for table, values in wanted.items():
            shown = page.column(table, scored.name)
            np.testing.assert_allclose(shown, values.ravel(), rtol=1e-5)
        levels = flow_levels(scored.placement, flows)
        stays = page.column("flow", f"{scored.name}: stays on its rank")
        np.testing.assert_allclose(stays, levels[:, 0], rtol=1e-5)
    for layer in statistics.layer_ids:
        head, rows = page.table(f"pair-{layer}")
        counts = np.array(rows, int)[:, 1:]
        np.testing.assert_array_equal(counts, statistics.coactivation[layer])
        assert head[1:] == [str(expert) for expert in range(16)]


def test_copies_to_fetch_are_listed_one_by_one(make_comparison, parse):
    comparison = make_comparison()
    page = parse(render_page(comparison))
    before, after = (
        c.placement.rank_of() for c in (comparison.baseline, comparison.result)
    )
    _, rows = page.table("moves")
    listed = {(int(layer), int(e), int(rank)) for layer, e, rank, _ in rows}
    moved = zip(*np.nonzero(before != after), strict=True)
    assert listed == {(int(i), int(e), int(after[i, e])) for i, e in moved}
    assert f"{len(listed):,} of 48 experts change ranks" in page.text


def test_the_course_of_the_solve_is_drawn_and_listed(make_comparison, parse):
    comparison = make_comparison(solver="ilp2")
    progress = comparison.result.placement.provenance.progress
    assert progress
    page = parse(render_page(comparison))
    _, rows = page.table("convergence")
    assert [row[0] for row in rows] == [point.stage for point in progress]
    shown = page.column("convergence", "incumbent")
    np.testing.assert_allclose(shown, [p.incumbent for p in progress], rtol=1e-5)


HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--$x$"


def test_names_from_files_stay_text(make_comparison, parse):
    comparison = make_comparison(
        metadata=TraceMetadata(model=HOSTILE, source=HOSTILE, dataset=HOSTILE)
    )
    plain = [name for name, _ in parse(render_page(comparison)).elements]
    origin = dataclasses.replace(
        comparison.result.placement.provenance,
        solver=HOSTILE,
        status=HOSTILE,
        objective=HOSTILE,
        options={HOSTILE: HOSTILE},
        progress=(
            ProgressPoint(stage=HOSTILE, seconds=-1, incumbent=1e308, bound=-1e308),
        ),
    )
    placement = dataclasses.replace(comparison.result.placement, provenance=origin)
    result = dataclasses.replace(comparison.result, name=HOSTILE, placement=placement)
    candidates = (*comparison.candidates[:-1], result)
    hostile = dataclasses.replace(comparison, candidates=candidates, result=result)
    text = render_page(hostile)
    page = parse(text)
    assert page.text.count(HOSTILE) > 10
    assert text.count("</script>") == 1
    for kind in ("img", "script", "image"):
        assert len(page.attributes(kind)) == plain.count(kind)
    assert not [
        attrs for _, attrs in page.elements if any(k.startswith("on") for k in attrs)
    ]


def other_placements(trace, topology, extra_slots=1):
    rng = np.random.default_rng(2)
    names = ("one", "two")
    return {name: random_placement(rng, trace, topology, extra_slots) for name in names}


@pytest.mark.parametrize(
    ("ranks", "per_node", "layers", "experts"),
    [(1, 1, 1, 4), (2, 1, 1, 4), (4, 4, 2, 4), (8, 4, 3, 64), (64, 8, 2, 64)],
)
@pytest.mark.parametrize("wire", list(Wire))
def test_any_machine_can_be_shown(parse, ranks, per_node, layers, experts, wire):
    rng = np.random.default_rng(9)
    ids = random_ids(rng, 300, layers, experts, 2, padding=0.1)
    trace = make_trace(ids, experts, ranked=True)
    topology = Topology(num_ranks=ranks, ranks_per_node=per_node)
    cost = CostModel(wire=wire, homes=Homes.FOLLOW)
    extra = 1 if experts > ranks else 0
    placements = other_placements(trace, topology, extra)
    for before in (None, "two"):
        page = parse(
            render_page(compare_placements(trace, placements, cost, before=before))
        )
        assert [attrs["id"] for attrs in page.attributes("section")] == SECTIONS


def test_a_source_that_only_counted_says_what_is_unknown(parse):
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 100, (5, 2, 8))
    counts[:, 1] = rng.permuted(counts[:, 0], axis=1)
    trace = CountTrace(
        counts=counts,
        num_tokens=counts[:, 0].sum(axis=1) // 2,
        layer_ids=np.array([0, 4], np.int32),
    )
    like = make_trace(random_ids(rng, 10, 2, 8, 2), 8)
    like = dataclasses.replace(like, layer_ids=trace.layer_ids)
    placements = other_placements(like, Topology(num_ranks=4, ranks_per_node=2), 0)
    cost = CostModel(wire=Wire.ALLGATHER)
    page = parse(render_page(compare_placements(trace, placements, cost)))
    assert "which experts go together is unknown" in page.text
    assert "where tokens go next is unknown" in page.text
    assert "nan" not in page.text


def test_the_largest_models_fit_on_a_page(parse):
    """58 layers of 256 experts on 64 ranks, and 512 experts on 512 ranks."""
    for layers, experts, ranks in ((58, 256, 64), (4, 512, 512)):
        ids = random_ids(np.random.default_rng(1), 200, layers, experts, 8)
        trace = make_trace(ids, experts)
        topology = Topology(num_ranks=ranks, ranks_per_node=8)
        placements = other_placements(trace, topology, 0)
        text = render_page(compare_placements(trace, placements, CostModel()))
        parse(text)
        assert len(text) < 1_500_000


def test_the_same_comparison_gives_the_same_file(make_comparison, tmp_path):
    comparison = make_comparison()
    for name in ("one.html", "two.html"):
        write_report(comparison, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    "name",
    ["gpt-oss-20b-fingerprinting/sorry_bench.npz", "deepseek-v2-lite-esft/law.npz"],
)
def test_recordings_of_large_models_are_reported(traces_dir, parse, name):
    trace = read_trace(traces_dir / name)
    machine = Topology(num_ranks=8, ranks_per_node=4)
    plan = plan_trace(trace, machine, PlanOptions(solver="chain"))
    text = render_page(plan)
    page = parse(text)
    assert verdict(plan) in page.text
    assert len(text) < 700_000
    shown = page.column("load", "chain")
    wanted = relative_load(plan.result.evaluation)
    np.testing.assert_allclose(shown, wanted.ravel(), rtol=1e-5)


def test_skew_by_layer_is_that_of_the_scored_tokens(make_comparison, parse):
    comparison = make_comparison(batch_tokens=100, batch_kind="mixed")
    found = measure_skew(comparison.scored, 4, batch_tokens=100, batch_kind="mixed")
    page = parse(render_page(comparison))
    assert skew_words(found) in page.text
    for name, values in (
        ("contiguous blocks, all tokens", found.persistent),
        ("best static balance, mean batch", found.transient),
        ("by chance alone, mean batch", found.transient_chance),
    ):
        np.testing.assert_allclose(page.column("skew", name), values, rtol=1e-5)
