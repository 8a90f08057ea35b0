"""SGLang's expert distribution recorder: ``stat``, ``per_pass`` and ``per_token``.

Files ``expert_distribution_recorder_*.pt`` as SGLang 0.5 dumps them. Their ids and
counts are of *physical* slots, which ``last_physical_to_logical_map`` [L_all, P] turns
into experts; several ranks are joined on ``forward_pass_id``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import (
    Tokens,
    as_ids,
    block_rows,
    counts_of,
    fold_counts,
    moe_layers,
    note_repeats,
    routed_tokens,
)
from moetuner.trace.importers.stored import StoredArray
from moetuner.trace.importers.torch_file import read_torch_file
from moetuner.trace.model import MAX_EXPERTS, PADDING, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions
    from moetuner.trace.model import CountTrace

_DECODE, _IDLE, _VERIFY = 2, 4, 5  # of SGLang's ForwardMode
_MAX_RANKS = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One forward pass of one rank."""

    forward_pass_id: int
    rank: int
    counts: StoredArray | None
    ids: StoredArray | None
    logical: NDArray[np.int16]
    sequence_lengths: NDArray[np.int64]
    positions: NDArray[np.int32]
    mode: int
    inputs: bytes


def read_sglang_recorder(
    files: Sequence[Path], options: ImportOptions
) -> Tokens | CountTrace:
    """Dumps of one recording: tokens when the recorder kept them, else counts."""
    stats: list[StoredArray] = []
    passes: list[_Pass] = []
    for done, path in enumerate(files):
        content = read_torch_file(path)
        try:
            if isinstance(content, dict) and "logical_count" in content:
                stats.append(_array(content["logical_count"], "logical_count", 3))
            elif isinstance(content, dict) and "records" in content:
                passes += _passes(content, path.stat().st_size)
            else:
                raise InvalidTraceError(
                    "no dump of SGLang's recorder: wanted the key 'logical_count' or "
                    "'records'"
                )
        except InvalidTraceError as error:
            raise InvalidTraceError(f"{path}: {error}") from error
        options.progress(done, len(files) * 10)  # the index; the tokens come later
    if stats and passes:
        raise InvalidTraceError("dumps of mode stat and of other modes cannot be mixed")
    if stats:
        total = sum(array.shape[0] for array in stats)
        return fold_counts(_stat(stats), total, "SGLang recorder, stat", options)
    if passes and not all(
        np.array_equal(passes[0].logical, p.logical) for p in passes[1:]
    ):
        options.note(
            "dumps have different maps of slots: experts moved while this was "
            "recorded, so counts and tokens between may be taken for other experts"
        )
    passes.sort(key=lambda p: (p.forward_pass_id, p.rank))
    for before, after in pairwise(passes):
        if (before.forward_pass_id, before.rank) == (after.forward_pass_id, after.rank):
            raise InvalidTraceError(
                f"forward pass {after.forward_pass_id} of rank {after.rank} is there "
                f"twice: the same dump twice, or dumps of two server starts"
            )
    if passes and all(p.ids is None for p in passes):
        total = len({p.forward_pass_id for p in passes})
        return fold_counts(_summed(passes), total, "SGLang recorder, per_pass", options)
    passes = [p for p in passes if p.ids is not None and p.mode != _IDLE]
    num_experts = max((int(p.logical.max()) + 1 for p in passes), default=1)
    drop: set[str] = set()
    return Tokens(
        blocks=_blocks(passes, num_experts, drop, options),
        num_experts=num_experts,
        source="SGLang recorder, per_token",
        drop=drop,
    )


def _array(value: Any, name: str, ndim: int) -> StoredArray:
    if not isinstance(value, StoredArray) or len(value.shape) != ndim:
        shape = list(value.shape) if isinstance(value, StoredArray) else value
        raise InvalidTraceError(
            f"{name} must be a tensor of {ndim} dimensions, got {shape!r:.60}"
        )
    return value


def _stat(arrays: list[StoredArray]) -> Iterator[NDArray[np.int64]]:
    for array in arrays:
        for step in range(array.shape[0]):
            yield counts_of(array, step, step + 1)[0]


