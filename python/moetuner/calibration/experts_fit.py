"""From times of experts to a curve, and to the two rates that stand for it elsewhere.

More rows for each expert, or more active experts, take no less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.calibration.exchange_fit import nonnegative_fit
from moetuner.calibration.prediction import model_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moetuner.calibration.samples import ExpertsSample, LayerShape

    Floats = NDArray[np.float64]

_PASSES = 20  # over rows and columns in turn; each brings both nearer


def smooth_experts(
    samples: Sequence[ExpertsSample],
) -> dict[LayerShape, list[tuple[int, int, float]]]:
    """Rows, active experts and seconds of each shape, in rising order of both.

    Each time is moved as little as it takes, relatively, so that none falls where there
    are more rows for each expert, or more active experts.
    """
    found: dict[LayerShape, list[tuple[int, int, float]]] = {}
    for shape in dict.fromkeys(sample.shape for sample in samples):
        own = [sample for sample in samples if sample.shape == shape]
        each = sorted({s.rows // s.active for s in own})
        active = sorted({s.active for s in own})
        grid = np.full((len(each), len(active)), np.nan)
        for s in own:
            place = each.index(s.rows // s.active), active.index(s.active)
            grid[place] = np.log(s.timing.seconds)
        grid = np.exp(rising(grid))
        found[shape] = [
            (rows * count, count, float(grid[i, j]))
            for j, count in enumerate(active)
            for i, rows in enumerate(each)
            if not np.isnan(grid[i, j])
        ]
    return found


def rising(grid: Floats) -> Floats:
    """The values that rise along both axes, near to `grid`; NaN: not there."""
    grid = grid.copy()
    for _ in range(_PASSES):
        for lines in (grid, grid.T):
            for line in lines:
                known = ~np.isnan(line)
                line[known] = pool(line[known])
    for axis in (0, 1):  # what the last pass left over
        grid = np.where(np.isnan(grid), np.nan, np.fmax.accumulate(grid, axis=axis))
    return grid


def pool(values: Floats) -> Floats:
    """Neighbours that fall become their mean: the nearest rising sequence."""
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, few), (high, more) = blocks[-2:]
            mean = (low * few + high * more) / (few + more)
            blocks[-2:] = [(mean, few + more)]
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def effective_rates(samples: Sequence[ExpertsSample]) -> tuple[float, float]:
    """Operations/s and bytes/s whose larger time is nearest to all times, relatively.

    A rate that is nowhere the slower one is the best that was seen.
    """
    took = np.array([s.timing.seconds for s in samples])
    sizes = [model_shape(s.shape) for s in samples]
    work = np.array(
        [
            [s.rows * size.flops_per_row, s.active * size.expert_bytes]
            for s, size in zip(samples, sizes, strict=True)
        ]
    )
    best = (took[:, None] / work).min(axis=0)
    found = best
    for _ in range(_PASSES):
        slower = (work * found).argmax(axis=1)
        chosen = np.where(np.arange(2) == slower[:, None], work, 0.0)
        fitted = nonnegative_fit(chosen, took, np.ones(len(took)))
        found = np.where(chosen.any(axis=0), fitted, best)
    operations, memory = (1 / found).tolist()
    return operations, memory
