"""From times of the exchange to latencies, bandwidths and the cost of a row.

Times are a sum of a latency (that grows with the ranks), the rows on the busiest link
and the rows that a rank brings into order. The fit is of relative errors, so that small
batches count as much as large ones; none of the figures can be negative; times that do
not fit have less weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.calibration.loads import case_counts
from moetuner.calibration.samples import Case, ExchangeSample, Way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ROUNDS = 30
_FAR = 0.1  # relative errors beyond count less and less
_LINKS = ("rank_egress", "rank_ingress", "node_egress", "node_ingress")
_LATENCY = ("rank_base", "rank_per_rank", "node_base", "node_per_rank", "local")
_ROWS = ("per_row", "per_byte")
_NAMES = (*_LINKS, *_LATENCY, *_ROWS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeFit:
    """Of one way of an exchange, in seconds, s per byte and s per row.

    What was not measured is None.
    """

    rank_egress: float | None
    rank_ingress: float | None
    node_egress: float | None
    """Of a whole node."""
    node_ingress: float | None
    rank_base: float | None
    rank_per_rank: float
    node_base: float | None
    node_per_rank: float
    local: float
    """Where no row leaves its rank."""
    per_row: float
    per_byte: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OneWay:
    """What one way of a case puts on the busiest links and ranks."""

    bytes_on: tuple[float, ...]
    """By `_LINKS`."""
    rows: float
    """(token, expert) rows of the rank with the most."""
    row_bytes: int

    @property
    def level(self) -> str:
        """Which latency it has."""
        rank_out, _, node_out, _ = self.bytes_on
        return "node" if node_out else "rank" if rank_out else "local"


def one_way(case: Case, way: Way, ranks_per_node: int, seed: int) -> OneWay:
    """By the evaluator's own counting."""
    counts = case_counts(case, ranks_per_node, seed)
    row_bytes = case.shape.row_bytes
    prefix = "return_" if way is Way.COMBINE else ""
    most = [float(getattr(counts, prefix + name).max()) for name in _LINKS]
    return OneWay(
        bytes_on=tuple(row_bytes * rows for rows in most),
        rows=float(counts.rank_rows().max()),
        row_bytes=row_bytes,
    )


def fit_exchange(
    samples: Sequence[ExchangeSample], ranks_per_node: int, seed: int
) -> ExchangeFit:
    """The figures that come nearest to all times.

    Parameters
    ----------
    samples
        Of one form of the exchange.
    ranks_per_node
        Of the ranks that were measured.
    seed
        That the loads were drawn with.
    """
    ways = [
        [one_way(sample.case, way, ranks_per_node, seed) for way in _halves(sample.way)]
        for sample in samples
    ]
    ranks = [
        {
            "rank": min(ranks_per_node, sample.case.num_ranks),
            "node": sample.case.num_ranks,
        }
        for sample in samples
    ]
    seconds = np.array([sample.timing.seconds for sample in samples])
    found = np.ones(len(_NAMES))
    chosen = np.zeros((len(samples), len(_NAMES)))
    weights = np.ones(len(samples))
    for _ in range(ROUNDS):
        before = found
        chosen = np.array(
            [_columns(of, n, found) for of, n in zip(ways, ranks, strict=True)]
        )
        found = _with_partners(
            nonnegative_fit(chosen, seconds, weights), chosen.any(axis=0)
        )
        error = np.abs(chosen @ found / seconds - 1)
        weights = np.minimum(1, _FAR / np.maximum(error, 1e-12))
        if np.allclose(found, before, rtol=1e-6, atol=0):
            break
    return _named(found, ways, seconds)


def nonnegative_fit(columns: Floats, seconds: Floats, weights: Floats) -> Floats:
    """Coefficients >= 0 that bring ``columns @ x`` nearest to times, relatively.

    Parameters
    ----------
    columns
        [samples, coefficients]; a column of zeros gets the coefficient 0.
    seconds
        [samples], positive.
    weights
        [samples], what the square of each relative error counts.
    """
    from scipy.optimize import nnls  # not with the package: it takes a while

    scaled = columns / seconds[:, None] * np.sqrt(weights)[:, None]
    size = np.linalg.norm(scaled, axis=0)
    size[size == 0] = 1
    found, _ = nnls(scaled / size, np.sqrt(weights))
    coefficients: Floats = found / size
    return coefficients


def _halves(way: Way) -> tuple[Way, ...]:
    return (Way.DISPATCH, Way.COMBINE) if way is Way.BOTH else (way,)


def _columns(
    ways: Sequence[OneWay], ranks: dict[str, int], found: Floats
) -> list[float]:
    """What each coefficient is multiplied by: of links of a kind the slowest counts.

    Rows are passed on inside a node when all have crossed: see `Wire.DEDUP`.
    """
    row = dict.fromkeys(_NAMES, 0.0)
    for way in ways:
        seconds = np.array(way.bytes_on) * found[: len(_LINKS)]
        for kind in (0, 2):
            slowest = kind + int(np.argmax(seconds[kind : kind + 2]))
            row[_LINKS[slowest]] += way.bytes_on[slowest]
        row["per_row"] += way.rows
        row["per_byte"] += way.rows * way.row_bytes
        if way.level == "local":
            row["local"] += 1
        else:
            row[f"{way.level}_base"] += 1
            row[f"{way.level}_per_rank"] += ranks[way.level]
    return list(row.values())


def _with_partners(found: Floats, known: Any) -> Floats:
    """A direction that was never the narrowest is as fast as the other one."""
    result: Floats = found.copy()
    for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        if not known[one]:
            result[one] = found[other]
    return result


def _named(
    found: Floats, ways: Sequence[Sequence[OneWay]], seconds: Floats
) -> ExchangeFit:
    """By name; None where no sample has any, and no link is faster than any time."""
    values = dict(zip(_NAMES, found.tolist(), strict=True))
    fastest: dict[str, float] = {}
    for of, took in zip(ways, seconds.tolist(), strict=True):
        for way in of:
            for name, count in zip(_LINKS, way.bytes_on, strict=True):
                if count:
                    least = 1e-3 * took / count
                    fastest[name] = min(fastest.get(name, least), least)
    links: dict[str, Any] = {
        name: max(values[name], fastest[name]) if name in fastest else None
        for name in _LINKS
    }
    levels = {way.level for of in ways for way in of}

    def base(level: str) -> float | None:
        return values[f"{level}_base"] if level in levels else None

    return ExchangeFit(
        **links,
        rank_base=base("rank"),
        rank_per_rank=values["rank_per_rank"],
        node_base=base("node"),
        node_per_rank=values["node_per_rank"],
        local=values["local"],
        per_row=values["per_row"],
        per_byte=values["per_byte"],
    )
