"""From measurements to a hardware file, with how far off each time is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.exchange_fit import ExchangeFit, fit_exchange
from moetuner.calibration.experts_fit import effective_rates, smooth_experts
from moetuner.calibration.launches_fit import is_priced, with_launches
from moetuner.calibration.pair_links import slow_pairs
from moetuner.calibration.prediction import predict, predict_experts
from moetuner.calibration.rank_groups import RankGroup, rank_groups
from moetuner.calibration.samples import (
    PADDED_LOADS,
    Case,
    ExchangeSample,
    ExpertsSample,
    Form,
    LayerSample,
    Load,
    Measurements,
    ValueKind,
    Way,
)
from moetuner.errors import CalibrationError
from moetuner.evaluation.curves import (
    Calibration,
    GemmPoint,
    GroupedGemm,
    Permutation,
    Residual,
)
from moetuner.evaluation.hardware import Hardware, LinkOf
from moetuner.evaluation.other_ranks import OtherRanks
from moetuner.evaluation.rates import Bandwidth, Latency
from moetuner.evaluation.times_file import LayerPart

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_MIN_POINTS = 3  # of a curve of experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One time as measured and as the fitted machine has it."""

    part: str
    what: str
    measured: float
    spread: float
    fitted: float

    @property
    def error(self) -> float:
        """How far off the fit is, of what was measured; 0.1 is 10 % too long."""
        return self.fitted / self.measured - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """A machine, and every time that it was made of."""

    hardware: Hardware
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]
    """What could not be measured at all, and where it is from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a hardware file says of itself."""

    name: str
    date: str
    command: str


def fit_hardware(
    measured: Measurements, origin: Origin, like: Hardware, form: Form, seed: int
) -> Calibrated:
    """The machine whose prices come nearest to the times of one form.

    Parameters
    ----------
    measured
        All measurements.
    origin
        Name, date and command.
    like
        What could not be measured is as on this machine: links between ranks of one
        rank, links between nodes of one node.
    form
        Exact: launched, as prefill runs. Fixed: replayed from a CUDA graph where that
        could be, as decoding runs.
    seed
        Of `CalibrationOptions`.

    Raises
    ------
    CalibrationError
        When nothing was measured of that form.
    """
    exchanges = [s for s in measured.exchanges if _tells(s.case, form, measured)]
    layers = [s for s in measured.layers if _tells(s.case, form, measured)]
    # A launch is hidden behind the work before it; what is not is the layer's overhead.
    replayed = any(s.replayed for s in measured.experts)
    experts = [s for s in measured.experts if s.replayed is replayed]
    if not exchanges or not experts:
        raise CalibrationError(
            f"calibrate: nothing was measured of the form {form.value}"
        )
    in_node = measured.topology.ranks_per_node
    fit = fit_exchange(exchanges, in_node, seed)
    usual, *others = rank_groups(experts)
    bare = _hardware(measured, fit, usual.samples, like, origin)
    bare = replace(bare, other_ranks=tuple(map(_other_ranks, others)))
    launched = measured.machine.num_devices > 0 and not any(s.replayed for s in layers)
    hardware = with_launches(bare, layers, in_node, seed, launched=launched)
    comparisons = (
        *_of_exchanges(exchanges, hardware, in_node, seed),
        *_of_experts(usual.samples, hardware),
        *(
            comparison
            for own, told in zip(others, hardware.other_ranks, strict=True)
            for comparison in _of_experts(own.samples, told.on(hardware), told.name)
        ),
        *_of_layers(layers, hardware, in_node, seed),
    )
    calibration = Calibration(
        machine=measured.machine.words(),
        date=origin.date,
        command=origin.command,
        residuals=tuple(residuals(comparisons)),
    )
    return Calibrated(
        hardware=replace(hardware, calibration=calibration),
        comparisons=comparisons,
        notes=(
            *_taken_over(measured, like),
            *map(_told_apart, others),
            *slow_pairs(measured.pairs),
        ),
    )


def residuals(comparisons: Sequence[Comparison]) -> list[Residual]:
    """Median and worst relative error of each part, then of all."""
    parts = dict.fromkeys(one.part for one in comparisons)
    groups = [(part, [c for c in comparisons if c.part == part]) for part in parts]
    found = []
    for part, own in (*groups, ("all", comparisons)):
        errors = [abs(one.error) for one in own]
        found.append(
            Residual(
                part=part,
                points=len(errors),
                median=float(np.median(errors)),
                worst=float(max(errors)),
            )
        )
    return found


