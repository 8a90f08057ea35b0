"""Measured times of a model's layers beside those that the objective predicts.

Legend: L layers, Q steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.times_file import LayerPart, MeasuredTime
from moetuner.evaluation.workload import (
    DEFAULT_BATCH_TOKENS,
    BatchKind,
    batch_index,
    price,
    tally_batches,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.evaluation.tally import RoutingTally
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace

    Floats = NDArray[np.float64]

RECORDED_RUN = "moetuner.nn.record_run"
"""What `TraceMetadata.source` says of a run whose steps are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTimes:
    """Seconds of one part in a mean step: of one layer, or of all together."""

    part: LayerPart
    layer: int | None
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 is as predicted."""
        if self.predicted:
            return self.measured / self.predicted
        return float("inf") if self.measured else 1.0

    @property
    def error(self) -> float:
        """How far the prediction is off, of what was measured; 0.1 is 10 %."""
        if self.measured:
            return abs(self.predicted / self.measured - 1)
        return float("inf") if self.predicted else 0.0


def compare_times(
    trace: Trace,
    placement: Placement,
    cost: CostModel,
    times: Sequence[MeasuredTime],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    batch_kind: BatchKind = BatchKind.SEQUENCES,
) -> list[PartTimes]:
    """Every measured time beside the prediction, in the order of parts and layers.

    Parameters
    ----------
    trace
        The tokens that were run. The steps of a run that `moetuner.nn.record_run` kept
        are known; other traces are cut into batches.
    placement, cost
        Of the run.
    times
        Of `moetuner.evaluation.times_file.read_times`.
    batch_tokens, batch_kind
        Of a step, where the trace does not know its steps.

    Returns
    -------
    list[PartTimes]
        Where all three parts were measured and their sum was not, the sum too.

    Raises
    ------
    InvalidTraceError
        When a layer was measured that the trace does not have.
    InvalidPlacementError
        When the placement is for another model.
    """
    batches = steps_of(trace, placement, batch_tokens, batch_kind)
    predicted = predicted_parts(trace, placement, cost, batches)
    layers = trace.layer_ids.tolist()
    found = []
    for time in (*times, *_sums(times)):
        of_layers = predicted[time.part]
        seconds = time.seconds
        if time.layer is None:
            own = float(of_layers.sum())
            seconds *= len(layers) if time.of_each_layer else 1
        elif time.layer in layers:
            own = float(of_layers[layers.index(time.layer)])
        else:
            raise InvalidTraceError(
                f"verify: times of layer {time.layer}, but the trace has layers "
                f"{layers[0]} to {layers[-1]}"
            )
        found.append(
            PartTimes(part=time.part, layer=time.layer, predicted=own, measured=seconds)
        )
    order = list(LayerPart)
    found.sort(
        key=lambda one: (order.index(one.part), -1 if one.layer is None else one.layer)
    )
    return found


def predicted_parts(
    trace: Trace,
    placement: Placement,
    cost: CostModel,
    batches: NDArray[np.int32],
) -> dict[LayerPart, Floats]:
    """Seconds of each part of each layer, means over steps, [L]."""
    parts = part_seconds(tally_batches(trace, placement, cost, batches), cost)
    return {part: of_steps.mean(axis=0) for part, of_steps in parts.items()}


def part_seconds(rows: RoutingTally, cost: CostModel) -> dict[LayerPart, Floats]:
    """Modelled time of each part of each layer, [Q, L], for each group of a tally.

    Parts are what a clock around them sees: bringing rows into order is half of what
    dispatch and combine do, while the price has it beside the experts, as both are the
    busiest rank's. So the total can be less than the sum of the parts.
    """
    whole, order = price(rows, cost), cost.hardware.permutation
    bare = replace(cost, hardware=replace(cost.hardware, permutation=None))
    most = rows.rank_rows().max(axis=-1)
    parts = {
        LayerPart.DISPATCH: whole.dispatch,
        LayerPart.EXPERTS: price(rows, bare).compute,
        LayerPart.COMBINE: whole.combine,
        LayerPart.TOTAL: whole.layer,
    }
    if order is not None:
        shape = cost.shape
        for part, value_bytes in (
            (LayerPart.DISPATCH, shape.dispatch_bytes),
            (LayerPart.COMBINE, shape.combine_bytes),
        ):
            row = order.per_row + shape.hidden_size * value_bytes * order.per_byte
            parts[part] = parts[part] + most * row
    return parts


def steps_of(
    trace: Trace, placement: Placement, batch_tokens: int, batch_kind: BatchKind
) -> NDArray[np.int32]:
    """Step of each token, int32 [T].

    A recorded run numbers the calls of all ranks through: those of one step are
    neighbours.
    """
    if trace.metadata.source != RECORDED_RUN or trace.sequence is None:
        return batch_index(trace, batch_tokens, batch_kind)
    step = trace.sequence // placement.topology.num_ranks
    _, index = np.unique(step, return_inverse=True)
    return index.astype(np.int32)


def _sums(times: Sequence[MeasuredTime]) -> list[MeasuredTime]:
    """The sum of the three parts, for each layer that has them and no total."""
    parts = [part for part in LayerPart if part is not LayerPart.TOTAL]
    found = []
    for key in dict.fromkeys((time.layer, time.of_each_layer) for time in times):
        own = {t.part: t for t in times if (t.layer, t.of_each_layer) == key}
        if LayerPart.TOTAL not in own and all(part in own for part in parts):
            found.append(
                MeasuredTime(
                    part=LayerPart.TOTAL,
                    layer=key[0],
                    of_each_layer=key[1],
                    seconds=sum(own[part].seconds for part in parts),
                )
            )
    return found
