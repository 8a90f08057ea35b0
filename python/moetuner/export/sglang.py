"""SGLang's ``--init-expert-location``: the key ``physical_to_logical_map``.

JSON is written; files of ``torch.save`` with the same key are read too.

Rows for all hidden layers; those of dense layers are there and unused. Read in SGLang
0.5.23: further keys would be passed on as arguments and end the server.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.export.base import (
    ExportOptions,
    SlotMap,
    Written,
    json_bytes,
    read_json,
    rows_of_ids,
)
from moetuner.export.maps import map_of, read_torch
from moetuner.export.replica_rules import planned_rule
from moetuner.export.rows import complete, filled_rows
from moetuner.trace.importers.torch_file import is_torch_file

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner.placement.model import Placement

KEY = "physical_to_logical_map"


def write_sglang(placement: Placement, options: ExportOptions) -> Written:
    """The slot map of all hidden layers."""
    completed = complete(placement, options, "sglang", hidden=True)
    rows = filled_rows(completed, options)
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
            f"{_choice(placement)}"
        ),
        notes=(
            "with --moe-a2a-backend none every rank computes on all tokens: then only "
            "the balance of the plan can help, not its traffic",
            *completed.notes,
            "rows of dense layers are there because the file has one for every hidden "
            "layer; SGLang does not use them",
            "SGLang before pull request 32962 (30 July 2026) answers wrongly with such "
            "a map and --moe-a2a-backend none, unless --enable-eplb is given",
        ),
    )


def _choice(placement: Placement) -> str:
    """How replicas are chosen; SGLang's own default is static."""
    dynamic = planned_rule(placement) is ReplicaRule.SGLANG_DYNAMIC
    return " --ep-dispatch-algorithm dynamic" if dynamic else ""


def read_sglang(path: Path) -> SlotMap:
    """The slot map of a file, a row for each hidden layer."""
    content: Any = read_torch(path) if is_torch_file(path) else read_json(path)
    if not isinstance(content, dict) or list(content) != [KEY]:
        keys = sorted(map(str, content))[:8] if isinstance(content, dict) else content
        raise InvalidPlacementError(
            f"{path}: wanted the one key {KEY!r}, got {keys!r:.80}"
        )
    rows = content[KEY]
    if isinstance(rows, np.ndarray):
        slots = map_of(rows, f"{path}: {KEY}")
        return SlotMap(slots=slots, shared=rows.ndim < 2)
    shared = bool(isinstance(rows, list) and rows and not isinstance(rows[0], list))
    return SlotMap(slots=rows_of_ids([rows] if shared else rows, KEY), shared=shared)
