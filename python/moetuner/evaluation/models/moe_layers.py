"""Which layers of a model have experts, by the rules of all families."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moetuner._checks import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Config = Mapping[str, Any]


def moe_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    """Numbers of the layers with routed experts, rising.

    `config` has the keys of a config.json, of the part that is about text. Without any
    rule that is known, every layer has experts.
    """
    listed = _listed(config)
    if listed is not None:
        return tuple(each for each in listed if each < num_layers)
    rule = next((make(config) for keys, make in _RULES if _has(config, keys)), None)
    return tuple(i for i in range(num_layers) if rule is None or rule(i))


def blocks_of(config: Config) -> list[Any] | None:
    """What each layer is, of models whose layers are attention, Mamba *or* experts."""
    for key in ("layers_block_type", "hybrid_override_pattern"):
        blocks = config.get(key)
        if isinstance(blocks, (list, str)) and ("moe" in blocks or "E" in blocks):
            return list(blocks)
    return None


def _listed(config: Config) -> list[int] | None:
    """Layers that are named one by one."""
    types = config.get("mlp_layer_types")
    if isinstance(types, list):
        return [i for i, each in enumerate(types) if each != "dense"]
    blocks = blocks_of(config)
    if blocks is not None:
        return [i for i, each in enumerate(blocks) if each in ("moe", "E")]
    mask = config.get("moe_layer_freq")
    if isinstance(mask, list):
        return [i for i, each in enumerate(mask) if each]
    layers = config.get("moe_layers_enum", config.get("moe_layers"))
    if isinstance(layers, str):  # Step-3: "4,5,6"
        parts = [part.strip() for part in layers.split(",")]
        layers = [int(part) for part in parts if part.isdecimal() and len(part) < 6]
    known = [int(i) for i in layers if is_whole(i)] if isinstance(layers, list) else []
    return sorted(known) or None


def _has(config: Config, keys: tuple[str, ...]) -> bool:
    return any(is_whole(config.get(key)) for key in keys)


def _number(config: Config, key: str, default: int) -> int:
    value: Any = config.get(key)
    return int(value) if is_whole(value) else default


def _every_step(config: Config) -> Callable[[int], bool]:  # Qwen
    step, dense = config["decoder_sparse_step"], config.get("mlp_only_layers")
    dense = dense if isinstance(dense, list) else []
    return lambda i: step > 0 and (i + 1) % step == 0 and i not in dense


def _interleaved(config: Config) -> Callable[[int], bool]:  # Llama 4
    step = max(config["interleave_moe_layer_step"], 1)
    return lambda i: (i + 1) % step == 0


def _periodic(config: Config) -> Callable[[int], bool]:  # Jamba
    period = max(_number(config, "expert_layer_period", 2), 1)
    offset = _number(config, "expert_layer_offset", 1)
    return lambda i: i % period == offset


def _between(config: Config) -> Callable[[int], bool]:  # ERNIE
    first = _number(config, "moe_layer_start_index", 0)
    last = _number(config, "moe_layer_end_index", -1)
    interval = max(_number(config, "moe_layer_interval", 1), 1)
    return lambda i: i >= first and (last < 0 or i <= last) and (i + 1) % interval == 0


def _behind_dense(config: Config) -> Callable[[int], bool]:  # DeepSeek and many more
    first = max(
        _number(config, "first_k_dense_replace", 0),
        _number(config, "num_dense_layers", 0),
        _number(config, "moe_layer_num_skipped", 0),
    )
    frequency = max(_number(config, "moe_layer_freq", 1), 1)
    return lambda i: i >= first and i % frequency == 0


_RULES: tuple[tuple[tuple[str, ...], Callable[[Config], Callable[[int], bool]]], ...]
_RULES = (
    (("decoder_sparse_step",), _every_step),
    (("interleave_moe_layer_step",), _interleaved),
    (("expert_layer_period", "expert_layer_offset"), _periodic),
    (("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _between),
    (
        (
            "first_k_dense_replace",
            "num_dense_layers",
            "moe_layer_num_skipped",
            "moe_layer_freq",
        ),
        _behind_dense,
    ),
)
"""The keys that tell a rule, and the rule."""
