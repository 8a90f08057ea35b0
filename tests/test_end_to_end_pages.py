"""What the pages of the end-to-end benchmark make of numbers that are known."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "end_to_end"
PLAIN = "all-to-all per expert"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the folder, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def result(placement, prefill, exchange="ours", experts=10.0, dispatch=20.0):
    parts = {"other": 1.0, "dispatch": dispatch, "experts": experts, "combine": 5.0}
    rows = {"out_of_ranks": 9000, "out_of_nodes": 4000}
    counted = rows | {"node_bytes": 2_000_000, "link_bytes": 2_100_000}
    return {
        "variant": f"{exchange}: {placement}",
        "placement": placement,
        "exchange": exchange,
        "how": f"by {exchange}",
        "prefill": counted,
        "decode": counted | {"node_bytes": None, "link_bytes": 0},
        "prefill_ms": prefill,
        "decode_ms": [[4.0, 6.0], [5.0, 5.0], [4.0, 8.0]],
        "parts": {"prefill": [parts], "decode": [parts]},
        "said": {"prefill": {"step": 30.0, "experts": 9.0, "exchange": 21.0}},
    }


CASE = {
    "family": {"name": "made-up", "hidden": 64, "experts": 8, "inner": 32, "top_k": 2},
    "layers": 2,
    "sizes": {"batches": 3, "sequences": 2, "prompt": 50, "decode": 2},
    "topology": {"num_ranks": 4, "ranks_per_node": 2},
    "hardware": "cpu",
    "network": "5 Gbit/s a node",
    "gbit": 5,
    "dtype": "float32",
    "source": "nothing",
    "told": {"contiguous": "0.0 s", "joint": "1.0 s"},
}
CONTENT = {
    "environment": {"commit": "none", "command": "made up"},
    "cases": [
        {
            "case": CASE,
            "shaped": True,
            "results": [
                result("contiguous", [200.0, 400.0, 100.0], PLAIN, dispatch=45.0),
                result("contiguous", [100.0, 200.0, 50.0]),
                # Slower than lpt once, but in each repetition faster than contiguous.
                result("lpt", [80.0, 190.0, 45.0]),
                result("joint", [90.0, 150.0, 30.0], experts=5.0),
                result("eplb + replicas", [40.0, 50.0, 20.0]),
                result("joint + replicas", [20.0, 25.0, 10.0]),
            ],
        }
    ],
}


def test_changes_are_of_the_same_repetition(load):
    found = load("figures").figures_of(CONTENT["cases"][0])
    joint, base = found["ours: joint"], found["ours: contiguous"]
    change = joint.change(base, "prefill")
    assert change.median == pytest.approx(-25)  # of -10, -25, -40
    assert (change.low, change.high) == pytest.approx((-32.5, -17.5))
    assert joint.step("prefill").median == 90
    assert joint.tail("prefill", 100) == 150
    assert joint.tail("decode", 100) == 8
    assert joint.tokens_per_second("prefill") == pytest.approx(4 * 2 * 50 / 0.090)
    assert joint.tokens_per_second("decode") == pytest.approx(4 * 2 / 0.005)
    assert joint.token_tail("prefill") == 5
    assert joint.exchange_tail("prefill") == 25


def test_plans_meet_the_fastest_other_with_as_many_slots(load):
    figures = load("figures")
    best = figures.rivals(figures.figures_of(CONTENT["cases"][0]), "prefill")
    assert best["joint"].name == "ours: lpt"
    assert best["joint + replicas"].name == "ours: eplb + replicas"


def test_only_pairs_beyond_the_spread_are_ranked(load):
    figures = load("figures")

    def on_ours(placement, prefill, told):
        made = result(placement, prefill)
        return made | {"said": {"prefill": {"step": told}}}

    results = [
        on_ours("contiguous", [99.0, 100.0, 101.0], 60.0),
        on_ours("lpt", [79.0, 80.0, 81.0], 50.0),
        on_ours("joint", [49.0, 50.0, 51.0], 70.0),  # predicted slowest, and fastest
        on_ours("eplb", [30.0, 75.0, 400.0], 10.0),  # of no pair: 185 ms apart
        result("contiguous", [500.0, 500.0, 500.0], PLAIN),  # another exchange
    ]
    found = figures.figures_of({"case": CASE, "results": results})
    assert figures.ranked(found, "prefill") == (1, 3)
    assert figures.ranked(found, "decode") == (0, 0)


def test_the_page_has_what_was_measured(load):
    page = load("table").page(CONTENT)
    assert "## made-up, 2 x 2 ranks, 5 Gbit/s\n" in page
    assert "- timed: 3 repetitions, and 1 by parts" in page
    assert (
        "| ours: joint | 90.0 (60.0) | 138.0 | 148.8 | 4,444 | -25.0 % (-32.5 to -17.5)"
        " | 1.00 | 5.00 | 25.00 | 30.00 | 9,000 | 4,000 | 2.00 | 2.10 |"
    ) in page
    assert "- prefill, ours: joint against ours: lpt: -21.1 % (-27.2 to -4.3)" in page
    assert (
        "- prefill, pairs of placements on our exchange further apart than either "
        "spread: 3, of which 0 were ranked as predicted"
    ) in page
    assert "| exchange alone | ours: contiguous | 100.0 | -50.0 % " in page
    # Both tails and the step against the paper's stack.
    assert "| ours: joint | -50.0 | -50.0 | -62.5 |" in page
    assert "| as printed, Mixtral-8x7B, two nodes | -27.0 | -30.5 | -17.5 |" in page


def test_the_page_says_what_the_network_lost(load):
    (case,) = CONTENT["cases"]
    counted = {"dropped": 2, "sent_again": 5, "timeouts": 0}
    results = [
        result("contiguous", [10.0, 10.0]) | {"lost": [counted, counted]},
        result("joint", [9.0, 9.0]) | {"lost": [counted, counted | {"timeouts": 3}]},
    ]
    page = load("table").page(CONTENT | {"cases": [case | {"results": results}]})
    assert (
        "- network: 8 packets dropped, 20 sent again, 3 timeouts of TCP, these in "
        "(repetition): ours: joint (2)\n"
    ) in page
    assert "- network:" not in load("table").page(CONTENT), "nobody counted there"


def test_a_link_that_was_not_made_is_no_link(load):
    (case,) = CONTENT["cases"]
    page = load("table").page(CONTENT | {"cases": [case | {"shaped": False}]})
    assert "## made-up, 2 x 2 ranks, planned for 5 Gbit/s\n" in page


def test_the_picture_shows_every_placement(load, tmp_path):
    pytest.importorskip("matplotlib")
    figure = load("plot").draw(CONTENT["cases"])
    left, right = figure.axes
    shown = dict(
        zip(names(left), (bar.get_width() for bar in left.patches), strict=True)
    )
    assert shown["joint"] == pytest.approx(-25)
    assert set(shown) == {"lpt", "joint", "eplb + replicas", "joint + replicas"}
    assert names(right) == ["both, with replicas", "both", "exchange alone"]
    figure.savefig(tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text().count("<g id=") > 20


def names(axis):
    return [label.get_text() for label in axis.get_yticklabels()]


def mixtral(ranks_per_node, **changes):
    """One case of the paper's model."""
    case = CASE | {"family": CASE["family"] | {"name": "mixtral-8x7b"}} | changes
    case["topology"] = {"num_ranks": 4, "ranks_per_node": ranks_per_node}
    return CONTENT["cases"][0] | {"case": case}


