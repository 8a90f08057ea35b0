"""Measured times of experts as a price: a start, and the largest of some planes.

A plane is linear in operations, in bytes of weights and in bytes of rows, so that a
curve of one shape of experts is one of others, too::

    seconds = start + max over planes p of (a_p operations + b_p weights + c_p values)

No factor is negative: the price never falls with rows or active experts, is convex, and
searches, programs and bounds take it as it is. It is fitted to relative errors. A byte
of rows takes no longer than one of weights (c_p <= b_p): both come from the same
memory. Shapes whose inner and outer sizes are alike hardly tell operations from bytes
of rows, and without that bound any split between them would do, until a shape with
other sizes is priced.

Legend: N points, P planes, F = 3 features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.curves import GroupedGemm  # noqa: TC001 - lru_cache's keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.evaluation.models import ModelShape

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

MAX_PLANES = 4
_LEAST_VALUE_BYTES = 2.0  # values of rows are 16 bits wide where weights are less
_ROUNDS = 30  # of planes fitted to the points where each is the largest


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """Seconds per row and per active expert."""

    row: float
    expert: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeCurve:
    """What a rank's experts take: ``start`` s once, and the largest of the planes."""

    start: float
    planes: tuple[Plane, ...]

    def seconds(self, rows: float, active: float) -> float:
        """Of so many rows of so many experts; nothing for no row."""
        if not rows:
            return 0.0
        return self.start + max(
            rows * plane.row + active * plane.expert for plane in self.planes
        )


def curve_for(shape: ModelShape, measured: Sequence[GroupedGemm]) -> ComputeCurve:
    """The price of experts of `shape`: from its own points, else from all others'.

    `measured` are curves of one dtype, at least one.
    """
    own = [curve for curve in measured if _features(curve) == _features(shape)]
    start, factors = _fit(tuple(own or measured))
    row, expert = _row_and_expert(shape)
    return ComputeCurve(
        start=start,
        planes=tuple(
            Plane(row=float(factor @ row), expert=float(factor @ expert))
            for factor in factors
        ),
    )


def least_ratio(curve: ComputeCurve, other: ComputeCurve) -> float:
    """The largest c with `curve` >= c * `other` for all rows and experts, but starts.

    Along the line from one row to one active expert both are the largest of straight
    lines, so their ratio is least where one of them bends, or at an end.
    """
    bends = [0.0, 1.0]
    for planes in (curve.planes, other.planes):
        for one in planes:
            for two in planes:
                rise = (one.expert - one.row) - (two.expert - two.row)
                where = (two.row - one.row) / rise if rise else 0.0
                bends += [where] if 0.0 < where < 1.0 else []

    def highest(of: ComputeCurve, part: float) -> float:
        return max((1 - part) * p.row + part * p.expert for p in of.planes)

    pairs = [(highest(curve, part), highest(other, part)) for part in bends]
    return min((mine / its for mine, its in pairs if its), default=1.0)


def _features(of: GroupedGemm | ModelShape) -> tuple[float, ...]:
    """Sizes that tell shapes apart."""
    sizes = (of.hidden_size, of.expert_hidden_size, of.num_projections)
    return (*sizes, of.weight_bytes)


def _row_and_expert(of: GroupedGemm | ModelShape) -> tuple[Floats, Floats]:
    """Features [F] of one row, and of one active expert.

    Operations; bytes of weights; bytes of weights and of what rows move besides. A sum
    of the last two in which neither is negative bounds the rate of the rows' bytes.
    """
    hidden, inner, projections, weight_bytes = _features(of)
    weights = projections * hidden * inner
    # In and out, and what the projections leave and take between.
    values = 2 * hidden + 2 * projections * inner
    moved = max(weight_bytes, _LEAST_VALUE_BYTES) * values
    return (
        np.array([2.0 * weights, 0.0, moved]),
        np.array([0.0, weights * weight_bytes, weights * weight_bytes]),
    )


@lru_cache(maxsize=64)
def _fit(curves: tuple[GroupedGemm, ...]) -> tuple[float, Floats]:
    """The start, and factors [P, F] of the planes."""
    features, seconds, crowd = [], [], []
    for curve in curves:
        row, expert = _row_and_expert(curve)
        for point in curve.points:
            features.append(point.rows * row + point.active * expert)
            seconds.append(point.seconds)
            crowd.append(point.rows / point.active)
    wide, took = np.array(features), np.array(seconds)
    scale = wide.max(axis=0)
    found = [
        _fit_planes(wide / scale, took, np.array(crowd), planes)
        for planes in range(1, MAX_PLANES + 1)
    ]
    _, start, factors = min(found, key=lambda one: one[0])
    return start, factors / scale


def _fit_planes(
    features: Floats, seconds: Floats, crowd: Floats, planes: int
) -> tuple[float, float, Floats]:
    """Mean squared relative error, start and factors [P, F].

    Each point belongs to the plane that is the largest there; at first to one of
    `planes` parts by rows per expert. Planes and who belongs to them take turns.
    """
    order = np.argsort(crowd, kind="stable")
    owner = np.empty(len(order), np.int64)
    owner[order] = np.arange(len(order)) * planes // len(order)
    best = (np.inf, 0.0, np.zeros((planes, features.shape[1])))
    for _ in range(_ROUNDS):
        start, factors = _solve(features, seconds, owner, planes)
        values = features @ factors.T
        error = float(np.mean(((start + values.max(axis=1)) / seconds - 1) ** 2))
        if error < best[0]:
            best = (error, start, factors)
        largest = values.argmax(axis=1)
        if (largest == owner).all():
            break
        owner = largest
    return best


def _solve(
    features: Floats, seconds: Floats, owner: Ints, planes: int
) -> tuple[float, Floats]:
    """Factors that are not negative, of least relative error, for points as owned."""
    from scipy.optimize import nnls  # not with the package: it takes a while

    count, width = features.shape
    columns = np.zeros((count, 1 + planes * width))
    columns[:, 0] = 1.0
    for i, plane in enumerate(owner.tolist()):
        columns[i, 1 + plane * width : 1 + (plane + 1) * width] = features[i]
    # The start is in units of the shortest time, so that no column is all but zero.
    columns[:, 0] *= seconds.min()
    factors, _ = nnls(columns / seconds[:, None], np.ones(count))
    return float(factors[0] * seconds.min()), factors[1:].reshape(planes, width)
