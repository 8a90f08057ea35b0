"""What a search looks at: batches of a workload, as arrays for the C++ core.

Legend: T tokens, S scenarios, L layers, K top-k, E experts, G ranks, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import moetuner._core as _core
from moetuner.evaluation.cost import Homes
from moetuner.evaluation.workload import Workload, batch_index, num_batches
from moetuner.trace import CountTrace, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.problem import PlacementProblem

    Floats = NDArray[np.float64]

POOLED = -1
"""Scenario size that stands for all tokens of a trace in one scenario."""
MAX_SEARCH_TOKENS = 65_536
"""Of more tokens than these, some scenarios are looked at, evenly over the trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchProfile:
    """What a search adds to the modelled time, and on what batches it looks.

    Maxima have plateaus, and in-sample maxima fit noise. Even loads and few remote
    ranks decide what they leave open. Units: 1 values a row on the fullest rank like
    the arithmetic of a row, a remote rank like its share of the links' time.

    Parameters
    ----------
    scenario_tokens
        Tokens of a scenario; 0 takes the workload's batches, `POOLED` all tokens as
        one. Smaller ones are more samples of what peaks together.
    peak, pooled, variance
        Weights of the fullest rank's rows in a scenario, of the same over all scenarios
        together, and of the ranks' variance.
    rank_copies, node_copies
        Weights of distinct ranks and nodes per token.
    """

    scenario_tokens: int = 512
    peak: float = 1.0
    pooled: float = 1.0
    variance: float = 0.0
    rank_copies: float = 2.0
    node_copies: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scenarios:
    """Tokens in scenarios; rows of scenario s stand for ``row_scale[s]`` each."""

    topk_ids: NDArray[np.int16]  # [T, L, K], sorted by scenario
    begin: NDArray[np.int64]  # [S + 1]
    load: NDArray[np.int32]  # [S, L, E]
    active: NDArray[np.uint8]  # [S, L, E], 1: expected to have a row in such a batch
    row_scale: Floats  # [S]
    weight: Floats  # [S], sums to 1
    token: NDArray[np.int64]  # [T], index of each token in its own trace
    home_rank: NDArray[np.int16] | None = None  # [T]


def make_scenarios(
    workload: Workload, scenario_tokens: int, max_tokens: int = MAX_SEARCH_TOKENS
) -> Scenarios:
    """Cut a workload into scenarios of about ``scenario_tokens`` tokens.

    0, or as many as a batch has, takes the batches themselves; `POOLED` all tokens.
    Traces count by their weights; with ``worst_case`` alike: see `solve_worst_case`.
    """
    parts = []
    for trace, weight, batches in zip(
        workload.traces, workload.weights, workload.batches, strict=True
    ):
        if not np.sum(trace.num_tokens):
            continue
        share = 1 / len(workload.traces) if workload.worst_case else weight
        group, size = batches, 0.0
        whole = scenario_tokens == 0 or 0 < workload.batch_tokens <= scenario_tokens
        if not whole:
            tokens = max(scenario_tokens, 0)  # 0 pools
            group = batch_index(
                trace,
                tokens,
                workload.batch_kind,
                chunk_tokens=workload.batch_tokens,
            )
            size = int(np.sum(trace.num_tokens)) / num_batches(batches)
        parts.append(_scenarios_of(trace, group, size, share, max_tokens))
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([0] + [len(part.topk_ids) for part in parts])
    top_k = max(part.topk_ids.shape[2] for part in parts)
    homes = [part.home_rank for part in parts]
    return Scenarios(
        topk_ids=np.concatenate([_widen(part.topk_ids, top_k) for part in parts]),
        begin=np.concatenate(
            [[0]] + [part.begin[1:] + e for part, e in zip(parts, ends, strict=False)]
        ).astype(np.int64),
        load=np.concatenate([part.load for part in parts]),
        active=np.concatenate([part.active for part in parts]),
        row_scale=np.concatenate([part.row_scale for part in parts]),
        weight=np.concatenate([part.weight for part in parts]),
        token=np.concatenate([part.token for part in parts]),
        home_rank=None
        if any(home is None for home in homes)
        else np.concatenate([home for home in homes if home is not None]),
    )


