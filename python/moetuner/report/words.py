"""How figures are written, alike in the terminal, on the page and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.solver.base import relative_gap
from moetuner.trace import CountTrace

if TYPE_CHECKING:
    from moetuner.evaluation.evaluate import GainInterval
    from moetuner.planning.scores import Comparison


def percent(share: float) -> str:
    """A share with its sign and one decimal; what rounds to nothing has no sign."""
    text = f"{share:+.1%}"
    return text[1:] if text[1:] == "0.0%" else text


def interval(gain: GainInterval) -> str:
    """The ends of the interval, for a sentence."""
    return f"{percent(gain.low)} to {percent(gain.high)}"


def gain_cell(gain: GainInterval | None) -> str:
    """A gain and its interval, for a table."""
    if gain is None:
        return "-"
    return f"{percent(gain.gain)} [{percent(gain.low)}, {percent(gain.high)}]"


def number(value: float) -> str:
    """A score or milliseconds: three decimals, from a thousand on none."""
    if value != value:
        return "unknown"
    return f"{value:.3f}" if value < 1000 else f"{value:.0f}"


def solved(value: float | None) -> str:
    """What a solver minimises or proves, in its own unit."""
    return "-" if value is None else f"{value:.5g}"


def gap(value: float | None, bound: float | None) -> str:
    """How far a value may be from the best one, as a share of it."""
    share = None if value is None else relative_gap(value, bound)
    return "-" if share is None else f"{share:.2%}"


def size(amount: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB" if amount < 1000 else f"{amount:,.0f} TB"


def left_out(comparison: Comparison) -> list[tuple[str, str]]:
    """Names of baselines that are missing, with the reason that they share."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in comparison.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return [(", ".join(names), reason) for reason, names in by_reason.items()]


def unit_of(comparison: Comparison) -> str:
    """What is counted: tokens, or choices where nobody says how many a token has."""
    scored = comparison.scored
    unknown = isinstance(scored, CountTrace) and not scored.tokens_known
    return "choices of experts a layer" if unknown else "tokens"
