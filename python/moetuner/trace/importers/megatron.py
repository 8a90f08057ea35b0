"""Megatron-Core's RouterTracer: ``router_trace_rank{r}.jsonl``.

One record per step, layer and rank with ``top_indices`` [tokens, top-k]; a layer that
comes again within a step is the next micro-batch.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import Tokens, as_ids, note_repeats
from moetuner.trace.importers.json_text import json_values
from moetuner.trace.importers.rows import written_tokens
from moetuner.trace.importers.stages import join_stages
from moetuner.trace.model import MAX_EXPERTS, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions


_Layers = dict[int, "list[NDArray[np.int16]]"]


class _Step(NamedTuple):
    """All micro-batches of one step of one rank."""

    step: int
    rank: int
    file: int
    layers: _Layers
    bytes_read: int


def read_megatron_trace(files: Sequence[Path], options: ImportOptions) -> Tokens:
    """The files of all ranks of one run."""
    drop: set[str] = set()
    return Tokens(
        blocks=_blocks(files, drop, options),
        num_experts=options.num_experts,
        source="Megatron-Core RouterTracer",
        drop=drop,
    )


def _blocks(
    files: Sequence[Path], drop: set[str], options: ImportOptions
) -> Iterator[Trace]:
    total, done, sequence = sum(path.stat().st_size for path in files), 0, 0
    layers: list[int] | None = None
    if len(files) < 2:
        drop.add("home_rank")
    steps = heapq.merge(
        *(_steps(path, number) for number, path in enumerate(files)),
        key=lambda one: (one.step, one.rank, one.file),
    )
    for _, same_step in groupby(steps, key=lambda one: one.step):
        seen: set[bytes] = set()
        for one in _joined(list(same_step)):
            done += one.bytes_read
            options.progress(done, total)
            layers = layers or sorted(one.layers)
            if sorted(one.layers) != layers:
                raise InvalidTraceError(
                    f"step {one.step} of rank {one.rank} has layers "
                    f"{sorted(one.layers)}, the first one {layers}: record without "
                    f"pipeline parallelism, and whole steps"
                )
            digest = hashlib.blake2b()
            for layer in layers:
                for ids in one.layers[layer]:
                    digest.update(ids.tobytes())
            some = any(len(ids) for ids in one.layers[layers[0]])
            if some and digest.digest() in seen:
                # Tensor-parallel ranks saw the same tokens.
                if "home_rank" not in drop:
                    note_repeats(options)
                drop.add("home_rank")
                continue
            seen.add(digest.digest())
            for block in _micro_batches(one, layers, sequence, options):
                yield block
                sequence += 1


def _joined(steps: list[_Step]) -> list[_Step]:
    """The ranks of a step, stages of a pipeline as one: their first."""
    ranks = {(one.rank, one.file): one for one in steps}
    return [
        ranks[pipeline[0]]._replace(
            layers={
                layer: batches
                for rank in pipeline
                for layer, batches in ranks[rank].layers.items()
            },
            bytes_read=sum(ranks[rank].bytes_read for rank in pipeline),
        )
        for pipeline in join_stages(
            {rank: tuple(one.layers) for rank, one in ranks.items()}
        )
    ]


def _micro_batches(
    one: _Step, layers: list[int], sequence: int, options: ImportOptions
) -> Iterator[Trace]:
    """Blocks of a step; a micro-batch is a sequence, as no other border is recorded."""
    counts = {len(one.layers[layer]) for layer in layers}
    if len(counts) != 1:
        raise InvalidTraceError(
            f"step {one.step} of rank {one.rank}: layers come {sorted(counts)} times, "
            f"wanted each as often"
        )
    for batch in range(counts.pop()):
        parts = [one.layers[layer][batch] for layer in layers]
        if len({part.shape for part in parts}) != 1:
            raise InvalidTraceError(
                f"step {one.step} of rank {one.rank}: layers differ in tokens or top-k"
            )
        ids = written_tokens(np.stack(parts, axis=1))
        yield Trace(
            topk_ids=ids,
            num_experts=options.num_experts or MAX_EXPERTS,
            layer_ids=np.array(layers, np.int32),
            sequence=np.full(len(ids), sequence + batch, np.int32),
            home_rank=np.full(len(ids), one.rank, np.int16),
        )


def _steps(path: Path, number: int) -> Iterator[_Step]:
    current: _Step | None = None
    read = 0
    for line, (length, record) in enumerate(json_values(path), start=1):
        read += length
        try:
            if not isinstance(record, dict):
                raise InvalidTraceError("a record must be a JSON object")
            if record.get("block", "decoder") != "decoder":
                continue  # heads of multi-token prediction have experts of their own
            step, rank, layer = (
                _natural(record, *limit)
                for limit in (("step", 2**62), ("rank", 2**15), ("layer", 2**16))
            )
            ids = _ids(record)
        except InvalidTraceError as error:
            raise InvalidTraceError(f"{path}, record {line}: {error}") from error
        if current is not None and (step, rank) < (current.step, current.rank):
            raise InvalidTraceError(
                f"{path}, record {line}: step {step} of rank {rank} after step "
                f"{current.step} of rank {current.rank}"
            )
        if current is None or (step, rank) != (current.step, current.rank):
            if current is not None:
                yield current._replace(bytes_read=read)
                read = 0
            current = _Step(step, rank, number, defaultdict(list), 0)
        current.layers[layer].append(ids)
    if current is None:
        raise InvalidTraceError(f"{path}: no record of a decoder layer")
    yield current._replace(bytes_read=read)


def _natural(record: dict[str, Any], name: str, limit: int) -> int:
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise InvalidTraceError(f"{name} must be 0..{limit - 1}, got {value!r:.40}")
    return value


def _ids(record: dict[str, Any]) -> NDArray[np.int16]:
    rows = record.get("top_indices")
    try:
        ids = np.array(rows)
    except (ValueError, OverflowError) as error:
        raise InvalidTraceError(
            "top_indices: rows differ in length, or a number needs more than 64 bits"
        ) from error
    if rows == []:
        ids = np.empty((0, _natural(record, "topk", MAX_EXPERTS)), np.int16)
    if ids.ndim != 2 or not ids.shape[1]:
        raise InvalidTraceError("top_indices must be lists of expert ids, a token each")
    num_tokens, top_k = ids.shape
    told = record.get("num_tokens", num_tokens), record.get("topk", top_k)
    if told != ids.shape:
        raise InvalidTraceError(
            f"top_indices must be [num_tokens, topk] = {list(told)!r:.40}, got "
            f"{list(ids.shape)}"
        )
    return as_ids(ids)