def _hardware(
    measured: Measurements,
    fit: ExchangeFit,
    experts: Sequence[ExpertsSample],
    like: Hardware,
    origin: Origin,
) -> Hardware:
    """All but what a layer takes besides."""
    between: dict[str, Any] = {
        "nic_bandwidth": like.nic_bandwidth,
        "node_latency": like.node_latency,
        "nic_of": like.nic_of,
        "network": like.network,
    }
    inside: dict[str, Any] = {
        "rank_bandwidth": like.rank_bandwidth,
        "rank_latency": like.rank_latency,
    }
    if fit.rank_egress is not None and fit.rank_ingress is not None:
        inside["rank_bandwidth"] = Bandwidth(
            egress=(1 / fit.rank_egress,), ingress=(1 / fit.rank_ingress,)
        )
        inside["rank_latency"] = (
            Latency(base=fit.node_base or 0.0, per_rank=fit.node_per_rank)
            if fit.rank_base is None  # no exchange stayed inside a node: at most that
            else Latency(base=fit.rank_base, per_rank=fit.rank_per_rank)
        )
    if fit.node_egress is not None and fit.node_ingress is not None:
        between["nic_bandwidth"] = Bandwidth(
            egress=(1 / fit.node_egress,), ingress=(1 / fit.node_ingress,)
        )
        between["node_latency"] = Latency(
            base=fit.node_base or 0.0, per_rank=fit.node_per_rank
        )
        between |= {"nic_of": LinkOf.NODE, "network": ""}
    operations, memory = effective_rates(experts)
    return Hardware(
        name=origin.name,
        sources=("measured by moetuner calibrate", *_taken_over(measured, like)),
        ranks_per_node=measured.topology.ranks_per_node,
        memory_bandwidth=memory,
        matmul_rate=operations,
        grouped_gemm=_curves(experts),
        permutation=Permutation(per_row=fit.per_row, per_byte=fit.per_byte),
        **inside,
        **between,
    )


def _other_ranks(group: RankGroup) -> OtherRanks:
    operations, memory = effective_rates(group.samples)
    return OtherRanks(
        name=f"ranks {', '.join(map(str, group.ranks))}",
        ranks=group.ranks,
        memory_bandwidth=memory,
        matmul_rate=operations,
        grouped_gemm=_curves(group.samples),
    )


def _told_apart(group: RankGroup) -> str:
    ranks = ", ".join(map(str, group.ranks))
    return (
        f"experts of ranks {ranks}: {group.ratio:.2f} times as long as those of the "
        f"others, so they have a curve of their own"
    )


def _curves(experts: Sequence[ExpertsSample]) -> tuple[GroupedGemm, ...]:
    return tuple(
        GroupedGemm(
            dtype="fp32" if shape.values is ValueKind.FLOAT32 else "bf16",
            hidden_size=shape.hidden_size,
            expert_hidden_size=shape.inner_size,
            weight_bytes=float(shape.values.num_bytes),
            points=tuple(
                GemmPoint(rows=rows, active=active, seconds=seconds)
                for rows, active, seconds in points
            ),
        )
        for shape, points in smooth_experts(experts).items()
        if len(points) >= _MIN_POINTS
    )


def _tells(case: Case, form: Form, measured: Measurements) -> bool:
    """Whether a case is of that form, and its rows are what travels.

    Where the fixed form sends whole shares, a load that stays on its rank takes as long
    as one that goes everywhere: its rows say nothing of links.
    """
    whole = form is Form.FIXED and measured.pads_shares and case.num_ranks > 1
    return case.form is form and (not whole or case.load in PADDED_LOADS)


def _of_exchanges(
    samples: Sequence[ExchangeSample], hardware: Hardware, in_node: int, seed: int
) -> list[Comparison]:
    found = []
    for sample in (s for s in samples if s.case.load is not Load.LOCAL):
        told = predict(sample.case, hardware, in_node, seed)
        parts = {Way.DISPATCH: told[LayerPart.DISPATCH]}
        parts[Way.COMBINE] = told[LayerPart.COMBINE]
        parts[Way.BOTH] = parts[Way.DISPATCH] + parts[Way.COMBINE]
        found.append(
            Comparison(
                part=sample.way.value,
                what=str(sample.case),
                measured=sample.timing.seconds,
                spread=sample.timing.spread,
                fitted=parts[sample.way],
            )
        )
    return found


def _of_experts(
    samples: Sequence[ExpertsSample], hardware: Hardware, of: str = ""
) -> list[Comparison]:
    return [
        Comparison(
            part=f"experts of {of}" if of else "experts",
            what=f"{s.rows} rows of {s.active} experts, {s.shape}",
            measured=s.timing.seconds,
            spread=s.timing.spread,
            fitted=predict_experts(s.shape, s.rows, s.active, hardware),
        )
        for s in samples
    ]


def _of_layers(
    samples: Sequence[LayerSample], hardware: Hardware, in_node: int, seed: int
) -> list[Comparison]:
    return [
        Comparison(
            part="layer",
            what=str(s.case),
            measured=s.timing.seconds,
            spread=s.timing.spread,
            fitted=predict(s.case, hardware, in_node, seed)[LayerPart.TOTAL],
        )
        for s in samples
        if is_priced(s.case)
    ]


def _taken_over(measured: Measurements, like: Hardware) -> list[str]:
    """What was not there to be measured."""
    topology = measured.topology
    found = []
    if topology.ranks_per_node == 1:
        found.append(f"links inside a node: not measured, as {like.name}")
    if topology.num_nodes == 1:
        found.append(f"links between nodes: not measured, as {like.name}")
    return found
