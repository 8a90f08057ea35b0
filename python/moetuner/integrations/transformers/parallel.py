"""Expert parallelism of a Transformers model by our exchange.

Legend: T tokens here, K top-k, E experts, G ranks, S slots per rank, P = G * S slots, H
hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moetuner.errors import InvalidProblemError
from moetuner.integrations.transformers.exchanged import ExchangedForward
from moetuner.integrations.transformers.families import experts_of
from moetuner.integrations.transformers.other_forwards import call_with_ids
from moetuner.integrations.transformers.stacked import check_stackable, stacked
from moetuner.nn.data_parallel import ready_for_ddp
from moetuner.nn.exchange import ATTRIBUTE, Exchange
from moetuner.nn.exchange_options import ExchangeOptions
from moetuner.nn.move import apply_placement, contiguous_placement
from moetuner.nn.placed import UNUSED_ROWS
from moetuner.placement.model import Placement, contiguous_rank_of

if TYPE_CHECKING:
    from collections.abc import Callable

_SHARDED = "moetuner_sharded"
_PLACED = "moetuner_placed"


def parallelize(
    model: torch.nn.Module,
    placement: Placement,
    group: dist.ProcessGroup | None = None,
    *,
    shared_batch: bool = False,
    options: ExchangeOptions | None = None,
) -> None:
    """Spread the experts of a Transformers model over ranks as `placement` says.

    Every rank of the group calls this.

    Parameters
    ----------
    model
        Either whole on every rank: each keeps the experts of its own slots, from then
        on. Or loaded with ``DistributedConfig(..., ep_implementation="moetuner")`` (or
        the style ``moetuner_experts``): expert weights then move between ranks.
    placement
        For the ranks of the group, the model's experts and its MoE layers. Replicas
        and empty slots need a model that was whole.
    group
        Its ranks hold the experts; None: all. A model that Transformers spread out has
        its own.
    shared_batch
        All ranks call the model with the same tokens, as `generate` on the same prompt
        does. Each then sends its share of them, and gets the sums of all.
    options
        Exact sizes or fixed capacity, transport, overlap; residency home only.

    Raises
    ------
    InvalidPlacementError
        On every rank, when the placement is not for this group and model, or differs
        between ranks.
    InvalidProblemError
        For ``residency=follow``: attention wants its own tokens; and for a model that
        this was called on before: give it another placement by `apply_placement`.

    Notes
    -----
    Afterwards `moetuner.nn.apply_placement`, `moetuner.nn.logical_order` (for
    ``save_pretrained``, with ``whole=True``) and `moetuner.nn.gather_counts` know the
    model. Without ``shared_batch`` all ranks must call the model equally often: one
    with nothing to do calls it with padding.
    """
    options = options or ExchangeOptions()
    if options.residency.value != "home":
        raise InvalidProblemError(
            "parallelize: attention wants its own tokens back: residency must be home"
        )
    layers = experts_of(model)
    if any(_PLACED in vars(module) for module in layers.values()):
        raise InvalidProblemError(
            "parallelize: this model is spread over ranks already: give it another "
            "placement with moetuner.nn.apply_placement"
        )
    trouble = _other_layers(layers, placement) or _adapted(model, layers)
    for layer, module in layers.items():
        trouble = trouble or check_stackable(module, layer)
    sharded = [module for module in layers.values() if _SHARDED in vars(module)]
    if sharded:
        for layer, module in layers.items():
            start: Sharded = vars(module)[_SHARDED]
            start.begin(_contiguous_like(placement), layer, options, trouble)
        apply_placement(model, placement)
        for module in layers.values():
            vars(module)[_PLACED] = True
        return
    group = group or dist.group.WORLD
    if group is None:
        raise InvalidProblemError(
            "parallelize: there is no process group: call "
            "torch.distributed.init_process_group first"
        )
    exchanges = {}
    for layer, module in layers.items():
        exchanges[layer] = Exchange(
            placement,
            group,
            layer=layer,
            options=options,
            device=next(module.parameters()).device,
            num_experts=_num_experts(module),
            problem=trouble,
        )
    for layer, given in layers.items():
        module = stacked(given)
        _keep_own(module, exchanges[layer])
        vars(module)[ATTRIBUTE] = exchanges[layer]
        vars(module)[_PLACED] = True
        exchanged = ExchangedForward(
            module, exchanges[layer], group if shared_batch else None
        )
        vars(module)["forward"] = exchanged.forward
    call_with_ids(model)
    ready_for_ddp(model)


class Sharded:
    """Experts that Transformers spread over ranks in blocks, one experts module.

    Its exchange is made by `parallelize`, or by the first call: where experts are is
    then the contiguous placement.
    """

    def __init__(self, module: torch.nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        self._module: Any = module
        self._group = ep_mesh.get_group()
        self._device = ep_mesh.device_type
        shared = tp_mesh is not None and tp_mesh.size() > 1
        self._shared = tp_mesh.get_group() if shared else None
        self._forward: Callable[..., torch.Tensor] | None = None
        self._share = int(module.num_experts)  # type: ignore[arg-type]
        vars(module)[_SHARDED] = self

    def begin(
        self,
        placement: Placement,
        layer: int,
        options: ExchangeOptions,
        problem: str = "",
    ) -> None:
        """Make the exchange, for experts in contiguous order."""
        experts = self._share * self._group.size()
        exchange = Exchange(
            placement,
            self._group,
            layer=layer,
            options=options,
            device=self._device_now(),
            num_experts=experts,
            problem=problem,
        )
        vars(self._module)[ATTRIBUTE] = exchange
        self._forward = ExchangedForward(
            self._module, exchange, self._shared, owned=False
        ).forward

    def __call__(
        self, hidden_states: Any, top_k_index: Any, top_k_weights: Any
    ) -> torch.Tensor:
        """The experts' forward, on this rank's tokens and ids of all E experts."""
        if self._forward is None:
            size = self._group.size()
            plain = contiguous_placement(1, self._share * size, size)
            self.begin(plain, 0, ExchangeOptions())
            assert self._forward is not None
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def _device_now(self) -> torch.device:
        if self._device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self._device)


@torch.no_grad()
def _keep_own(module: torch.nn.Module, exchange: Exchange) -> None:
    """Cut weights [E, ...] down to this rank's slots [S, ...]; zeros where empty."""
    row = exchange.tables.row_of(exchange.layer)
    experts = exchange.tables.local_experts[row]
    unused = vars(module)[UNUSED_ROWS] = {}
    for name, parameter in module.named_parameters(recurse=False):
        unused[name] = parameter.detach()[exchange.placement.num_experts :].clone()
        index = torch.tensor(experts, dtype=torch.int64, device=parameter.device)
        own = parameter.detach()[index.clamp(min=0)]
        own[index < 0] = 0
        parameter.data = own


