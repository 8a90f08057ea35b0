"""The verdict, and the few numbers that it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.report.html.content import Pair
from moetuner.report.html.markup import Markup, tag
from moetuner.report.verdict import called, decisive_gain, is_claimed, verdict
from moetuner.report.words import interval, number, percent, size

if TYPE_CHECKING:
    from moetuner.placement.changes import Changes
    from moetuner.planning.scores import Comparison

    Tile = tuple[str, str, str]


def summary(comparison: Comparison, moved: Changes) -> Markup:
    """What came out, and the figures behind it."""
    gain = decisive_gain(comparison)
    mood, sign = "even", "="
    if gain is not None and is_claimed(gain):
        mood, sign = ("good", "✓") if gain.gain > 0 else ("bad", "!")
    return tag(
        "section",
        tag(
            "div",
            tag("span", sign, class_="sign", aria_hidden="true"),
            tag("p", verdict(comparison)),
            class_=f"verdict {mood}",
        ),
        tag(
            "div",
            *(
                tag(
                    "div",
                    tag("p", name, class_="what"),
                    tag("p", value, class_="value"),
                    tag("p", detail, class_="detail"),
                    class_="tile",
                )
                for name, value, detail in _tiles(comparison, moved)
            ),
            class_="tiles",
        ),
        id="verdict",
    )


def _tiles(comparison: Comparison, moved: Changes) -> list[Tile]:
    pair = Pair.of(comparison)
    before, after = pair.before, pair.after
    tiles: list[Tile] = [
        *_gain_tiles(comparison),
        _tile(
            "busiest rank / mean",
            before.evaluation.imbalance_mean,
            after.evaluation.imbalance_mean,
            "load, mean over layers",
        ),
        _tile(
            "remote ranks per token",
            before.evaluation.remote_ranks_per_token,
            after.evaluation.remote_ranks_per_token,
            "remote ranks, mean over layers",
        ),
    ]
    if pair.differ:
        share = moved.num_moved / moved.num_replicas
        words = (
            f"{moved.num_moved:,} of {moved.num_replicas:,} ({share:.0%}) change ranks "
            f"from {called(before.name)}"
        )
        tiles.append(("weights to move", size(moved.bytes_moved), words))
    return tiles


def _gain_tiles(comparison: Comparison) -> list[Tile]:
    """The mean batch: over the best baseline, then over the reference."""
    result, rival = comparison.result, comparison.rival
    if result.gain is None:
        seconds = result.evaluation.batch_seconds_mean
        return [("mean batch", f"{number(seconds * 1e3)} ms", "modelled time")]
    gains = {called(comparison.baseline.name): result.gain}
    if rival is not None and rival.gain and rival.name != comparison.baseline.name:
        gains = {f"{called(rival.name)}, the best baseline": rival.gain, **gains}
    return [
        (
            "gain in the mean batch",
            percent(gain.gain),
            f"over {name}: {interval(gain)} (95% interval)",
        )
        for name, gain in gains.items()
    ]


def _tile(name: str, before: float, after: float, detail: str) -> Tile:
    if before != before or after != after:
        return (name, "unknown", "the source only counted loads")
    return (name, f"{number(before)} → {number(after)}", detail)
