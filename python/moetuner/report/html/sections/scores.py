"""All placements on the same held-out tokens, in a table and two pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.report.html.charts import Part, bar_chart, gain_chart
from moetuner.report.html.content import figure, grid, note, section
from moetuner.report.html.frame import key
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.palette import PARTS
from moetuner.report.verdict import called
from moetuner.report.words import gain_cell, left_out, number, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.evaluation.evaluate import Evaluation, GainInterval
    from moetuner.planning.scores import Comparison, Scored

_COLUMNS: tuple[tuple[str, str, Callable[[Evaluation], float | None]], ...] = (
    ("batch, ms", "modelled time of a batch, mean over batches",
     lambda e: e.batch_seconds_mean * 1e3),
    ("batch p95", "95 of 100 batches take no longer",
     lambda e: _of_several(e, e.batch_seconds_p95 * 1e3)),
    ("batch p99", "99 of 100 batches take no longer",
     lambda e: _of_several(e, e.batch_seconds_p99 * 1e3)),
    ("load, mean", "busiest rank / mean rank, mean over layers",
     lambda e: e.imbalance_mean),
    ("load, worst", "busiest rank / mean rank, at the worst layer",
     lambda e: e.imbalance_worst),
    ("remote ranks", "ranks other than its home that compute a token",
     lambda e: e.remote_ranks_per_token),
    ("remote nodes", "nodes other than its home that compute a token",
     lambda e: e.remote_nodes_per_token),
    ("busiest receive", "rows into the busiest rank / its even share of tokens",
     lambda e: e.bottleneck_receive),
)  # fmt: skip
_SPENT = ("compute", "dispatch", "combine")


def scores(comparison: Comparison) -> Markup:
    """Baselines and result."""
    reference = called(comparison.baseline.name)
    gains = [(c.name, c.gain) for c in comparison.candidates if c.gain is not None]
    pictures = [_spent(comparison)]
    if gains:
        pictures.insert(
            0,
            figure(
                f"Gain in the mean batch over {reference}",
                gain_chart(gains, x="less time, 95% interval", name=_gains_name(gains)),
            ),
        )
    return section(
        "scores",
        "Scores on held-out tokens" if comparison.held_out else "Scores",
        _lead(comparison),
        tag("div", _table(comparison), class_="wide", tabindex="0"),
        *(note(f"Left out {names}: {why}") for names, why in left_out(comparison)),
        grid(*pictures),
    )


def _lead(comparison: Comparison) -> str:
    """On what was planned and scored."""
    unit = unit_of(comparison)
    scored = f"{comparison.score_tokens:,} {unit}"
    origin = comparison.result.placement.provenance
    if comparison.in_sample:
        return (
            f"Planned on all {scored}, scored on the same: nothing was held out. Other "
            f"tokens will gain less."
        )
    if comparison.plan_tokens:
        return (
            f"Planned on {comparison.plan_tokens:,} {unit} of this recording, scored "
            f"on {scored} of its other sequences."
        )
    if comparison.held_out and origin.trace_sha256:
        return (
            f"Planned on another recording, scored on all {scored} of this one; so "
            f"only the baselines that need no planning stand beside it."
        )
    if comparison.held_out:
        return f"Scored on all {scored}; nothing was planned on them."
    return (
        f"Scored on all {scored}. What the placement was planned on is unknown: if it "
        f"was on these tokens, it looks better here than it is."
    )


def _table(comparison: Comparison) -> Markup:
    head = tag(
        "tr",
        tag("th", "placement", scope="col"),
        tag("th", f"gain over {comparison.baseline.name} [95%]", scope="col"),
        *(tag("th", name, scope="col", title=words) for name, words, _ in _COLUMNS),
    )
    rows = (_row(c, c is comparison.result) for c in comparison.candidates)
    return tag("table", tag("thead", head), tag("tbody", *rows))


def _row(scored: Scored, is_result: bool) -> Markup:
    values = (value(scored.evaluation) for _, _, value in _COLUMNS)
    return tag(
        "tr",
        tag("th", scored.name, scope="row"),
        tag("td", gain_cell(scored.gain)),
        *(tag("td", "-" if each is None else number(each)) for each in values),
        class_="result" if is_result else None,
    )


def _of_several(evaluation: Evaluation, value: float) -> float | None:
    """A percentile of batches; one batch has none."""
    return value if evaluation.batch_seconds.size > 1 else None


def _gains_name(gains: list[tuple[str, GainInterval]]) -> str:
    return "Gains: " + "; ".join(f"{name} {gain_cell(gain)}" for name, gain in gains)


def _spent(comparison: Comparison) -> Markup:
    names = [candidate.name for candidate in comparison.candidates]
    parts = [
        Part(
            values=[
                getattr(c.evaluation, f"batch_{part}_seconds") * 1e3
                for c in comparison.candidates
            ],
            color=ink.css,
            name=part,
        )
        for part, ink in zip(_SPENT, PARTS, strict=True)
    ]
    return figure(
        "Where the time of the mean batch goes",
        bar_chart(parts, names, x="ms, sum over layers", name="Modelled time by part"),
        key([(part.color, "area", part.name) for part in parts]),
    )
