"""Numbers of things, as people say them."""

from __future__ import annotations

SHOWN = 5e-4
"""Changes below are printed as 0.0%."""


def amount(number: float, thing: str) -> str:
    """``1 layer``, ``58 layers``, ``2,048 tokens``; of several words the first counts.

    ``amount(2, "batch")`` is ``2 batches``, ``amount(2, "slot a rank")`` ``2 slots a
    rank``.
    """
    first, *others = thing.split(" ")
    if number != 1:
        first += "es" if first.endswith(("ch", "ss", "x")) else "s"
    return " ".join([f"{number:,}", first, *others])


def verb(number: float, one: str, several: str) -> str:
    """The form of a verb that goes with so many."""
    return one if number == 1 else several
