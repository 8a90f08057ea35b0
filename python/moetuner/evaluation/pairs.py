"""Bandwidth from each rank to each other: B[g, h] of the MoETuner paper.

Legend: G ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moetuner._checks import is_number
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.rates import Bandwidth

Pairs = tuple[tuple[float, ...], ...]
"""[G, G] bytes/s from rank g (row) to rank h (column); 0 from a rank to itself."""


def checked_pairs(value: Any, name: str) -> Pairs:
    """`value` as tuples; empty where nothing is said of pairs.

    Raises
    ------
    InvalidProblemError
        When it is not square, no table at all, a rank has bandwidth to itself, or
        another value is not positive and finite; `name` says which figure.
    """
    try:
        rows = tuple(map(tuple, value))
    except TypeError:
        raise InvalidProblemError(
            f"{name} must be a list of rows, one for each rank, got {value!r:.60}"
        ) from None
    for g, row in enumerate(rows):
        if len(row) != len(rows):
            raise InvalidProblemError(
                f"{name} must be square: row {g} has {len(row)} values, there are "
                f"{len(rows)} rows"
            )
        for h, rate in enumerate(row):
            if g == h and not (is_number(rate) and rate == 0):
                raise InvalidProblemError(
                    f"{name} must be 0 from a rank to itself, got {rate!r} for rank {g}"
                )
            if g != h and not (is_number(rate) and 0 < rate < np.inf):
                raise InvalidProblemError(
                    f"{name} must be positive and finite, got {rate!r} from rank {g} "
                    f"to rank {h}"
                )
    return rows


def bandwidth_of_pairs(
    pairs: Pairs, ranks_per_node: int, *, between_nodes: bool
) -> Bandwidth:
    """What links carry that serve one pair after the other, as much for each.

    So a link has the harmonic mean of its pairs. Inside nodes there is one value for
    each rank; between nodes one for each node, of a card that takes part in all pairs.

    Parameters
    ----------
    pairs
        [G, G], of whole nodes; a rank has another one to send to.
    ranks_per_node
        Ranks of a node.
    between_nodes
        Whether the pairs of two nodes are meant, or those of one.
    """
    rates = np.array(pairs, np.float64)
    node_of = np.arange(len(rates)) // ranks_per_node
    same_node = node_of[:, None] == node_of
    used = ~same_node if between_nodes else same_node & (rates > 0)
    # Beside the fastest pair, so that pairs that are alike make links that are.
    fastest = rates[used].max()
    slow = np.divide(fastest, rates, where=used, out=np.zeros_like(rates))
    members = ranks_per_node if between_nodes else 1

    def mean(axis: int) -> tuple[float, ...]:
        links, total = (
            each.sum(axis=axis).reshape(-1, members).sum(axis=1)
            for each in (used, slow)
        )
        return tuple((fastest * (links / total)).tolist())

    return Bandwidth(egress=mean(1), ingress=mean(0))
