"""Links of a layer's program: rows that each of them carries bound its time below.

Legend: G ranks, N nodes, B batches, M sets of experts, H homes that are told apart,
U places: ranks or nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner._core import LinkRates
    from moetuner.solver.programs.model import MilpBuilder

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Way:
    """A direction: its seconds, and factors of what leaves and what enters places."""

    rates: LinkRates
    rank: tuple[list[float], list[float]]
    node: tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Level:
    """Links between ranks of a node, or between nodes: U of either.

    ``pairs`` [U, U] says between whom a row goes, ``out`` [H, U] the share of a home's
    rows that leave through a unit. ``egress`` and ``ingress`` [U] are how slow links
    are beside ``seconds``.
    """

    seconds: float
    pairs: NDArray[np.bool_]
    out: Floats
    egress: Floats
    ingress: Floats

    @classmethod
    def of(
        cls,
        *,
        seconds: float,
        factors: tuple[list[float], list[float]],
        pairs: NDArray[np.bool_],
        out: Floats,
    ) -> Level:
        """Links with those factors of egress and ingress, or without any: alike."""
        egress, ingress = (np.array(f or [1.0] * len(pairs)) for f in factors)
        return cls(
            seconds=seconds, pairs=pairs, out=out, egress=egress, ingress=ingress
        )

    def add_links(
        self, builder: MilpBuilder, busiest: Ints, visits: list[tuple[Ints, Floats]]
    ) -> None:
        """Rows that keep every link below ``busiest`` [B]."""
        shared = len(self.out) == 1
        for batch, column in enumerate(busiest.tolist()):
            leaving: dict[int, list[int]] = {}
            for unit, (columns, counts) in enumerate(visits):
                ways: list[int] = []
                senders = np.flatnonzero(self.pairs[unit]).tolist()
                rows = self.seconds * counts[batch] @ self.out  # [M, U]
                for sender in senders:
                    # From uniform homes all senders send alike: one column will do.
                    if not (shared and ways):
                        ways.append(_add_sum(builder, columns, rows[:, sender]))
                    leaving.setdefault(sender, []).append(ways[-1])
                if ways:
                    factor = float(len(senders)) if shared else 1.0
                    builder.add_row(
                        [column, *ways],
                        [1.0, *np.full(len(ways), -factor * self.ingress[unit])],
                        lower=0.0,
                    )
            for sender, rows_out in leaving.items():
                builder.add_row(
                    [column, *rows_out],
                    [1.0, *np.full(len(rows_out), -self.egress[sender])],
                    lower=0.0,
                )


def _add_sum(builder: MilpBuilder, columns: Ints, factors: Floats) -> int:
    """A column that is at least the sum of others."""
    total = int(builder.add_columns(1)[0])
    used = np.flatnonzero(factors)
    builder.add_row([total, *columns[used]], [1.0, *-factors[used]], lower=0.0)
    return total
