"""A model's published config.json, whatever its family calls things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetuner._checks import is_whole
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.models.model import Model
from moetuner.evaluation.models.moe_layers import blocks_of, moe_layers
from moetuner.evaluation.models.quantization import stored_weights
from moetuner.evaluation.models.shape import MAX_SIZE, ModelShape

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    Config = Mapping[str, Any]

_EXPERTS = (
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "experts_per_token",
    "num_selected_experts",
    "moe_router_topk",
)
# The narrow space that some models' experts work in comes first.
_HIDDEN = (
    "routed_expert_hidden_size",
    "moe_latent_size",
    "moe_hidden_size",
    "hidden_size",
    "d_model",
)
_FULL_HIDDEN = ("hidden_size", "d_model")
_INNER = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "expert_intermediate_size",
    "ffn_hidden_size",
    "intermediate_size",
)
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
)
_SHARED = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)
_PARTS = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
    "ffn_config",
)
"""Where models of several senses, and DBRX, keep what is about the experts."""
_NO_GATE = frozenset({"nemotron_h"})
"""Families whose experts are two matrices."""
_BESIDE_MLP = ("llama4", "gemma4")
"""Families with an unconditional MLP of ``intermediate_size`` beside the experts."""
_MAX_BYTES = 1 << 24
_MAX_LAYERS = 10_000


def read_model(path: str | os.PathLike[str]) -> Model:
    """The model that a config.json, or the folder of a checkpoint, describes.

    Raises
    ------
    InvalidProblemError
        When it is no such file, or tells of no experts, or leaves out their sizes.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    config = _json_object(file)
    beside = file.with_name("hf_quant_config.json")  # of NVIDIA's Model Optimizer
    if "quantization_config" not in config and beside.is_file():
        told = _json_object(beside).get("quantization")
        config = {**config, "quantization_config": told}
    return model_of(config, name=str(path), source=str(file))


def model_of(config: Config, *, name: str, source: str) -> Model:
    """The model that the content of a config.json describes.

    Raises
    ------
    InvalidProblemError
        When it tells of no experts, or leaves out their sizes.
    """
    where = f"model {source}"
    text = _text_part(config)
    if text is None:
        raise InvalidProblemError(
            f"{where}: no Mixture-of-Experts model: wanted one of "
            f"{', '.join(_EXPERTS)}, got none"
        )
    inner = _needed(text, _INNER, where, "the inner width of an expert")
    hidden = _needed(text, _HIDDEN, where, "the hidden size")
    projections = 2 if str(text.get("model_type")) in _NO_GATE else 3
    blocks = blocks_of(text)
    num_layers = _one(text, _LAYERS, where) or (len(blocks) if blocks else None)
    if num_layers is None:
        raise _missing(where, "the number of layers", _LAYERS)
    if num_layers > _MAX_LAYERS:
        raise InvalidProblemError(
            f"{where}: {num_layers} layers, wanted at most {_MAX_LAYERS}"
        )
    layers = moe_layers(text, num_layers)
    if not layers:
        raise InvalidProblemError(f"{where}: none of its {num_layers} layers is MoE")
    told = text.get("quantization_config")
    stored = stored_weights(text, told if isinstance(told, dict) else {}, layers[-1])
    if stored is None:
        raise InvalidProblemError(
            f"{where}: quantization_config tells no type of the experts' weights that "
            f"is known: {json.dumps(told)[:200]}; take it out and say `weights`"
        )
    shared = _shared_width(text, inner, where)
    full = _needed(text, _FULL_HIDDEN, where, "the hidden size")
    return Model(
        name=name,
        shape=ModelShape(
            hidden_size=hidden,
            expert_hidden_size=inner,
            num_projections=projections,
            weight_type=stored[0],
            weight_bytes=stored[1],
            shared_values=projections * full * shared,
        ),
        num_experts=_needed(text, _EXPERTS, where, "the number of experts"),
        top_k=_needed(text, _TOP_K, where, "the experts of a token"),
        num_layers=num_layers,
        moe_layers=layers,
        num_mtp_layers=_one(text, _MTP, where) or 0,
        source=source,
    )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise InvalidProblemError(f"model {file}: too long for a config.json")
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidProblemError(f"model {file}: {reason}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidProblemError):
            raise
        raise InvalidProblemError(f"model {file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidProblemError(
            f"model {file}: wanted an object, as config.json is, got "
            f"{type(content).__name__}"
        )
    return content


def _text_part(config: Config) -> dict[str, Any] | None:
    """Everything about the text model: the part that names experts, over the whole."""
    if _names_experts(config):
        return dict(config)
    for name in _PARTS:
        part = config.get(name)
        found = _text_part(part) if isinstance(part, dict) else None
        if found is not None:
            return {**config, **found}
    return None


def _names_experts(config: Config) -> bool:
    if config.get("enable_moe_block") is False:  # Gemma 4 without experts
        return False
    return any(config.get(key) not in (None, 0, 1, []) for key in _EXPERTS)


def _one(config: Config, keys: tuple[str, ...], where: str) -> int | None:
    """The first of `keys` that holds a number > 0; one number of a list of the same."""
    for key in keys:
        value: Any = config.get(key)
        if isinstance(value, list) and value:
            if any(each != value[0] for each in value):
                raise InvalidProblemError(
                    f"{where}: {key} holds several sizes: {str(value)[:80]}; one for "
                    f"all layers was wanted: say `hidden_size` and "
                    f"`expert_hidden_size` instead"
                )
            value = value[0]
        if is_whole(value) and value > 0:
            return int(value)
    return None


def _needed(config: Config, keys: tuple[str, ...], where: str, what: str) -> int:
    found = _one(config, keys, where)
    if found is None:
        raise _missing(where, what, keys)
    if found > MAX_SIZE:
        raise InvalidProblemError(
            f"{where}: {what} is {found}, wanted at most {MAX_SIZE}"
        )
    return found


def _missing(where: str, what: str, keys: tuple[str, ...]) -> InvalidProblemError:
    return InvalidProblemError(
        f"{where}: does not say {what}: wanted one of {', '.join(keys)}"
    )


def _shared_width(config: Config, inner: int, where: str) -> int:
    """Inner width of all shared experts of a layer together."""
    width = _one(config, _SHARED_WIDTH, where)
    if width is not None:
        return width
    if str(config.get("model_type", "")).startswith(_BESIDE_MLP):
        return _one(config, ("intermediate_size",), where) or 0
    return (_one(config, _SHARED, where) or 0) * inner
