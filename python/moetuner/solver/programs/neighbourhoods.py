"""Which ranks of a layer are freed next, and what is known of the layer.

Legend: L layers, E experts, G ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moetuner.solver.base import SolveStatus
from moetuner.solver.programs.layer import LayerProgram, count_visits, layer_program
from moetuner.solver.programs.layer_tokens import LayerTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem
    from moetuner.solver.programs.cbc import MilpResult

    RankOf = NDArray[np.int32]

MOST_VISITS = 20_000
"""Size of a program of two ranks beyond which none is built."""
WHOLE_VISITS = 1_200
"""Size up to which a whole layer is tried: about 16 experts, two chosen by a token."""
MORE_EFFORT = 4
"""How much more time a program gets when it is tried again."""
_SHAVED = 1e-9
"""Share of its time that a layer must lose to be better, beyond rounding."""


@dataclass(kw_only=True)
class LayerSearch:
    """The neighbourhoods of one layer: sets of free ranks, never one twice in vain.

    As many ranks are freed as ``max_visits`` allows, at least two. A program that is
    not closed in time makes the next sets smaller; when all sets of a size are done,
    they grow. What was not closed is tried again, with more time, when nothing else is
    left.
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
    effort: int = 1
    """How much longer than at first a program may take."""
    program: LayerProgram | None = None
    """The one that is being solved."""
    closed: bool = False
    """Whether nothing is left to try."""
    tokens: LayerTokens = field(init=False)
    _sizes: list[int] = field(init=False)
    """Numbers of ranks that may be freed, ascending."""
    _at: int = field(init=False)
    _end: int = field(init=False)
    """Sizes from here on were not closed in time."""
    _gave_up: bool = field(init=False)
    _tried: set[bytes] = field(default_factory=set)
    """Sets of ranks that had their turn, with this effort or closed."""
    _solved: set[bytes] = field(default_factory=set)
    """Those of them whose program was closed since the layer last changed."""

    def __post_init__(self) -> None:
        self.tokens = LayerTokens.of(self.problem, self.layer)
        self._sizes = self._sizes_that_fit()
        self.closed = not self._sizes
        self._from_the_largest()

    @property
    def whole(self) -> bool:
        """Whether the program that is being solved frees all ranks."""
        num_ranks = self.problem.topology.num_ranks
        return self.program is not None and self.program.ranks.size == num_ranks

    def open_program(self) -> LayerProgram:
        """The program of the next neighbourhood."""
        num_ranks = self.problem.topology.num_ranks
        while True:
            ranks = np.sort(self.rng.permutation(num_ranks)[: self._sizes[self._at]])
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
            self._tried, self._solved = set(), set()
        if proven:
            self._solved.add(self.program.ranks.tobytes())
            self._tried |= self._solved
        else:
            self._end, self._gave_up = min(self._end, max(self._at, 1)), True
            self._at = max(self._at - 1, 0)
        self.program = None
        while not self.closed and self._all_tried():
            self._go_on()

    def _all_tried(self) -> bool:
        size = self._sizes[self._at]
        done = sum(len(key) == _key_bytes(size) for key in self._tried)
        return done >= math.comb(self.problem.topology.num_ranks, size)

    def _go_on(self) -> None:
        """To larger sets, or what took too long, or to the end."""
        if self._at + 1 < self._end:
            self._at += 1
        elif self._gave_up:
            self.effort *= MORE_EFFORT
            self._from_the_largest()
        else:
            self.closed = True

    def _from_the_largest(self) -> None:
        self._end, self._gave_up = len(self._sizes), False
        self._at, self._tried = self._end - 1, set(self._solved)

    def _sizes_that_fit(self) -> list[int]:
        """Numbers of ranks whose programs are small enough, by the first of them."""
        num_ranks = self.problem.topology.num_ranks
        sizes = []
        for size in range(2, num_ranks + 1):
            limit = MOST_VISITS if size == 2 else self.max_visits
            if size == num_ranks:  # a proof is worth more
                limit = max(limit, WHOLE_VISITS)
            visits = count_visits(
                self.problem, self.tokens, self.rank_of, np.arange(size)
            )
            if visits <= limit:
                sizes.append(size)
        return sizes


def _key_bytes(size: int) -> int:
    """Length of the key of a set of so many ranks."""
    return np.arange(size).nbytes
