"""SGLang's expert distribution recorder: ``stat``, ``per_pass`` and ``per_token``.

Files ``expert_distribution_recorder_*.pt`` as SGLang 0.5 dumps them. Their ids and
counts are of *physical* slots, which ``last_physical_to_logical_map`` [L_all, P] turns
into experts; several ranks are joined on ``forward_pass_id``.

A pass of a rank may be there several times: with speculative decoding target and draft
number their passes each for itself, and drafts record nothing; stages of a pipeline
record the same pass at other layers. The empty ones are dropped, the others joined.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import Tokens, as_ids, block_rows, note_repeats
from moetuner.trace.importers.counting import counts_of, fold_counts
from moetuner.trace.importers.rows import TokenRows
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """What one stage of a pipeline recorded of a pass."""

    counts: StoredArray | None
    ids: StoredArray | None
    logical: NDArray[np.int16]

    def layers(self) -> NDArray[np.bool_]:
        """Layers at which something was recorded, bool [L_all]."""
        if self.counts is not None:
            return np.asarray(self.counts.read().any(axis=1))
        if self.ids is None:
            return np.zeros(len(self.logical), bool)
        return np.asarray((self.ids.read() > PADDING).any(axis=(1, 2)))

    @property
    def num_tokens(self) -> int:
        """Tokens of which ids were recorded."""
        return 0 if self.ids is None else self.ids.shape[1]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Pass:
    """One forward pass of one rank, all stages of it."""

    forward_pass_id: int
    rank: int
    parts: tuple[_Part, ...]
    sequence_lengths: NDArray[np.int64]
    positions: NDArray[np.int32]
    mode: int
    inputs: bytes

    @property
    def has_ids(self) -> bool:
        """Whether tokens were recorded, not only counts."""
        return any(part.ids is not None for part in self.parts)


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
                stats.append(_logical_count(content["logical_count"]))
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
    passes = _joined(passes)
    maps = [part.logical for one in passes for part in one.parts]
    if not all(np.array_equal(maps[0], other) for other in maps[1:]):
        options.note(
            "dumps have different maps of slots: experts moved while this was "
            "recorded, so counts and tokens between may be taken for other experts"
        )
    if passes and not any(one.has_ids for one in passes):
        total = len({p.forward_pass_id for p in passes})
        return fold_counts(_summed(passes), total, "SGLang recorder, per_pass", options)
    passes = [p for p in passes if p.has_ids and p.mode != _IDLE]
    num_experts = max((int(m.max()) + 1 for m in maps), default=1)
    if options.num_experts not in (None, num_experts):
        raise InvalidTraceError(
            f"import: num_experts is {options.num_experts}, the map of slots is of "
            f"{num_experts}"
        )
    drop: set[str] = set()
    return Tokens(
        blocks=_blocks(passes, num_experts, drop, options),
        num_experts=num_experts,
        source="SGLang recorder, per_token",
        drop=drop,
    )


def _joined(passes: list[_Pass]) -> list[_Pass]:
    """Each pass of each rank once, in order.

    Raises
    ------
    InvalidTraceError
        When one is there twice with the same layers.
    """
    passes = sorted(passes, key=lambda p: (p.forward_pass_id, p.rank))
    joined = []
    for (number, rank), same in groupby(
        passes, key=lambda p: (p.forward_pass_id, p.rank)
    ):
        records = list(same)
        if len(records) > 1:
            told = [(r, r.parts[0].layers()) for r in records]
            wrote = [(r, layers) for r, layers in told if layers.any()] or told[:1]
            tokens = {r.parts[0].num_tokens for r, _ in wrote}
            shapes = {layers.shape for _, layers in wrote}
            once = len(shapes) == 1 and np.sum([m for _, m in wrote], axis=0).max() < 2
            if len(wrote) > 1 and (not once or len(tokens) > 1):
                raise InvalidTraceError(
                    f"forward pass {number} of rank {rank} is there twice: the same "
                    f"dump twice, or dumps of two server starts"
                )
            records = [r for r, _ in wrote]
        parts = tuple(part for r in records for part in r.parts)
        joined.append(replace(records[0], parts=parts))
    return joined


def _logical_count(value: Any) -> StoredArray:
    """Counts [steps, L_all, E], or [L_all, E] of one step."""
    if isinstance(value, StoredArray) and len(value.shape) == 2:
        strides = value.strides
        return replace(
            value,
            shape=(1, *value.shape),
            strides=None if strides is None else (0, *strides),
        )
    return _array(value, "logical_count", 3)


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
        (part,) = passes[-1].parts
        arrays = (part.ids, part.counts)
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
    part = _Part(
        counts=None if counts is None else _array(counts, "global_physical_count", 2),
        ids=None if ids is None else _array(ids, "topk_ids_of_layer", 3),
        logical=logical,
    )
    known = _Pass(
        forward_pass_id=_number(record, "forward_pass_id", 2**62),
        rank=_number(record, "rank", _MAX_RANKS),
        parts=(part,),
        sequence_lengths=_integers(record, "extend_seq_lens"),
        positions=_integers(record, "positions").astype(np.int32),
        mode=_number(record, "forward_mode", 2**31, default=0),
        inputs=hashlib.blake2b(inputs.tobytes()).digest(),
    )
    for name, array in (("counts", part.counts), ("ids", part.ids)):
        if array is not None and array.shape[0] != len(logical):
            raise InvalidTraceError(
                f"{name} of {array.shape[0]} layers beside a map of {len(logical)}"
            )
    if part.counts is not None and part.counts.shape != logical.shape:
        raise InvalidTraceError(
            f"counts {list(part.counts.shape)} beside a map {list(logical.shape)}"
        )
    if part.ids is not None and len(known.positions) not in (0, part.num_tokens):
        raise InvalidTraceError(
            f"{len(known.positions)} positions for {part.num_tokens} tokens"
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
    parts = [part for one in passes for part in one.parts]
    num_experts = max(int(part.logical.max()) + 1 for part in parts)
    for number, ranks in groupby(passes, key=lambda p: p.forward_pass_id):
        total: NDArray[np.int64] | None = None
        for rank, part in ((one.rank, part) for one in ranks for part in one.parts):
            if part.counts is None:
                raise InvalidTraceError(
                    f"forward pass {number} of rank {rank} has no global_physical_count"
                )
            physical = counts_of(part.counts)
            logical = np.zeros((len(physical), num_experts), np.int64)
            rows = np.arange(len(physical))[:, None]
            np.add.at(logical, (rows, part.logical), physical)
            if total is not None and total.shape != logical.shape:
                raise InvalidTraceError("ranks recorded different numbers of layers")
            total = logical if total is None else total + logical
        assert total is not None
        yield total


def _blocks(
    passes: list[_Pass], num_experts: int, drop: set[str], options: ImportOptions
) -> Iterator[Trace]:
    top_k, sequences = options.top_k, 0
    token_rows = TokenRows(replace(options, num_experts=num_experts), marked=True)
    several = len({p.rank for p in passes}) > 1
    started = False
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
                if not started and not (ids > PADDING).any():
                    continue
                if not started:
                    top_k = _top_k(one, ids, options)
                    started = True
                assert top_k is not None
                if (ids[:, :, top_k:] > PADDING).any():
                    raise InvalidTraceError(
                        f"a token has more than {top_k} experts; say --top-k"
                    )
                places, kept = token_rows.routed(ids[:, :, :top_k])
                yield _block(
                    one, start + places, kept, token_rows.layer_ids, num_experts, first
                )
            sequences = first + max(len(one.sequence_lengths), 1)
        options.progress(len(passes) + 9 * index, len(passes) * 10)


def _top_k(one: _Pass, ids_TLK: NDArray[np.int16], options: ImportOptions) -> int:
    """Experts per token: the widest row of the first tokens, unless it is given."""
    width = ids_TLK.shape[2]
    if options.top_k is not None and options.top_k > width:
        raise InvalidTraceError(
            f"import: top_k is {options.top_k}, but SGLang's recorder kept {width} "
            f"experts of each token: record with mode per_pass or stat, or return "
            f"routed experts per request"
        )
    counted = sum(int(p.counts.read().sum()) for p in one.parts if p.counts is not None)
    listed = sum(
        int((p.ids.read() > PADDING).sum()) for p in one.parts if p.ids is not None
    )
    if counted * width >= listed * (width + 1):
        options.note(
            f"the first pass counted {counted} choices and lists {listed}: tokens have "
            f"more than the {width} experts that SGLang's recorder keeps of each; "
            f"record with mode per_pass, or return routed experts per request"
        )
    used = (ids_TLK > PADDING).any(axis=(0, 1))
    return options.top_k or int(np.flatnonzero(used)[-1]) + 1


def _is_repeat(one: _Pass, seen: set[bytes]) -> bool:
    """Whether another rank recorded the very same tokens in this forward pass."""
    if not any(part.num_tokens for part in one.parts):
        return False
    digest = hashlib.blake2b(one.inputs + one.positions.tobytes())
    for array in (part.ids for part in one.parts if part.ids is not None):
        rows = block_rows(array.shape[0], array.shape[2])
        for start in range(0, array.shape[1], rows):
            digest.update(array.read(start, start + rows, axis=1).tobytes())
    if digest.digest() in seen:
        return True
    seen.add(digest.digest())
    return False


def _logical_ids(one: _Pass) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Blocks of logical ids [t, L_all, width] and the token where each begins."""
    parts = [part for part in one.parts if part.ids is not None]
    shapes = {part.ids.shape for part in parts if part.ids is not None}
    if len(shapes) != 1:
        raise InvalidTraceError(
            f"forward pass {one.forward_pass_id}: stages recorded ids of shapes "
            f"{sorted(shapes)[:4]}"
        )
    num_layers, num_tokens, width = shapes.pop()
    rows = block_rows(num_layers, width)
    for start in range(0, num_tokens, rows):
        stages = [_logical_part(one, part, start, start + rows) for part in parts]
        # Stages list nothing (-1) at layers that are not theirs.
        ids = np.maximum.reduce(stages)
        yield start, np.ascontiguousarray(ids.transpose(1, 0, 2))


def _logical_part(one: _Pass, part: _Part, start: int, stop: int) -> NDArray[np.int16]:
    """Logical ids [L_all, t, width] of some tokens at the layers of one stage."""
    assert part.ids is not None
    num_slots = part.logical.shape[1]
    physical = part.ids.read(start, stop, axis=1)
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
        logical[layer] = np.where(slots == PADDING, PADDING, part.logical[layer][slots])
    return logical


def _block(
    one: _Pass,
    tokens: NDArray[np.int64],
    ids: NDArray[np.int16],
    layers: NDArray[np.int32],
    num_experts: int,
    first_sequence: int,
) -> Trace:
    """Some tokens of a forward pass.

    Request ids are not recorded: a sequence is one prompt, or one batch of decoding.
    """
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
