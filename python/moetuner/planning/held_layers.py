"""A plan that favours something else than time, held to the time of a faster one.

Legend: L layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner.solver.joint.replan import widened

if TYPE_CHECKING:
    from collections.abc import Callable

    from moetuner.placement.model import Placement
    from moetuner.problem import PlacementProblem


def held_layers(
    problem: PlacementProblem,
    plan: Placement,
    fast: Placement,
    value_of: Callable[[Placement], float],
    most: float,
    seconds_left: Callable[[], float],
) -> tuple[Placement, int]:
    """`plan` with as few layers of `fast` as make its value `most` or less.

    Layers that lose most time go first, by halving: about log2(L) valuations, no more
    than there is time for. The value of `fast` is `most` or less; without time all
    layers are its.

    Returns
    -------
    The placement, and how many of its layers are those of `fast`.
    """
    plan, fast = widened(plan, problem), widened(fast, problem)
    enough = problem.num_layers
    if seconds_left() <= 0:
        return fast, enough
    loss = [problem.workload.layer_seconds(each) for each in (plan, fast)]
    order = np.argsort(loss[1] - loss[0], kind="stable")
    found, too_few = fast, 0
    while enough - too_few > 1 and seconds_left() > 0:
        number = (enough + too_few) // 2
        slots = np.array(plan.slot_experts)
        slots[order[:number]] = fast.slot_experts[order[:number]]
        mixed = replace(plan, slot_experts=slots)
        if value_of(mixed) <= most:
            found, enough = mixed, number
        else:
            too_few = number
    return found, enough
