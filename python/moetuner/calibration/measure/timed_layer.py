"""One layer that is timed: our exchange, and experts of random weights.

Legend: T tokens of a rank, K top-k, S slots of a rank, M rows of its experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moetuner.calibration.samples import Form, LayerShape, ValueKind
from moetuner.nn.experts import Experts
from moetuner.ops import Dispatched, check_overflow, combine, dispatch
from moetuner.placement.tables import PlacementTables

if TYPE_CHECKING:
    from moetuner.calibration.loads import KnownLoad
    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.ops import NodeGroups


@dataclass(frozen=True, kw_only=True)
class Path:
    """How rows travel: over which group, and on two levels or one."""

    group_name: str
    nodes: NodeGroups | None


class TimedLayer:
    """One layer on this rank, and the tokens that it is given.

    Parameters
    ----------
    known
        Tokens of all ranks, one layer of them, and where the experts are.
    form
        Exact, or fixed with just enough room.
    shape
        Of the layer.
    experts
        Those of this rank's slots; None where only `both` is run.
    ranks
        This rank.
    path
        Of the rows.
    """

    def __init__(
        self,
        known: KnownLoad,
        form: Form,
        shape: LayerShape,
        experts: Experts | None,
        ranks: Ranks,
        path: Path,
    ) -> None:
        ids = torch.from_numpy(known.ids(ranks.rank)).to(ranks.device)
        size, kind = (len(ids), shape.hidden_size), dtype_of(shape)
        x = torch.randn(size, dtype=kind, device=ranks.device)
        weights = torch.rand(ids.shape, device=ranks.device)
        tables = PlacementTables.of(known.placement, ranks.rank)
        slots = tables.candidates[0], tables.num_candidates[0]
        self._tokens = x, ids, weights
        self._slots = tuple(torch.from_numpy(t).to(ranks.device) for t in slots)
        self._size, self._group_name = tables.slots_per_rank, path.group_name
        self._options: dict[str, Any] = {"nodes": path.nodes}
        if path.nodes is None:
            self._options["ranks_per_node"] = tables.ranks_per_node
        if form is Form.FIXED:
            self._options |= fixed_sizes(known)
        self._experts = experts

    def dispatch(self, _: Any) -> Dispatched:
        """The way out."""
        x, ids, weights = self._tokens
        candidates, num_candidates = self._slots
        return dispatch(
            x,
            ids,
            weights,
            candidates,
            num_candidates,
            self._size,
            self._group_name,
            **self._options,
        )

    def experts(self, sent: Dispatched) -> tuple[torch.Tensor, Dispatched]:
        """What they make of the rows."""
        assert self._experts is not None
        return self._experts(sent.rows, sent.end_offsets), sent

    def combine(self, done: tuple[torch.Tensor, Dispatched]) -> torch.Tensor:
        """The way back."""
        return combine(done[0], done[1].handle)

    def both(self, _: Any) -> torch.Tensor:
        """The way out and back, without experts."""
        sent = self.dispatch(None)
        return combine(sent.rows, sent.handle)

    def check(self) -> None:
        """Sizes that are too small would make it look fast."""
        handle = self.dispatch(None).handle
        if handle.overflow is not None:
            check_overflow(handle.overflow)


def fixed_sizes(known: KnownLoad) -> dict[str, int]:
    """Just enough room for a load."""
    assert known.trace.home_rank is not None
    tokens = np.bincount(known.trace.home_rank, minlength=1)
    rows = int(known.counts.rank_rows().max())
    return {"capacity": max(int(tokens.max()), 1), "max_rows": max(rows, 1)}


def make_experts(shape: LayerShape, num_slots: int, device: torch.device) -> Experts:
    """Those of a rank, of random numbers; never trained."""
    made = Experts(
        num_slots,
        shape.hidden_size,
        shape.inner_size,
        device=device,
        dtype=dtype_of(shape),
    )
    return made.requires_grad_(False)


def dtype_of(shape: LayerShape) -> torch.dtype:
    """What torch calls the values of a layer."""
    kinds = {
        ValueKind.BFLOAT16: torch.bfloat16,
        ValueKind.FLOAT16: torch.float16,
        ValueKind.FLOAT32: torch.float32,
    }
    return kinds[shape.values]
