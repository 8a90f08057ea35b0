"""vllm-ascend's ``expert_map_path``: JSON, a list of experts for each device and layer.

Layers are numbered among the MoE layers, from 0. A device may hold an expert once.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidPlacementError
from moetuner.export.base import (
    ExportOptions,
    SlotMap,
    Written,
    json_bytes,
    read_json,
    rows_of_ids,
)
from moetuner.export.rows import complete, filled_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement


def write_vllm_ascend(placement: Placement, options: ExportOptions) -> Written:
    """Devices are ranks."""
    num_ranks = placement.topology.num_ranks
    completed = complete(placement, options, "vllm-ascend")
    slots = filled_rows(completed, options, repeats=False)
    by_rank = slots.reshape(len(slots), num_ranks, -1).tolist()
    layers = [
        json.dumps(
            {
                "layer_id": layer,
                "device_count": num_ranks,
                "device_list": [
                    {"device_id": device, "device_expert": experts}
                    for device, experts in enumerate(devices)
                ],
            }
        )
        for layer, devices in enumerate(by_rank)
    ]
    start = f'{{"moe_layer_count": {len(slots)}, "layer_list": ['
    return Written(
        data=json_bytes(layers, start, "]}"),
        command=(
            "vllm serve MODEL --enable-expert-parallel --additional-config "
            '\'{"eplb_config": {"expert_map_path": "{json}"}}\''
        ),
        notes=(
            *completed.notes,
            "layers are counted among the MoE layers; the model's own numbers are lost",
            "more than one device of expert parallelism, else the map is not read",
        ),
    )


def read_vllm_ascend(path: Path) -> SlotMap:
    """The map of a file; equally many experts on every device."""
    content = read_json(path)
    layers = content.get("layer_list") if isinstance(content, dict) else None
    if not isinstance(layers, list) or not layers:
        raise InvalidPlacementError(f"{path}: wanted a list under 'layer_list'")
    if content.get("moe_layer_count") != len(layers):
        raise InvalidPlacementError(
            f"{path}: moe_layer_count is {content.get('moe_layer_count')!r:.20}, there "
            f"are {len(layers)} layers"
        )
    tables = [_devices(layer, index, path) for index, layer in enumerate(layers)]
    if len({table.shape for table in tables}) != 1:
        raise InvalidPlacementError(f"{path}: layers differ in devices or experts")
    slots = np.stack(tables)
    return SlotMap(
        slots=slots.reshape(len(slots), -1),
        num_ranks=int(slots.shape[1]),
    )


def _devices(layer: Any, index: int, path: Path) -> NDArray[np.int64]:
    """Experts [devices, slots] of one layer."""
    devices: Any = layer.get("device_list") if isinstance(layer, dict) else None
    legal = (
        isinstance(devices, list)
        and layer.get("layer_id") == index
        and layer.get("device_count", len(devices)) == len(devices)
        and all(
            isinstance(device, dict) and device.get("device_id") == number
            for number, device in enumerate(devices)
        )
    )
    if not legal:
        raise InvalidPlacementError(
            f"{path}: layer {index} must have its 'layer_id', 'device_count' and a "
            f"'device_list' in order"
        )
    return rows_of_ids(
        [device.get("device_expert") for device in devices],
        f"{path}: device_expert of layer {index}",
    )
