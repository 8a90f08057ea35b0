"""The weights that `examples/train_demo_model/train.py --weights` keeps, spread.

Legend: L layers, E experts, H hidden, I inner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from families import FAMILIES, Family

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

DEMO = FAMILIES["moetuner-demo-moe"]


class TrainedExperts:
    """A trained model: its dense parts are loaded, its experts go where they should."""

    def __init__(self, file: Path) -> None:
        kept: dict[str, Any] = torch.load(file, mmap=True, weights_only=True)
        self.config, self.weights = kept["config"], kept["weights"]

    @property
    def family(self) -> Family:
        """The sizes of this very model."""
        config = self.config
        return Family(
            name=DEMO.name,
            layers=config["layers"],
            hidden=config["hidden"],
            heads=config["heads"],
            kv_heads=config["heads"],
            head=config["hidden"] // config["heads"],
            experts=config["experts"],
            top_k=config["top_k"],
            inner=config["expert_hidden"],
            vocabulary=config["vocabulary"],
        )

    def load(self, decoder: nn.Module, routers: list[nn.Module]) -> None:
        """All that is not an expert."""
        own = decoder.state_dict()
        decoder.load_state_dict({name: self.weights[name] for name in own})
        for layer, router in enumerate(routers):
            router.linear.weight.copy_(
                self.weights[f"blocks.{layer}.router.linear.weight"]
            )

    def copy(self, layer: int, expert: int, up: torch.Tensor, down: torch.Tensor):
        """The weights of one expert into those two matrices, [2 I, H] and [H, I]."""
        kept = f"blocks.{layer}.experts."
        up.copy_(self.weights[f"{kept}gate_up"][expert].T)
        down.copy_(self.weights[f"{kept}down"][expert].T)
