"""The verdict, and the few numbers that it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.report.html.content import Pair
from moetuner.report.html.markup import Markup, tag
from moetuner.report.verdict import (
    decisive_gain,
    is_claimed,
    reference_name,
    verdict,
)

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
            f"{moved.num_moved:,} of {moved.num_replicas:,} ({share:.0%}) change ranks"
        )
        tiles.append(("weights to move", size(moved.bytes_moved), words))
    return tiles


def _gain_tiles(comparison: Comparison) -> list[Tile]:
    """The mean batch: over the best baseline, then over the reference."""
    result, rival = comparison.result, comparison.rival
    if result.gain is None:
        seconds = result.evaluation.batch_seconds_mean
        return [("mean batch", f"{seconds * 1e3:.3g} ms", "modelled time")]
    reference = reference_name(comparison)
    gains = {reference: result.gain}
    if rival is not None and rival.gain and rival.name != comparison.baseline.name:
        gains = {f"{rival.name}, the best baseline": rival.gain, **gains}
    return [
        (
            "gain in the mean batch",
            f"{gain.gain:+.1%}",
            f"over {name}: {gain.low:+.1%} to {gain.high:+.1%} (95 % interval)",
        )
        for name, gain in gains.items()
    ]


def _tile(name: str, before: float, after: float, detail: str) -> Tile:
    if before != before or after != after:
        return (name, "unknown", "the source only counted loads")
    return (name, f"{before:.2f} → {after:.2f}", detail)


def size(amount: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB" if amount < 1000 else f"{amount:,.0f} TB"
