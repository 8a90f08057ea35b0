"""Persistent and transient skew, in a table and in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner._words import amount
from moetuner.evaluation.evaluate import MIN_BATCHES
from moetuner.report.table import plain_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.table import Table

    from moetuner.planning.skew import Skew

    Floats = NDArray[np.float64]


_SHOWN = 5e-4  # less is printed as 0.000


def skew_table(skew: Skew) -> Table:
    """All tokens at once beside the mean batch; layers from the least to the most."""
    table = plain_table(
        f"Fullest of {amount(skew.num_ranks, 'rank')} over the mean rank "
        f"(layers from, to)"
    )
    table.add_column("experts placed", overflow="fold")
    for head in ("all tokens", f"mean of {amount(skew.num_batches, 'batch')}"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, pooled, batch in (
        ("contiguous blocks", skew.persistent, skew.blocks),
        ("best static balance", skew.left, skew.transient),
        ("by chance alone", skew.persistent_chance, skew.transient_chance),
    ):
        table.add_row(name, _layers(pooled), _layers(batch))
    return table


def skew_words(skew: Skew) -> str:
    """What a static placement can remove, what is chance, and what is neither."""
    if skew.num_ranks == 1:
        return "On one rank nothing is uneven."
    today, kept = (float(each.mean()) - 1 for each in (skew.blocks, skew.transient))
    few = ""
    if skew.num_batches < MIN_BATCHES:
        few = (
            f" With fewer than {MIN_BATCHES} batches the balance fits their chance "
            f"too: others are less even."
        )
    return (
        f"With contiguous blocks the fullest rank of a batch is {today:.3f} above the "
        f"mean. A static balance removes {skew.removable:.0%} of that and leaves "
        f"{max(kept, 0.0):.3f}. {_rest(skew)}{few}"
    )


def _rest(skew: Skew) -> str:
    """What a static balance leaves, by its cause."""
    left = float(skew.left.mean()) - 1
    chance = float(skew.transient_chance.mean()) - 1
    parts = [f"{chance - left:.3f} is chance"]
    if left >= _SHOWN:
        parts.append(
            f"{left:.3f} is experts too busy for equal slots, which replicas can spread"
        )
    if skew.changing:
        changes = f"{skew.changing:.3f} changes from batch to batch"
        return (
            f"Of that {', '.join(parts)}, and {changes}: no static balance removes it."
        )
    return f"That is no more than expected: {' and '.join(parts)}."


def _layers(values: Floats) -> str:
    return f"{values.mean():.3f} ({values.min():.2f}, {values.max():.2f})"
