"""Rounds of the search that walks tokens: replicas, or homes and a row per expert.

Legend: T tokens, L layers, E experts, G ranks, N nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

import moetuner._core as _core
from moetuner.solver.joint.layers import search_options
from moetuner.solver.joint.scenarios import (
    Scenarios,
    SearchProfile,
    first_homes,
    make_scenarios,
    search_problem,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem
    from moetuner.solver.base import Clock, SolverOptions
    from moetuner.solver.joint.interruptible import Interruptible

    Floats = NDArray[np.float64]
    Slots = NDArray[np.int32]

WARM, COOL = 0.1, 0.01
"""Temperatures, in units of the median |change| of a random move."""
MAX_WALKED_TOKENS = 6_144
"""Tokens that are walked; a move costs time in proportion."""
SWEEPS = 8
"""Even and odd layers take turns so many times in a round."""


@dataclass(kw_only=True)
class TokenRounds:
    """Annealing with exact changes of what sampled tokens cost on their way."""

    problem: PlacementProblem
    options: SolverOptions
    profile: SearchProfile
    runner: Interruptible
    replicas: bool = False
    placement: Placement = field(init=False)
    _least: float = np.inf
    _scenarios: Scenarios = field(init=False)
    _search: _core.SearchProblem = field(init=False)
    _rounds: int = 0

    def __post_init__(self) -> None:
        workload = self.problem.workload
        self._scenarios = make_scenarios(
            workload, self.profile.scenario_tokens, MAX_WALKED_TOKENS
        )
        self._search = search_problem(
            self.problem,
            self._scenarios,
            self.profile,
            home=first_homes(self.problem, self._scenarios),
            replicas=self.replicas,
        )

    def begin(self, placements: list[Placement], clock: Clock) -> None:
        """Take the best of them, the last first, as where the walk begins.

        Looks at no more of them than the clock allows.
        """
        for placement in reversed(placements):
            if self._least < np.inf and not clock.left:
                break
            score = self.score(placement)
            if score <= self._least:
                self.placement, self._least = placement, score

    def round(self, proposals: int, seconds: float) -> bool:
        """Anneal from the best placement so far; whether there is a better one now."""
        self._rounds += 1
        seed = self.options.round_seed(self._rounds)
        slots, _ = self.runner.run(
            lambda stop: self.anneal(
                self.placement.slot_experts, proposals, seconds, seed, stop
            )
        )
        found = replace(self.placement, slot_experts=slots)
        score = self.score(found)
        if score >= self._least:
            return False
        self.placement, self._least = found, score
        return True

    def settle(self) -> int:
        """There is one way only."""
        return 1

    def anneal(
        self,
        slot_experts: Slots,
        proposals: int,
        seconds: float,
        seed: int,
        stop: NDArray[np.int32],
        *,
        hot: float = WARM,
        cold: float = COOL,
        sweeps: int = SWEEPS,
    ) -> tuple[Slots, Floats]:
        """Slots after annealing, [L, P], and search costs, [L].

        A layer's cost holds its way to the next one too, where homes follow.
        """
        options = search_options(
            self.options, proposals, seconds, seed, hot=hot, cold=cold, sweeps=sweeps
        )
        return _core.search_tokens(self._search, options, slot_experts, stop)

    def score(self, placement: Placement) -> float:
        """Search cost of a placement, on the sampled tokens."""
        if self.runner.interrupted:
            return float("inf")
        _, cost = self.anneal(
            placement.slot_experts,
            0,
            float("inf"),
            0,
            np.zeros(1, np.int32),
            sweeps=1,
        )
        return float(cost.sum())
