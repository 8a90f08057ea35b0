"""SGLang's ``--init-expert-location``: JSON of the key ``physical_to_logical_map``.

Rows for all hidden layers; those of dense layers are there and unused. Read in SGLang
0.5.23: further keys would be passed on as arguments and end the server.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

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
from moetuner.export.padding import fill_slots

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner.placement.model import Placement

KEY = "physical_to_logical_map"


def write_sglang(placement: Placement, options: ExportOptions) -> Written:
    """The slot map of all hidden layers."""
    num_layers = options.num_layers
    if num_layers is None:
        raise InvalidPlacementError(
            "export to sglang: the file has a row for every hidden layer, dense ones "
            "too: say how many there are with --num-layers (num_hidden_layers in the "
            "model's config.json)"
        )
    if not placement.layer_ids[-1] < num_layers <= 1 << 16:
        raise InvalidPlacementError(
            f"export to sglang: --num-layers is {num_layers}, the placement has layer "
            f"{placement.layer_ids[-1]}"
        )
    slots = fill_slots(placement, load=options.load).slots
    identity = np.arange(placement.num_slots) % placement.num_experts
    rows = np.tile(identity, (num_layers, 1))
    rows[placement.layer_ids] = slots
    num_ranks = placement.topology.num_ranks
    num_redundant = placement.num_slots - placement.num_experts
    return Written(
        data=json_bytes(
            [json.dumps(row) for row in rows.tolist()], f'{{"{KEY}": [', "]}"
        ),
        command=(
            f"python -m sglang.launch_server --model-path MODEL --tp-size {num_ranks} "
            f"--ep-size {num_ranks} --ep-num-redundant-experts {num_redundant} "
            f"--init-expert-location {{path}} --moe-a2a-backend deepep"
        ),
        notes=(
            "with --moe-a2a-backend none every rank computes on all tokens: then only "
            "the balance of the plan can help, not its traffic",
            "rows of dense layers are the identity; SGLang does not use them",
        ),
    )


def read_sglang(path: Path) -> SlotMap:
    """The slot map of a file, a row for each hidden layer."""
    content = read_json(path)
    if not isinstance(content, dict) or list(content) != [KEY]:
        keys = sorted(content)[:8] if isinstance(content, dict) else content
        raise InvalidPlacementError(
            f"{path}: wanted the one key {KEY!r}, got {keys!r:.80}"
        )
    return SlotMap(slots=rows_of_ids(content[KEY], KEY))