def _passes(content: dict[str, Any], num_bytes: int) -> list[_Pass]:
    stored = _array(
        content.get("last_physical_to_logical_map"), "last_physical_to_logical_map", 2
    )
    logical = as_ids(stored.read())
    if not logical.size or logical.min() < 0:
        raise InvalidTraceError("last_physical_to_logical_map must hold ids >= 0")
    records = content["records"]
    if not isinstance(records, list):
        raise InvalidTraceError(f"records must be a list, got {type(records).__name__}")
    passes = []
    for record in records:
        passes.append(_pass(record, logical))
        arrays = (passes[-1].ids, passes[-1].counts)
        num_bytes -= sum(0 if a is None else a.num_bytes for a in arrays)
        num_bytes -= len(passes[-1].positions) + len(passes[-1].sequence_lengths)
        if num_bytes < 0:  # one list or tensor in many records: endless from little
            raise InvalidTraceError("the records hold more than the file has bytes")
    return passes


def _pass(record: Any, logical: NDArray[np.int16]) -> _Pass:
    if not isinstance(record, dict):
        raise InvalidTraceError(f"a record must be a dict, got {record!r:.40}")
    counts, ids = record.get("global_physical_count"), record.get("topk_ids_of_layer")
    inputs = _integers(record, "input_ids")
    known = _Pass(
        forward_pass_id=_number(record, "forward_pass_id", 2**62),
        rank=_number(record, "rank", _MAX_RANKS),
        counts=None if counts is None else _array(counts, "global_physical_count", 2),
        ids=None if ids is None else _array(ids, "topk_ids_of_layer", 3),
        logical=logical,
        sequence_lengths=_integers(record, "extend_seq_lens"),
        positions=_integers(record, "positions").astype(np.int32),
        mode=_number(record, "forward_mode", 2**31, default=0),
        inputs=hashlib.blake2b(inputs.tobytes()).digest(),
    )
    for name, array in (("counts", known.counts), ("ids", known.ids)):
        if array is not None and array.shape[0] != len(logical):
            raise InvalidTraceError(
                f"{name} of {array.shape[0]} layers beside a map of {len(logical)}"
            )
    if known.counts is not None and known.counts.shape != logical.shape:
        raise InvalidTraceError(
            f"counts {list(known.counts.shape)} beside a map {list(logical.shape)}"
        )
    if known.ids is not None and len(known.positions) not in (0, known.ids.shape[1]):
        raise InvalidTraceError(
            f"{len(known.positions)} positions for {known.ids.shape[1]} tokens"
        )
    return known


def _number(
    record: dict[str, Any], name: str, limit: int, default: int | None = None
) -> int:
    value = record.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise InvalidTraceError(f"{name} must be 0..{limit - 1}, got {value!r:.40}")
    return value


