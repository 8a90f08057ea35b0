"""Bounds by pricing sets: where few sets of experts can be a group, all are priced.

Let s run over all sets of S experts, y[s] = 1 when s is one of the P groups. For every
maximum m over groups (compute or links of one batch) and every expert e

    value of m >= floor[m] + sum over s with e in s of y[s] excess[m, s]

because one group holds e. With u[m, e] >= 0, sum over e of u[m, e] <= 1, any p[e]::

    sum of the maxima >= sum floor[m] + sum p[e]
        + P min over s of sum over e in s of (sum over m of u[m, e] excess[m, s] - p[e])

A linear program over some of the sets finds u and p; sets that undercut join it. The
formula is evaluated over all sets. The proof is in ``docs/bounds.md``.

Legend: Q batches, M maxima, E experts, N sets, S slots, P groups.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, hstack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.bounds.visits import RuleBook

    Floats = NDArray[np.float64]

_MAX_SETS = 60_000
_MAX_CELLS = 20_000_000
"""Of the table [M, N]."""
_FIRST, _MORE = 25, 500
"""Sets per expert to begin with, and sets that join at a time."""
_CLOSE = 1e-5
_CHUNK = 1 << 18
"""Words of 64 tokens that are counted at a time."""
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8))
_ONES = _ONES.reshape(1 << 16, 16).sum(axis=1, dtype=np.uint8)
"""Ones in the binary digits of a number."""


def few_enough(num_groups: int, slots: int, maxima: int) -> bool:
    """Whether all sets of `slots` experts can be priced."""
    sets = math.comb(num_groups * slots, slots)
    return num_groups > 1 and sets <= _MAX_SETS and sets * maxima <= _MAX_CELLS


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Maxima:
    """Maxima over groups, of some batches of one trace, in seconds.

    Parameters
    ----------
    rows
        float64 [Q, E], rows of each expert in each batch.
    compute_floor, planes
        [Q], and seconds per row and per active expert: compute is the largest of the
        floor and of what each plane makes of rows and active experts.
    tokens
        Of each batch the experts of its tokens, int [t, K], -1 where there is none.
        Without tokens links count rows.
    link_floor, per_visit
        [Q] and a number: seconds per token that visits a group.
    weight
        What a batch counts for.
    """

    rows: Floats
    compute_floor: Floats
    planes: tuple[tuple[float, float], ...]
    tokens: tuple[NDArray[np.integer[Any]], ...]
    link_floor: Floats
    per_visit: float
    weight: float

    @property
    def floor(self) -> float:
        """Seconds that no placement saves."""
        return self.weight * float(self.compute_floor.sum() + self.link_floor.sum())

    def excess(self, sets: NDArray[np.int64]) -> Floats:
        """Seconds of each maximum above its floor, if a group is `sets` [N, S]."""
        num_items = int(sets.max()) + 1
        rows = np.zeros((len(self.rows), num_items))
        rows[:, : self.rows.shape[1]] = self.rows
        held, active = (table[:, sets].sum(axis=2) for table in (rows, rows > 0))
        compute = np.maximum.reduce(
            [held * row + active * expert for row, expert in self.planes]
        )
        links = np.array([visits(of, sets) for of in self.tokens]) * self.per_visit
        above = [compute - self.compute_floor[:, None]]
        if len(links):
            above.append(links - self.link_floor[:, None])
        return np.asarray(np.maximum(np.vstack(above), 0) * self.weight)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PricedSets:
    """A piece of the objective: maxima of one layer, plus ``constant`` seconds.

    Parameters
    ----------
    name, least
        As in `moetuner.bounds.relaxation.RelaxedPiece`.
    num_groups, slots
        Groups P of S experts each.
    known
        Group of each expert in a good placement, int [E], or None.
    """

    name: str
    least: float
    constant: float
    num_groups: int
    slots: int
    maxima: tuple[Maxima, ...]
    known: NDArray[np.integer[Any]] | None
    searched: bool = True

    def bound(
        self,
        deadline: float,
        max_iterations: int,
        book: RuleBook | None = None,  # noqa: ARG002  (as of every piece)
        last: float | None = None,  # noqa: ARG002  (a step is short)
    ) -> float:
        """Best lower bound found until ``time.time()`` is `deadline`, in seconds."""
        items = self.num_groups * self.slots
        every = itertools.combinations(range(items), self.slots)
        sets = np.array(list(every), np.int64)
        excess = np.vstack([each.excess(sets) for each in self.maxima])
        floor = self.constant + sum(each.floor for each in self.maxima)
        scale = float(excess.max())
        if not scale:
            return max(self.least, floor)
        search = _Columns(sets=sets, excess=excess / scale, num_groups=self.num_groups)
        search.begin(self.known)
        for _ in range(max_iterations):
            if not search.improve(deadline - time.time()):
                break
        return max(self.least, floor + scale * search.best)


class _Columns:
    """Column generation over sets; ``best`` is proven at every moment."""

    def __init__(
        self, *, sets: NDArray[np.int64], excess: Floats, num_groups: int
    ) -> None:
        self.sets, self.excess, self.num_groups = sets, excess, num_groups
        self.items, self.best = num_groups * sets.shape[1], 0.0
        self.member = np.zeros((len(sets), self.items))
        self.member[np.arange(len(sets))[:, None], sets] = 1
        self.chosen: NDArray[np.int64] = np.empty(0, np.int64)

    def begin(self, known: NDArray[np.integer[Any]] | None) -> None:
        """Choose sets of a known placement, of neighbours, and some at random."""
        rng = np.random.default_rng(0)
        size = min(_FIRST * self.items, len(self.sets))
        first = [rng.choice(len(self.sets), size, replace=False)]
        labels = [np.arange(self.items) // self.sets.shape[1]]
        if known is not None and np.bincount(known).max() <= self.sets.shape[1]:
            labels.append(_filled(known, self.num_groups, self.sets.shape[1]))
        for label in labels:
            same = (label[self.sets] == label[self.sets[:, :1]]).all(axis=1)
            first.append(np.flatnonzero(same))
        self.chosen = np.unique(np.concatenate(first))

    def improve(self, seconds: float) -> bool:
        """Solve for the chosen sets, bound over all, choose more; whether to go on."""
        solved = self._solve(seconds) if seconds > 0 else None
        if solved is None:
            return False
        shares, prices = solved
        reduced = -(self.member @ prices)
        for of_maximum, excess in zip(shares, self.excess, strict=True):
            reduced += (self.member @ of_maximum) * excess
        least, total = float(reduced.min()), float(prices.sum())
        rounding = 1e-12 * (1 + float(np.abs(prices).sum()) + self.num_groups)
        bound = total + self.num_groups * least - rounding
        self.best = max(self.best, bound)
        if self.num_groups * least > -_CLOSE * max(abs(total), 1e-9):
            return False
        more = np.argpartition(reduced, min(_MORE, len(reduced)) - 1)[:_MORE]
        before = len(self.chosen)
        self.chosen = np.union1d(self.chosen, more[reduced[more] < 0])
        return len(self.chosen) > before

    def _solve(self, seconds: float) -> tuple[Floats, Floats] | None:
        """(u [M, E], p [E]) of the chosen sets' linear program."""
        sets, excess = self.sets[self.chosen], self.excess[:, self.chosen]
        maximum, column = np.nonzero(excess)
        size = sets.shape[1]
        num_rows = len(excess) * self.items
        held = coo_array(
            (
                np.repeat(excess[maximum, column], size),
                (
                    (maximum[:, None] * self.items + sets[column]).ravel(),
                    np.repeat(column, size),
                ),
            ),
            shape=(num_rows, len(sets)),
        )
        rows = np.arange(num_rows)
        less = coo_array((-np.ones(num_rows), (rows, rows // self.items)))
        free = coo_array((self.items, len(excess)))
        found = linprog(  # type: ignore[call-overload]
            np.repeat([0.0, 1.0], [len(sets), len(excess)]),
            A_ub=hstack([held, less]).tocsr(),
            b_ub=np.zeros(num_rows),
            A_eq=hstack([coo_array(self.member[self.chosen].T), free]).tocsr(),
            b_eq=np.ones(self.items),
            method="highs-ipm",
            options={"time_limit": seconds},
        )
        if found.status != 0:
            return None
        shares = np.maximum(-found.ineqlin.marginals.reshape(len(excess), -1), 0)
        shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1)
        return shares, np.asarray(found.eqlin.marginals, np.float64)


def visits(tokens: NDArray[np.integer[Any]], sets: NDArray[np.int64]) -> Floats:
    """Tokens [t, K] with an expert in each of the sets [N, S], float64 [N]."""
    there = np.zeros((int(sets.max()) + 1, len(tokens)), np.bool_)
    token, choice = np.nonzero(tokens >= 0)
    there[tokens[token, choice], token] = True
    bits = np.packbits(there, axis=1)
    bits = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 8))).view(np.uint64)
    counts = np.empty(len(sets))
    step = max(_CHUNK // max(bits.shape[1], 1), 1)
    for start in range(0, len(sets), step):
        some = sets[start : start + step]
        union = bits[some[:, 0]]
        for column in some.T[1:]:
            union |= bits[column]
        ones = _ONES[union.view(np.uint16)]
        counts[start : start + step] = ones.sum(axis=1, dtype=np.int64)
    return counts


def _filled(
    known: NDArray[np.integer[Any]], num_groups: int, slots: int
) -> NDArray[np.int64]:
    """`known`, and experts without rows where there is room."""
    room = slots - np.bincount(known, minlength=num_groups)
    empty = np.repeat(np.arange(num_groups), room)
    return np.concatenate([known.astype(np.int64), empty])
