"""The MoE layer of a custom model: router, exchange, experts.

Legend: T tokens here, U tokens here afterwards, K top-k, E experts, S slots per rank, H
hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from moetuner.errors import InvalidPlacementError
from moetuner.nn.exchange import Exchange
from moetuner.nn.exchange_options import ExchangeOptions, Residency
from moetuner.ops._ranges import ranged

if TYPE_CHECKING:
    import torch.distributed as dist

    from moetuner.nn.follow import Resident
    from moetuner.placement.model import Placement


class MoELayer(torch.nn.Module):
    """Routes tokens, sends them to their experts' ranks, and sums what returns.

    Every rank of the group has one, and calls it with its own tokens, of any number.

    Parameters
    ----------
    router
        [T, H] to ``(topk_ids, topk_weights)``: int32 or int64 [T, K], ids outside
        [0, E) being padding, and [T, K]. Where it has ``num_experts``, that is checked.
    experts
        Rows [M, H] by slot and their end offsets int32 [S], to rows [M, H]; its own
        parameters have one row per slot: `Experts`, or your own. Row s is the expert
        in slot s of this rank; `Experts.take` makes them of a whole layer's.
    placement
        Which expert is in which slot; for the ranks of the group.
    group
        Its ranks hold the experts; None: all.
    layer
        The model's number of this layer; may be left out where the placement has one.
    options
        Residency; exact sizes or fixed capacity.

    Raises
    ------
    InvalidPlacementError
        On every rank, when the placement is for other ranks, another model or not the
        same on all of them, or the experts are not one per slot.

    Notes
    -----
    Traffic is always counted: ``layer.exchange.counts()``. Replicas of an expert are
    trained apart unless their gradients are summed: train without them.

    Examples
    --------
    >>> import tempfile, torch, torch.distributed as dist
    >>> from moetuner.nn import Experts, MoELayer, TopKRouter, contiguous_placement
    >>> store = dist.FileStore(tempfile.mktemp(), 1)
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> placement = contiguous_placement(num_layers=1, num_experts=4, num_ranks=1)
    >>> layer = MoELayer(TopKRouter(16, 4, top_k=2), Experts(4, 16, 8), placement)
    >>> layer(torch.randn(3, 5, 16)).shape
    torch.Size([3, 5, 16])
    >>> layer.exchange.counts().tokens
    15
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        router: torch.nn.Module,
        experts: torch.nn.Module,
        placement: Placement,
        group: dist.ProcessGroup | None = None,
        *,
        layer: int | None = None,
        options: ExchangeOptions | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        wrong = wrong_rows(experts, placement.slots_per_rank)
        self.exchange = Exchange(
            placement,
            group,
            layer=layer,
            options=options,
            device=next((p.device for p in experts.parameters()), None),
            num_experts=getattr(router, "num_experts", None),
            problem=wrong,
        )

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor | Resident:
        """Run the layer on [..., H].

        Parameters
        ----------
        x
            The tokens that are here now.
        keys
            For ``residency=follow``: whose they are, from the layer before.

        Returns
        -------
        torch.Tensor or Resident
            [..., H]; under ``follow`` a `Resident` of [U, H]: other tokens, with keys.
        """
        tokens = x.reshape(-1, x.shape[-1])
        topk_ids, topk_weights = route(self.router, tokens)
        if self.exchange.options.residency is Residency.FOLLOW:
            return self.exchange.follow(
                tokens, topk_ids, topk_weights, self.experts, keys
            )
        out: torch.Tensor = self.exchange(tokens, topk_ids, topk_weights, self.experts)
        return out.view(*x.shape[:-1], out.shape[-1])

    def get_extra_state(self) -> torch.Tensor:
        """The slots of the layer, int32 [P]: a state dict says what its rows are."""
        row = self.exchange.tables.row_of(self.exchange.layer)
        return torch.from_numpy(self.exchange.placement.slot_experts[row].copy())

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse weights that lie otherwise than this layer's placement says."""
        mine = self.get_extra_state()
        if not torch.equal(state.cpu(), mine):
            raise InvalidPlacementError(
                f"MoELayer: layer {self.exchange.layer} is loaded from a state dict "
                f"whose slots hold {_short(state)}, but this layer's hold "
                f"{_short(mine)}: apply that placement first, or save and load under "
                f"logical_order"
            )


class TopKRouter(torch.nn.Module):
    """The K largest of a softmax over E experts, their weights summing to one."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.linear = torch.nn.Linear(hidden_size, num_experts, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [T, K] by falling weight, and weights float32 [T, K]."""
        chances = self.linear(x).float().softmax(dim=-1)
        weights, ids = chances.topk(self.top_k, dim=-1)
        return ids, weights / weights.sum(dim=-1, keepdim=True)


@ranged
def route(
    router: torch.nn.Module, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router, by the name of its range."""
    ids, weights = router(tokens)
    return ids, weights


def wrong_rows(experts: torch.nn.Module, num_slots: int) -> str:
    """Why the experts cannot be those of the slots; empty when they can."""
    for name, parameter in experts.named_parameters(recurse=False):
        share = local_share(parameter)
        if share.dim() == 0 or len(share) != num_slots:
            return (
                f"experts.{name} is {list(share.shape)}, wanted one row for each "
                f"of the {num_slots} slots of a rank: see Experts.take"
            )
    return ""


def local_share(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The memory of a parameter on this rank: all of it, or a `DTensor`'s part."""
    tensor: torch.Tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _short(slots: torch.Tensor) -> str:
    head = ", ".join(str(int(expert)) for expert in slots[:6])
    return f"[{head}{', ...' if len(slots) > 6 else ''}]"
