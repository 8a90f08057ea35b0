"""How uneven loads are for good, and how uneven only in one batch.

A static placement can spread the experts that are busy all the time. It cannot follow
experts that are busy in one batch and idle in the next. Some of that unevenness is not
even real: a batch is a finite draw of tokens, and the fullest of several ranks is above
the mean by chance.

Legend: Q batches, L layers, G ranks, N samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidProblemError
from moetuner.evaluation.cost import CostModel, Wire
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    BatchKind,
    Workload,
    num_batches,
)
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import get_solver
from moetuner.trace import CountTrace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement
    from moetuner.trace import Trace

    Floats = NDArray[np.float64]

DRAWS = 400
"""Draws of each expectation by chance, all batches together; at least `MIN_DRAWS` of
each batch. The error of a mean is then below a hundredth of what it is above 1."""
MIN_DRAWS = 8
_DEFAULT_RANKS = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Skew:
    """Load of the fullest rank over the mean rank, layer by layer; 1 is balance.

    ``blocks`` are contiguous blocks of experts, as engines load a model. ``balanced``
    is the best static balance: `moetuner.solver` ``lpt`` on the loads of all tokens,
    the scored ones included, so no plan had as much to go by. A placement that sees
    which experts peak together may still do a little better in a batch.
    """

    num_ranks: int
    batch_tokens: int
    batch_kind: BatchKind
    num_batches: int
    persistent: Floats
    """[L], all tokens as one batch, blocks: what is uneven for good."""
    persistent_chance: Floats
    """[L], what a uniform router would show there, by chance."""
    left: Floats
    """[L], all tokens as one batch, balanced: what no equal slots can spread."""
    blocks: Floats
    """[L], mean over batches, blocks: what ranks wait for today."""
    transient: Floats
    """[L], mean over batches, balanced: what no static balance removes."""
    transient_chance: Floats
    """[L], what batches would show if every choice were drawn from the loads of all
    tokens, whatever the batch: multinomial sampling."""
    chance_error: Floats
    """[L], standard error of so many batches' mean, were they drawn so."""

    @property
    def removable(self) -> float:
        """Share of the unevenness of today's batches that a static balance removes.

        Means over layers, above 1; 0 where nothing is uneven.
        """
        today = float(self.blocks.mean()) - 1
        kept = float(self.transient.mean()) - 1
        return max(1 - kept / today, 0.0) if today > 0 else 0.0

    @property
    def changing(self) -> float:
        """What a static balance leaves beyond chance, mean over layers; 0 within error.

        The error is two standard errors, as if all layers erred alike.
        """
        beyond = float((self.transient - self.transient_chance).mean())
        return beyond if beyond > 2 * float(self.chance_error.mean()) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {
            **plain,
            "batch_kind": self.batch_kind.value,
            "removable": self.removable,
            "changing": self.changing,
        }


