"""What is compared: a placement, and an exchange that carries its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetuner import Wire

if TYPE_CHECKING:
    from case import Case

PER_EXPERT = "all-to-all per expert"
ALL_GATHER = "all-gather"
OURS = "ours"
FOLLOW = "ours, follow"
WIRES = {  # what the evaluator calls the rows of each
    PER_EXPERT: Wire.PER_EXPERT,
    ALL_GATHER: Wire.ALLGATHER,
    OURS: Wire.DEDUP,
    FOLLOW: Wire.DEDUP,
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A placement by its name in `plans.PLANNERS`, under an exchange."""

    placement: str
    exchange: str = OURS

    @property
    def name(self) -> str:
        """For people, and for result files."""
        return f"{self.exchange}: {self.placement}"


BASELINE = Variant(placement="contiguous", exchange=PER_EXPERT)
"""The paper's own stack: blocks of experts, a row for each (token, expert)."""
CONTIGUOUS = Variant(placement="contiguous")
PLACEMENTS = (
    *("contiguous", "random", "lpt", "lpt, chain", "eplb", "eplb + replicas"),
    *("paper", "affinity", "joint", "joint + replicas"),
)
OUR_PLANS = {"joint", "joint + replicas"}
WITH_REPLICAS = {"eplb + replicas", "joint + replicas"}
FOLLOWED = ("contiguous", "paper", "joint for follow")
ABLATION = {
    "the paper's baseline": BASELINE,
    "exchange alone": CONTIGUOUS,
    "placement alone": Variant(placement="joint for per-expert", exchange=PER_EXPERT),
    "both": Variant(placement="joint"),
    "both, with replicas": Variant(placement="joint + replicas"),
    "follow": Variant(placement="joint for follow", exchange=FOLLOW),
}
ALL = (
    BASELINE,
    Variant(placement="paper", exchange=PER_EXPERT),
    ABLATION["placement alone"],
    Variant(placement="contiguous", exchange=ALL_GATHER),
    Variant(placement="lpt", exchange=ALL_GATHER),
    *(Variant(placement=name) for name in PLACEMENTS),
    *(Variant(placement=name, exchange=FOLLOW) for name in FOLLOWED),
)


def runnable(case: Case, only: list[str] | None = None) -> list[Variant]:
    """Those that a case has placements for; with `only` that have it in their names.

    Tokens cannot follow their first experts where nobody knows which these are.
    """
    found = [variant for variant in ALL if variant.placement in case.placements]
    if not case.routing.ranked:
        found = [variant for variant in found if variant.exchange != FOLLOW]
    if only:
        found = [v for v in found if any(part in v.name for part in only)]
    return found
