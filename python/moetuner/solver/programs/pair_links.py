"""ILP2 where the link of each pair of ranks has its own speed, as the paper has it.

With s[g, h] the seconds of a row from rank g to rank h, the seconds of a row from
cluster a of a layer to cluster b of the next are ``sum_gh s[g, h] y[a, g] y'[b, h]``.
That is split by the rank of b::

    p[a, b, h] = (row seconds from a's rank to rank h) where b is on h, else 0
    sum_b p[a, b, h] = sum_g s[g, h] y[a, g]        one cluster is on h
    p[a, b, h] <= max_g s[g, h] * y'[b, h]

For whole y these leave one value to p, so G^3 columns per pair of layers are exact.

Legend: L layers, G ranks and clusters of a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.solver.heuristics.chain import bottleneck
from moetuner.solver.programs.model import MilpBuilder, MilpModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def pair_link_bounds(flows: Floats, seconds: Floats) -> Floats:
    """Least possible slowest link of each layer pair by itself, float64 [L - 1].

    A cluster's rows to the next layer take least where the most go over the fastest
    links of its rank. Clusters are then given ranks so that the worst of them is best,
    once for what leaves clusters and once for what enters them.

    Parameters
    ----------
    flows
        Rows from cluster to cluster, [L - 1, G, G].
    seconds
        Of a row from rank to rank, [G, G].
    """

    def least(flow: Floats, links: Floats) -> float:
        most, fastest = -np.sort(-flow, axis=1), np.sort(links, axis=1)
        return bottleneck((most[:, None] * fastest[None]).max(axis=2))

    return np.array(
        [max(least(flow, seconds), least(flow.T, seconds.T)) for flow in flows]
    )


def pair_link_model(
    flows: Floats, seconds: Floats, bounds: Floats, scale: float
) -> MilpModel:
    """ILP2 for clusters that sit, at the start, on the rank of their own number.

    ``bounds`` [L - 1] are `pair_link_bounds`; 1 in the objective is ``scale`` seconds.
    The columns of y [L, G, G] come first.
    """
    num_layers, num_ranks = len(flows) + 1, len(seconds)
    slowest = seconds.max()
    share = seconds / slowest  # so that p is in [0, 1]
    builder = MilpBuilder()
    y = builder.add_columns(num_layers, num_ranks, num_ranks, upper=1.0, integer=True)
    for clusters in y:
        for i in range(num_ranks):
            builder.add_row(clusters[i], lower=1.0, upper=1.0)
            builder.add_row(clusters[:, i], lower=1.0, upper=1.0)
    for layer, flow in enumerate(flows):
        bound = bounds[layer] / scale
        w = builder.add_columns(1, objective=1.0, lower=bound * (1 - 1e-9))
        p = _add_seconds(builder, y[layer], y[layer + 1], share)
        rows = flow * (slowest / scale)
        for a, b in np.argwhere(rows > bound).tolist():  # no others can exceed it
            factors = np.full(num_ranks, -rows[a, b])
            builder.add_row([w[0], *p[a, b]], [1.0, *factors], lower=0.0)
    values = np.zeros(len(builder))
    values[y[:, np.arange(num_ranks), np.arange(num_ranks)]] = 1.0
    return builder.build(values)


def _add_seconds(
    builder: MilpBuilder, here: NDArray[np.int64], there: NDArray[np.int64], s: Floats
) -> NDArray[np.int64]:
    """Columns p[a, b, h] for the columns of y of a layer and of the next."""
    num_ranks = len(s)
    p = builder.add_columns(num_ranks, num_ranks, num_ranks)
    for h in range(num_ranks):
        for i in range(num_ranks):
            builder.add_row(
                np.concatenate([p[i, :, h], here[i]]),
                np.concatenate([np.ones(num_ranks), -s[:, h]]),
                lower=0.0,
                upper=0.0,
            )
            for b in range(num_ranks):
                limit = -s[:, h].max()
                builder.add_row([p[i, b, h], there[b, h]], [1.0, limit], upper=0.0)
    return p
