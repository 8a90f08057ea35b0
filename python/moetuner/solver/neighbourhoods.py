"""Which ranks of a layer are freed next, and what is known of the layer.

Legend: L layers, E experts, G ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner.solver.base import SolveStatus
from moetuner.solver.layer_ilp import LayerProgram, count_visits, layer_program
from moetuner.solver.layer_tokens import LayerTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.cbc import MilpResult

    RankOf = NDArray[np.int32]

MOST_VISITS = 20_000
"""Size of a program of two ranks beyond which none is built."""
_SHAVED = 1e-9
"""Share of its time that a layer must lose to be better, beyond rounding."""


@dataclass(kw_only=True)
class LayerSearch:
    """The neighbourhoods of one layer: sets of free ranks, never one twice in vain.

    As many ranks are freed as ``max_visits`` allows, at least two, at most all. A
    program that is not closed in time makes the next sets smaller; when all sets of a
    size are closed, they grow, up to the size that was not closed.
    """

    problem: PlacementProblem
    layer: int
    rank_of: RankOf
    """Ranks [E] now."""
    seconds: float
    """Time of the layer now."""
    max_visits: int
    rng: np.random.Generator
    bound: float | None = None
    """What programs of the whole layer prove, seconds."""
    program: LayerProgram | None = None
    """The one that is being solved."""
    closed: bool = False
    """Whether nothing is left to try."""
    tokens: LayerTokens = field(init=False)
    _width: int = field(init=False)
    _too_wide: int = field(init=False)
    _tried: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tokens = LayerTokens.of(self.problem, self.layer)
        self._too_wide = self.problem.topology.num_ranks + 1
        self._width = self._too_wide - 1
        while self._width >= 2 and not self._fits():
            self._too_wide, self._width = self._width, self._width - 1
        self.closed = self._width < 2

    @property
    def whole(self) -> bool:
        """Whether the program that is being solved frees all ranks."""
        num_ranks = self.problem.topology.num_ranks
        return self.program is not None and self.program.ranks.size == num_ranks

    def open_program(self) -> LayerProgram:
        """The program of the next neighbourhood."""
        num_ranks = self.problem.topology.num_ranks
        while True:
            ranks = np.sort(self.rng.permutation(num_ranks)[: self._width])
            if ranks.tobytes() not in self._tried:
                break
        self._tried.add(ranks.tobytes())
        self.program = layer_program(
            self.problem, self.tokens, self.rank_of, ranks, self.seconds
        )
        return self.program

    def candidate(self, result: MilpResult) -> RankOf | None:
        """Ranks [E] that the program says are better, or None."""
        assert self.program is not None
        if self.whole and result.bound is not None:
            bound = max(self.program.seconds(result.bound), 0.0)
            self.bound = bound if self.bound is None else max(bound, self.bound)
        if result.x is None:
            return None
        value = self.program.seconds(float(self.program.model.objective @ result.x))
        if value >= self.seconds * (1 - _SHAVED):
            return None
        return self.program.read(result.x)

    def close(self, result: MilpResult, better: RankOf | None, seconds: float) -> None:
        """End the neighbourhood, with ranks [E] that were taken and their time."""
        assert self.program is not None
        proven = result.status is SolveStatus.OPTIMAL
        if proven and self.whole:
            self.closed = True
        if better is not None:
            self.rank_of, self.seconds = better, seconds
            now = self.program.ranks.tobytes()
            self._tried = {now} if proven else set()
        self.program = None
        if not proven:
            self._too_wide = min(self._too_wide, self._width)
            if self._width > 2:
                self._width, self._tried = self._width - 1, set()
        num_ranks = self.problem.topology.num_ranks
        while len(self._tried) >= math.comb(num_ranks, self._width):
            self._width, self._tried = self._width + 1, set()
            if self._width >= self._too_wide:
                self.closed = True
                break

    def _fits(self) -> bool:
        """Whether the first ranks of this number make a program of legal size."""
        ranks = np.arange(self._width)
        visits = count_visits(self.problem, self.tokens, self.rank_of, ranks)
        limit = MOST_VISITS if self._width == 2 else self.max_visits
        return visits <= limit
