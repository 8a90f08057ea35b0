"""What moving and computing rows costs on a given machine.

`CostModel` says what the machine can do and how tokens travel. The core's `LayerPrice`
makes seconds of it: csrc/include/moetuner/planning/price.h, in words docs/objective.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import check_positive, one_of
from moetuner._core import (
    ComputeRates,
    LayerPrice,
    LinkFactors,
    LinkRates,
    RankCompute,
    Rates,
    WireRules,
    wire_rules,
)
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.compute_curve import (
    ComputeCurve,
    Plane,
    curve_for,
    least_ratio,
)
from moetuner.evaluation.hardware import HARDWARE, Dtype, Hardware
from moetuner.evaluation.models import DEFAULT_SHAPE, ModelShape
from moetuner.evaluation.rates import Bandwidth
from moetuner.evaluation.replica_rule import ReplicaRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.curves import GroupedGemm
    from moetuner.placement.topology import Topology

    Floats = NDArray[np.float64]


class Wire(str, enum.Enum):
    """What crosses the network for one token."""

    DEDUP = "dedup"
    """One row per distinct remote rank; between nodes one per distinct remote node."""
    DEDUP_PIPELINED = "dedup_pipelined"
    """The same, but rows are passed on inside a node while others still cross."""
    DEDUP_RANKS = "dedup_ranks"
    """One row per distinct remote rank, also between nodes."""
    PER_EXPERT = "per_expert"
    """One row per (token, expert) on a remote rank."""
    ALLGATHER = "allgather"
    """Every row goes to every rank, around a ring; placement changes only load."""

    @property
    def rules(self) -> WireRules:
        """Which rows travel, and how: the core's rules, which all code asks for."""
        return wire_rules(self)


