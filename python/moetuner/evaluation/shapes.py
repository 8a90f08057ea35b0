"""Sizes of models: one expert's weights and the rows that travel to it."""

from __future__ import annotations

from moetuner.evaluation.models import DEFAULT_SHAPE as DEFAULT_SHAPE
from moetuner.evaluation.models import ModelShape as ModelShape
from moetuner.evaluation.models import ValueType, find_model


def shape_for_model(model: str) -> ModelShape | None:
    """Shape of a known model, found by the name inside `model`; None when unknown.

    Weights and rows are bf16: a name does not tell in what they are served.
    `ModelShape.with_types` does.
    """
    found = find_model(model)
    return None if found is None else found.shape.with_types(weights=ValueType.BF16)
