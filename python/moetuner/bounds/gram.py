"""How much of a pair weight can experts keep inside equal groups? A safe upper bound.

Items (experts, perhaps of two layers) fall into P groups. Y[i, j] = 1 when i and j
share one. Every group holds ``sizes[b]`` items of block b; kappa = sum(sizes)::

    Y = J / P + M,  M rows sum to 0 in every block,  0 <= M <= kappa I,
    trace M = kappa (P - 1),  diag Y = 1,  0 <= Y <= 1

For *any* symmetric D the weight <K, Y> of every partition is at most::

    <K - D, J> / P + kappa * (P - 1 largest eigenvalues of K - D, rows centred by block)
      + sum_i D[i, i] + sum_(i != j) max(0, D[i, j])

Alternating directions look for a good D; whatever they find, the formula holds. The
proof is in ``docs/bounds.md``.

Legend: n items, P groups.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import eigh

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SINGLE_FROM = 96
"""From this many items on, iterates are float32; the bound never is."""
_CHECK_EVERY = 10
_RELAXATION = 1.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Groups of equal make-up.

    Parameters
    ----------
    num_groups
        Number of groups P.
    sizes
        Items of each block in one group; block b has ``P * sizes[b]`` items, blocks
        follow one another.
    apart
        Whether the items of the last block are all in different groups (it then has
        one of each).
    """

    num_groups: int
    sizes: tuple[int, ...]
    apart: bool = False

    @property
    def num_items(self) -> int:
        """Number of items n."""
        return self.num_groups * self.kappa

    @property
    def kappa(self) -> int:
        """Items of one group."""
        return sum(self.sizes)

    def blocks(self) -> list[slice]:
        """Where each block lies."""
        ends = np.cumsum([0, *self.sizes]) * self.num_groups
        return [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]

    def ceiling(self) -> Floats:
        """Largest entries of Y, [n, n]: 1, and 0 between items that are apart."""
        most = np.ones((self.num_items, self.num_items))
        if self.apart:
            block = self.blocks()[-1]
            most[block, block] = np.eye(self.num_groups)
        return most


