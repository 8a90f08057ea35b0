"""Blocks that call their experts in another way than Transformers' interface does.

Legend: T tokens, K top-k, E experts, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def call_with_ids(model: torch.nn.Module) -> None:
    """Let such blocks of a spread model call their experts with ids and weights."""
    for module in list(model.modules()):
        if type(module).__name__ == "Llama4TextMoe":
            vars(module)["forward"] = _ScaledInputs(module).forward
        elif type(module).__name__ == "LongcatFlashExperts":
            vars(module)["forward"] = _TokensThemselves(module).forward


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
    """LongCat Flash: ids from E on give back the token, which need not travel."""

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
        ids = top_k_index.masked_fill(~travels, -1)
        done: torch.Tensor = self._exchanged(hidden_states, ids, top_k_weights)
        stays = top_k_weights.masked_fill(travels, 0).sum(dim=1, keepdim=True)
        return done + (hidden_states * stays).to(done.dtype)
