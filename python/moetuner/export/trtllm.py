"""TensorRT-LLM's load balancer file: YAML of three keys, and no others.

``num_slots``, ``initial_global_assignments`` (real layer number -> expert of each slot)
and ``layer_updates_per_iter`` (0: the placement stays).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidPlacementError, MissingDependencyError
from moetuner.export.base import ExportOptions, SlotMap, Written, rows_of_ids
from moetuner.export.rows import complete, filled_rows

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner.placement.model import Placement

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")
MAX_BYTES = 1 << 23
"""61 layers of 1024 slots are a quarter of a megabyte."""


def write_trtllm(placement: Placement, options: ExportOptions) -> Written:
    """The three keys; lists are flow sequences, which are JSON."""
    completed = complete(placement, options, "trtllm")
    slots = filled_rows(completed, options)
    layer_ids = completed.placement.layer_ids.tolist()
    layers = "".join(
        f"  {layer}: {row.tolist()}\n"
        for layer, row in zip(layer_ids, slots, strict=True)
    )
    text = (
        f"num_slots: {placement.num_slots}\n"
        f"initial_global_assignments:\n{layers}"
        f"layer_updates_per_iter: 0\n"
    )
    return Written(
        data=text.encode(),
        command=(
            f"trtllm-serve MODEL --tp_size {placement.topology.num_ranks} --ep_size "
            f"{placement.topology.num_ranks} --extra_llm_api_options options.yaml  # "
            f"options.yaml: enable_attention_dp: true, moe_config: "
            f"{{backend: WIDEEP, load_balancer: {{path}}}}"
        ),
        notes=(
            *completed.notes,
            "the section is ignored without a word for architectures that have no "
            "load balancer, without expert parallelism, and without attention-DP",
            "every MoE layer of the model must be in the file, those of multi-token "
            "prediction too (`mtp_layers`): a missing one ends the server",
        ),
    )


def read_trtllm(path: Path) -> SlotMap:
    """The assignments of a file, by layer."""
    content = _load(path)
    if not isinstance(content, dict) or not set(content) <= set(KEYS):
        keys = list(content)[:8] if isinstance(content, dict) else content
        raise InvalidPlacementError(
            f"{path}: wanted the keys {', '.join(KEYS)}, got {keys!r:.80}"
        )
    layers = content.get("initial_global_assignments")
    legal = isinstance(layers, dict) and all(
        type(layer) is int and 0 <= layer < 1 << 16 for layer in layers
    )
    if not legal or not layers:
        raise InvalidPlacementError(
            f"{path}: initial_global_assignments must map layer numbers to lists"
        )
    order = sorted(layers)
    slots = rows_of_ids([layers[n] for n in order], "initial_global_assignments")
    if content.get("num_slots") != slots.shape[1]:
        raise InvalidPlacementError(
            f"{path}: num_slots is {content.get('num_slots')!r:.20}, layers list "
            f"{slots.shape[1]}"
        )
    return SlotMap(slots=slots, layer_ids=np.array(order, np.int32))


def _load(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: YAML is read with PyYAML: pip install 'moetuner[yaml]'"
        ) from error
    if path.stat().st_size > MAX_BYTES:
        raise InvalidPlacementError(f"{path}: larger than {MAX_BYTES} bytes")
    try:
        text = path.read_bytes().decode()
        # An alias may stand for a list that stands for a list: a few bytes, gigabytes.
        # The scanner's tokens would be slow; neither sign is in a file of numbers, but
        # it may be in a comment: those go, unless quotes stand before the #.
        bare = re.sub(r"(?m)^((?:[^#'\"\n]*[^\S\n])?)#.*$", r"\1", text)
        if "&" in bare or "*" in bare:
            raise InvalidPlacementError(f"{path}: YAML anchors and aliases are refused")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(bare, Loader=loader)
    except InvalidPlacementError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidPlacementError(f"{path}: not YAML: {reason:.200}") from error
