"""The forward of experts that are spread over ranks.

Legend: T tokens here, K top-k, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetuner.integrations.transformers.experts import run_experts
from moetuner.nn.data_parallel import check_owned
from moetuner.ops._shared_batch import all_rows, in_common, own_rows

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from moetuner.nn.exchange import Exchange


class ExchangedForward:
    """The forward of an experts module, by an exchange.

    Its method stands in the place of the module's own. It is an object, not a closure:
    a copy of the model, or a pickled one, then runs its own experts.

    Parameters
    ----------
    module
        Holds the experts of this rank's slots.
    exchange
        Takes tokens to them.
    shared
        The ranks that are called with the same tokens, each of which sends its share of
        them; None: each rank has its own.
    owned
        The module's parameters must not be in the hands of DDP or FSDP.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        exchange: Exchange,
        shared: dist.ProcessGroup | None,
        *,
        owned: bool = True,
    ) -> None:
        self._module, self._exchange, self._owned = module, exchange, owned
        self._shared = None if shared is None else str(shared.group_name)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] to [T, H]."""
        if self._owned:
            check_owned(self._module, self._exchange)
        given = [hidden_states, top_k_index, top_k_weights]
        shared = self._shared
        if shared is not None:
            given = own_rows(given, shared)
        out: torch.Tensor = self._exchange(*given, self._run)
        if shared is not None:
            out = all_rows(out, hidden_states.shape[0], shared)
        return out.to(hidden_states.dtype)

    def _run(self, rows: torch.Tensor, end_offsets: torch.Tensor) -> torch.Tensor:
        return run_experts(self._module, rows, end_offsets, self._in_common)

    def _in_common(self, parameter: torch.Tensor) -> torch.Tensor:
        shared = self._shared
        return parameter if shared is None else in_common(parameter, shared)
