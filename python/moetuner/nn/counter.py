"""Routing statistics of a running model, counted on its device; no tokens are kept.

Legend: T tokens, L layers, K top-k, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moetuner.errors import InvalidTraceError
from moetuner.nn.recompute import first_pass, recomputing
from moetuner.ops import count_routing
from moetuner.trace.statistics import RoutingStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence


class RoutingCounter:
    """Loads, co-activation and transitions in persistent tensors: one kernel per layer.

    Nothing is read from the device before `statistics`, and nothing is allocated by
    `add`: a CUDA graph that captured it counts with every replay.

    Parameters
    ----------
    layer_ids
        The model's own layer numbers, L of them, rising.
    num_experts
        E.
    max_tokens
        The most tokens of a step: `add` keeps the ids of the layer before, which
        transitions need.
    top_k
        K; None: that of the first ids, before which no CUDA graph may be captured.
    device
        Of the model.
    pairs
        Count co-activation and transitions too: 16 L E E bytes.

    Examples
    --------
    >>> import torch
    >>> from moetuner.nn import RoutingCounter
    >>> counter = RoutingCounter([0, 1], num_experts=3, max_tokens=8, top_k=2)
    >>> counter.add(0, torch.tensor([[0, 1], [1, 2]]))
    >>> counter.add(1, torch.tensor([[2, 0], [2, 1]]))
    >>> counted = counter.statistics()
    >>> counted.num_tokens, counted.load.tolist(), counted.transitions[0, 1].tolist()
    (2, [[1, 2, 1], [1, 1, 2]], [1, 1, 2])
    """

    def __init__(
        self,
        layer_ids: Sequence[int],
        num_experts: int,
        *,
        max_tokens: int,
        top_k: int | None = None,
        device: torch.device | str = "cpu",
        pairs: bool = True,
    ) -> None:
        self._layer_ids = np.array(layer_ids, np.int32)
        self._row = {int(layer): row for row, layer in enumerate(layer_ids)}
        num_layers = len(self._row)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._tokens = zeros(num_layers)
        self._load = zeros(num_layers, num_experts)
        self._together = self._after = None
        if pairs:
            self._together = zeros(num_layers, num_experts, num_experts)
            self._after = zeros(max(num_layers - 1, 0), num_experts, num_experts)
        self._most = max_tokens
        self._ids: list[torch.Tensor] = []
        self._step: dict[int, torch.Tensor] | None = (
            None  # ids by row, while it is open
        )
        if top_k is not None:
            self._expect(top_k)

    def add(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Count the choices of one layer, int [T, K]; layers of a step in their order.

        What activation checkpointing computes again was counted already.

        Raises
        ------
        InvalidTraceError
            For a layer that was not announced, or more tokens than were.
        ValueError
            For an id beyond int32, as `count_routing` says it.
        """
        if recomputing():
            return
        if not self._ids:
            self._expect(topk_ids.shape[1])
        row = self._row.get(layer)
        most, top_k = self._ids[0].shape
        if row is None or len(topk_ids) > most or topk_ids.shape[1] != top_k:
            raise InvalidTraceError(
                f"RoutingCounter: wanted at most [{most}, {top_k}] ids of layers "
                f"{list(self._row)}, got {list(topk_ids.shape)} of layer {layer}"
            )
        here, before = (self._ids[(row + i) % 2][: len(topk_ids)] for i in (0, 1))
        here.copy_(first_pass(topk_ids, -1))
        _count(here, before, self._tables_of(row))
        number = self._tokens.new_full((), len(topk_ids))
        self._tokens[row] += first_pass(number)
        captured = topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._step is not None and not captured:
            self._step[row] = topk_ids.detach()

    def begin_step(self) -> None:
        """Begin a forward pass: until `end_step` its ids are kept, for `drop_step`."""
        self._step = {}

    def end_step(self) -> None:
        """The forward pass ended well."""
        self._step = None

    def drop_step(self) -> None:
        """Take back what an open forward pass has counted: it did not end well.

        Without an open one nothing happens, and none is open afterwards.
        """
        step, self._step = self._step or {}, None
        for row, ids in step.items():
            tables = self._tables_of(row)
            counted = [torch.zeros_like(table) for table in tables]
            _count(ids.long(), step.get(row - 1, ids).long(), counted)
            for table, undone in zip(tables, counted, strict=True):
                table -= undone
            self._tokens[row] -= len(ids)

    def _tables_of(self, row: int) -> list[torch.Tensor]:
        """Load, and with pairs co-activation and the transitions to it, of a layer."""
        if self._together is None or self._after is None:
            return [self._load[row]]
        after = [] if row == 0 else [self._after[row - 1]]
        return [self._load[row], self._together[row], *after]

    def _expect(self, top_k: int) -> None:
        """Two, used in turns: the ids of this layer, and of the one before.

        As wide as ids can be: the op that counts them refuses those beyond int32.
        """
        device = self._load.device
        self._ids = [
            torch.full((self._most, top_k), -1, dtype=torch.int64, device=device)
            for _ in range(2)
        ]

    def reset(self) -> None:
        """Begin again at zero; captured graphs go on counting into the same tensors."""
        for tensor in (self._tokens, self._load, self._together, self._after):
            if tensor is not None:
                tensor.zero_()

    def statistics(self) -> RoutingStatistics:
        """What was counted so far; **waits for the device**.

        Raises
        ------
        InvalidTraceError
            When layers saw different numbers of tokens.
        """
        tokens = self._tokens.cpu()
        if (tokens != tokens[0]).any():
            raise InvalidTraceError(
                f"RoutingCounter: layers saw {tokens.tolist()} tokens, wanted as many "
                f"at each"
            )

        def host(tensor: torch.Tensor | None) -> np.ndarray | None:
            return None if tensor is None else tensor.cpu().numpy().copy()

        return RoutingStatistics(
            num_tokens=int(tokens[0]),
            layer_ids=self._layer_ids,
            load=self._load.cpu().numpy().copy(),
            coactivation=host(self._together),
            transitions=host(self._after),
        )


def _count(
    ids: torch.Tensor, before: torch.Tensor, tables: Sequence[torch.Tensor]
) -> None:
    load, *pairs = tables
    if len(pairs) == 2:
        count_routing(ids, load, pairs[0], before, pairs[1])
    else:
        count_routing(ids, load, *pairs)
