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
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import Tokens, block_rows, note_repeats
from moetuner.trace.importers.counting import counts_of, fold_counts
from moetuner.trace.importers.rows import TokenRows
from moetuner.trace.importers.sglang_passes import (
    Part,
    Pass,
    array_of,
    joined_passes,
    passes_of,
    staged_passes,
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


def read_sglang_recorder(
    files: Sequence[Path], options: ImportOptions
) -> Tokens | CountTrace:
    """Dumps of one recording: tokens when the recorder kept them, else counts."""
    stats: list[StoredArray] = []
    passes: list[Pass] = []
    for done, path in enumerate(files):
        content = read_torch_file(path)
        try:
            if isinstance(content, dict) and "logical_count" in content:
                stats.append(_logical_count(content["logical_count"]))
            elif isinstance(content, dict) and "records" in content:
                passes += passes_of(content, path.stat().st_size)
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
    passes = staged_passes(joined_passes(passes))
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
            f"import: `num_experts` is {options.num_experts}, the map of slots is of "
            f"{num_experts}"
        )
    drop: set[str] = set()
    return Tokens(
        blocks=_blocks(passes, num_experts, drop, options),
        num_experts=num_experts,
        source="SGLang recorder, per_token",
        drop=drop,
    )


def _logical_count(value: Any) -> StoredArray:
    """Counts [steps, L_all, E], or [L_all, E] of one step."""
    if isinstance(value, StoredArray) and len(value.shape) == 2:
        strides = value.strides
        return replace(
            value,
            shape=(1, *value.shape),
            strides=None if strides is None else (0, *strides),
        )
    return array_of(value, "logical_count", 3)


def _stat(arrays: list[StoredArray]) -> Iterator[NDArray[np.int64]]:
    for array in arrays:
        for step in range(array.shape[0]):
            yield counts_of(array, step, step + 1)[0]


def _summed(passes: list[Pass]) -> Iterator[NDArray[np.int64]]:
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
    passes: list[Pass], num_experts: int, drop: set[str], options: ImportOptions
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
                        f"a token has more than {top_k} experts; say `top_k`"
                    )
                places, kept = token_rows.routed(ids[:, :, :top_k])
                yield _block(
                    one, start + places, kept, token_rows.layer_ids, num_experts, first
                )
            sequences = first + max(len(one.sequence_lengths), 1)
        options.progress(len(passes) + 9 * index, len(passes) * 10)


def _top_k(one: Pass, ids_TLK: NDArray[np.int16], options: ImportOptions) -> int:
    """Experts per token: the widest row of the first tokens, unless it is given."""
    width = ids_TLK.shape[2]
    if options.top_k is not None and options.top_k > width:
        raise InvalidTraceError(
            f"import: `top_k` is {options.top_k}, but SGLang's recorder kept {width} "
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


def _is_repeat(one: Pass, seen: set[bytes]) -> bool:
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


def _logical_ids(one: Pass) -> Iterator[tuple[int, NDArray[np.int16]]]:
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


def _logical_part(one: Pass, part: Part, start: int, stop: int) -> NDArray[np.int16]:
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
    one: Pass,
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
