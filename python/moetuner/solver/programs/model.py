"""A mixed-integer linear program as plain arrays, and a small builder for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MilpModel:
    """min objective.x, row_lower <= A x <= row_upper, lower <= x <= upper.

    A is in compressed rows: ``columns`` and ``values`` of row i lie between
    ``row_begin[i]`` and ``row_begin[i + 1]``. n columns, m rows.
    """

    objective: NDArray[np.float64]  # [n]
    lower: NDArray[np.float64]  # [n]
    upper: NDArray[np.float64]  # [n]
    integer: NDArray[np.bool_]  # [n]
    row_begin: NDArray[np.int64]  # [m + 1]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    row_lower: NDArray[np.float64]  # [m]
    row_upper: NDArray[np.float64]  # [m]
    start: NDArray[np.float64]  # [n], or [0] when there is none

    @property
    def num_columns(self) -> int:
        """Variables n."""
        return self.objective.size

    @property
    def num_rows(self) -> int:
        """Constraints m."""
        return self.row_lower.size


@dataclass(kw_only=True, slots=True)
class MilpBuilder:
    """Collects columns and rows; `build` freezes them."""

    _objective: list[float] = field(default_factory=list)
    _lower: list[float] = field(default_factory=list)
    _upper: list[float] = field(default_factory=list)
    _integer: list[bool] = field(default_factory=list)
    _row_begin: list[int] = field(default_factory=lambda: [0])
    _columns: list[int] = field(default_factory=list)
    _values: list[float] = field(default_factory=list)
    _row_lower: list[float] = field(default_factory=list)
    _row_upper: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Columns so far."""
        return len(self._objective)

    def add_columns(
        self,
        *shape: int,
        objective: float = 0.0,
        lower: float = 0.0,
        upper: float = np.inf,
        integer: bool = False,
    ) -> NDArray[np.int64]:
        """Add variables; returns their indices in the given shape."""
        count = int(np.prod(shape, dtype=np.int64))
        first = len(self._objective)
        self._objective += [objective] * count
        self._lower += [lower] * count
        self._upper += [upper] * count
        self._integer += [integer] * count
        return np.arange(first, first + count).reshape(shape)

    def fix(self, columns: NDArray[np.int64], value: float) -> None:
        """Fix variables at `value`."""
        for column in columns.ravel().tolist():
            self._lower[column] = self._upper[column] = value

    def weigh(self, columns: NDArray[np.int64], objective: NDArray[np.float64]) -> None:
        """Give columns the objective's factors, in order."""
        values = objective.ravel().tolist()
        for column, value in zip(columns.ravel().tolist(), values, strict=True):
            self._objective[column] = value

    def add_row(
        self,
        columns: NDArray[np.int64] | Iterable[int],
        values: Any = 1.0,
        *,
        lower: float = -np.inf,
        upper: float = np.inf,
    ) -> None:
        """Add lower <= sum values * columns <= upper; `values` broadcast to columns."""
        indices = np.asarray(columns, np.int64)
        self._columns += indices.ravel().tolist()
        self._values += np.broadcast_to(values, indices.shape).ravel().tolist()
        self._row_begin.append(len(self._columns))
        self._row_lower.append(lower)
        self._row_upper.append(upper)

    def build(self, start: NDArray[np.float64] | None = None) -> MilpModel:
        """The finished model, with an optional feasible start [n]."""
        return MilpModel(
            objective=np.array(self._objective),
            lower=np.array(self._lower),
            upper=np.array(self._upper),
            integer=np.array(self._integer, bool),
            row_begin=np.array(self._row_begin, np.int64),
            columns=np.array(self._columns, np.int64),
            values=np.array(self._values),
            row_lower=np.array(self._row_lower),
            row_upper=np.array(self._row_upper),
            start=np.empty(0) if start is None else start,
        )
