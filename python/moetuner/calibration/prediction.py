"""What the objective says of a case: by the evaluator's own price, on known loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.loads import known_load
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.shapes import ModelShape
from moetuner.evaluation.workload import LayerSeconds, price
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from moetuner.calibration.samples import Case, LayerShape
    from moetuner.evaluation.hardware import Hardware


def model_shape(shape: LayerShape) -> ModelShape:
    """The sizes that the price knows; rows and weights are bfloat16."""
    return ModelShape(
        hidden_size=shape.hidden_size, expert_hidden_size=shape.inner_size
    )


def predict(
    case: Case, hardware: Hardware, ranks_per_node: int, seed: int
) -> LayerSeconds:
    """Seconds of one layer and of its parts, arrays [1, 1]."""
    in_node = min(ranks_per_node, case.num_ranks)
    topology = Topology(num_ranks=case.num_ranks, ranks_per_node=in_node)
    counts = known_load(case, topology, seed).counts()
    cost = CostModel(
        hardware=hardware, shape=model_shape(case.shape), homes=Homes.RECORDED
    )
    return price(counts, cost)


def predict_experts(
    shape: LayerShape, rows: int, active: int, hardware: Hardware
) -> float:
    """Seconds that one rank takes for rows spread evenly over active experts."""
    cost = CostModel(hardware=hardware, shape=model_shape(shape))
    layer_price = cost.layer_price(Topology(num_ranks=1, ranks_per_node=1))
    return float(layer_price.compute(np.array([rows]), np.array([active])))
