"""Planning core of moetuner (C++)."""

from __future__ import annotations

import collections.abc
import enum
import typing

import numpy
import numpy.typing

import moetuner.evaluation.cost
import moetuner.evaluation.replica_rule

__all__: list[str] = [
    "ArcCost",
    "ComputeRates",
    "Crossing",
    "Hops",
    "LayerPrice",
    "LinkFactors",
    "LinkRates",
    "RankCompute",
    "Rates",
    "Rows",
    "SearchOptions",
    "SearchProblem",
    "Smoothing",
    "WireRules",
    "cheapest_arcs",
    "count_statistics",
    "pack_by_load",
    "refine_by_swaps",
    "search_layers",
    "search_tokens",
    "tally_routing",
    "wire_rules",
]

class Rows(enum.Enum):
    """Which rows a token sends."""

    PER_EXPERT = ...
    PER_RANK = ...
    TO_ALL = ...

class Crossing(enum.Enum):
    """How rows reach another node."""

    DIRECT = ...
    GATEWAY = ...
    RING = ...

class Hops(enum.Enum):
    """What a direction takes on links of both kinds."""

    IN_TURN = ...
    TOGETHER = ...

class WireRules:
    """All that the planner must know of a wire."""
    def __init__(self, *, rows: Rows, crossing: Crossing, hops: Hops = ...) -> None: ...
    @property
    def crossing(self) -> Crossing: ...
    @property
    def hops(self) -> Hops: ...
    @property
    def once_per_place(self) -> bool:
        """Whether a token sends one row to each rank and node it visits."""
    @property
    def rows(self) -> Rows: ...

