"""What each layer costs at least, found by counting.

"Group" is a node or a rank, see `moetuner.bounds.link_level`.

Legend: T tokens, Q batches, L layers, E experts, K top-k, P groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import assert_never
from moetuner._core import Rows
from moetuner.bounds.balance import (
    cannot_stay_together,
    fullest_group,
    min_remote,
)
from moetuner.bounds.link_level import LinkLevel
from moetuner.errors import MissingStatisticsError
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.workload import num_batches, price, tally_batches
from moetuner.placement.model import Placement, contiguous_rank_of
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]

_NEAR = 1.002
"""Counting within this of the mean leaves something to the search."""
_PROMISING = 1.05
"""So do rows that exceed counting by this where experts are spread at random."""


@dataclass(kw_only=True, slots=True, eq=False)
class LayerShare:
    """What is known of one layer of one trace, times the weight of a batch.

    ``*_least`` are seconds by counting; ``*_base`` those that stay beside the visits.
    ``compute_base`` stays beside ``compute``, seconds per pair that shares a rank.
    """

    compute_least: float = 0.0
    compute_base: float = 0.0
    compute: Floats | None = None
    """float64 [E, E]; None where counting says all."""
    dispatch_least: float = 0.0
    dispatch_base: float = 0.0
    combine_least: float = 0.0
    combine_base: float = 0.0
    links: Floats | None = None
    """float64 [E, E], seconds per pair that shares a group; never negative."""
    inside_least: float = 0.0
    """Of hops inside nodes, where they come on top."""

    @property
    def least(self) -> float:
        """All parts together, by counting."""
        links = self.dispatch_least + self.combine_least + self.inside_least
        return self.compute_least + links


class Counting:
    """Counts what layers of one problem cost at least.

    Raises
    ------
    MissingStatisticsError
        When the wire needs tokens and a source only counted load.
    """

    def __init__(self, problem: PlacementProblem, *, replicas: bool) -> None:
        self.problem, self.workload = problem, problem.workload
        self.cost: CostModel = problem.workload.cost
        tokens = all(isinstance(trace, Trace) for trace in self.workload.traces)
        if self.cost.wire.rules.rows is not Rows.TO_ALL and not tokens:
            raise MissingStatisticsError(
                f"certify: wire={self.cost.wire.value} needs the experts of each "
                f"token; a trace of the workload only counted load. Use "
                f"wire=allgather, or record tokens."
            )
        self.level = LinkLevel.of(problem, replicas)
        self.price = self.cost.layer_price(problem.topology)
        speeds = self.cost.bound_speeds(problem.topology.num_ranks)
        self.overhead, self.floor = self.price.rates.layer, self.price.rates.floor
        self.mean_speed, self.top_speed = float(speeds.mean()), float(speeds.max())

    def weights(self) -> list[float]:
        """What a batch of each trace counts for in the objective.

        The worst of several means is at least their mean.
        """
        workload = self.workload
        count = len(workload.traces)
        weights = (1 / count,) * count if workload.worst_case else workload.weights
        return [
            weight / num_batches(batches)
            for weight, batches in zip(weights, workload.batches, strict=True)
        ]

    def shares(self, layer: int) -> list[LayerShare]:
        """What a layer costs at least, for each trace."""
        return [
            self._share(trace, batches, layer, weight)
            for trace, batches, weight in zip(
                self.workload.traces,
                self.workload.batches,
                self.weights(),
                strict=True,
            )
        ]

    def _share(
        self,
        trace: Trace | CountTrace,
        batches: NDArray[np.int32],
        layer: int,
        weight: float,
    ) -> LayerShare:
        rows = expert_rows(trace, batches, layer)  # [Q, E]
        share = LayerShare()
        self._compute(rows, weight, share)
        if self.level.num_groups > 1:
            self._links(trace, batches, layer, rows, weight, share)
        copies = self.level.rows is Rows.PER_EXPERT
        if self.level.equal and copies and self.cost.homes is Homes.UNIFORM:
            both = self.level.dispatch + self.level.combine
            seconds = np.full(len(rows), weight * self.level.leaves * both)
            share.links = rows_of_own_rank(rows, seconds)
        return share

    def launches(self, rows: Floats) -> float:
        """Seconds of all batches [Q] in which any expert has rows."""
        return self.overhead * float((rows > 0).any(axis=1).sum())

    def compute_floor(self, rows: Floats) -> Floats:
        """Seconds of compute, without launches, of each batch at least, by counting.

        Returns float64 [Q].

        The price is convex, so ranks take the price of their mean on average; and it
        never falls, so the rank with most rows, or experts, takes that at least.
        """
        level, num_ranks = self.level, self.problem.topology.num_ranks
        slots = level.slots // level.ranks_per_group
        busy, active = self.price.busy, (rows > 0).sum(axis=1)
        fullest = fullest_group(rows, num_ranks, slots, level.spare)
        most = -(-active // num_ranks)
        none = np.zeros(len(rows))
        floor: Floats = np.maximum.reduce(
            [
                busy(rows.sum(axis=1) / num_ranks, active / num_ranks)
                / self.mean_speed,
                busy(fullest, none) / self.top_speed,
                busy(none, most) / self.top_speed,
                np.where(active > 0, self.floor, 0.0),
            ]
        )
        return floor

    def _compute(self, rows: Floats, weight: float, share: LayerShare) -> None:
        """Fill in the compute part."""
        level, num_ranks = self.level, self.problem.topology.num_ranks
        per_row = self.price.rates.compute.row
        slots = level.slots // level.ranks_per_group
        mean = rows.sum(axis=1) / num_ranks * per_row / self.mean_speed
        counted = self.compute_floor(rows)
        launches = self.launches(rows)
        share.compute_least = weight * (float(counted.sum()) + launches)
        searched = np.zeros(len(rows), bool)
        if self.mean_speed == self.top_speed and level.equal and num_ranks > 1:
            spread = spread_at_random(rows, num_ranks, slots) * per_row
            searched = spread / self.top_speed > counted * _PROMISING
            searched |= (mean > 0) & (counted <= mean * _NEAR)
        share.compute_base = weight * (float(counted[~searched].sum()) + launches)
        if searched.any():
            seconds = np.where(searched, weight * per_row / self.top_speed, 0.0)
            share.compute = rows_of_own_rank(rows, seconds)

    def _links(
        self,
        trace: Trace | CountTrace,
        batches: NDArray[np.int32],
        layer: int,
        rows: Floats,
        weight: float,
        share: LayerShare,
    ) -> None:
        """Fill in dispatch and combine."""
        level, cost = self.level, self.cost
        exact = isinstance(trace, CountTrace) or cost.homes is not Homes.FOLLOW
        if level.rows is Rows.TO_ALL and exact:
            seconds = self._same_for_all(trace, batches)
            for part in ("dispatch", "combine"):
                value = weight * float(seconds[part][:, layer].sum())
                setattr(share, f"{part}_least", value)
                setattr(share, f"{part}_base", value)
            return
        assert isinstance(trace, Trace)
        ids = trace.topk_ids[:, layer]
        for part, per_row in (("dispatch", level.dispatch), ("combine", level.combine)):
            uniform = self.uniform(part, layer)
            least = self.min_rows(ids, batches, rows, uniform)
            latency = level.latency * self._crosses(ids, batches, rows, uniform)
            base = weight * float(latency.sum())
            setattr(share, f"{part}_base", base)
            setattr(share, f"{part}_least", base + weight * per_row * least.sum())
        visits = self._rank_visits(ids, batches, rows)
        share.inside_least = weight * self.inside(layer) * float(visits.sum())

    def inside(self, layer: int) -> float:
        """Seconds at least, both ways, that a visit to a rank adds inside its node.

        Replicas may keep rows of all homes at their gateways: nothing then.
        """
        if not self.level.equal:
            return 0.0
        return sum(
            seconds
            for part, seconds in self.level.inside.items()
            if self.uniform(part, layer)
        )

    def _rank_visits(
        self, ids: NDArray[np.int16], batches: NDArray[np.int32], rows: Floats
    ) -> Floats:
        """Tokens that visit the busiest rank at least, by counting, [Q]."""
        num_ranks = self.problem.topology.num_ranks
        ranks = -(-(ids >= 0).sum(axis=1) // self.problem.slots_per_rank)
        sums = np.bincount(batches, weights=ranks, minlength=len(rows))
        return np.asarray(np.maximum(sums / num_ranks, rows.max(axis=1)))

    def uniform(self, part: str, layer: int) -> bool:
        """Whether homes are uniform for one direction at a layer."""
        homes = self.cost.homes
        first = homes is Homes.FOLLOW and layer == 0 and part == "dispatch"
        return homes is Homes.UNIFORM or first

    def _same_for_all(
        self, trace: Trace | CountTrace, batches: NDArray[np.int32]
    ) -> dict[str, Floats]:
        """Seconds [Q, L] of an all-gather, which no placement changes."""
        topology = self.problem.topology
        blocks = Placement.from_rank_of(
            contiguous_rank_of(
                self.problem.num_layers, self.problem.num_experts, topology.num_ranks
            ),
            layer_ids=self.problem.statistics.layer_ids,
            topology=topology,
        )
        seconds = price(tally_batches(trace, blocks, self.cost, batches), self.cost)
        return {"dispatch": seconds.dispatch, "combine": seconds.combine}

    def min_rows(
        self,
        ids: NDArray[np.int16],
        batches: NDArray[np.int32],
        rows: Floats,
        uniform: bool,
    ) -> Floats:
        """Rows on the busiest link at least, by counting, [Q]."""
        level, sent = self.level, self.level.rows
        sizes = (ids >= 0).sum(axis=1)
        count = len(rows)

        def per_batch(of_token: NDArray[np.int64]) -> Floats:
            sums = np.bincount(batches, weights=of_token, minlength=count)
            return np.asarray(sums / level.num_groups)

        if sent is Rows.TO_ALL:  # homes that follow: only the sum is known
            return per_batch(np.full(len(ids), level.num_groups - 1))
        groups = -(-sizes // level.slots)
        away = np.maximum(groups - 1, 0)
        if not uniform:
            if sent is Rows.PER_EXPERT:
                away = np.maximum(sizes - level.slots, 0)
            return per_batch(away)
        if level.spare:
            remote = min_remote(rows, level.num_groups, level.spare)
            remote = remote / level.num_groups
            if sent is Rows.PER_RANK:
                remote = remote / min(level.slots, max(int(sizes.max(initial=1)), 1))
            return np.maximum(per_batch(away), remote)
        if sent is Rows.PER_EXPERT:
            fullest = fullest_group(rows, level.num_groups, level.slots, 0)
            return np.asarray(fullest * level.leaves)
        if sent is not Rows.PER_RANK:
            assert_never(sent)
        visited = np.maximum(per_batch(groups), rows.max(axis=1))
        return np.asarray(visited * level.leaves)

    def _crosses(
        self,
        ids: NDArray[np.int16],
        batches: NDArray[np.int32],
        rows: Floats,
        uniform: bool,
    ) -> NDArray[np.bool_]:
        """Whether anything must cross a link in a batch, bool [Q]."""
        level = self.level
        if level.rows is Rows.TO_ALL:
            return np.bincount(batches, minlength=len(rows)) > 0
        if uniform and not level.spare:
            return np.asarray(rows.sum(axis=1) > 0)
        too_many = (ids >= 0).sum(axis=1) > level.slots
        crosses = np.bincount(batches, weights=too_many, minlength=len(rows)) > 0
        if uniform:
            remote = min_remote(rows, level.num_groups, level.spare)
            return np.asarray(crosses | (remote > 1e-9))
        if level.spare or not ids.size:
            return np.asarray(crosses)
        tied = cannot_stay_together(ids, batches, rows.shape[1], level.slots)
        return np.asarray(crosses | tied)


def rows_of_own_rank(rows: Floats, seconds: Floats) -> Floats:
    """K with <K, Y> = sum over batches of seconds * rows that a row meets on its rank.

    That mean over a batch's rows is at most the fullest rank's; Y tells who shares one.
    """
    total = rows.sum(axis=1)
    used = (seconds > 0) & (total > 0)
    scaled = rows[used] * np.sqrt(seconds[used] / total[used])[:, None]
    return np.asarray(scaled.T @ scaled)


def spread_at_random(rows: Floats, num_groups: int, slots: int) -> Floats:
    """That mean, [Q], where every pair shares a group with the same probability."""
    total = rows.sum(axis=1)
    own = (rows**2).sum(axis=1) / np.maximum(total, 1.0)
    others = (slots - 1) / max(num_groups * slots - 1, 1)
    return np.asarray(own + others * (total - own))


def expert_rows(
    trace: Trace | CountTrace, batches: NDArray[np.int32], layer: int
) -> Floats:
    """Rows of each expert in each batch at one layer, float64 [Q, E]."""
    rows = np.zeros((num_batches(batches), trace.num_experts))
    if isinstance(trace, CountTrace):
        np.add.at(rows, batches, trace.counts[:, layer].astype(np.float64))
        return rows
    token, choice = np.nonzero(trace.topk_ids[:, layer] >= 0)
    np.add.at(rows, (batches[token], trace.topk_ids[token, layer, choice]), 1.0)
    return rows
