"""Models by name: a table of published families, which is data/models.json.

Each entry has what matters of one model's config.json, in its own words, and is read
like any other.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from moetuner.evaluation.models.config_json import model_of
from moetuner.evaluation.models.value_type import ValueType

if TYPE_CHECKING:
    from moetuner.evaluation.models.model import Model
    from moetuner.evaluation.models.shape import ModelShape

_DENSE = "distill"
"""In names of dense models that learned from one of the table."""


def find_model(name: str) -> Model | None:
    """The model of the table that is named in `name`; None when there is none.

    Case, spaces and what stands around the name do not matter:
    ``deepseek-ai/DeepSeek-V3-0324`` is ``deepseek-v3``. Another version or size never
    is: ``DeepSeek-V3.2`` and ``GLM-4.5V`` are no ``deepseek-v3`` and no ``glm-4.5``.
    """
    text = re.sub(r"[\s_]+", "-", name.lower())
    if _DENSE in text:
        return None
    found = [key for key in _families() if _is_named(key, text)]
    if not found:
        return None
    key = max(found, key=len)
    return replace(_model_of(key), name=key)


def shape_for_model(model: str) -> ModelShape | None:
    """Shape of a known model, found by the name inside `model`; None when unknown.

    Weights and rows are bf16: a name does not tell in what they are served.
    `ModelShape.with_types` does.
    """
    found = find_model(model)
    return None if found is None else found.shape.with_types(weights=ValueType.BF16)


def known_names() -> tuple[str, ...]:
    """Names of the table."""
    return tuple(_families())


def similar_names(name: str) -> tuple[str, ...]:
    """Up to three names of the table that look like `name`, for a message."""
    asked = name.lower().rpartition("/")[2]
    return tuple(difflib.get_close_matches(asked, known_names(), 3, 0.5))


def _is_named(key: str, text: str) -> bool:
    """Whether `key` stands in `text` as a whole: no word and no version goes on."""
    return bool(re.search(rf"(?<![a-z0-9.]){re.escape(key)}(?![a-z0-9]|\.\d)", text))


@cache
def _families() -> dict[str, dict[str, Any]]:
    file = resources.files("moetuner") / "data" / "models.json"
    families = json.loads(file.read_text("utf-8"))["families"]
    return {name: family for family in families for name in family["names"]}


@cache
def _model_of(key: str) -> Model:
    family = _families()[key]
    if "either" not in family:
        return model_of(family["config"], name=key, source=family["published"])
    models = [_model_of(each) for each in family["either"]]
    experts, top_k, layers = (
        {getattr(model, name) for model in models}
        for name in ("num_experts", "top_k", "num_layers")
    )
    return replace(
        models[0],
        name=key,
        num_experts=experts.pop() if len(experts) == 1 else None,
        top_k=top_k.pop() if len(top_k) == 1 else None,
        num_layers=layers.pop() if len(layers) == 1 else None,
        moe_layers=(),
    )