class ComputeRates:
    """Seconds of computing, on a rank of speed 1."""
    def __init__(
        self,
        *,
        row: typing.SupportsFloat | typing.SupportsIndex,
        expert: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...
    @property
    def expert(self) -> float:
        """Of one expert that has a row."""
    @property
    def row(self) -> float:
        """Of one (token, expert) row."""

class RankCompute:
    """How one rank of speed 1 computes."""
    def __init__(
        self,
        *,
        rates: ComputeRates,
        planes: collections.abc.Sequence[ComputeRates],
        start: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...
    @property
    def planes(self) -> list[ComputeRates]:
        """Where larger than `rates`."""
    @property
    def rates(self) -> ComputeRates: ...
    @property
    def start(self) -> float:
        """Once, beside `Rates.layer`, at any speed."""

class LinkRates:
    """Seconds of one direction of the exchange."""
    def __init__(
        self,
        *,
        rank_row: typing.SupportsFloat | typing.SupportsIndex,
        node_row: typing.SupportsFloat | typing.SupportsIndex,
        rank_latency: typing.SupportsFloat | typing.SupportsIndex,
        node_latency: typing.SupportsFloat | typing.SupportsIndex,
        hops: Hops = ...,
    ) -> None: ...
    @property
    def hops(self) -> Hops: ...
    @property
    def node_latency(self) -> float:
        """Where a row leaves its node."""
    @property
    def node_row(self) -> float:
        """Of a row over a node's links."""
    @property
    def rank_latency(self) -> float:
        """Where no row leaves its node."""
    @property
    def rank_row(self) -> float:
        """Of a row over a rank's link."""

class LinkFactors:
    """How slow links are beside `LinkRates`, at most 1; empty: all alike."""
    def __init__(
        self,
        *,
        egress: collections.abc.Sequence[
            typing.SupportsFloat | typing.SupportsIndex
        ] = [],
        ingress: collections.abc.Sequence[
            typing.SupportsFloat | typing.SupportsIndex
        ] = [],
    ) -> None: ...
    @property
    def egress(self) -> list[float]:
        """Of what leaves each rank or node."""
    @property
    def ingress(self) -> list[float]:
        """Of what enters each rank or node."""

class Rates:
    """All that turns rows of a layer into seconds; see `CostModel.rates`."""
    def __init__(
        self,
        *,
        compute: ComputeRates,
        dispatch: LinkRates,
        combine: LinkRates,
        both_ways: LinkRates,
        dispatch_share: typing.SupportsFloat | typing.SupportsIndex,
        rank_speeds: collections.abc.Sequence[
            typing.SupportsFloat | typing.SupportsIndex
        ],
        rank_links: LinkFactors,
        node_links: LinkFactors,
        planes: collections.abc.Sequence[ComputeRates] = [],
        layer: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        rank_compute: collections.abc.Sequence[RankCompute] = [],
        floor: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    ) -> None: ...
    def of_nodes(
        self,
        speeds: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    ) -> Rates:
        """Rates of whole nodes in the place of ranks; `speeds` [N] beside their ranks' number."""
    @property
    def both_ways(self) -> LinkRates:
        """Dispatch and combine together."""
    @property
    def combine(self) -> LinkRates: ...
    @property
    def compute(self) -> ComputeRates: ...
    @property
    def dispatch(self) -> LinkRates: ...
    @property
    def dispatch_share(self) -> float:
        """Of a row's bytes both ways."""
    @property
    def floor(self) -> float:
        """Of computing, at least, beside `layer`."""
    @property
    def layer(self) -> float:
        """Once, where any rank has a row: launches."""
    @property
    def node_links(self) -> LinkFactors:
        """Of nodes."""
    @property
    def planes(self) -> list[ComputeRates]:
        """Of computing, where larger than `compute`."""
    @property
    def rank_compute(self) -> list[RankCompute]:
        """[G], or empty where all are alike."""
    @property
    def rank_links(self) -> LinkFactors:
        """Of ranks inside their node."""
    @property
    def rank_speeds(self) -> list[float]:
        """[G], relative to `compute`."""

class LayerPrice:
    """The time of a layer, from its rows."""
    def __init__(self, rates: Rates) -> None: ...
    def busiest_node(
        self,
        egress: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        ingress: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Rows [...] on the busiest link between nodes, from [..., N]."""
    def busiest_rank(
        self,
        egress: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        ingress: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Rows [...] on the busiest link inside a node, from [..., G]; faster links count less."""
    def busy(
        self,
        rows: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        active_experts: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Seconds of a rank of speed 1 that computes in no way of its own: never falls, and is convex, in rows and experts."""
    def compute(
        self,
        rank_rows: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        active_experts: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Seconds [...] of the slowest rank and of launches, from [..., G] rows and experts that have some."""
    def exchange(
        self,
        direction: LinkRates,
        rank_rows: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        node_rows: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Seconds of one direction, from rows on the busiest link of each kind."""
    def planes_of(
        self, rank: typing.SupportsInt | typing.SupportsIndex
    ) -> list[ComputeRates]:
        """The same of one rank at speed 1, in its own way."""
    def total(
        self,
        compute: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        dispatch: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
        combine: typing.Annotated[numpy.typing.ArrayLike, numpy.float64],
    ) -> numpy.typing.NDArray[numpy.float64]:
        """Seconds of a layer, from those of its parts."""
    @property
    def busy_planes(self) -> list[ComputeRates]:
        """`busy` as the largest of linear functions."""
    @property
    def rates(self) -> Rates: ...

class ArcCost(enum.Enum):
    """What a step between layers costs."""

    EXCHANGE = ...
    REMOTE = ...
    SLOWEST_PAIR = ...

class Smoothing:
    """What a search adds to the price, in seconds."""
    def __init__(
        self,
        *,
        peak: typing.SupportsFloat | typing.SupportsIndex,
        pooled: typing.SupportsFloat | typing.SupportsIndex,
        variance: typing.SupportsFloat | typing.SupportsIndex,
        rank_copies: typing.SupportsFloat | typing.SupportsIndex,
        node_copies: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...
    def of_nodes(
        self, ranks_per_node: typing.SupportsInt | typing.SupportsIndex
    ) -> Smoothing:
        """The same for whole nodes in the place of ranks."""
    @property
    def node_copies(self) -> float: ...
    @property
    def peak(self) -> float: ...
    @property
    def pooled(self) -> float: ...
    @property
    def rank_copies(self) -> float: ...
    @property
    def variance(self) -> float: ...

class SearchProblem:
    """What a search looks at; keeps its arrays."""
    def __init__(
        self,
        *,
        topk_ids: numpy.typing.NDArray[numpy.int16],
        scenario_begin: numpy.typing.NDArray[numpy.int64],
        load: numpy.typing.NDArray[numpy.int32],
        active: numpy.typing.NDArray[numpy.uint8],
        row_scale: numpy.typing.NDArray[numpy.float64],
        weight: numpy.typing.NDArray[numpy.float64],
        token: numpy.typing.NDArray[numpy.int64],
        home: numpy.typing.NDArray[numpy.int32] | None,
        ranks_per_node: typing.SupportsInt | typing.SupportsIndex,
        wire: WireRules,
        homes: moetuner.evaluation.cost.Homes,
        replica_rule: moetuner.evaluation.replica_rule.ReplicaRule,
        rates: Rates,
        smoothing: Smoothing,
        stay_rank: numpy.typing.NDArray[numpy.int32] | None = None,
        move_seconds: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        replicas: bool = False,
    ) -> None: ...
    @property
    def num_ranks(self) -> int: ...

class SearchOptions:
    """How long and how hot a search is."""
    def __init__(
        self,
        *,
        proposals: typing.SupportsInt | typing.SupportsIndex,
        sweeps: typing.SupportsInt | typing.SupportsIndex,
        start_temperature: typing.SupportsFloat | typing.SupportsIndex,
        end_temperature: typing.SupportsFloat | typing.SupportsIndex,
        seed: typing.SupportsInt | typing.SupportsIndex,
        num_threads: typing.SupportsInt | typing.SupportsIndex,
        seconds: typing.SupportsFloat | typing.SupportsIndex,
        fills_time: bool = False,
    ) -> None: ...

def cheapest_arcs(
    *,
    rank_of: numpy.typing.NDArray[numpy.int32],
    rank_rows: numpy.typing.NDArray[numpy.float64],
    node_rows: numpy.typing.NDArray[numpy.float64],
    rename: numpy.typing.NDArray[numpy.int32],
    link_seconds: numpy.typing.NDArray[numpy.float64],
    weight: numpy.typing.NDArray[numpy.float64],
    ranks_per_node: typing.SupportsInt | typing.SupportsIndex,
    cost: ArcCost,
    crossing: Crossing,
    dispatch: LinkRates,
    rank_links: LinkFactors,
    node_links: LinkFactors,
    num_threads: typing.SupportsInt | typing.SupportsIndex = 0,
) -> dict[str, typing.Any]: ...
def count_statistics(
    topk_ids: numpy.typing.NDArray[numpy.int16],
    num_experts: typing.SupportsInt | typing.SupportsIndex,
    coactivation: bool,
    transitions: bool,
    num_threads: typing.SupportsInt | typing.SupportsIndex = 0,
) -> dict[str, typing.Any]: ...
def pack_by_load(
    load: numpy.typing.NDArray[numpy.float64],
    num_ranks: typing.SupportsInt | typing.SupportsIndex,
    slots_per_rank: typing.SupportsInt | typing.SupportsIndex,
) -> numpy.typing.NDArray[numpy.int32]: ...
def refine_by_swaps(
    load: numpy.typing.NDArray[numpy.float64],
    rank_of: numpy.typing.NDArray[numpy.int32],
    num_ranks: typing.SupportsInt | typing.SupportsIndex,
    max_swaps: typing.SupportsInt | typing.SupportsIndex = 10000,
) -> numpy.typing.NDArray[numpy.int32]: ...
def search_layers(
    problem: SearchProblem,
    options: SearchOptions,
    start: numpy.typing.NDArray[numpy.int32],
    stop: numpy.typing.NDArray[numpy.int32],
) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.float64]]:
    """Ranks [L, P] of experts and empty slots from `start`, and search costs [L]."""

def search_tokens(
    problem: SearchProblem,
    options: SearchOptions,
    start: numpy.typing.NDArray[numpy.int32],
    stop: numpy.typing.NDArray[numpy.int32],
) -> tuple[numpy.typing.NDArray[numpy.int32], numpy.typing.NDArray[numpy.float64]]:
    """Experts [L, P] of slots from `start`, and search costs [L]."""

def tally_routing(
    topk_ids: numpy.typing.NDArray[numpy.int16],
    slot_experts: numpy.typing.NDArray[numpy.int32],
    num_experts: typing.SupportsInt | typing.SupportsIndex,
    num_ranks: typing.SupportsInt | typing.SupportsIndex,
    ranks_per_node: typing.SupportsInt | typing.SupportsIndex,
    wire: WireRules,
    homes: moetuner.evaluation.cost.Homes,
    replica_rule: moetuner.evaluation.replica_rule.ReplicaRule,
    rank_slots: numpy.typing.NDArray[numpy.int32] | None,
    home_rank: numpy.typing.NDArray[numpy.int16] | None,
    group: numpy.typing.NDArray[numpy.int32],
    num_groups: typing.SupportsInt | typing.SupportsIndex,
    num_threads: typing.SupportsInt | typing.SupportsIndex = 0,
) -> dict[str, typing.Any]: ...
def wire_rules(wire: moetuner.evaluation.cost.Wire) -> WireRules:
    """The rules of a wire."""