def test_the_papers_table_has_both_its_machines(load):
    paper = load("paper_table")
    one_node = mixtral(4, network="", gbit=0)
    one = {"environment": {"gpu": "Some GPU"}, "cases": [one_node]}
    measured = mixtral(2, network="")  # planned for links that were measured
    two = {"environment": {"gpu": "Other"}, "cases": [*CONTENT["cases"], measured]}
    page = paper.page([one, two])
    assert (
        "| as printed in the paper | -36.0 | -36.3 | -9.3 | -27.0 | -30.5 | -17.5 |"
    ) in page
    # Against contiguous blocks on the same exchange, not on the paper's.
    ours = "-50.0 | +0.0 | -25.0 (-32.5 to -17.5)"
    assert f"| joint, our exchange | {ours} | {ours} |" in page
    assert "| the paper's two programs, our exchange | - | - | - | - | - | - |" in page
    assert "| between nodes | the cluster's own | 5 Gbit/s a node |" in page
    assert "4 ranks, 4 a node; 4 ranks, 2 a node |" in page
    alone = paper.page([two])
    assert "| change in % | two nodes: token processing |" in alone
    assert "one node" not in alone


def test_the_papers_table_is_of_its_model(load):
    with pytest.raises(SystemExit, match="no case of mixtral-8x7b"):
        load("paper_table").page([CONTENT])


def test_the_page_says_how_a_case_was_planned(load):
    case = CONTENT["cases"][0]
    told = case | {"case": CASE | {"command": "python plan.py --out CASE"}}
    page = load("table").page(CONTENT | {"cases": [told]})
    assert "- planned with: python plan.py --out CASE\n" in page
