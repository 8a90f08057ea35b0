"""Sizes of models: one expert's weights and the rows that travel to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetuner._checks import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of one expert and of the rows that travel to it.

    Parameters
    ----------
    hidden_size
        Values per row H.
    expert_hidden_size
        Inner width of one expert.
    num_projections
        Weight matrices of an expert: 3 for SwiGLU, 2 without a gate.
    dispatch_bytes, combine_bytes, weight_bytes
        Bytes per value on the way out, on the way back and in the weights
        (bf16 = 2; fp8 = 1).
    """

    hidden_size: int
    expert_hidden_size: int
    num_projections: int = 3
    dispatch_bytes: float = 2
    combine_bytes: float = 2
    weight_bytes: float = 2

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_positive("ModelShape", name, getattr(self, name))

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return self.num_projections * self.hidden_size * self.expert_hidden_size

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_values * self.weight_bytes

    @property
    def dispatch_share(self) -> float:
        """Of the bytes that a row takes both ways, those on the way out."""
        return self.dispatch_bytes / (self.dispatch_bytes + self.combine_bytes)

    @property
    def flops_per_row(self) -> float:
        """Operations of one (token, expert): a multiply and an add per weight."""
        return 2.0 * self.expert_values


# hidden_size and the routed experts' intermediate size, from each model's config.json.
MODEL_SHAPES: dict[str, ModelShape] = {
    "gpt-oss": ModelShape(hidden_size=2880, expert_hidden_size=2880),
    "deepseek-v2-lite": ModelShape(hidden_size=2048, expert_hidden_size=1408),
    "deepseek-v3": ModelShape(hidden_size=7168, expert_hidden_size=2048),
    "deepseek-r1": ModelShape(hidden_size=7168, expert_hidden_size=2048),
    "mixtral-8x7b": ModelShape(hidden_size=4096, expert_hidden_size=14336),
    "mixtral-8x22b": ModelShape(hidden_size=6144, expert_hidden_size=16384),
    "olmoe-1b-7b": ModelShape(hidden_size=2048, expert_hidden_size=1024),
    "qwen1.5-moe-a2.7b": ModelShape(hidden_size=2048, expert_hidden_size=1408),
    "qwen3-30b-a3b": ModelShape(hidden_size=2048, expert_hidden_size=768),
    "qwen3-235b-a22b": ModelShape(hidden_size=4096, expert_hidden_size=1536),
    "moetuner-demo-moe": ModelShape(hidden_size=512, expert_hidden_size=256),
}

DEFAULT_SHAPE = ModelShape(hidden_size=4096, expert_hidden_size=2048)


def shape_for_model(model: str) -> ModelShape | None:
    """Shape of a known model, found by the name inside `model`; None when unknown."""
    name = re.sub(r"[\s_]+", "-", model.lower())
    return next((shape for key, shape in MODEL_SHAPES.items() if key in name), None)
