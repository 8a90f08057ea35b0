"""TensorRT-LLM's expert statistics: a folder with ``meta_info.json``.

``rank{r}.safetensors`` holds counts [E] under ``{iteration}_{layer}``. Versions that
also keep each token's experts [tokens, top-k] put them in ``rank{r}_raw.safetensors``
or ``token_selected_experts_rank{r}.safetensors``: then tokens are imported.

With a load balancer active, TensorRT-LLM records slots instead of experts, and calls
their number the number of experts; ``slot_experts`` of the options turns them back.
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
)
from moetuner.trace.importers.counting import count_trace, counts_of
from moetuner.trace.importers.rows import written_tokens
from moetuner.trace.importers.stages import join_stages
from moetuner.trace.importers.stored import open_safetensors
from moetuner.trace.model import MAX_EXPERTS, PADDING, CountTrace, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

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
    num_ids, top_k = (_natural(meta, key) for key in _META_KEYS)
    logical = _Logical(num_ids, options)
    raw = _tables(folder, _RAW)
    if raw:
        return Tokens(
            blocks=_blocks(raw, logical, top_k, options),
            num_experts=logical.num_experts,
            source="TensorRT-LLM token_selected_experts",
        )
    counted = _tables(folder, _COUNTS)
    if not counted:
        raise InvalidTraceError(f"{folder}: no rank*.safetensors beside meta_info.json")
    return _counts(counted, logical, top_k, options)


class _Logical:
    """What a recorded id stands for: an expert, or a slot of a placement."""

    def __init__(self, num_ids: int, options: ImportOptions) -> None:
        self.num_ids = self.num_experts = num_ids
        self._slots = options.slot_experts
        if self._slots is None:
            options.note(
                "ids are taken as experts; if a load balancer was active they are "
                "slots: say with `slot_experts` which placement it had"
            )
            return
        sizes = {len(slots) for slots in self._slots.values()}
        if sizes != {num_ids}:
            raise InvalidTraceError(
                f"the recording is of {num_ids} ids, the placement has "
                f"{sorted(sizes)} slots"
            )
        if any((slots < 0).any() for slots in self._slots.values()):
            raise InvalidTraceError("the placement has empty slots; engines have none")
        self.num_experts = 1 + max(int(s.max()) for s in self._slots.values())

    def _of(self, layer: int) -> NDArray[np.integer[Any]]:
        assert self._slots is not None
        if layer not in self._slots:
            raise InvalidTraceError(f"the placement has no layer {layer}")
        return self._slots[layer]

    def counts(self, layer: int, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Counts [E] from those of ids."""
        if self._slots is None:
            return counts
        logical = np.zeros(self.num_experts, np.int64)
        np.add.at(logical, self._of(layer), counts)
        return logical

    def ids(self, layer: int, ids: NDArray[np.int16]) -> NDArray[np.int16]:
        """Experts of the ids; padding stays."""
        if self._slots is None:
            return ids
        if ids.size and ids.max() >= self.num_ids:
            raise InvalidTraceError(
                f"slot {ids.max()} is outside 0..{self.num_ids - 1}"
            )
        return np.where(ids == PADDING, PADDING, self._of(layer)[ids]).astype(np.int16)


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
    return _joined(tables)


def _joined(tables: _Tables) -> _Tables:
    """The same with stages of a pipeline as one rank: their first."""
    ranks: dict[int, dict[int, dict[int, StoredArray]]] = defaultdict(dict)
    for (iteration, rank), layers in tables.items():
        ranks[iteration][rank] = layers
    return {
        (iteration, pipeline[0]): {
            layer: array for rank in pipeline for layer, array in of_rank[rank].items()
        }
        for iteration, of_rank in ranks.items()
        for pipeline in join_stages(of_rank)
    }


def _layers(tables: _Tables) -> list[int]:
    every = {tuple(sorted(layers)) for layers in tables.values()}
    if len(every) != 1:
        raise InvalidTraceError("ranks and iterations recorded different layers")
    return list(every.pop())


def _counts(
    tables: _Tables, logical: _Logical, top_k: int, options: ImportOptions
) -> CountTrace:
    """Counts added over ranks, in groups of neighbouring iterations."""
    layers = _layers(tables)
    iterations = sorted({iteration for iteration, _ in tables})
    num_groups = min(len(iterations), MAX_GROUPS)
    group_of = {
        it: i * num_groups // len(iterations) for i, it in enumerate(iterations)
    }
    if 8 * num_groups * len(layers) * logical.num_experts > MAX_TABLE_BYTES:
        raise InvalidTraceError("too large a table of counts")
    groups = np.zeros((num_groups, len(layers), logical.num_experts), np.int64)
    for done, ((iteration, _), arrays) in enumerate(sorted(tables.items())):
        for row, layer in enumerate(layers):
            if arrays[layer].shape != (logical.num_ids,):
                raise InvalidTraceError(
                    f"counts of layer {layer} must be [{logical.num_ids}], got "
                    f"{list(arrays[layer].shape)}"
                )
            counts = logical.counts(layer, counts_of(arrays[layer]))
            groups[group_of[iteration], row] += counts
        options.progress(done + 1, len(tables))
    return count_trace(
        groups, "TensorRT-LLM statistics", options, np.array(layers, np.int32), top_k
    )


def _blocks(
    tables: _Tables, logical: _Logical, top_k: int, options: ImportOptions
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
            parts = [
                logical.ids(layer, as_ids(arrays[layer].read(start, start + rows)))
                for layer in layers
            ]
            ids = written_tokens(np.stack(parts, axis=1))
            yield Trace(
                topk_ids=ids,
                num_experts=logical.num_experts,
                layer_ids=np.array(layers, np.int32),
                sequence=np.full(len(ids), sequence_of[iteration], np.int32),
                home_rank=np.full(len(ids), rank, np.int16),
            )
        options.progress(done + 1, len(tables))
