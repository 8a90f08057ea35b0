"""Lower bounds of the groups that one set of items visits, linear in its pairs.

Whatever numbers s[i, j] are taken for the pairs of a set of k items,

    visited >= c - sum over pairs kept together of s[i, j],
    c = min over all ways to fall into groups of  visited + sum over its kept pairs

so a rule is a choice of s; the ways are enumerated. Rules with all s alike come from
Turan's theorem (`visit_lines`); others are learnt: for given chances y[i, j] of being
together the best rule solves a linear program, max c - s.y. Rules do not know which
items they are about, so a rule that was learnt from one set serves all of its size.

Legend: W ways, R rules, p = k (k - 1) / 2 pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linprog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_MAX_WAYS = 25_000
"""Sets with more ways than this (10 items, say) keep the rules with all s alike."""
_MAX_RULES = 300
_MAX_TRIES, _MIN_TRIES = 20, 2
"""Linear programs per lesson; fewer after lessons that taught little."""
_WORTH = 2e-3
"""What a new rule gains for the set that it was made for, at least."""
_VIOLATED = 1e-9
_MAX_ADDED = 40
"""Ways that a linear program takes in at a time."""


@dataclass(kw_only=True, slots=True, eq=False)
class Touches:
    """Rules for sets of one size.

    Parameters
    ----------
    size
        Items of a set k.
    num_groups, capacity
        Groups there are, items that one can hold.
    """

    size: int
    num_groups: int
    capacity: int
    rules: Floats = field(init=False)
    """float64 [R, 1 + p]: c, then minus s of each pair."""
    _ways: tuple[Floats, Floats] | None = field(init=False)
    _rows: set[int] = field(init=False, default_factory=set)
    _tries: int = field(init=False, default=_MAX_TRIES)
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        pairs = self.size * (self.size - 1) // 2
        lines = visit_lines(self.size, self.num_groups, self.capacity)
        alike = [[u + v * pairs] + [-v] * pairs for u, v in lines]
        self.rules = np.array(alike)
        self._rng = np.random.default_rng(0)
        self._ways = ways(self.size, self.num_groups, self.capacity)
        if self._ways is not None:
            visited = self._ways[0]
            self._rows = {int(visited.argmin()), int(visited.argmax())}

    def best(self, together: NDArray[np.floating]) -> Floats:
        """The best rule of each set, [T, 1 + p], by ``together`` [T, p] in [0, 1]."""
        rules = self.rules.astype(together.dtype)
        values = together @ rules[:, 1:].T
        values += rules[:, 0]
        return np.asarray(self.rules[values.argmax(axis=1)])

    def learn(self, together: NDArray[np.floating]) -> None:
        """Add the best rules there are for a few of the sets, ``together`` [T, p]."""
        room = _MAX_RULES - len(self.rules)
        tries = min(self._tries, len(together), room)
        if self._ways is None or self.size < 3 or tries < 1:
            return
        learnt = 0
        for index in self._rng.choice(len(together), tries, replace=False):
            pairs = together[index].astype(np.float64)
            best = float((self.rules[:, 0] + self.rules[:, 1:] @ pairs).max())
            rule = self._solve(pairs)
            if rule is not None and rule[0] + rule[1:] @ pairs > best * (1 + _WORTH):
                self.rules = np.vstack([self.rules, rule])
                learnt += 1
        change = self._tries * 2 if 4 * learnt > tries else self._tries // 2
        self._tries = min(max(change, _MIN_TRIES), _MAX_TRIES)

    def _solve(self, pairs: Floats) -> Floats | None:
        """The best rule with abs(s) <= 1: largest c - s.y. Ways join as they matter."""
        assert self._ways is not None
        visited, kept = self._ways
        while True:
            rows = sorted(self._rows)
            found = linprog(
                np.r_[-1.0, pairs],
                A_ub=np.column_stack([np.ones(len(rows)), -kept[rows]]),
                b_ub=visited[rows],
                bounds=[(None, None)] + [(-1.0, 1.0)] * pairs.size,
                method="highs-ds",
            )
            if found.x is None:
                return None
            slopes = found.x[1:]
            least = visited + kept @ slopes
            excess = least - found.x[0]
            missed = np.flatnonzero(excess < -_VIOLATED)
            missed = missed[np.argsort(excess[missed])][:_MAX_ADDED]
            new = set(missed.tolist()) - self._rows
            if not new:
                # c of these very slopes, less what adding up may have rounded away.
                rule: Floats = np.r_[float(least.min()) - 1e-12, -slopes]
                return rule
            self._rows |= new


@cache
def ways(size: int, num_groups: int, capacity: int) -> tuple[Floats, Floats] | None:
    """(groups visited [W], pairs kept together [W, p]) of every way to fall.

    None when there are too many. Pairs are in the order of `numpy.triu_indices`.
    """
    labels = list(itertools.islice(_falls(size, num_groups, capacity), _MAX_WAYS + 1))
    if not labels or len(labels) > _MAX_WAYS:
        return None
    group = np.array(labels)
    first, second = np.triu_indices(size, 1)
    kept = (group[:, first] == group[:, second]).astype(np.float64)
    return group.max(axis=1) + 1.0, kept


def _falls(size: int, num_groups: int, capacity: int) -> Iterator[tuple[int, ...]]:
    """Group of each item, groups numbered as they appear."""

    def grow(start: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        if len(start) == size:
            yield start
            return
        for group in range(min(used + 1, num_groups)):
            if start.count(group) < capacity:
                yield from grow((*start, group), max(used, group + 1))

    return grow((), 0)


@cache
def visit_lines(size: int, num_groups: int, capacity: int) -> Floats:
    """Lines (u, v), visited >= u + v (pairs cut), float64 [lines, 2].

    Of `size` items in d groups at most ``turan_pairs(size, d)`` pairs are cut; these
    are the lines of the convex lower hull of those points.
    """
    most = min(size, num_groups)
    least = min(-(-size // capacity), most)
    points = [(turan_pairs(size, groups), groups) for groups in range(least, most + 1)]
    hull: list[tuple[int, int]] = []
    for point in points:
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    lines = [(float(least), 0.0)]
    for (cut, groups), (more_cut, more) in itertools.pairwise(hull):
        slope = (more - groups) / (more_cut - cut)
        lines.append((groups - slope * cut, slope))
    return np.array(lines)


def turan_pairs(size: int, num_groups: int) -> int:
    """Most pairs in different groups that `size` items in `num_groups` can have."""
    small, extra = divmod(size, num_groups)
    kept = num_groups * small * (small - 1) // 2 + extra * small
    return size * (size - 1) // 2 - kept


def _above(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether `b` is on or above the line from `a` to `c`."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
