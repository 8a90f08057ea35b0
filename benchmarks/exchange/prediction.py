"""What the evaluator says of the tokens that a benchmark sends.

Legend: L layers, G ranks.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.models import shape_for_model

if TYPE_CHECKING:
    import numpy as np
    from moetuner import Placement
    from moetuner.trace import Trace


@cache
def predicted_traffic(
    tokens: Trace, placement: Placement, homes: str
) -> np.ndarray | None:
    """Rows from rank to rank, [L, G, G]; None where the planning core is missing."""
    try:
        from moetuner.evaluation.tally import tally
    except ImportError:
        return None
    return tally(tokens, placement, homes=Homes(homes)).traffic


def predicted_step(
    model: str, tokens: Trace, placement: Placement
) -> dict[str, object] | None:
    """Rows and seconds of all layers, each rank's tokens at home; or None."""
    try:
        from moetuner.evaluation.evaluate import evaluate
    except ImportError:
        return None
    cost = CostModel(shape=shape_for_model(model), homes=Homes.RECORDED)
    found = evaluate(tokens, placement, cost)
    return {
        "milliseconds": found.modelled_seconds * 1e3,
        "exchange_milliseconds": (found.dispatch_seconds + found.combine_seconds) * 1e3,
        "traffic": found.traffic.tolist(),
    }
