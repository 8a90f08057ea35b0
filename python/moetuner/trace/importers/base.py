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


def whole(numbers: NDArray[Any]) -> NDArray[Any]:
    """Floats that are all whole as integers: tools without integers write them."""
    if numbers.dtype.kind != "f" or not (numbers == np.floor(numbers)).all():
        return numbers
    return np.where(np.abs(numbers) < 1 << 31, numbers, 1 << 31).astype(np.int64)


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
