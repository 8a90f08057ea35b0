"""Bandwidths that may differ by direction and place, latencies that grow with ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_number
from moetuner.errors import InvalidProblemError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is no finite time."""
    if not is_number(value) or not 0 <= value < np.inf:
        raise InvalidProblemError(f"{name} must be >= 0 s, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bandwidth:
    """What links carry out of a place and into it, bytes/s.

    Parameters
    ----------
    egress, ingress
        One value for all places, or one for each; a number stands for one value.

    Raises
    ------
    InvalidProblemError
        When a value is not positive, or there is none.
    """

    egress: tuple[float, ...]
    ingress: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("egress", "ingress"):
            values = _numbers(getattr(self, name))
            for value in values or (None,):
                _check_rate(f"Bandwidth: {name}", value)
            object.__setattr__(self, name, values)

    @staticmethod
    def of(value: Any, name: str) -> Bandwidth:
        """`value`, where a number is the same both ways; `name` is for errors."""
        if isinstance(value, Bandwidth):
            return value
        _check_rate(name, value)
        return Bandwidth(egress=(value,), ingress=(value,))

    @property
    def plain(self) -> Bandwidth | float:
        """A number where one value says it all."""
        alike = self.places == 1 and self.egress == self.ingress
        return self.egress[0] if alike else self

    @property
    def places(self) -> int:
        """How many places are told apart: 1 when all are alike."""
        return max(len(self.egress), len(self.ingress))

    @property
    def slowest(self) -> float:
        """Of all places and both ways."""
        return min(*self.egress, *self.ingress)

    def spread(self, count: int) -> tuple[Floats, Floats]:
        """Egress and ingress of `count` places, float64 [count] each.

        Fewer values than places are those of a node, and alike in all nodes.
        """
        return _spread(self.egress, count), _spread(self.ingress, count)

    def times(self, factor: float) -> Bandwidth:
        """Of `factor` such links together."""
        return Bandwidth(
            egress=tuple(value * factor for value in self.egress),
            ingress=tuple(value * factor for value in self.ingress),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """What an exchange takes beside its rows: ``base + per_rank * ranks``, in s.

    Raises
    ------
    InvalidProblemError
        When a value is negative or not finite.
    """

    base: float
    per_rank: float = 0.0

    def __post_init__(self) -> None:
        check_seconds("Latency: base", self.base)
        check_seconds("Latency: per_rank", self.per_rank)

    @staticmethod
    def of(value: Any, name: str) -> Latency:
        """`value`, where a number is the base alone; `name` is for errors."""
        if isinstance(value, Latency):
            return value
        check_seconds(name, value)
        return Latency(base=value)

    @property
    def plain(self) -> Latency | float:
        """A number where it does not grow."""
        return self if self.per_rank else self.base

    def seconds(self, num_ranks: int) -> float:
        """Among `num_ranks` ranks."""
        return self.base + self.per_rank * num_ranks if self.per_rank else self.base


def _check_rate(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value < np.inf:
        raise InvalidProblemError(f"{name} must be positive, got {value!r}")


def _spread(values: tuple[float, ...], count: int) -> Floats:
    return np.resize(np.array(values, np.float64), count)


def _numbers(values: Any) -> tuple[Any, ...]:
    return (values,) if is_number(values) else tuple(values)
