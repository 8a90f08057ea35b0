"""Blocks that call their experts in another way than Transformers' interface does.

Legend: T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetuner.integrations.transformers.families import ids_of_mask

if TYPE_CHECKING:
    import torch


def call_with_ids(model: torch.nn.Module) -> None:
    """Let such blocks of a spread model call their experts with ids and weights."""
    for module in list(model.modules()):
        if type(module).__name__ == "Llama4TextMoe":
            vars(module)["forward"] = _ScaledInputs(module).forward
        elif type(module).__name__ == "LongcatFlashExperts":
            vars(module)["forward"] = _TokensThemselves(module).forward
        elif type(module).__name__ == "SwitchTransformersExperts":
            vars(module)["forward"] = _Masked(module).forward
        elif type(module).__name__ == "JetMoeMoE":
            vars(module)["forward"] = _SortsNothing(module).forward


class _ScaledInputs:
    """Llama 4: scores scale what goes into an expert, so each choice is a row of it."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [T, H] and the router's logits [T, E] of [B, S, H]."""
        block = self._block
        tokens = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(tokens)
        chosen, ids = scores.topk(block.top_k, dim=-1)
        rows = (tokens[:, None] * chosen[..., None]).flatten(0, 1)
        as_they_are = rows.new_ones(len(rows), 1)
        done = block.experts(rows, ids.reshape(-1, 1), as_they_are)
        summed = done.view(*chosen.shape, -1).sum(dim=1)
        return block.shared_expert(tokens) + summed, logits


class _TokensThemselves:
    """LongCat Flash: ids from E on give back the token; no exchange sends them."""

    def __init__(self, module: Any) -> None:
        self._module, self._exchanged = module, vars(module)["forward"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], [T, K], [T, K] to [T, H]."""
        travels = top_k_index < self._module.num_experts
        done: torch.Tensor = self._exchanged(hidden_states, top_k_index, top_k_weights)
        stays = top_k_weights.masked_fill(travels, 0).sum(dim=1, keepdim=True)
        return done + (hidden_states * stays).to(done.dtype)


class _Masked:
    """Switch Transformers: one expert a token, or none where that one is full."""

    def __init__(self, module: Any) -> None:
        self._exchanged = vars(module)["forward"]

    def forward(
        self,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H], a mask [T, 1, E], [T, 1] to [T, H]."""
        ids, weights = ids_of_mask(selected_experts, routing_weights)
        done: torch.Tensor = self._exchanged(hidden_states, ids, weights)
        return done


class _SortsNothing:
    """JetMoE: its router sorts the rows of a rank, which are to be sorted elsewhere."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H]."""
        block = self._block
        tokens = layer_input.reshape(-1, layer_input.shape[-1])
        *_, logits = block.router(tokens)
        chosen, ids = logits.topk(block.router.top_k, dim=1)
        weights = chosen.softmax(dim=1).type_as(tokens)
        done = block.experts(tokens, ids, weights) + block.bias
        out: torch.Tensor = done.view(layer_input.shape)
        return out