class Homes(str, enum.Enum):
    """Where a token's hidden state lives when a layer begins."""

    UNIFORM = "uniform"
    """Every rank equally likely, whatever the routing; an exact expectation."""
    RECORDED = "recorded"
    """As the trace's ``home_rank`` says."""
    FOLLOW = "follow"
    """The rank of the token's first expert a layer before; uniform at the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Machine, model, and how tokens travel: all that turns row counts into seconds.

    ``wire``, ``homes`` and ``replica_rule`` may be given by their names, "dedup" say.
    ``rank_speeds`` [G] are the ranks' speeds of computing, relative to ``hardware``;
    empty when all are alike.
    """

    hardware: Hardware = HARDWARE["h100"]
    shape: ModelShape = DEFAULT_SHAPE
    wire: Wire = Wire.DEDUP
    homes: Homes = Homes.UNIFORM
    rank_speeds: tuple[float, ...] = ()
    replica_rule: ReplicaRule = ReplicaRule.MOETUNER

    def __post_init__(self) -> None:
        speeds = tuple(self.rank_speeds)
        for speed in speeds:
            check_positive("CostModel", "rank_speeds", speed)
        object.__setattr__(self, "rank_speeds", speeds)
        object.__setattr__(self, "wire", one_of(Wire, self.wire, "CostModel: wire"))
        object.__setattr__(self, "homes", one_of(Homes, self.homes, "CostModel: homes"))
        rule = one_of(ReplicaRule, self.replica_rule, "CostModel: replica_rule")
        object.__setattr__(self, "replica_rule", rule)

    def speeds(self, num_ranks: int) -> Floats:
        """``rank_speeds``, spelt out where all ranks are alike, float64 [G]."""
        return np.array(self.rank_speeds or (1.0,) * num_ranks, np.float64)

    def bound_speeds(self, num_ranks: int) -> Floats:
        """Speeds for bounds, float64 [G]: no rank takes less than at its own of these.

        They are of ranks that all compute as most do. Where none computes in a way of
        its own they are ``speeds``.
        """
        speeds = self.speeds(num_ranks)
        if not self.hardware.other_ranks:
            return speeds
        usual, *others = self.compute_curves()
        for each, curve in zip(self.hardware.other_ranks, others, strict=True):
            least = least_ratio(curve, usual) * (1 - 1e-12)  # for rounding
            speeds[list(each.ranks)] /= max(least, 1e-300)
        return speeds

    def alike(self, topology: Topology) -> bool:
        """Whether nothing but their nodes tells ranks apart, and nothing nodes.

        What leaves a rank may be slower than what enters it.
        """
        rates = self.rates(topology)
        links = (rates.rank_links, rates.node_links)
        if self.hardware.other_ranks:
            return False
        each = [rates.rank_speeds]
        each += [way for link in links for way in (link.egress, link.ingress)]
        return all(len(set(values)) <= 1 for values in each)

    def check_topology(self, topology: Topology) -> None:
        """Refuse a number of ranks or nodes that no figure is about."""
        if self.rank_speeds and len(self.rank_speeds) != topology.num_ranks:
            raise InvalidProblemError(
                f"CostModel: rank_speeds names {len(self.rank_speeds)} ranks, the "
                f"topology has {topology.num_ranks}"
            )
        self._check_pairs(topology)
        for each in self.hardware.other_ranks:
            if max(each.ranks) >= topology.num_ranks:
                raise InvalidProblemError(
                    f"CostModel: other_ranks of {self.hardware.name} has rank "
                    f"{max(each.ranks)} in {each.name}, the topology has ranks 0 to "
                    f"{topology.num_ranks - 1}"
                )
        inside = self.hardware.inside
        between = self.hardware.between(topology.ranks_per_node)
        of_ranks = (1, topology.ranks_per_node, topology.num_ranks)
        for name, given, counts in (
            ("rank_bandwidth", inside, of_ranks),
            ("nic_bandwidth", between, (1, topology.num_nodes)),
        ):
            for values in (given.egress, given.ingress):
                if len(values) not in counts:
                    wanted = " or ".join(map(str, sorted(set(counts))))
                    raise InvalidProblemError(
                        f"CostModel: {name} of {self.hardware.name} has {len(values)} "
                        f"values, wanted {wanted} for {topology.num_ranks} ranks on "
                        f"{topology.num_nodes} nodes"
                    )

    def _check_pairs(self, topology: Topology) -> None:
        """Refuse ranks, or nodes, that ``pair_bandwidth`` is not about."""
        ranks = len(self.hardware.pair_bandwidth)
        per_node = min(self.hardware.ranks_per_node, ranks)
        wanted = (topology.num_ranks, topology.ranks_per_node)
        if ranks and (ranks, per_node) != wanted:
            raise InvalidProblemError(
                f"CostModel: pair_bandwidth of {self.hardware.name} is of {ranks} "
                f"ranks in nodes of {per_node}, the topology has {wanted[0]} in nodes "
                f"of {wanted[1]}"
            )

    def rates(self, topology: Topology) -> Rates:
        """Seconds of rows, experts and messages on the ranks of ``topology``.

        All that the core needs to price a layer; docs/objective.md has the formulas.
        """
        self.check_topology(topology)
        hardware, shape, curve = self.hardware, self.shape, self.compute_curve()
        own = self.rank_curves(topology)
        start = min((each.start for each in own), default=curve.start)
        usual = _compute_of(curve, curve.start)
        return Rates(
            compute=usual.rates,
            planes=usual.planes,
            layer=start + hardware.layer_overhead,
            floor=hardware.compute_floor,
            dispatch=self._link_rates(shape.dispatch_bytes, 1, topology),
            combine=self._link_rates(shape.combine_bytes, 1, topology),
            both_ways=self._link_rates(
                shape.dispatch_bytes + shape.combine_bytes, 2, topology
            ),
            dispatch_share=shape.dispatch_share,
            rank_speeds=self.speeds(topology.num_ranks).tolist(),
            rank_links=_factors(hardware.inside, topology.num_ranks),
            node_links=_factors(
                hardware.between(topology.ranks_per_node), topology.num_nodes
            ),
            rank_compute=[_compute_of(each, start) for each in own],
        )

    def compute_curve(self) -> ComputeCurve:
        """What a rank's experts take with the permutation of their rows, by its planes.

        Of all ranks but the hardware's ``other_ranks``. As measured where the hardware
        has times in the type that the experts multiply in; else arithmetic and reading
        weights side by side.
        """
        return self.compute_curves()[0]

    def compute_curves(self) -> tuple[ComputeCurve, ...]:
        """`compute_curve`, and one for each of the hardware's ``other_ranks``."""
        hardware, dtype = self.hardware, _matmul_type(self.shape)
        machines = (hardware, *(each.on(hardware) for each in hardware.other_ranks))
        measured = [_measured(each, dtype) for each in machines]
        return tuple(
            self._with_permutation(
                curve_for(self.shape, own) if own else self._ratios(each)
            )
            for each, own in zip(machines, measured, strict=True)
        )

    def rank_curves(self, topology: Topology) -> tuple[ComputeCurve, ...]:
        """The curve of each rank; nothing where none computes in its own way."""
        if not self.hardware.other_ranks:
            return ()
        usual, *others = self.compute_curves()
        found = [usual] * topology.num_ranks
        for each, curve in zip(self.hardware.other_ranks, others, strict=True):
            for rank in each.ranks:
                found[rank] = curve
        return tuple(found)

    def _ratios(self, hardware: Hardware) -> ComputeCurve:
        """Arithmetic and reading weights, side by side."""
        shape, rate = self.shape, hardware.rate(_matmul_type(self.shape))
        return ComputeCurve(
            start=0.0,
            planes=(
                Plane(row=shape.flops_per_row / rate, expert=0.0),
                Plane(row=0.0, expert=shape.expert_bytes / hardware.memory_bandwidth),
            ),
        )

    def _with_permutation(self, curve: ComputeCurve) -> ComputeCurve:
        each, shape = self.hardware.permutation, self.shape
        if each is None:
            return curve
        moved = shape.hidden_size * (shape.dispatch_bytes + shape.combine_bytes)
        row = 2 * each.per_row + moved * each.per_byte
        planes = tuple(replace(plane, row=plane.row + row) for plane in curve.planes)
        return replace(curve, planes=planes)

    def pair_bandwidths(self, topology: Topology) -> Floats:
        """What a row from rank to rank travels at, bytes/s, [G, G].

        As the hardware says of each pair; else the slower of what leaves the one and
        what enters the other, inside a node or through network cards. Of a rank with
        itself it says nothing.
        """
        self.check_topology(topology)
        if self.hardware.pair_bandwidth:
            return np.array(self.hardware.pair_bandwidth, np.float64)
        cards = Bandwidth.of(self.hardware.nic_bandwidth, "CostModel: nic_bandwidth")
        node_of = np.arange(topology.num_ranks) // topology.ranks_per_node
        out, into = self.hardware.inside.spread(topology.num_ranks)
        card_out, card_into = cards.spread(topology.num_nodes)
        return np.where(
            topology.same_node(),
            np.minimum.outer(out, into),
            np.minimum.outer(card_out[node_of], card_into[node_of]),
        )

    def layer_price(self, topology: Topology) -> LayerPrice:
        """The price of a layer on the ranks of ``topology``."""
        return LayerPrice(self.rates(topology))

    def _link_rates(
        self, bytes_per_value: float, messages: int, topology: Topology
    ) -> LinkRates:
        hardware = self.hardware
        row_bytes = self.shape.hidden_size * bytes_per_value
        inside = hardware.inside
        between = hardware.between(topology.ranks_per_node)
        near = hardware.latency(topology.ranks_per_node, between_nodes=False)
        far = hardware.latency(topology.num_ranks, between_nodes=True)
        return LinkRates(
            rank_row=row_bytes / inside.slowest,
            node_row=row_bytes / between.slowest,
            rank_latency=messages * near,
            node_latency=messages * far,
            hops=self.wire.rules.hops,
        )