def default_ranks(num_experts: int) -> int:
    """Ranks of a node of eight, or fewer so that each has two experts to choose."""
    return max(min(_DEFAULT_RANKS, num_experts // 2), 1)


def measure_skew(
    trace: Trace | CountTrace,
    num_ranks: int = 0,
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKind = BatchKind.SEQUENCES,
    seed: int = 0,
) -> Skew:
    """Tell persistent from transient skew of a trace or a count-only source.

    Parameters
    ----------
    trace
        Tokens, or counts, whose groups then stand for sequences.
    num_ranks
        Ranks that share the experts; 0: `default_ranks`.
    batch_tokens, batch_kind
        Batches, see `moetuner.evaluation.workload.batch_index`.
    seed
        Of the draws.

    Raises
    ------
    InvalidProblemError
        When there are more ranks than experts, or the batch makes no sense.
    """
    ranks = num_ranks or default_ranks(trace.num_experts)
    if not 1 <= ranks <= trace.num_experts:
        raise InvalidProblemError(
            f"skew: num_ranks must be 1..{trace.num_experts}, the number of "
            f"experts, got {ranks}"
        )
    workload = Workload(
        traces=(trace,),
        cost=CostModel(wire=Wire.ALLGATHER),
        batch_tokens=batch_tokens,
        batch_kind=batch_kind,
    )
    problem = PlacementProblem.from_workload(
        workload,
        Topology(num_ranks=ranks, ranks_per_node=ranks),
        objective=Objective.MAX_LOAD,
    )
    placements = [get_solver(n).solve(problem).placement for n in ("contiguous", "lpt")]
    (batches,) = workload.batches
    blocks, balanced = _rank_rows(trace, batches, placements)
    even = np.full(blocks.shape[1:], 1 / ranks)
    pooled = blocks.sum(axis=0, keepdims=True)
    rng = np.random.default_rng(seed)
    by_chance, _ = _by_chance(rng, pooled.sum(axis=2), even)
    shares = _shares(balanced.sum(axis=0))
    of_batches, error = _by_chance(rng, balanced.sum(axis=2), shares)
    return Skew(
        num_ranks=ranks,
        batch_tokens=batch_tokens,
        batch_kind=workload.batch_kind,
        num_batches=len(blocks),
        persistent=_mean_skew(pooled),
        persistent_chance=by_chance,
        left=_mean_skew(balanced.sum(axis=0, keepdims=True)),
        blocks=_mean_skew(blocks),
        transient=_mean_skew(balanced),
        transient_chance=of_batches,
        chance_error=error,
    )


def _rank_rows(
    trace: Trace | CountTrace,
    batches: NDArray[np.int32],
    placements: Sequence[Placement],
) -> Floats:
    """Choices on each rank in each batch, [placements, Q, L, G]."""
    count = num_batches(batches)
    ranks = [placement.rank_of() for placement in placements]
    num_ranks = placements[0].topology.num_ranks
    rows = np.empty((len(placements), count, trace.num_layers, num_ranks))
    for layer in range(trace.num_layers):
        chosen = _expert_counts(trace, batches, layer, count)
        for found, rank_of in zip(rows, ranks, strict=True):
            found[:, layer] = chosen @ np.eye(num_ranks)[rank_of[layer]]
    return rows


def _expert_counts(
    trace: Trace | CountTrace, batches: NDArray[np.int32], layer: int, count: int
) -> Floats:
    """Choices of each expert of a layer in each batch, [Q, E]."""
    experts = trace.num_experts
    if isinstance(trace, CountTrace):
        chosen = np.zeros((count, experts))
        np.add.at(chosen, batches, trace.counts[:, layer])
        return chosen
    ids = trace.topk_ids[:, layer]
    cell = batches[:, None].astype(np.int64) * experts + ids
    counts = np.bincount(cell[ids >= 0], minlength=count * experts)
    return counts.reshape(count, experts).astype(np.float64)


def _shares(rows: Floats) -> Floats:
    """Share of each rank in its layer, [L, G]; alike where nothing was routed."""
    total = rows.sum(axis=-1, keepdims=True)
    shares: Floats = np.where(
        total > 0, rows / np.where(total > 0, total, 1), 1 / rows.shape[-1]
    )
    return shares


def _skew(rows: Floats) -> Floats:
    """The fullest rank over the mean rank, [..., G] -> [...]; NaN without a row."""
    mean = rows.mean(axis=-1)
    skew: Floats = rows.max(axis=-1) / np.where(mean > 0, mean, np.nan)
    return skew


def _mean_skew(rows: Floats) -> Floats:
    """Mean of `_skew` over batches, [Q, L, G] -> [L].

    Batches that route nothing in a layer are left out; 1 where none does.
    """
    skew = _skew(rows)
    known = np.isfinite(skew)
    count = known.sum(axis=0)
    total = np.where(known, skew, 0.0).sum(axis=0)
    found: Floats = np.where(count > 0, total / np.maximum(count, 1), 1.0)
    return found


def _by_chance(
    rng: np.random.Generator, choices: Floats, shares: Floats
) -> tuple[Floats, Floats]:
    """`_mean_skew` of that many choices [Q, L], drawn by `shares` [L, G].

    Its expectation [L], and its standard error [L].
    """
    samples = max(-(-DRAWS // len(choices)), MIN_DRAWS)
    expected, error = np.ones(len(shares)), np.zeros(len(shares))
    for layer, share in enumerate(shares):
        counts = np.round(choices[:, layer]).astype(np.int64)
        counts = counts[counts > 0]
        if counts.size:
            drawn = rng.multinomial(counts, share, size=(samples, counts.size))
            skew = _skew(drawn.astype(np.float64))
            expected[layer] = skew.mean()
            error[layer] = skew.std() / np.sqrt(counts.size)
    return expected, error
