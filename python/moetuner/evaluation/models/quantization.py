"""What the weights of a checkpoint's experts are stored in, by its config.json."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from moetuner._checks import is_whole
from moetuner.evaluation.models.value_type import ValueType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Config = Mapping[str, Any]

Stored = tuple[ValueType, float]
"""A type, and bytes per weight with scales."""

_DTYPES = {
    "float32": ValueType.FP32,
    "float16": ValueType.FP16,
    "bfloat16": ValueType.BF16,
}
_FOUR, _EIGHT = 4, 8


def stored_weights(config: Config, quantization: Config, layer: int) -> Stored | None:
    """Type and bytes of a routed expert's weights; None where they cannot be told.

    Parameters
    ----------
    config
        Of the text model: ``dtype``, ``torch_dtype``, ``expert_dtype``.
    quantization
        ``quantization_config``, or what stands in hf_quant_config.json; may be empty.
    layer
        A layer with experts: those may be left as they were.
    """
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain = _DTYPES.get(dtype.removeprefix("torch."), ValueType.BF16)
    if not quantization or _left_out(config, quantization, layer):
        return plain, plain.weight_bytes()
    told = {"expert_dtype": config.get("expert_dtype"), **quantization}
    for read in (_packed_experts, _model_optimizer, _groups, _quark, _by_method):
        found = read(told)
        if found is not None:
            return found
    return None


def _packed_experts(told: Config) -> Stored | None:
    """DeepSeek-V4: experts in FP4 among FP8, with one scale per 32 values."""
    if told.get("expert_dtype") != "fp4":
        return None
    if told.get("moe_quant_algo") == "NVFP4":
        return _of(ValueType.NVFP4)
    scale = 1.0 if told.get("scale_fmt") == "ue8m0" else 4.0
    return _of(ValueType.MXFP4, 32, scale)


def _model_optimizer(told: Config) -> Stored | None:
    """NVIDIA's Model Optimizer: the experts' own algorithm where layers differ."""
    layers = told.get("quantized_layers")
    own = [
        each
        for name, each in (layers.items() if isinstance(layers, dict) else ())
        if ".experts" in name and isinstance(each, dict)
    ]
    for each in (*own[:1], told):
        algorithm = str(each.get("moe_quant_algo") or each.get("quant_algo") or "")
        group = _whole(each.get("group_size"))
        if "NVFP4" in algorithm:
            return _of(ValueType.NVFP4, group)
        if algorithm in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            return _of(ValueType.FP8, scale_bytes=0.0)
        if algorithm.startswith("FP8"):  # by blocks
            return _of(ValueType.FP8)
        if algorithm.startswith(("W4A16", "W4A8")):
            return _of(ValueType.INT4, group)
        if algorithm.startswith("MXFP4"):
            return _of(ValueType.MXFP4, group)
    return None


def _groups(told: Config) -> Stored | None:
    """compressed-tensors: groups of modules, each with the bits of its weights."""
    groups = told.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None
    first = next(iter(groups.values()))
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return None
    bits, group = _whole(weights.get("num_bits")), _whole(weights.get("group_size"))
    real = weights.get("type") == "float"
    if bits == _EIGHT:
        kind = ValueType.FP8 if real else ValueType.INT8
        block = weights.get("block_structure")
        blocks = _area(block) if isinstance(block, list) else None
        return _of(kind, blocks, None if blocks else 0.0)
    if bits != _FOUR:
        return None
    if not real:
        zero = 0.0 if weights.get("symmetric", True) else 0.5
        return _of(ValueType.INT4, group, 2.0 + zero)
    if "mxfp4" in f"{told.get('format')} {first.get('format')}" or group == 32:
        return _of(ValueType.MXFP4, group)
    return _of(ValueType.NVFP4, group)


def _quark(told: Config) -> Stored | None:
    """AMD Quark: one rule for all layers."""
    rule = told.get("global_quant_config")
    weights = rule.get("weight") if isinstance(rule, dict) else None
    if not isinstance(weights, dict):
        return None
    dtype, group = str(weights.get("dtype")), _whole(weights.get("group_size"))
    if dtype == "fp4":
        return _of(ValueType.MXFP4, group)
    if dtype.startswith("fp8"):
        return _of(ValueType.FP8, scale_bytes=0.0)
    return _of(ValueType.INT8) if dtype == "int8" else None


def _by_method(told: Config) -> Stored | None:
    """What the method's name says, with its bits and group size."""
    method = str(told.get("quant_method") or "").lower()
    bits, group = _whole(told.get("bits")), _whole(told.get("group_size"))
    if method in ("fp8", "fbgemm_fp8"):
        block = told.get("weight_block_size")
        if not isinstance(block, list):
            return _of(ValueType.FP8, scale_bytes=0.0)
        exponent = told.get("scale_fmt") == "ue8m0"
        return _of(ValueType.FP8, _area(block), 1.0 if exponent else 4.0)
    if method in ("mxfp4", "mxfp8", "nvfp4"):
        return _of(ValueType(method), group)
    if method in ("awq", "gptq", "auto-round", "auto_round", "intel/auto-round"):
        if bits == _FOUR:
            zero = 0.0 if told.get("sym") else 0.5
            return _of(ValueType.INT4, group, 2.0 + zero)
        return _of(ValueType.INT8) if bits == _EIGHT else None
    if method == "bitsandbytes":
        if told.get("load_in_4bit"):
            return _of(ValueType.INT4, 64, 4.0)
        return _of(ValueType.INT8) if told.get("load_in_8bit") else None
    return None


def _of(
    kind: ValueType, group: int | None = None, scale_bytes: float | None = None
) -> Stored:
    return kind, kind.weight_bytes(group=group, scale_bytes=scale_bytes)


def _whole(value: Any) -> int | None:
    return int(value) if is_whole(value) and value > 0 else None


def _area(block: list[Any]) -> int | None:
    sides = [_whole(side) for side in block]
    known = [side for side in sides if side is not None]
    return known[0] * known[1] if len(sides) == len(known) == 2 else None


def _left_out(config: Config, told: Config, layer: int) -> bool:
    """Whether the routed experts of `layer` stayed as they were."""
    patterns = [
        pattern
        for key in ("ignore", "exclude_modules", "exclude", "modules_to_not_convert")
        if isinstance(told.get(key), list)
        for pattern in told[key]
        if isinstance(pattern, str)
    ]
    apart = str(config.get("model_type")).startswith("gemma4")  # from the MLP's block
    blocks = [""] if apart else ["mlp.", "block_sparse_moe.", "feed_forward."]
    blocks += [] if apart else ["mixer.", "ffn."]
    names = [
        f"{start}layers.{layer}.{block}experts.0.{projection}_proj"
        for start in ("", "model.", "language_model.model.", "model.language_model.")
        for block in blocks
        for projection in ("gate", "up", "down")
    ]
    return any(_matches(pattern, names) for pattern in patterns)


def _matches(pattern: str, names: Iterable[str]) -> bool:
    if pattern.startswith("re:"):
        try:
            found = re.compile(pattern[3:])
        except re.error:
            return False
        return any(found.match(name) for name in names)
    if "*" in pattern:
        return any(fnmatchcase(name, pattern) for name in names)
    return any(f".{pattern}." in f".{name}." for name in names)
