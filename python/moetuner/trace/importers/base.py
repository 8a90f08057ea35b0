"""What every importer takes and gives, and what several of them do.

Legend: T tokens, L recorded MoE layers, K top-k, E experts, Q groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.model import MAX_EXPERTS, PADDING, CountTrace, Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.stored import StoredArray

BLOCK_BYTES = 1 << 25
"""Ids of a block of tokens, as read; several such blocks are alive at once."""
MAX_GROUPS = 64
"""Groups that the passes of a count-only source are folded into."""
MAX_TABLE_BYTES = 1 << 30

Progress = Callable[[int, int], None]
Note = Callable[[str], None]


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What a recording may not say by itself.

    Parameters
    ----------
    model, dataset
        Names for the metadata.
    num_experts
        Routed experts E; else what the recording says, else its largest id plus one.
    num_layers
        Hidden layers of the model, dense ones included: the row length of SGLang's
        per-request ids.
    top_k
        Experts per token K, where only counts or flat lists of ids are recorded.
    layers
        The model's own numbers of its MoE layers.
    slot_experts
        Expert of each slot, int [P], by layer number: the placement that was active,
        where slots were recorded (TensorRT-LLM with a load balancer).
    progress
        Called with bytes read and bytes to read.
    note
        Called with what was assumed or left out.
    """

    model: str = ""
    dataset: str = ""
    num_experts: int | None = None
    num_layers: int | None = None
    top_k: int | None = None
    layers: tuple[int, ...] | None = None
    slot_experts: Mapping[int, NDArray[np.integer[Any]]] | None = None
    progress: Progress = _ignore
    note: Note = _ignore

    def __post_init__(self) -> None:
        limits = {
            "num_experts": MAX_EXPERTS,
            "num_layers": 1 << 16,
            "top_k": MAX_EXPERTS,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise InvalidTraceError(
                    f"import: {name} must be 1..{limit}, got {value}"
                )
        layers = self.layers
        if layers is not None and (
            not layers
            or list(layers) != sorted(set(layers))
            or layers[0] < 0
            or layers[-1] >= 1 << 16
        ):
            raise InvalidTraceError(
                f"import: layers must be increasing numbers in 0..{2**16 - 1}, got "
                f"{list(layers)[:8]}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A recording of tokens: read block by block.

    Parameters
    ----------
    blocks
        Traces of equal shape, read as they are asked for.
    num_experts
        What the recording says, or None.
    source
        Engine and kind of recording.
    drop
        Names of fields that turned out, while reading, not to be worth keeping.
    """

    blocks: Iterator[Trace]
    num_experts: int | None
    source: str
    drop: set[str] = field(default_factory=set)


class Importer(Protocol):
    """One kind of recording."""

    def __call__(
        self, files: Sequence[Path], options: ImportOptions
    ) -> Tokens | CountTrace:
        """Open the files; tokens are read later, counts at once."""
        ...  # pragma: no cover


def block_rows(num_layers: int, width: int) -> int:
    """Tokens of `num_layers` x `width` int32 ids that fit a block; at least one."""
    return max(BLOCK_BYTES // (4 * max(num_layers * width, 1)), 1)


def as_ids(ids: NDArray[Any]) -> NDArray[np.int16]:
    """Integers as expert ids; refuses what is none or would not fit."""
    if ids.dtype.kind not in "iu":
        raise InvalidTraceError(f"expert ids must be integers, got {ids.dtype}")
    if ids.size and (ids.min() < PADDING or ids.max() >= MAX_EXPERTS):
        raise InvalidTraceError(
            f"expert ids must be -1..{MAX_EXPERTS - 1}, got "
            f"{int(ids.min())}..{int(ids.max())}"
        )
    return ids.astype(np.int16)


def without_unrouted(ids: NDArray[np.int16]) -> NDArray[np.int16]:
    """A copy in which rows that nobody filled are padding.

    Engines hand out buffers of zeros; a row that lists expert 0 more than once was
    never written.
    """
    ids = np.array(ids)
    if ids.shape[2] > 1:
        ids[(ids == 0).all(axis=2)] = PADDING
    return ids


def moe_layers(ids_TLK: NDArray[np.int16], options: ImportOptions) -> NDArray[np.int32]:
    """Which of all layers route, as the option says or as the first tokens tell."""
    num_layers = ids_TLK.shape[1]
    if options.layers is not None:
        layers = np.array(options.layers, np.int32)
        if layers[-1] >= num_layers:
            raise InvalidTraceError(
                f"import: layer {layers[-1]} of --layers is beyond the {num_layers} "
                f"recorded ones"
            )
        return layers
    routed = ids_TLK.max(axis=(0, 2), initial=PADDING) > (
        PADDING if ids_TLK.shape[2] > 1 else 0
    )
    layers = np.flatnonzero(routed).astype(np.int32)
    if not layers.size:
        raise InvalidTraceError(
            "no layer of the recording routes any token; --layers says which ones do"
        )
    if layers.size < num_layers:
        dense = np.flatnonzero(~routed).tolist()
        options.note(f"layers {dense} hold no routing: taken as dense")
    return layers


def only_routed(ids_TLK: NDArray[np.int16]) -> NDArray[np.int16]:
    """The tokens that have an expert at some layer; the others are padding."""
    return np.ascontiguousarray(ids_TLK[(ids_TLK > PADDING).any(axis=(1, 2))])


def routed_tokens(
    ids_TLK: NDArray[np.int16], layers: NDArray[np.int32], num_experts: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.int16]]:
    """Tokens with an expert somewhere (bool [T]), and their ids at `layers`."""
    dense = np.ones(ids_TLK.shape[1], bool)
    dense[layers] = False
    if ids_TLK.shape[2] > 1 and (stray := (ids_TLK[:, dense] > PADDING)).any():
        layer = np.flatnonzero(dense)[np.argwhere(stray)[0][1]]
        raise InvalidTraceError(
            f"layer {layer} routes tokens, but none of the first: say with --layers "
            f"which layers have experts"
        )
    ids = ids_TLK[:, layers]
    routed: NDArray[np.bool_] = np.asarray((ids > PADDING).any(axis=(1, 2)))
    ids = np.ascontiguousarray(ids[routed])
    if num_experts is not None and ids.size and ids.max() >= num_experts:
        raise InvalidTraceError(
            f"expert id {ids.max()} is outside 0..{num_experts - 1}"
        )
    return routed, ids


def fold_counts(
    passes: Iterator[NDArray[np.int64]],
    total: int,
    source: str,
    options: ImportOptions,
) -> CountTrace:
    """Add the counts [L_all, E] of `total` passes up in at most `MAX_GROUPS` groups.

    Passes and layers without a count are left out; groups keep the order of time.

    Raises
    ------
    InvalidTraceError
        When nothing was counted, or the tables would fill the memory.
    """
    groups: NDArray[np.int64] | None = None
    for index, counts in enumerate(passes):
        if groups is None:
            num_groups = min(total, MAX_GROUPS)
            if 8 * num_groups * counts.size > MAX_TABLE_BYTES:
                raise InvalidTraceError(
                    f"counts of {list(counts.shape)} are too large a table"
                )
            groups = np.zeros((num_groups, *counts.shape), np.int64)
        if counts.size and counts.min() < 0:
            raise InvalidTraceError(f"counts must be >= 0, got {counts.min()}")
        if counts.shape != groups.shape[1:]:
            raise InvalidTraceError(
                f"counts change shape from {list(groups.shape[1:])} to "
                f"{list(counts.shape)}"
            )
        groups[index * len(groups) // max(total, 1)] += counts
    if groups is None or not groups.any():
        raise InvalidTraceError("the recording counted nothing")
    return count_trace(groups, source, options)


def count_trace(
    counts_QLE: NDArray[np.int64],
    source: str,
    options: ImportOptions,
    layer_ids: NDArray[np.int32] | None = None,
    top_k: int | None = None,
) -> CountTrace:
    """Counts per group, layer and expert as a trace; empty groups and layers go."""
    kept = counts_QLE.any(axis=(1, 2))
    routed = np.asarray(counts_QLE.any(axis=(0, 2)))
    if layer_ids is None:
        if options.layers is not None:
            if len(options.layers) not in (len(routed), int(routed.sum())):
                raise InvalidTraceError(
                    f"import: --layers names {len(options.layers)} layers, the "
                    f"counts have {len(routed)}"
                )
            layer_ids = np.array(options.layers, np.int32)
            if len(options.layers) == len(routed):
                layer_ids = layer_ids[routed]
        else:
            layer_ids = np.flatnonzero(routed).astype(np.int32)
    else:
        layer_ids = layer_ids[routed]
    counts = np.ascontiguousarray(counts_QLE[kept][:, routed])
    if not counts.size:
        raise InvalidTraceError("the recording counted nothing")
    if options.num_experts not in (None, counts.shape[2]):
        raise InvalidTraceError(
            f"import: num_experts is {options.num_experts}, the counts are of "
            f"{counts.shape[2]}"
        )
    top_k = options.top_k or top_k
    if top_k is not None and top_k > counts.shape[2]:
        raise InvalidTraceError(
            f"import: top_k is {top_k}, the counts are of {counts.shape[2]} experts"
        )
    if top_k is None:
        options.note("top-k unknown: one token per assignment; --top-k says otherwise")
        top_k = 1
    return CountTrace(
        counts=counts,
        num_tokens=counts.sum(axis=2).max(axis=1) // top_k,
        layer_ids=layer_ids,
        metadata=named(TraceMetadata(), options, source),
    )


def note_repeats(options: ImportOptions) -> None:
    """Say what is left out of a recording in which ranks saw the same tokens."""
    options.note(
        "ranks recorded the very same tokens: these count once, and no home rank is "
        "kept"
    )


def named(
    metadata: TraceMetadata, options: ImportOptions, source: str = ""
) -> TraceMetadata:
    """What a recording says of itself, under the names of the options."""
    return replace(
        metadata,
        model=options.model or metadata.model,
        source=metadata.source or source,
        dataset=options.dataset or metadata.dataset,
    )


def counts_of(array: StoredArray, start: int = 0, stop: int | None = None) -> Any:
    """Part of a stored array as int64 counts; refuses what is no count."""
    return whole_counts(array.read(start, stop))


def whole_counts(values: NDArray[Any]) -> NDArray[np.int64]:
    """Numbers as int64 counts; refuses fractions, NaN and what is below 0."""
    if values.dtype.kind not in "iuf":
        raise InvalidTraceError(f"counts must be numbers, got {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidTraceError("counts must be finite numbers")
    if values.size and (values.min() < 0 or values.max() > 2**53):
        raise InvalidTraceError(
            f"counts must be 0..2**53, got {values.min()}..{values.max()}"
        )
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        raise InvalidTraceError("counts must be whole numbers")
    return values.astype(np.int64)
