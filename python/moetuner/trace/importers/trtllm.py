"""TensorRT-LLM's expert statistics: a folder with ``meta_info.json``.

``rank{r}.safetensors`` holds counts [E] under ``{iteration}_{layer}``. Versions that
also keep each token's experts [tokens, top-k] put them in ``rank{r}_raw.safetensors``
or ``token_selected_experts_rank{r}.safetensors``: then tokens are imported.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import (
    MAX_GROUPS,
    MAX_TABLE_BYTES,
    Tokens,
    as_ids,
    block_rows,
    count_trace,
    counts_of,
)
from moetuner.trace.importers.stored import open_safetensors
from moetuner.trace.model import MAX_EXPERTS, CountTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.importers.stored import StoredArray

_COUNTS = re.compile(r"rank(\d{1,5})\.safetensors")
_RAW = re.compile(
    r"(?:token_selected_experts_rank(\d{1,5})|rank(\d{1,5})_raw)\.safetensors"
)
_KEY = re.compile(r"(\d{1,18})_(\d{1,5})")
_MAX_META_BYTES = 1 << 20

# (iteration, rank) -> layer -> array
_Tables = dict[tuple[int, int], dict[int, "StoredArray"]]


def read_trtllm_statistics(
    files: Sequence[Path], options: ImportOptions
) -> Tokens | CountTrace:
    """One folder of statistics."""
    if len(files) != 1 or not files[0].is_dir():
        raise InvalidTraceError(
            "TensorRT-LLM statistics: wanted the one folder that has meta_info.json"
        )
    folder = files[0]
    meta = _meta(folder / "meta_info.json")
    num_experts, top_k = (_natural(meta, key) for key in _META_KEYS)
    raw = _tables(folder, _RAW)
    if raw:
        return Tokens(
            blocks=_blocks(raw, num_experts, top_k, options),
            num_experts=num_experts,
            source="TensorRT-LLM token_selected_experts",
        )
    counted = _tables(folder, _COUNTS)
    if not counted:
        raise InvalidTraceError(f"{folder}: no rank*.safetensors beside meta_info.json")
    return _counts(counted, num_experts, top_k, options)


_META_KEYS = ("num_experts", "num_experts_per_token")


def _meta(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_META_BYTES:
        raise InvalidTraceError(f"{path}: larger than {_MAX_META_BYTES} bytes")
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidTraceError(f"{path}: not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise InvalidTraceError(f"{path}: wanted a JSON object")
    return meta


def _natural(meta: dict[str, Any], key: str) -> int:
    value = meta.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTraceError(f"meta_info.json: {key} must be a number")
    if not 1 <= value <= MAX_EXPERTS:
        raise InvalidTraceError(f"meta_info.json: {key} must be 1..{MAX_EXPERTS}")
    return value


def _tables(folder: Path, pattern: re.Pattern[str]) -> _Tables:
    tables: _Tables = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        rank = int(next(group for group in match.groups() if group is not None))
        for key, array in open_safetensors(path).items():
            parts = _KEY.fullmatch(key)
            if parts is None or rank >= 2**15:
                raise InvalidTraceError(
                    f"{path}: tensor {key!r:.40}, wanted names like '100_3' "
                    f"(iteration_layer)"
                )
            iteration, layer = map(int, parts.groups())
            if layer in tables[iteration, rank]:
                raise InvalidTraceError(
                    f"{path}: rank {rank} is there twice for iteration {iteration}"
                )
            tables[iteration, rank][layer] = array
    return tables


def _layers(tables: _Tables) -> list[int]:
    every = {tuple(sorted(layers)) for layers in tables.values()}
    if len(every) != 1:
        raise InvalidTraceError("ranks and iterations recorded different layers")
    return list(every.pop())


def _counts(
    tables: _Tables, num_experts: int, top_k: int, options: ImportOptions
) -> CountTrace:
    """Counts added over ranks, in groups of neighbouring iterations."""
    layers = _layers(tables)
    iterations = sorted({iteration for iteration, _ in tables})
    num_groups = min(len(iterations), MAX_GROUPS)
    group_of = {
        it: i * num_groups // len(iterations) for i, it in enumerate(iterations)
    }
    if 8 * num_groups * len(layers) * num_experts > MAX_TABLE_BYTES:
        raise InvalidTraceError("too large a table of counts")
    groups = np.zeros((num_groups, len(layers), num_experts), np.int64)
    for done, ((iteration, _), arrays) in enumerate(sorted(tables.items())):
        for row, layer in enumerate(layers):
            if arrays[layer].shape != (num_experts,):
                raise InvalidTraceError(
                    f"counts of layer {layer} must be [{num_experts}], got "
                    f"{list(arrays[layer].shape)}"
                )
            groups[group_of[iteration], row] += counts_of(arrays[layer])
        options.progress(done + 1, len(tables))
    return count_trace(
        groups, "TensorRT-LLM statistics", options, np.array(layers, np.int32), top_k
    )


def _blocks(
    tables: _Tables, num_experts: int, top_k: int, options: ImportOptions
) -> Iterator[Trace]:
    """Tokens of each iteration and rank; an iteration is a sequence, none is known."""
    layers = _layers(tables)
    sequence_of = {it: i for i, it in enumerate(sorted({it for it, _ in tables}))}
    for done, ((iteration, rank), arrays) in enumerate(sorted(tables.items())):
        shapes = {array.shape for array in arrays.values()}
        shape = shapes.pop()
        if shapes or len(shape) != 2 or shape[1] != top_k:
            raise InvalidTraceError(
                f"iteration {iteration} of rank {rank}: wanted the same "
                f"[tokens, {top_k}] at every layer"
            )
        rows = block_rows(len(layers), top_k)
        for start in range(0, shape[0], rows):
            parts = [as_ids(arrays[n].read(start, start + rows)) for n in layers]
            ids = np.ascontiguousarray(np.stack(parts, axis=1))
            yield Trace(
                topk_ids=ids,
                num_experts=num_experts,
                layer_ids=np.array(layers, np.int32),
                sequence=np.full(len(ids), sequence_of[iteration], np.int32),
                home_rank=np.full(len(ids), rank, np.int16),
            )
        options.progress(done + 1, len(tables))
