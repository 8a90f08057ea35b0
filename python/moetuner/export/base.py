"""What every engine's file is written from, and read into.

Legend: L MoE layers, E experts, G ranks, P slots of a layer over all ranks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidPlacementError
from moetuner.placement.model import EMPTY, Placement, Provenance
from moetuner.placement.topology import Topology

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MAX_FILE_BYTES = 1 << 28
MAX_VALUES = 1 << 24
MAX_EXPERTS = 32767


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What an engine's file needs and a placement does not say.

    Parameters
    ----------
    num_layers
        Hidden layers of the model, dense ones included; see `rows`.
    moe_layers
        Those that have experts; None takes the placement's own, or all.
    mtp_layers
        Layers of multi-token prediction, numbered after the hidden ones.
    load
        float64 or int64 [L, E], tokens per expert, for the choice of what spare slots
        repeat; see `padding`.
    expert_bytes
        Bytes of one expert's weights, to say what spare slots cost.
    pull_request
        Which of vLLM's proposed formats.
    """

    num_layers: int | None = None
    moe_layers: tuple[int, ...] | None = None
    mtp_layers: int = 0
    load: NDArray[Any] | None = None
    expert_bytes: float | None = None
    pull_request: int = 49572


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A file in an engine's format, not yet on disk.

    Parameters
    ----------
    data
        Its bytes.
    command
        Command line, or part of one, that loads it. The file stands in it as a word of
        the shell ``{path}``, within JSON in single quotes ``{json}``, or within a
        Python string in double quotes ``{string}``.
    notes
        What must be switched on for it to matter, and what it cannot say.
    fills
        Whether spare slots were filled, as engines that know no empty ones want it.
    """

    data: bytes
    command: str
    notes: tuple[str, ...]
    fills: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotMap:
    """A placement read from an engine's file, which says less than ours.

    Parameters
    ----------
    slots
        int64 [L, P], expert of each slot.
    layer_ids
        The model's layer numbers, or None where the file has none.
    num_ranks
        Ranks, or None where the file has none.
    shared
        Whether the one row is of all layers.
    """

    slots: NDArray[np.int64]
    layer_ids: NDArray[np.int32] | None = None
    num_ranks: int | None = None
    shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """What an engine's file does not say of a placement.

    Parameters
    ----------
    num_ranks
        Ranks G that the slots are shared by; vllm-ascend's file says it itself.
    ranks_per_node
        GPUs per node; None for one node.
    layers
        The model's layer numbers of the rows to keep; None keeps all rows, numbered
        from 0.
    model
        Name of the model.
    """

    num_ranks: int | None = None
    ranks_per_node: int | None = None
    layers: tuple[int, ...] | None = None
    model: str = ""


def to_placement(read: SlotMap, options: ReadOptions, source: str) -> Placement:
    """A slot map as a placement.

    A slot that repeats an expert of its own rank holds nothing that the rank lacks, and
    becomes an empty one.

    Raises
    ------
    InvalidPlacementError
        When the number of ranks is unknown, or the map is no legal placement.
    """
    num_ranks = read.num_ranks if read.num_ranks is not None else options.num_ranks
    if num_ranks is None:
        raise InvalidPlacementError(
            f"{source}: the file does not say how many ranks there are; say `num_ranks`"
        )
    if options.num_ranks not in (None, num_ranks):
        raise InvalidPlacementError(
            f"{source}: the file is for {amount(num_ranks, 'rank')}, got "
            f"{options.num_ranks}"
        )
    slots = read.slots
    if slots.ndim != 2 or 0 in slots.shape:
        raise InvalidPlacementError(
            f"{source}: wanted [layers, slots], got {list(slots.shape)}"
        )
    if slots.min() < 0 or slots.max() >= MAX_EXPERTS:
        raise InvalidPlacementError(
            f"{source}: expert ids must be 0..{MAX_EXPERTS - 1}, got "
            f"{slots.min()}..{slots.max()}"
        )
    layer_ids = np.arange(len(slots), dtype=np.int32)
    if read.layer_ids is not None:
        layer_ids = read.layer_ids
    if options.layers is not None:
        if not options.layers:
            raise InvalidPlacementError(f"{source}: no layer is asked for")
        if read.shared:
            slots = np.repeat(slots, len(options.layers), axis=0)
            layer_ids = np.arange(len(slots), dtype=np.int32)
        rows = _rows_of(options.layers, layer_ids, read.layer_ids is None, source)
        slots, layer_ids = slots[rows], np.array(options.layers, np.int32)
    if num_ranks < 1 or slots.shape[1] % num_ranks:
        raise InvalidPlacementError(
            f"{source}: {amount(slots.shape[1], 'slot')} cannot be shared equally by "
            f"{amount(num_ranks, 'rank')}"
        )
    return Placement(
        slot_experts=_without_repeats(slots, num_ranks),
        layer_ids=layer_ids,
        num_experts=int(slots.max()) + 1,
        topology=Topology(
            num_ranks=num_ranks, ranks_per_node=options.ranks_per_node or num_ranks
        ),
        provenance=Provenance(model=options.model, solver=source),
    )


def _rows_of(
    layers: tuple[int, ...],
    layer_ids: NDArray[np.int32],
    unnumbered: bool,
    source: str,
) -> list[int]:
    """Rows of the wanted layers; as many as there are rows name them in order."""
    if unnumbered and len(layers) == len(layer_ids):
        return list(range(len(layers)))
    row_of = {layer: row for row, layer in enumerate(layer_ids.tolist())}
    missing = [layer for layer in layers if layer not in row_of]
    if missing:
        raise InvalidPlacementError(
            f"{source}: no row for layers {missing[:8]}, there are {len(row_of)} rows"
        )
    return [row_of[layer] for layer in layers]


def _without_repeats(slots: NDArray[np.int64], num_ranks: int) -> NDArray[np.int32]:
    by_rank = slots.reshape(len(slots), num_ranks, -1)
    order = np.argsort(by_rank, axis=2, kind="stable")
    rising = np.take_along_axis(by_rank, order, axis=2)
    again = np.zeros(rising.shape, bool)
    again[:, :, 1:] = rising[:, :, 1:] == rising[:, :, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=2)
    return np.where(repeated, EMPTY, by_rank).reshape(slots.shape).astype(np.int32)


def read_json(path: Path) -> Any:
    """The JSON value of a file of bounded size, each key once.

    Raises
    ------
    InvalidPlacementError
        When it is not JSON, too large, or too deep.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidPlacementError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    data = path.read_bytes()
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise InvalidPlacementError(f"{path}: more than {MAX_VALUES} values")
    try:
        return json.loads(data, object_pairs_hook=_object)
    except InvalidPlacementError as error:
        raise InvalidPlacementError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidPlacementError(f"{path}: not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise InvalidPlacementError("a key is there twice")
    return content


def rows_of_ids(rows: Any, what: str) -> NDArray[np.int64]:
    """Lists of whole numbers of one length, as int64 [rows, length].

    Raises
    ------
    InvalidPlacementError
        When they are anything else.
    """
    legal = isinstance(rows, list) and all(
        isinstance(row, list)
        and len(row) == len(rows[0])
        and all(type(value) is int and -(2**31) <= value < 2**31 for value in row)
        for row in rows
    )
    if not legal or not rows:
        raise InvalidPlacementError(
            f"{what} must be lists of expert ids, all of one length"
        )
    return np.array(rows, np.int64)


def json_bytes(rows: list[str], start: str = "[", end: str = "]") -> bytes:
    """JSON with one line for each of `rows`."""
    return (start + "\n" + ",\n".join(rows) + "\n" + end + "\n").encode()
