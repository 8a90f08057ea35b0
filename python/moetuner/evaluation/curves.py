"""What was measured on a machine, how, and how well it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moetuner._checks import check_positive, is_number, is_whole
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.rates import check_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmPoint:
    """One measured time of a rank's experts.

    Parameters
    ----------
    rows
        (token, expert) rows, shared out over the active experts as a router does.
    active
        Experts that have a row.
    seconds
        Of all their projections, one after the other.
    """

    rows: int
    active: int
    seconds: float

    def __post_init__(self) -> None:
        for name in ("rows", "active"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise InvalidProblemError(
                    f"GemmPoint: {name} must be a whole number >= 1, got {value!r}"
                )
        if self.rows < self.active:
            raise InvalidProblemError(
                f"GemmPoint: an active expert has a row: rows must be >= active, got "
                f"{self.rows} rows and {self.active} active"
            )
        check_positive("GemmPoint", "seconds", self.seconds)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedGemm:
    """Measured times of experts of one shape: seconds by rows and active experts.

    Parameters
    ----------
    dtype
        What was multiplied in: ``fp32``, ``bf16`` (16 bits of any kind), ``fp8`` or
        ``fp4``.
    hidden_size, expert_hidden_size, num_projections, weight_bytes
        Sizes of the experts, as `ModelShape` has them.
    points
        At least three.
    """

    dtype: str
    hidden_size: int
    expert_hidden_size: int
    points: tuple[GemmPoint, ...]
    num_projections: int = 3
    weight_bytes: float = 2.0

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16", "fp8", "fp4"):
            raise InvalidProblemError(
                f"GroupedGemm: dtype must be one of fp32, bf16, fp8, fp4, got "
                f"{self.dtype!r}"
            )
        for name in ("hidden_size", "expert_hidden_size", "num_projections"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise InvalidProblemError(
                    f"GroupedGemm: {name} must be a whole number >= 1, got {value!r}"
                )
        check_positive("GroupedGemm", "weight_bytes", self.weight_bytes)
        points = tuple(self.points)
        if len(points) < 3:
            raise InvalidProblemError(
                f"GroupedGemm: wanted at least 3 points, got {len(points)}"
            )
        object.__setattr__(self, "points", points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Permutation:
    """Time to bring one (token, expert) row into expert order, or back: s.

    A row of ``b`` bytes takes ``per_row + per_byte * b`` each way.
    """

    per_row: float = 0.0
    per_byte: float = 0.0

    def __post_init__(self) -> None:
        check_seconds("Permutation: per_row", self.per_row)
        check_seconds("Permutation: per_byte", self.per_byte)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """How far fitted times are from measured ones: relative errors, 0.1 is 10 %."""

    part: str
    points: int
    median: float
    worst: float

    def __post_init__(self) -> None:
        if not is_whole(self.points) or self.points < 1:
            raise InvalidProblemError(
                f"Residual: points must be a whole number >= 1, got {self.points!r}"
            )
        for name in ("median", "worst"):
            value: Any = getattr(self, name)
            if not is_number(value) or not 0 <= value < float("inf"):
                raise InvalidProblemError(
                    f"Residual: {name} must be >= 0, got {value!r}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Where figures were measured, when, by which command, and how well they fit."""

    machine: str
    date: str
    command: str
    residuals: tuple[Residual, ...] = ()
