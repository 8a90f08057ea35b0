"""vLLM's *proposed* placement files, and a fork's; no release reads one.

=====  =======================================  ===================================
 PR    option                                   file
=====  =======================================  ===================================
49572  ``eplb_config.initial_expert_map_path``  ``[[expert of each slot], ...]``
53022  ``eplb_config.expert_map_path``          the same, for DeepSeek-V4
34811  ``--expert-placement-file``              ``{"expert_to_ep_rank": [...]}``
=====  =======================================  ===================================

The start map of a fork (``eplb_config.init_placement_path``) is a tensor of
``torch.save``, int64 [MoE layers, slots].
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
from moetuner.export.maps import map_of, read_torch
from moetuner.export.rows import complete, filled_rows
from moetuner.export.torch_map import torch_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner.placement.model import Placement

PULL_REQUESTS = (49572, 53022, 34811)
_KEY = "expert_to_ep_rank"


def write_vllm(placement: Placement, options: ExportOptions) -> Written:
    """The file of `options.pull_request`."""
    number = options.pull_request
    if number not in PULL_REQUESTS:
        raise InvalidPlacementError(
            f"export to vllm: pull request must be one of {PULL_REQUESTS}, got {number}"
        )
    notes = (
        f"experimental: vLLM 0.33 reads no placement file; this one is what pull "
        f"request {number} proposes, https://github.com/vllm-project/vllm/pull/{number}",
    )
    if number == 34811:
        return _rank_of_expert(placement, notes)
    completed = complete(placement, options, "vllm")
    slots = filled_rows(completed, options)
    key = "initial_expert_map_path" if number == 49572 else "expert_map_path"
    num_redundant = placement.num_slots - placement.num_experts
    return Written(
        data=json_bytes([json.dumps(row) for row in slots.tolist()]),
        command=(
            "vllm serve MODEL --enable-expert-parallel --enable-eplb --eplb-config "
            f'\'{{"{key}": "{{json}}", "num_redundant_experts": {num_redundant}}}\''
        ),
        notes=(
            *notes,
            *completed.notes,
            "rows are the MoE layers in order; the model's own numbers are lost",
            "EPLB moves experts again after step_interval steps: set it high",
        ),
    )


def write_start_map(placement: Placement, options: ExportOptions) -> Written:
    """The tensor that a fork of vLLM starts from."""
    completed = complete(placement, options, "vllm-start-map")
    num_redundant = placement.num_slots - placement.num_experts
    return Written(
        data=torch_bytes(filled_rows(completed, options).astype(np.int64)),
        command=(
            "vllm serve MODEL --enable-expert-parallel --enable-eplb --eplb-config "
            f'\'{{"init_placement_path": "{{json}}", "num_redundant_experts": '
            f"{num_redundant}}}'"
        ),
        notes=(
            "experimental: only a fork of vLLM reads it, as init_placement_path; vLLM "
            "0.33 has no start map",
            *completed.notes,
            "rows are the MoE layers in order; the model's own numbers are lost",
            "EPLB moves experts again after step_interval steps: set it high",
        ),
    )


def read_start_map(path: Path) -> SlotMap:
    """The tensor of such a file."""
    content = read_torch(path)
    if not isinstance(content, np.ndarray):
        raise InvalidPlacementError(
            f"{path}: wanted one tensor [layers, slots], got {type(content).__name__}"
        )
    return SlotMap(slots=map_of(content, f"{path}: the map"), shared=content.ndim < 2)


def read_vllm(path: Path) -> SlotMap:
    """A map of slots per layer; one list is shared by all layers."""
    content = read_json(path)
    if isinstance(content, dict):
        return _read_ranks(content, path)
    shared = bool(
        isinstance(content, list) and content and not isinstance(content[0], list)
    )
    rows = rows_of_ids([content] if shared else content, f"{path}: the map")
    return SlotMap(slots=rows, shared=shared)


def _rank_of_expert(placement: Placement, notes: tuple[str, ...]) -> Written:
    ranks = placement.rank_of()
    if (ranks != ranks[0]).any():
        layer = placement.layer_ids[(ranks != ranks[0]).any(axis=1)][0]
        raise InvalidPlacementError(
            f"export to vllm: pull request 34811 has one map for all layers, but layer "
            f"{layer} differs from layer {placement.layer_ids[0]}"
        )
    return Written(
        data=(json.dumps({_KEY: ranks[0].tolist()}) + "\n").encode(),
        command=(
            "vllm serve MODEL --enable-expert-parallel --expert-placement-strategy "
            "custom --expert-placement-file {path}"
        ),
        notes=(*notes, "one map for all layers, without replicas, and without EPLB"),
    )


def _read_ranks(content: dict[str, object], path: Path) -> SlotMap:
    if list(content) != [_KEY]:
        raise InvalidPlacementError(
            f"{path}: wanted the one key {_KEY!r}, got {sorted(content)[:8]!r:.80}"
        )
    ranks = rows_of_ids([content[_KEY]], f"{path}: {_KEY}")[0]
    if not ranks.size or ranks.min() < 0 or ranks.max() >= ranks.size:
        raise InvalidPlacementError(f"{path}: ranks must be 0..{ranks.size - 1}")
    sizes = np.bincount(ranks)
    if len(set(sizes.tolist())) != 1:
        raise InvalidPlacementError(
            f"{path}: ranks hold {sizes.min()} to {sizes.max()} experts, wanted as "
            f"many each"
        )
    return SlotMap(
        slots=np.argsort(ranks, kind="stable")[None, :],
        num_ranks=len(sizes),
        shared=True,
    )
