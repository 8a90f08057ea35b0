"""What the figures show, as numbers: one definition for the web page and for paper.

Legend: L layers, E experts, G ranks, S slots in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetuner.placement.model import EMPTY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moetuner.evaluation.evaluate import Evaluation
    from moetuner.placement.model import Placement

    Floats = NDArray[np.float64]

FLOW_LEVELS = ("stays on its rank", "stays in its node", "changes node")


def relative_load(evaluation: Evaluation) -> Floats:
    """Load of each rank over the layer's mean, float64 [L, G]; 1 without tokens."""
    rows = evaluation.rank_rows
    mean = rows.mean(axis=1, keepdims=True)
    load: Floats = np.divide(rows, mean, out=np.ones_like(rows), where=mean > 0)
    return load


def traffic_per_token(evaluation: Evaluation) -> Floats:
    """Dispatch rows per token of an even share, mean over layers, float64 [G, G].

    From home to computing rank; the diagonal, which crosses no link, is NaN.
    """
    share = evaluation.num_tokens * len(evaluation.imbalance)
    table: Floats = evaluation.traffic * (len(evaluation.traffic) / share)
    np.fill_diagonal(table, np.nan)
    return table


def experts_by_rank(placement: Placement, layer: int) -> NDArray[np.int32]:
    """Experts of a layer in the order of their slots, int32 [S]; replicas repeat."""
    row = placement.slot_experts[layer]
    experts: NDArray[np.int32] = row[row != EMPTY]
    return experts


def ranks_in_order(placement: Placement, layer: int) -> NDArray[np.int64]:
    """Rank of each entry of `experts_by_rank`, int64 [S]."""
    slots = np.flatnonzero(placement.slot_experts[layer] != EMPTY)
    ranks: NDArray[np.int64] = slots // placement.slots_per_rank
    return ranks


def rank_shares(placement: Placement, layer: int) -> Floats:
    """Share of each expert's tokens that a rank takes, float64 [E, G].

    Copies of an expert share alike.
    """
    shares = np.zeros((placement.num_experts, placement.topology.num_ranks))
    shares[experts_by_rank(placement, layer), ranks_in_order(placement, layer)] = 1.0
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def together(placement: Placement, coactivation: NDArray[np.int64]) -> Floats:
    """Share of a token's pairs of experts that one rank can serve, float64 [L].

    Of the pairs in ``coactivation`` [L, E, E] without the diagonal; 1 without any.
    """
    shares = np.ones(placement.num_layers)
    for layer, pairs in enumerate(coactivation):
        held = rank_shares(placement, layer) > 0
        meet = (held.astype(np.float64) @ held.T) > 0
        total = pairs.sum() - np.trace(pairs)
        if total:
            shares[layer] = ((pairs * meet).sum() - np.trace(pairs)) / total
    return shares


def rank_flows(placement: Placement, transitions: NDArray[np.int64]) -> Floats:
    """Rows from rank to rank between recorded layers, float64 [L - 1, G, G]."""
    shares = [rank_shares(placement, i) for i in range(placement.num_layers)]
    ranks = placement.topology.num_ranks
    flows = np.zeros((len(transitions), ranks, ranks))
    for layer, counts in enumerate(transitions):
        flows[layer] = shares[layer].T @ counts.astype(np.float64) @ shares[layer + 1]
    return flows


def flow_levels(placement: Placement, flows: Floats) -> Floats:
    """Share of each layer's flow per entry of `FLOW_LEVELS`, float64 [L - 1, 3]."""
    total = flows.sum(axis=(1, 2))
    near = (flows * placement.topology.same_node()).sum(axis=(1, 2))
    stays = np.trace(flows, axis1=1, axis2=2)
    parts = np.stack([stays, near - stays, total - near], axis=1)
    shares: Floats = parts / np.where(total > 0, total, 1)[:, None]
    return shares
