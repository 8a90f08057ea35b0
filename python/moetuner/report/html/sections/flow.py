"""Where tokens go from layer to layer."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.cost import Homes
from moetuner.report.html.charts import Part, column_chart
from moetuner.report.html.colors import scale_around
from moetuner.report.html.content import Pair, figure, grid, note, section
from moetuner.report.html.frame import key
from moetuner.report.html.heatmap import color_bar
from moetuner.report.html.markup import join
from moetuner.report.html.palette import PARTS
from moetuner.report.html.pooling import pooled
from moetuner.report.html.rank_maps import RankTables, rank_maps
from moetuner.report.quantities import FLOW_LEVELS, flow_levels, rank_flows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.planning.scores import Comparison
    from moetuner.report.html.content import Numbers
    from moetuner.report.html.markup import Markup

    Floats = NDArray[np.float64]


def flow(comparison: Comparison, numbers: Numbers) -> Markup:
    """What stays and what moves between layers, and between which ranks."""
    title, transitions = "Flow from layer to layer", comparison.statistics.transitions
    if transitions is None:
        lead = "This source only counted loads: where tokens go next is unknown."
        return section("flow", title, lead)
    if not len(transitions):
        return section("flow", title, "There is one layer: nothing flows.")
    pair = Pair.of(comparison)
    flows = [rank_flows(c.placement, transitions) for c in pair.both()]
    levels = [
        flow_levels(c.placement, f) for c, f in zip(pair.both(), flows, strict=True)
    ]
    names = _steps(comparison)
    table = numbers.table(
        "flow",
        "Share of the flow by layer step",
        ("step", *(f"{c.name}: {level}" for c in pair.both() for level in FLOW_LEVELS)),
        (
            (name, *(float(x) for shares in levels for x in shares[i]))
            for i, name in enumerate(names)
        ),
    )
    columns = [
        figure(c.name, _columns(shares, names, c.name), color=color)
        for c, shares, color in zip(pair.both(), levels, pair.colors(), strict=True)
    ]
    return section(
        "flow",
        title,
        _lead(pair, levels),
        key(
            [
                (p.css, "area", level)
                for p, level in zip(PARTS, FLOW_LEVELS, strict=True)
            ]
        ),
        grid(*columns),
        _maps(comparison, pair, flows, numbers),
        table,
        _hint(comparison),
    )


def _steps(comparison: Comparison) -> list[str]:
    layers = comparison.statistics.layer_ids.tolist()
    return [f"{a}→{b}" for a, b in itertools.pairwise(layers)]


def _lead(pair: Pair, levels: list[Floats]) -> str:
    words = " and ".join(
        f"{shares[:, 0].mean():.1%} with {c.name}"
        for c, shares in zip(pair.both(), levels, strict=True)
    )
    return (
        f"Every choice of a token, joined with its choices a layer later: {words} of "
        f"them stay on their rank."
    )


def _columns(shares: Floats, names: list[str], name: str) -> Markup:
    parts = [
        Part(values=(100 * shares[:, i]).tolist(), color=ink.css, name=level)
        for i, (ink, level) in enumerate(zip(PARTS, FLOW_LEVELS, strict=True))
    ]
    firsts = [step.split("→")[0] for step in names]
    return column_chart(
        parts,
        firsts,
        x="from layer, to the next",
        y="% of the flow",
        name=f"{name}: flow that stays, stays in its node, changes node",
    )


def _maps(
    comparison: Comparison, pair: Pair, flows: list[Floats], numbers: Numbers
) -> Markup:
    tables = [pooled(_even(f), 0, 1) for f in flows]
    scale = scale_around(
        1.0, *tables, label="flow / an even share, all steps", least=0.25
    )
    names = RankTables(
        key="flows",
        title="Flow from rank to rank over an even share",
        what="flow from rank to rank, all layer steps together",
        row="rank",
        column="rank a layer later",
    )
    shown = rank_maps(names, comparison.topology, pair, tables, scale, numbers)
    return join([color_bar(scale, *tables, words="no colour: 1"), *shown])


def _even(flows: Floats) -> Floats:
    """Flow over what each pair of ranks had if all had the same, [G, G]."""
    total: Floats = flows.sum(axis=0)
    return total / (total.mean() or 1)


def _hint(comparison: Comparison) -> Markup | None:
    notes = []
    if comparison.cost.homes is not Homes.FOLLOW:
        notes.append(
            "Here tokens go home between layers (homes "
            f"{comparison.cost.homes.value}), so this flow costs nothing by itself; "
            "it does where tokens stay with their experts (homes follow)."
        )
    if (np.diff(comparison.statistics.layer_ids) != 1).any():
        notes.append("Layers that were not recorded are skipped.")
    if comparison.result.placement.has_replicas:
        notes.append("Replicas of an expert are taken to share its tokens alike.")
    return note(" ".join(notes)) if notes else None