@dataclass(kw_only=True, slots=True)
class KeptWeight:
    """The search for a small upper bound of <K, Y>; stop it when you like.

    Parameters
    ----------
    weight
        K, symmetric float64 [n, n].
    groups
        What a partition looks like.
    """

    weight: Floats
    groups: Groups
    bound: float = np.inf
    """Smallest upper bound so far."""
    iterations: int = 0
    shared: Any = None
    """Latest Y [n, n] of the relaxation, or None."""
    _multiplier: Any = None
    _rho: float = 0.0
    _scale: float = 0.0

    def reweigh(self, weight: Floats) -> None:
        """Go on with another K, from where the search stands."""
        self.weight, self.bound = weight, np.inf

    def quick(self) -> float:
        """Bound without iterating: each item keeps its heaviest possible partners."""
        kept = float(np.trace(self.weight))
        off = self.weight.copy()
        np.fill_diagonal(off, -np.inf)
        blocks = self.groups.blocks()
        for rows in blocks:
            for columns, size in zip(blocks, self.groups.sizes, strict=True):
                count = size - (rows == columns)
                if count > 0:
                    part = -np.partition(-off[rows, columns], count - 1, axis=1)
                    kept += float(part[:, :count].sum())
        self.bound = min(self.bound, kept)
        return self.bound

    def improve(self, until: float = np.inf, max_iterations: int = 2000) -> float:
        """Iterate until ``time.time()`` is `until`, or the bound falls no more."""
        if not self.weight.any():
            return self.quick()
        if self.shared is None:
            self._begin()
        most = self.groups.ceiling().astype(self.shared.dtype)
        weight = (self.weight / self._scale).astype(self.shared.dtype)
        stale, best = 0, np.inf
        while self.iterations < max_iterations and time.time() < until:
            self._step(weight, most)
            if self.iterations % _CHECK_EVERY == 0:
                now = self._evaluate(
                    self._rho * self._scale * self._multiplier.astype(np.float64)
                )
                stale = 0 if now < best - 1e-5 * abs(best) else stale + 1
                best = min(best, now)
                if stale >= 3:
                    break
        self.bound = min(self.bound, best)
        return self.bound

    def _begin(self) -> None:
        n = self.groups.num_items
        dtype = np.float32 if n >= _SINGLE_FROM else np.float64
        self._scale = float(np.abs(self.weight).max())
        self.shared = np.full((n, n), 1 / self.groups.num_groups, dtype)
        np.fill_diagonal(self.shared, 1)
        self._multiplier = np.zeros((n, n), dtype)
        norm = float(np.linalg.norm(self.weight)) / self._scale
        self._rho = norm / max(float(np.linalg.norm(self.shared)), 1e-12)

    def _step(self, weight: NDArray[Any], most: NDArray[Any]) -> None:
        """Project on the spectral set, then on the box; the multiplier answers."""
        before, u = self.shared, self._multiplier
        y = self._spectral(before - u + weight / self._rho)
        mixed = _RELAXATION * y + (1 - _RELAXATION) * before
        z = np.clip(mixed + u, 0, most)
        np.fill_diagonal(z, 1)
        u += mixed - z
        self.shared = z
        self.iterations += 1
        if self.iterations % 5 == 0 and self.iterations < 100:
            primal = float(np.linalg.norm(y - z))
            dual = float(np.linalg.norm(z - before))
            factor = np.sqrt(primal / max(dual, 1e-12))
            factor = float(np.clip(factor, 0.5, 2.0))
            self._rho *= factor
            u /= factor

    def _evaluate(self, d: Floats) -> float:
        """The formula at D, in double precision, rounding allowed for."""
        d = (d + d.T) / 2
        groups, rest = self.groups, self.weight - d
        centred = _centre(rest, groups)
        count = groups.num_groups - 1
        kept = float(rest.sum()) / groups.num_groups
        if count:
            # Block indicators are eigenvectors of the centred matrix with value 0, and
            # are not available: push them below all others.
            norm = float(np.abs(centred).sum(axis=1).max()) + 1e-300
            for block in groups.blocks():
                centred[block, block] -= 2 * norm / (block.stop - block.start)
            n = groups.num_items
            top = eigh(
                centred,
                eigvals_only=True,
                subset_by_index=(n - count, n - 1),
                check_finite=False,
            )
            kept += groups.kappa * float(top.sum())
            kept += groups.kappa * count * n * np.finfo(float).eps * norm
        most = groups.ceiling()
        diagonal = np.diagonal(d).copy()
        np.fill_diagonal(d, 0)
        return kept + float(diagonal.sum() + (np.maximum(d, 0) * most).sum())

    def _spectral(self, x: NDArray[Any]) -> NDArray[Any]:
        """Nearest Y = J / P + M with M as above."""
        groups = self.groups
        centred = _centre((x + x.T) / 2, groups)
        # Block indicators must stay out: far enough below, but not so far that single
        # precision is lost on them.
        push = float(np.linalg.norm(centred)) + 2 * groups.kappa
        for block in groups.blocks():
            centred[block, block] -= push / (block.stop - block.start)
        values, vectors = eigh(
            centred, overwrite_a=True, check_finite=False, driver="evd"
        )
        kept = _capped(values, groups.kappa, groups.kappa * (groups.num_groups - 1))
        used = kept > 0
        factor = vectors[:, used] * np.sqrt(kept[used])
        nearest: NDArray[Any] = factor @ factor.T
        nearest += np.asarray(1 / groups.num_groups, x.dtype)
        return nearest


def _centre(x: NDArray[Any], groups: Groups) -> NDArray[Any]:
    """`x` with the means of rows and columns taken out, block by block."""
    out: NDArray[Any] = x.copy()
    for block in groups.blocks():
        out[block] -= out[block].mean(axis=0, keepdims=True)
    for block in groups.blocks():
        out[:, block] -= out[:, block].mean(axis=1, keepdims=True)
    return out


def _capped(values: NDArray[Any], cap: float, total: float) -> NDArray[Any]:
    """Nearest numbers in [0, cap] that sum to `total`."""
    low, high = float(values.min()) - cap, float(values.max())
    for _ in range(60):
        shift = (low + high) / 2
        if np.clip(values - shift, 0, cap).sum() > total:
            low = shift
        else:
            high = shift
    kept: NDArray[Any] = np.clip(values - high, 0, cap)
    return kept