def _integers(record: dict[str, Any], name: str) -> NDArray[np.int64]:
    values = record.get(name)
    if isinstance(values, StoredArray):
        values = values.read()
    try:
        array = np.array([] if values is None else values)
    except (ValueError, OverflowError) as error:
        raise InvalidTraceError(f"{name} must be whole numbers: {error}") from error
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidTraceError(f"{name} must be a list of whole numbers")
    if array.min() < 0 or array.max() >= 2**31:
        raise InvalidTraceError(
            f"{name} must be 0..2**31 - 1, got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64)


def _summed(passes: list[_Pass]) -> Iterator[NDArray[np.int64]]:
    """Logical counts [L_all, E] of each forward pass, added over ranks."""
    num_experts = max(int(p.logical.max()) + 1 for p in passes)
    for _, ranks in groupby(passes, key=lambda p: p.forward_pass_id):
        total: NDArray[np.int64] | None = None
        for one in ranks:
            if one.counts is None:
                raise InvalidTraceError(
                    f"forward pass {one.forward_pass_id} of rank {one.rank} has no "
                    f"global_physical_count"
                )
            physical = counts_of(one.counts)
            logical = np.zeros((len(physical), num_experts), np.int64)
            rows = np.arange(len(physical))[:, None]
            np.add.at(logical, (rows, one.logical), physical)
            if total is not None and total.shape != logical.shape:
                raise InvalidTraceError("ranks recorded different numbers of layers")
            total = logical if total is None else total + logical
        assert total is not None
        yield total


def _blocks(
    passes: list[_Pass], num_experts: int, drop: set[str], options: ImportOptions
) -> Iterator[Trace]:
    layers, top_k, sequences = None, options.top_k, 0
    several = len({p.rank for p in passes}) > 1
    if not several:
        drop.add("home_rank")
    for index, (_, ranks) in enumerate(groupby(passes, lambda p: p.forward_pass_id)):
        seen: set[bytes] = set()
        for one in ranks:
            if several and _is_repeat(one, seen):
                # Without data-parallel attention all ranks see the same tokens.
                if "home_rank" not in drop:
                    note_repeats(options)
                drop.add("home_rank")
                continue
            first = sequences
            for start, ids in _logical_ids(one):
                if layers is None:
                    if not (ids > PADDING).any():
                        continue
                    layers = moe_layers(ids, options)
                    used = (ids > PADDING).any(axis=(0, 1))
                    top_k = top_k or int(np.flatnonzero(used)[-1]) + 1
                assert top_k is not None
                if (ids[:, :, top_k:] > PADDING).any():
                    raise InvalidTraceError(
                        f"a token has more than {top_k} experts; say --top-k"
                    )
                kept, ids = routed_tokens(ids[:, :, :top_k], layers, num_experts)
                yield _block(one, start, kept, ids, layers, num_experts, first)
            sequences = first + max(len(one.sequence_lengths), 1)
        options.progress(len(passes) + 9 * index, len(passes) * 10)


def _is_repeat(one: _Pass, seen: set[bytes]) -> bool:
    """Whether another rank recorded the very same tokens in this forward pass."""
    assert one.ids is not None
    if not one.ids.shape[1]:
        return False
    digest = hashlib.blake2b(one.inputs + one.positions.tobytes())
    rows = block_rows(one.ids.shape[0], one.ids.shape[2])
    for start in range(0, one.ids.shape[1], rows):
        digest.update(one.ids.read(start, start + rows, axis=1).tobytes())
    if digest.digest() in seen:
        return True
    seen.add(digest.digest())
    return False


def _logical_ids(one: _Pass) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Blocks of logical ids [t, L_all, width] and the token where each begins."""
    assert one.ids is not None
    num_layers, num_tokens, width = one.ids.shape
    num_slots = one.logical.shape[1]
    rows = block_rows(num_layers, width)
    for start in range(0, num_tokens, rows):
        physical = one.ids.read(start, start + rows, axis=1)
        if physical.dtype.kind not in "iu":
            raise InvalidTraceError(f"topk_ids_of_layer is {physical.dtype}")
        if physical.size and (physical.min() < PADDING or physical.max() >= num_slots):
            raise InvalidTraceError(
                f"forward pass {one.forward_pass_id}: slot ids "
                f"{physical.min()}..{physical.max()} are outside 0..{num_slots - 1}; "
                f"shared experts must not be fused while recording"
            )
        logical = np.empty(physical.shape, np.int16)
        for layer, slots in enumerate(physical):
            logical[layer] = np.where(
                slots == PADDING, PADDING, one.logical[layer][slots]
            )
        yield start, np.ascontiguousarray(logical.transpose(1, 0, 2))


def _block(
    one: _Pass,
    start: int,
    kept: NDArray[np.bool_],
    ids: NDArray[np.int16],
    layers: NDArray[np.int32],
    num_experts: int,
    first_sequence: int,
) -> Trace:
    """The tokens `kept` of a forward pass.

    Request ids are not recorded: a sequence is one prompt, or one batch of decoding.
    """
    tokens = start + np.flatnonzero(kept)
    ends = np.cumsum(one.sequence_lengths)
    sequence = first_sequence + np.searchsorted(ends, tokens, side="right").clip(
        max=max(len(ends) - 1, 0)
    )
    if first_sequence + len(ends) >= 2**31:
        raise InvalidTraceError("more than 2**31 sequences")
    decodes = one.mode in (_DECODE, _VERIFY)
    return Trace(
        topk_ids=ids,
        num_experts=min(num_experts, MAX_EXPERTS),
        layer_ids=layers,
        sequence=sequence.astype(np.int32),
        position=one.positions[tokens] if len(one.positions) else None,
        home_rank=np.full(len(tokens), one.rank, np.int16),
        phase=np.full(len(tokens), decodes, np.uint8) if one.mode else None,
    )
