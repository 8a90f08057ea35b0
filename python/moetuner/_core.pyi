"""Types of the C++ planning core; contracts are in csrc/include/moetuner."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def count_statistics(
    topk_ids: NDArray[np.int16],
    num_experts: int,
    coactivation: bool,
    transitions: bool,
    num_threads: int = 0,
) -> dict[str, Any]: ...
def tally_routing(
    topk_ids: NDArray[np.int16],
    slot_experts: NDArray[np.int32],
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    wire: int,
    homes: int,
    home_rank: NDArray[np.int16] | None,
    group: NDArray[np.int32],
    num_groups: int,
    num_threads: int = 0,
) -> dict[str, Any]: ...
def pack_by_load(
    load: NDArray[np.float64], num_ranks: int, slots_per_rank: int
) -> NDArray[np.int32]: ...
def refine_by_swaps(
    load: NDArray[np.float64],
    rank_of: NDArray[np.int32],
    num_ranks: int,
    max_swaps: int = 10_000,
) -> NDArray[np.int32]: ...
def cheapest_arcs(
    *,
    rank_of: NDArray[np.int32],
    rank_rows: NDArray[np.float64],
    node_rows: NDArray[np.float64],
    rename: NDArray[np.int32],
    link_seconds: NDArray[np.float64],
    weight: NDArray[np.float64],
    ranks_per_node: int,
    cost: int,
    rank_seconds: float,
    node_seconds: float,
    rank_latency: float,
    node_latency: float,
    num_threads: int = 0,
) -> dict[str, Any]: ...
def search_layers(
    topk_ids: NDArray[np.int16],
    scenario_begin: NDArray[np.int64],
    load: NDArray[np.int32],
    active: NDArray[np.uint8],
    row_scale: NDArray[np.float64],
    weight: NDArray[np.float64],
    rank_speed: NDArray[np.float64],
    weights: NDArray[np.float64],
    ranks_per_node: int,
    dedup: bool,
    gather: bool,
    stay_rank: NDArray[np.int32] | None,
    move_seconds: float,
    rank_of: NDArray[np.int32],
    proposals: int,
    start_temperature: float,
    end_temperature: float,
    seed: int,
    num_threads: int,
    seconds: float,
    stop: NDArray[np.int32],
    home: NDArray[np.int32] | None = None,
    follow: bool = False,
    dispatch_share: float = 1.0,
    sweeps: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
def search_tokens(
    topk_ids: NDArray[np.int16],
    scenario_begin: NDArray[np.int64],
    row_scale: NDArray[np.float64],
    weight: NDArray[np.float64],
    rank_speed: NDArray[np.float64],
    home: NDArray[np.int32],
    token: NDArray[np.int64],
    weights: NDArray[np.float64],
    dispatch_share: float,
    num_experts: int,
    ranks_per_node: int,
    wire: int,
    follow: bool,
    replicas: bool,
    slot_experts: NDArray[np.int32],
    proposals: int,
    sweeps: int,
    start_temperature: float,
    end_temperature: float,
    seed: int,
    num_threads: int,
    seconds: float,
    stop: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
