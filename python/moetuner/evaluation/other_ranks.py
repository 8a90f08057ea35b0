"""Ranks that compute otherwise than the rest of their machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moetuner._checks import check_positive, is_whole
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.curves import GroupedGemm  # noqa: TC001 - read by provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.hardware import Hardware


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRanks:
    """How some ranks compute: their own rates, or their own measured times.

    Parameters
    ----------
    name
        What they are called.
    ranks
        Which ranks of all.
    memory_bandwidth
        Bytes/s. None: as the machine's other ranks.
    matmul_rate, fp8_matmul_rate, fp4_matmul_rate
        Operations/s, dense; the first in bf16. Without it all three are the machine's.
    grouped_gemm
        Measured times of their experts. Where a type has none, the rates above count;
        where there are no rates either, the machine's times.

    Raises
    ------
    InvalidProblemError
        When no rank is named, one twice, or nothing is said of them.
    """

    name: str
    ranks: tuple[int, ...]
    memory_bandwidth: float | None = None
    matmul_rate: float | None = None
    fp8_matmul_rate: float | None = None
    fp4_matmul_rate: float | None = None
    grouped_gemm: tuple[GroupedGemm, ...] = ()

    def __post_init__(self) -> None:
        name: Any = self.name
        if not isinstance(name, str) or not name.isprintable():
            raise InvalidProblemError(
                f"OtherRanks: name must be printable text, got {name!r}"
            )
        given: Any = self.ranks
        ranks = tuple(given) if isinstance(given, Iterable) else ()
        if not ranks or not all(is_whole(rank) and rank >= 0 for rank in ranks):
            raise InvalidProblemError(
                f"OtherRanks: ranks must be whole numbers >= 0, at least one, got "
                f"{self.ranks!r}"
            )
        if len(set(ranks)) < len(ranks):
            raise InvalidProblemError(
                f"OtherRanks: ranks must differ, got {self.ranks!r}"
            )
        for name in _RATES:
            if getattr(self, name) is not None:
                check_positive("OtherRanks", name, getattr(self, name))
        if self.matmul_rate is None and (self.fp8_matmul_rate or self.fp4_matmul_rate):
            raise InvalidProblemError(
                "OtherRanks: wanted matmul_rate beside the rates of narrower types"
            )
        if not self.has_rates and not self.grouped_gemm:
            raise InvalidProblemError(
                f"OtherRanks: wanted a rate or measured times of {self.name}, got none"
            )
        object.__setattr__(self, "ranks", ranks)
        object.__setattr__(self, "grouped_gemm", tuple(self.grouped_gemm))

    @property
    def has_rates(self) -> bool:
        """Whether any rate is their own."""
        return any(getattr(self, name) is not None for name in _RATES)

    def on(self, hardware: Hardware) -> Hardware:
        """A machine of which all ranks compute as these."""
        own = {curve.dtype for curve in self.grouped_gemm}
        kept = () if self.has_rates else hardware.grouped_gemm
        curves = self.grouped_gemm + tuple(c for c in kept if c.dtype not in own)
        found = replace(hardware, grouped_gemm=curves, other_ranks=())
        if self.memory_bandwidth is not None:
            found = replace(found, memory_bandwidth=self.memory_bandwidth)
        if self.matmul_rate is None:
            return found
        return replace(
            found,
            matmul_rate=self.matmul_rate,
            fp8_matmul_rate=self.fp8_matmul_rate,
            fp4_matmul_rate=self.fp4_matmul_rate,
        )


_RATES = ("memory_bandwidth", "matmul_rate", "fp8_matmul_rate", "fp4_matmul_rate")


def checked_others(given: Sequence[OtherRanks]) -> tuple[OtherRanks, ...]:
    """`given`, where no rank is in two of them."""
    seen: dict[int, str] = {}
    for each in given:
        for rank in each.ranks:
            if rank in seen:
                raise InvalidProblemError(
                    f"Hardware: other_ranks has rank {rank} twice, in {seen[rank]} and "
                    f"in {each.name}"
                )
            seen[rank] = each.name
    return tuple(given)
