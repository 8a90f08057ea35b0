"""Which ranks share a node.

Ranks are numbered node by node: rank ``g`` lives on node ``g // ranks_per_node``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import is_whole
from moetuner.errors import InvalidProblemError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_RANKS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Ranks (one GPU each) in nodes of equal size.

    Parameters
    ----------
    num_ranks
        Number of ranks G of the expert-parallel group.
    ranks_per_node
        Ranks that share a node's fast links; must divide ``num_ranks``.

    Raises
    ------
    InvalidProblemError
        When a number is not whole and positive, or the nodes are not equally full.
    """

    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "ranks_per_node"):
            value = getattr(self, name)
            if not is_whole(value) and value == value:
                raise InvalidProblemError(
                    f"Topology: {name} must be a whole number, got {value!r}"
                )
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise InvalidProblemError(
                f"Topology: num_ranks must be 1..{MAX_RANKS}, got {self.num_ranks}"
            )
        if self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise InvalidProblemError(
                f"Topology: ranks_per_node must divide num_ranks={self.num_ranks}, "
                f"got {self.ranks_per_node}"
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return self.num_ranks // self.ranks_per_node

    def nodes(self) -> NDArray[np.int64]:
        """Node of each rank, int64 [G]."""
        return np.arange(self.num_ranks) // self.ranks_per_node

    def same_node(self) -> NDArray[np.bool_]:
        """Whether two ranks share a node, bool [G, G]."""
        nodes = self.nodes()
        same: NDArray[np.bool_] = nodes[:, None] == nodes[None, :]
        return same