def _compute_of(curve: ComputeCurve, layer: float) -> RankCompute:
    """A curve as the core has it, whose layers start after `layer` s anyway."""
    return RankCompute(
        rates=ComputeRates(
            row=max(plane.row for plane in curve.planes),
            expert=max(plane.expert for plane in curve.planes),
        ),
        planes=[
            ComputeRates(row=plane.row, expert=plane.expert)
            for plane in curve.planes
            if plane.row and plane.expert  # others are those of `rates`
        ],
        start=curve.start - layer,
    )


def _matmul_type(shape: ModelShape) -> Dtype:
    """What experts multiply in: the wider of what rows and weights come in."""
    widest = max(shape.dispatch_bytes, shape.weight_bytes)
    if widest < 0.75:  # 4 bits and their scales
        return Dtype.FP4
    if widest < 1.5:
        return Dtype.FP8
    return Dtype.BF16 if widest < 3 else Dtype.FP32


def _measured(hardware: Hardware, dtype: Dtype) -> list[GroupedGemm]:
    """Curves of that type; those of 16 bits where none is of float32."""
    found = [each for each in hardware.grouped_gemm if each.dtype == dtype.value]
    if found or dtype is not Dtype.FP32:
        return found
    return _measured(hardware, Dtype.BF16)


def _factors(bandwidth: Bandwidth, places: int) -> LinkFactors:
    """How slow each link is beside the slowest, whose seconds `LinkRates` are."""
    if bandwidth.places == 1 and bandwidth.egress == bandwidth.ingress:
        return LinkFactors()
    egress, ingress = (bandwidth.slowest / each for each in bandwidth.spread(places))
    return LinkFactors(egress=egress.tolist(), ingress=ingress.tolist())