def _num_experts(module: Any) -> int:
    return int(module.num_experts)


def _adapted(model: torch.nn.Module, layers: dict[int, torch.nn.Module]) -> str:
    """Why adapters keep experts from being spread; empty where there are none."""
    experts = {id(module): layer for layer, module in layers.items()}
    for name, module in model.named_modules():
        base = module._modules.get("base_layer")
        if base is not None and id(base) in experts:
            return (
                f"{name} adapts all experts of layer {experts[id(base)]}: add adapters "
                f"after parallelize, or merge them into the weights first"
            )
    return ""


def _other_layers(layers: dict[int, torch.nn.Module], placement: Placement) -> str:
    wanted = placement.layer_ids.tolist()
    if sorted(layers) == wanted:
        return ""
    return (
        f"the placement is for another model: it has layers {wanted}, the model has "
        f"{sorted(layers)}"
    )


def _contiguous_like(placement: Placement) -> Placement:
    """Where Transformers has the experts, for the layers and nodes of another."""
    topology = placement.topology
    ranks = contiguous_rank_of(
        placement.num_layers, placement.num_experts, topology.num_ranks
    )
    return Placement.from_rank_of(
        ranks, layer_ids=placement.layer_ids, topology=topology
    )


def register() -> None:
    """Name our exchange to whatever hook this Transformers has for expert parallelism.

    5.17 to 5.22: a style for the plan, ``moetuner_experts``. From 5.23 on:
    ``DistributedConfig(ep_implementation="moetuner")``.
    """
    try:
        from transformers.distributed.expert_parallel import (
            EPImplementation,
            EPImplementationInterface,
        )
    except ImportError:
        _register_style()
        return

    class MoetunerEP(EPImplementation):  # type: ignore[misc,unused-ignore]
        """Rows travel once to each rank, by the placement of `parallelize`."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self._sharded = Sharded(experts, ep_mesh, tp_mesh)

        def __call__(self, *tokens: torch.Tensor) -> torch.Tensor:
            return self._sharded(*tokens)

    EPImplementationInterface.register("moetuner", MoetunerEP)


def _register_style() -> None:
    try:
        from transformers.distributed import tensor_parallel
    except ImportError:  # before 5.17: parallelize a whole model instead
        return
    library: Any = tensor_parallel

    class MoetunerExperts(library.TensorParallelLayer):  # type: ignore[misc,name-defined,unused-ignore]
        """Whole experts per rank; every rank has the same batch."""

        def should_use_local_tensors(self, module: Any) -> bool:  # noqa: ARG002
            return True

        def install_forward(self, module: Any, mesh: Any) -> Any:
            sharded = Sharded(module, mesh, mesh)

            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
                with self.context_around_forward(module, mesh):
                    return sharded(*args, **kwargs)

            module.forward = forward
            return module

    library.ALL_PARALLEL_STYLES.register("moetuner_experts", MoetunerExperts())
