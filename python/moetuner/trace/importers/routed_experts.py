"""Routed experts that an engine returns with each request.

JSON, one response a line or pretty-printed: SGLang's ``meta_info.routed_experts`` and
``sgl_ext.routed_experts``, vLLM's ``choices[].routed_experts`` and
``prompt_routed_experts``, in the forms of `encoded_ids`. Or ``.npy`` files [tokens,
layers, top-k], one request each, as ``CompletionOutput.routed_experts`` saves; ids are
logical.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from moetuner._words import amount
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.answers import Checked, Piece, place, requests_of
from moetuner.trace.importers.base import Tokens, block_rows
from moetuner.trace.importers.json_text import json_values
from moetuner.trace.importers.loads import arrays_of
from moetuner.trace.importers.rows import TokenRows
from moetuner.trace.importers.stored import StoredArray
from moetuner.trace.model import MAX_EXPERTS, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions


def read_routed_responses(files: Sequence[Path], options: ImportOptions) -> Tokens:
    """JSON of responses of SGLang or vLLM."""
    drop: set[str] = set()
    return Tokens(
        blocks=_responses(files, drop, options),
        num_experts=options.num_experts,
        source="routed experts of requests",
        drop=drop,
    )


def read_routed_arrays(files: Sequence[Path], options: ImportOptions) -> Tokens:
    """Arrays [tokens, layers, top-k], or [tokens, top-k] of one layer; a request each.

    From ``.npy``, or the arrays in ``.pt``, ``.npz``, safetensors or a JSON list.
    """
    return Tokens(
        blocks=_arrays(files, options),
        num_experts=options.num_experts,
        source="routed experts of requests",
    )


def _block(
    rows: TokenRows,
    ids_TLK: NDArray[np.int16],
    sequence: int,
    start: int,
    prompt_tokens: int | None,
    request: int | None,
    options: ImportOptions,
) -> Trace:
    """The routed tokens of some rows as a trace, first position `start`."""
    places, ids = rows.routed(ids_TLK)
    position = start + places
    if position.size and position[-1] >= 1 << 31:
        raise InvalidTraceError(f"position {position[-1]} is beyond 2**31")
    return Trace(
        topk_ids=ids,
        num_experts=options.num_experts or MAX_EXPERTS,
        layer_ids=rows.layer_ids,
        sequence=np.full(len(ids), sequence, np.int32),
        position=position.astype(np.int32),
        phase=(
            None
            if prompt_tokens is None
            else (position >= prompt_tokens).astype(np.uint8)
        ),
        request=None if request is None else np.full(len(ids), request, np.int32),
    )


def _arrays(files: Sequence[Path], options: ImportOptions) -> Iterator[Trace]:
    token_rows, done, sequence = TokenRows(options), 0, 0
    total = sum(path.stat().st_size for path in files)
    for path in files:
        for array in arrays_of(path):
            if len(array.shape) not in (2, 3) or not math.prod(array.shape[1:]):
                raise InvalidTraceError(
                    f"{path}: routed experts must be [tokens, layers, top-k], or "
                    f"[tokens, top-k] of one layer, got {list(array.shape)}"
                )
            num_tokens, *inner = array.shape
            shape = (-1, *((1, *inner)[-2:]))
            rows = block_rows(*shape[1:])
            for start in range(0, num_tokens, rows):
                if isinstance(array, StoredArray):
                    ids = array.read(start, start + rows)
                else:
                    ids = array[start : start + rows]
                try:
                    ids = ids.reshape(shape)
                    yield _block(token_rows, ids, sequence, start, None, None, options)
                except InvalidTraceError as error:
                    raise InvalidTraceError(f"{path}: {error}") from error
                read = min(start + rows, num_tokens) * path.stat().st_size
                options.progress(done + read // num_tokens, total)
            sequence += 1
        done += path.stat().st_size


def _responses(
    files: Sequence[Path], drop: set[str], options: ImportOptions
) -> Iterator[Trace]:
    rows, checked = TokenRows(options), Checked()
    done, sequence, number, without, several = 0, 0, 0, 0, 0
    total = sum(path.stat().st_size for path in files)
    for path in files:
        for line, (length, response) in enumerate(json_values(path), start=1):
            try:
                for request in requests_of(response, options):
                    placed = place(request, checked)
                    without += not placed.pieces
                    several += len(request.answers) > 1
                    for piece in placed.pieces:
                        for start, ids in _parts(piece):
                            yield _block(
                                rows,
                                ids,
                                sequence + piece.answer,
                                start,
                                placed.prompt_tokens,
                                number,
                                options,
                            )
                    sequence += max(len(request.answers), bool(placed.pieces))
                    number += 1
            except InvalidTraceError as error:
                raise InvalidTraceError(f"{path}, line {line}: {error}") from error
            done += length
            options.progress(done, total)
    if number == without:
        raise InvalidTraceError(
            "no response has routed experts: start the server with "
            "--enable-return-routed-experts (SGLang: and ask for "
            "return_routed_experts)"
        )
    if not several:
        drop.add("request")
    if without:
        options.note(f"{amount(without, 'response')} without routed experts: left out")
    if rows.unwritten:
        options.note(
            f"{amount(rows.unwritten, 'row')} that nobody wrote (no expert, or 0 "
            f"everywhere): left out"
        )
    if checked.text:
        options.note(checked.text)


def _parts(piece: Piece) -> Iterator[tuple[int, NDArray[np.int16]]]:
    """Blocks of a piece's rows and the position where each begins."""
    rows = block_rows(*piece.ids.shape[1:])
    for start in range(0, len(piece.ids), rows):
        yield piece.start + start, piece.ids[start : start + rows]
