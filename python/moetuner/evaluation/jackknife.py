"""How the mean batch varies where batches share sequences.

Steps of decoding have tokens of the same sequences, and chunks of one prompt lie in
several batches: such batches vary together, so drawing them one by one would show too
little. Groups of sequences are left out instead, one at a time (Tukey's jackknife).
That errs on the wide side (Efron and Stein, "The Jackknife Estimate of Variance", The
Annals of Statistics 9, 1981).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.evaluation.workload import BatchKind, batch_index, price, tally_batches
from moetuner.trace.split import select, sequence_index

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.cost import CostModel
    from moetuner.placement.model import Placement
    from moetuner.trace import Trace

MAX_GROUPS = 20


def jackknife_seconds(
    trace: Trace,
    placement: Placement,
    cost: CostModel,
    *,
    batch_tokens: int,
    kind: BatchKind,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Deviations of the mean batch, float64 [U] for U groups of sequences.

    Their standard deviation is the standard error of the mean batch. The same seed
    makes the same groups for every placement, so that differences between placements
    are paired. The trace has at least two sequences.
    """
    index = sequence_index(trace)
    num_sequences = int(index.max()) + 1
    num_groups = min(num_sequences, MAX_GROUPS)
    group_of = np.random.default_rng(seed).permutation(num_sequences) % num_groups
    group = group_of[index]
    # Batches stay as they are: what else falls together then is chance, not spread.
    batches = batch_index(trace, batch_tokens, kind)
    means = np.empty(num_groups)
    for left_out in range(num_groups):
        kept = group != left_out
        rows = tally_batches(select(trace, kept), placement, cost, batches[kept])
        seconds = price(rows, cost).total
        means[left_out] = seconds[rows.tokens > 0].mean()
    deviations: NDArray[np.float64] = (means - means.mean()) * np.sqrt(num_groups - 1)
    return deviations