def _widen(ids: NDArray[np.int16], top_k: int) -> NDArray[np.int16]:
    wide = np.full((*ids.shape[:2], top_k), -1, np.int16)
    wide[..., : ids.shape[2]] = ids
    return wide


def _scenarios_of(
    trace: Trace | CountTrace,
    group: NDArray[np.int32],
    batch_size: float,
    weight: float,
    max_tokens: int,
) -> Scenarios:
    """Scenarios by ``group``; ``batch_size`` is what one stands for, 0: for itself."""
    num_scenarios = num_batches(group)
    layers, experts = trace.num_layers, trace.num_experts
    if isinstance(trace, CountTrace):
        counts = np.zeros((num_scenarios, layers, experts), np.int64)
        np.add.at(counts, group, trace.counts)
        sizes = np.bincount(group, trace.num_tokens, num_scenarios)
        # A rank's rows are added up in 32 bits.
        unit = max(-(-int(counts.sum(axis=2).max(initial=0)) // 2**30), 1)
        rows = (counts // unit).astype(np.int32)
        return Scenarios(
            topk_ids=np.empty((0, layers, 1), np.int16),
            begin=np.zeros(num_scenarios + 1, np.int64),
            load=rows,
            active=_active(rows, batch_size),
            row_scale=_row_scale(batch_size or sizes, sizes) * unit,
            weight=weight * _shares(sizes, batch_size),
            token=np.empty(0, np.int64),
        )
    order = _sample(group, max_tokens)
    full = np.bincount(group)
    group = group[order]
    # Sampling may leave a scenario without a token.
    kept, scenario = np.unique(group, return_inverse=True)
    full = full[kept]
    num_scenarios = num_batches(scenario)
    ids = np.ascontiguousarray(trace.topk_ids[order])
    sizes = np.bincount(scenario, minlength=num_scenarios)
    load = _count(ids, scenario, num_scenarios, experts)
    return Scenarios(
        topk_ids=ids,
        begin=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        load=load,
        active=_active(load, batch_size),
        row_scale=_row_scale(batch_size or full, sizes),
        weight=weight * _shares(sizes, batch_size),
        token=order,
        home_rank=None if trace.home_rank is None else trace.home_rank[order],
    )


def _sample(group: NDArray[np.int32], max_tokens: int) -> NDArray[np.int64]:
    """Tokens by scenario, about ``max_tokens``: whole scenarios, evenly spread.

    Parts of many would cost time for each, and peak for having few tokens.
    """
    chosen = np.arange(group.size)
    num_scenarios = num_batches(group)
    if group.size > max_tokens:
        count = max(round(num_scenarios * max_tokens / group.size), 1)
        kept = np.arange(count) * num_scenarios // count
        chosen = np.flatnonzero(np.isin(group, kept))
    order: NDArray[np.int64] = chosen[np.argsort(group[chosen], kind="stable")]
    if order.size > max_tokens:
        order = order[np.arange(max_tokens) * order.size // max_tokens]
    return order


def _row_scale(stands_for: Any, sizes: NDArray[Any]) -> Floats:
    """Rows of a batch for each row of a scenario."""
    scale: Floats = np.maximum(stands_for, 1) / np.maximum(sizes, 1)
    return scale


def _shares(sizes: NDArray[Any], batch_size: float) -> Floats:
    """What scenarios weigh, sums to 1: batches alike, parts of them by their tokens."""
    tokens = sizes if batch_size else np.ones(sizes.size)
    shares: Floats = tokens / tokens.sum()
    return shares


def _active(load: NDArray[np.int32], batch_size: float) -> NDArray[np.uint8]:
    """Which experts have rows; in part of a batch, all that have any anywhere."""
    used = load > 0
    if batch_size:
        used = np.broadcast_to(used.any(axis=0), load.shape)
    return np.ascontiguousarray(used, np.uint8)


def _count(
    ids: NDArray[np.int16], group: NDArray[Any], num_scenarios: int, num_experts: int
) -> NDArray[np.int32]:
    """Rows of each expert, int32 [S, L, E]."""
    layers = ids.shape[1]
    load = np.empty((num_scenarios, layers, num_experts), np.int32)
    for layer in range(layers):
        chosen = ids[:, layer].astype(np.int64)
        cell = group[:, None] * num_experts + chosen
        load[:, layer] = np.bincount(
            cell[chosen >= 0], minlength=num_scenarios * num_experts
        ).reshape(num_scenarios, num_experts)
    return load


def search_problem(
    problem: PlacementProblem,
    scenarios: Scenarios,
    profile: SearchProfile,
    *,
    home: NDArray[np.int32] | None,
    stay: NDArray[np.int32] | None = None,
    move_seconds: float = 0.0,
    replicas: bool = False,
    nodes_alone: bool = False,
) -> _core.SearchProblem:
    """What the core looks at: scenarios, from homes [T] or uniform ones, and prices.

    With ``nodes_alone`` nodes take the place of ranks, in ``home`` too.
    """
    workload, topology = problem.workload, problem.topology
    cost, per_node = workload.cost, topology.ranks_per_node
    rates = cost.rates(topology)
    added = _smoothing(problem, profile, rates, walked=home is not None)
    if nodes_alone:
        speeds = cost.bound_speeds(topology.num_ranks)
        speeds = speeds.reshape(-1, per_node).mean(axis=1)
        rates, added = rates.of_nodes(speeds.tolist()), added.of_nodes(per_node)
    return _core.SearchProblem(
        topk_ids=scenarios.topk_ids,
        scenario_begin=scenarios.begin,
        load=scenarios.load,
        active=scenarios.active,
        row_scale=scenarios.row_scale,
        weight=scenarios.weight,
        token=scenarios.token,
        home=home,
        ranks_per_node=1 if nodes_alone else per_node,
        wire=cost.wire.rules,
        homes=cost.homes,
        replica_rule=cost.replica_rule,
        rates=rates,
        smoothing=added,
        stay_rank=stay,
        move_seconds=move_seconds,
        replicas=replicas,
    )


def _smoothing(
    problem: PlacementProblem,
    profile: SearchProfile,
    rates: _core.Rates,
    *,
    walked: bool,
) -> _core.Smoothing:
    """A profile in seconds; a walk counts remote ranks and nodes."""
    ranks, nodes = problem.topology.num_ranks, problem.topology.num_nodes
    row, links = rates.compute.row, rates.both_ways
    moves = problem.workload.cost.wire.rules.rows is not _core.Rows.TO_ALL
    rank_copies = moves * profile.rank_copies * links.rank_row / ranks
    node_copies = moves * profile.node_copies * links.node_row / nodes
    if walked:
        # A distinct rank is remote for all homes but one, a distinct node likewise.
        rank_copies *= ranks / max(ranks - 1, 1)
        node_copies *= nodes / max(nodes - 1, 1)
    return _core.Smoothing(
        peak=profile.peak * row,
        pooled=profile.pooled * row,
        variance=profile.variance * row,
        rank_copies=rank_copies,
        node_copies=node_copies,
    )


def first_homes(problem: PlacementProblem, scenarios: Scenarios) -> NDArray[np.int32]:
    """Where tokens are at the first layer, int32 [T]: recorded, or by turns."""
    workload = problem.workload
    if workload.cost.homes is Homes.RECORDED:
        assert scenarios.home_rank is not None
        return scenarios.home_rank.astype(np.int32)
    turns = np.arange(len(scenarios.token)) % problem.topology.num_ranks
    return turns.astype(np.int32)


def members(problem: PlacementProblem, rank_of: NDArray[Any]) -> NDArray[np.int32]:
    """Ranks of the experts and then of the empty slots, int32 [L, P]."""
    num_ranks, slots = problem.topology.num_ranks, problem.slots_per_rank
    sizes = problem.rank_sizes(rank_of)
    empty = [np.repeat(np.arange(num_ranks), slots - size) for size in sizes]
    return np.hstack([rank_of, np.stack(empty)]).astype(np.int32)
