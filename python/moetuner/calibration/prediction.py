"""What the objective says of a case: by the evaluator's own price, on known loads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.loads import case_counts
from moetuner.calibration.samples import ValueKind
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.models import ModelShape, ValueType
from moetuner.evaluation.step_times import part_seconds
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from moetuner._core import LayerPrice
    from moetuner.calibration.samples import Case, LayerShape
    from moetuner.evaluation.hardware import Hardware
    from moetuner.evaluation.times_file import LayerPart

_TYPES = {
    ValueKind.BFLOAT16: ValueType.BF16,
    ValueKind.FLOAT16: ValueType.FP16,
    ValueKind.FLOAT32: ValueType.FP32,
}


def model_shape(shape: LayerShape) -> ModelShape:
    """The sizes that the price knows."""
    kind = _TYPES[shape.values]
    return ModelShape(
        hidden_size=shape.hidden_size, expert_hidden_size=shape.inner_size
    ).with_types(weights=kind, rows_out=kind, rows_back=kind)


def predict(
    case: Case, hardware: Hardware, ranks_per_node: int, seed: int
) -> dict[LayerPart, float]:
    """Seconds of one layer and of its parts."""
    others = [
        (o, [r for r in o.ranks if r < case.num_ranks]) for o in hardware.other_ranks
    ]
    there = tuple(replace(one, ranks=tuple(own)) for one, own in others if own)
    cost = CostModel(
        hardware=replace(hardware, other_ranks=there),
        shape=model_shape(case.shape),
        homes=Homes.RECORDED,
    )
    parts = part_seconds(case_counts(case, ranks_per_node, seed), cost)
    return {part: float(seconds.sum()) for part, seconds in parts.items()}


def predict_experts(
    shape: LayerShape, rows: int, active: int, hardware: Hardware
) -> float:
    """Seconds that a usual rank takes for rows of its active experts."""
    layer_price = _alone(shape, hardware)
    return float(layer_price.compute(np.array([rows]), np.array([active])))


def start_seconds(shape: LayerShape, hardware: Hardware) -> float:
    """Seconds that experts of a usual rank take beside their planes."""
    return float(_alone(shape, hardware).rates.layer)


def _alone(shape: LayerShape, hardware: Hardware) -> LayerPrice:
    """The price of nothing but experts, on one rank."""
    alone = replace(
        hardware,
        permutation=None,
        layer_overhead=0.0,
        compute_floor=0.0,
        other_ranks=(),
    )
    cost = CostModel(hardware=alone, shape=model_shape(shape))
    return cost.layer_price(Topology(num_ranks=1, ranks_per_node=1))
