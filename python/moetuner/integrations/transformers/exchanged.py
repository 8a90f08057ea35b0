"""The forward of experts that are spread over ranks.

Legend: T tokens here, K top-k, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from moetuner.integrations.transformers.experts import run_experts
from moetuner.nn.data_parallel import check_owned
from moetuner.ops._collectives import group_named

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
        self._device = next(module.parameters()).device.type
        self._mesh = self._new_mesh()

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] to [T, H]."""
        if self._owned:
            check_owned(self._module, self._exchange)
        given = (hidden_states, top_k_index, top_k_weights)
        if self._device != hidden_states.device.type:  # the model moved
            self._device = hidden_states.device.type
            self._mesh = self._new_mesh()
        mesh = self._mesh
        if mesh is not None:
            given = tuple(_own_share(tensor, mesh) for tensor in given)  # type: ignore[assignment]
        out: torch.Tensor = self._exchange(*given, self._run)
        if mesh is not None:
            out = _whole(out, mesh, hidden_states.shape)
        return out.to(hidden_states.dtype)

    def _run(self, rows: torch.Tensor, end_offsets: torch.Tensor) -> torch.Tensor:
        return run_experts(self._module, rows, end_offsets, self._in_common)

    def _in_common(self, parameter: torch.Tensor) -> torch.Tensor:
        mesh = self._mesh
        return parameter if mesh is None else _with_whole_gradient(parameter, mesh)

    def _new_mesh(self) -> DeviceMesh | None:
        if self._shared is None:
            return None
        return DeviceMesh.from_group(group_named(self._shared), self._device)

    def __getstate__(self) -> dict[str, Any]:
        """All but the mesh, which belongs to this process."""
        return {name: value for name, value in vars(self).items() if name != "_mesh"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._mesh = self._new_mesh()


def _own_share(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Rows of this rank, of what all ranks have; gradients are gathered."""
    spread = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    share: torch.Tensor = spread.redistribute(mesh, [Shard(0)]).to_local()
    return share


def _with_whole_gradient(parameter: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The same values; the gradient is the sum of what every rank makes of its rows."""
    spread = DTensor.from_local(parameter, mesh, [Replicate()], run_check=False)
    same: torch.Tensor = spread.to_local(grad_placements=[Partial()])
    return same


def _whole(share: torch.Tensor, mesh: DeviceMesh, shape: torch.Size) -> torch.Tensor:
    """The rows of all ranks, on all of them."""
    spread = DTensor.from_local(
        share.contiguous(), mesh, [Shard(0)], shape=shape, stride=(shape[1], 1)
    )
    return spread.full_tensor()
