"""Forward passes in the dumps of SGLang's recorder, each of each rank once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import as_ids
from moetuner.trace.importers.stages import join_stages
from moetuner.trace.importers.stored import StoredArray
from moetuner.trace.model import PADDING

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_RANKS = 1 << 15


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Part:
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
class Pass:
    """One forward pass of one rank, all stages of it."""

    forward_pass_id: int
    rank: int
    gatherer: str
    parts: tuple[Part, ...]
    sequence_lengths: NDArray[np.int64]
    positions: NDArray[np.int32]
    mode: int
    inputs: bytes

    @property
    def has_ids(self) -> bool:
        """Whether tokens were recorded, not only counts."""
        return any(part.ids is not None for part in self.parts)


def joined_passes(passes: list[Pass]) -> list[Pass]:
    """Each pass of each rank (and of each half of a batch cut in two) once, in order.

    Raises
    ------
    InvalidTraceError
        When one is there twice with the same layers.
    """
    joined = []
    for (number, rank, _), same in groupby(sorted(passes, key=_identity), _identity):
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


def staged_passes(passes: list[Pass]) -> list[Pass]:
    """The same, with ranks that are stages of one pipeline as its first rank.

    Raises
    ------
    InvalidTraceError
        When stages recorded different tokens.
    """
    missing = {one.rank for one in passes}
    layers_of: dict[int, tuple[int, ...]] = {}
    for one in passes if len(missing) > 1 else ():
        if one.rank in missing:
            there = np.logical_or.reduce([part.layers() for part in one.parts])
            if there.any():
                layers_of[one.rank] = tuple(np.flatnonzero(there).tolist())
                missing.remove(one.rank)
        if not missing:
            break
    if len(set(layers_of.values())) < 2:
        return passes
    try:
        pipelines = join_stages(layers_of)
    except InvalidTraceError:
        return passes  # ranks that saw different tokens, and little of them
    first = {rank: pipeline[0] for pipeline in pipelines for rank in pipeline}
    led = [replace(one, rank=first.get(one.rank, one.rank)) for one in passes]
    staged = []
    for (number, rank, _), same in groupby(sorted(led, key=_identity), _identity):
        stages = list(same)
        if len({part.num_tokens for one in stages for part in one.parts}) > 1:
            raise InvalidTraceError(
                f"forward pass {number}: stages of the pipeline of rank {rank} "
                f"recorded different numbers of tokens"
            )
        parts = tuple(part for one in stages for part in one.parts)
        staged.append(replace(stages[0], parts=parts))
    return staged


def _identity(one: Pass) -> tuple[int, int, str]:
    return one.forward_pass_id, one.rank, one.gatherer


def array_of(value: Any, name: str, ndim: int) -> StoredArray:
    """The value, where it is a tensor of `ndim` dimensions."""
    if not isinstance(value, StoredArray) or len(value.shape) != ndim:
        shape = list(value.shape) if isinstance(value, StoredArray) else value
        raise InvalidTraceError(
            f"{name} must be a tensor of {ndim} dimensions, got {shape!r:.60}"
        )
    return value


def passes_of(content: dict[str, Any], num_bytes: int) -> list[Pass]:
    """The records of one dump; refuses what is damaged."""
    stored = array_of(
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


def _pass(record: Any, logical: NDArray[np.int16]) -> Pass:
    if not isinstance(record, dict):
        raise InvalidTraceError(f"a record must be a dict, got {record!r:.40}")
    counts, ids = record.get("global_physical_count"), record.get("topk_ids_of_layer")
    inputs = _integers(record, "input_ids")
    part = Part(
        counts=None if counts is None else array_of(counts, "global_physical_count", 2),
        ids=None if ids is None else array_of(ids, "topk_ids_of_layer", 3),
        logical=logical,
    )
    known = Pass(
        forward_pass_id=_number(record, "forward_pass_id", 2**62),
        rank=_number(record, "rank", _MAX_RANKS),
        gatherer=str(record.get("gatherer_key", "")),
        parts=(part,),
        sequence_lengths=_integers(record, "extend_seq_lens"),
        positions=_integers(record, "positions").astype(np.int32),
        mode=_number(record, "forward_mode", 2**31, default=0),
        inputs=hashlib.blake2b(inputs.tobytes()).digest(),
    )
    for name, array in (("counts", part.counts), ("ids", part.ids)):
        if array is not None and array.shape[0] != len(logical):
            raise InvalidTraceError(
                f"{name} of {amount(array.shape[0], 'layer')} beside a map of "
                f"{len(logical)}"
            )
    if part.counts is not None and part.counts.shape != logical.shape:
        raise InvalidTraceError(
            f"counts {list(part.counts.shape)} beside a map {list(logical.shape)}"
        )
    if part.ids is not None and len(known.positions) not in (0, part.num_tokens):
        raise InvalidTraceError(
            f"{amount(len(known.positions), 'position')} for "
            f"{amount(part.num_tokens, 'token')}"
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
