"""Routed experts that an engine returns with each request.

JSON lines, one response a line: SGLang's ``meta_info.routed_experts`` (base64 of int32,
rows of all layers and top-k), vLLM's ``choices[].routed_experts`` (base64 of a ``.npy``
file [tokens, layers, top-k]). Or ``.npy`` files of that shape, one request each, as
``CompletionOutput.routed_experts`` saves; ids are logical.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.base import (
    Tokens,
    as_ids,
    block_rows,
    moe_layers,
    routed_tokens,
    without_unrouted,
)
from moetuner.trace.importers.stored import npy_header, open_npy
from moetuner.trace.model import MAX_EXPERTS, Trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions

MAX_LINE_BYTES = 1 << 29
# A list of a thousand numbers takes a Python list of them; text does not grow.
MAX_LINE_VALUES = 1 << 24
_NPY = b"\x93NUMPY"


class _Layers:
    """Which layers route, told by the first request, the same for all."""

    def __init__(self, options: ImportOptions) -> None:
        self._options = options
        self._layers: NDArray[np.int32] | None = None
        self._shape: tuple[int, ...] = ()

    def block(
        self,
        ids_TLK: NDArray[np.int16],
        sequence: int,
        start: int,
        prompt_tokens: int | None,
    ) -> Trace:
        """The routed tokens of a request as a trace, first position `start`."""
        ids_TLK = without_unrouted(ids_TLK)
        if self._layers is None:
            self._layers = moe_layers(ids_TLK, self._options)
            self._shape = ids_TLK.shape[1:]
        if ids_TLK.shape[1:] != self._shape:
            raise InvalidTraceError(
                f"responses change shape from {list(self._shape)} to "
                f"{list(ids_TLK.shape[1:])} (layers, top-k)"
            )
        kept, ids = routed_tokens(ids_TLK, self._layers, self._options.num_experts)
        position = start + np.flatnonzero(kept)
        return Trace(
            topk_ids=ids,
            num_experts=self._options.num_experts or MAX_EXPERTS,
            layer_ids=self._layers,
            sequence=np.full(len(ids), sequence, np.int32),
            position=position.astype(np.int32),
            phase=(
                None
                if prompt_tokens is None
                else (position >= prompt_tokens).astype(np.uint8)
            ),
        )


def read_routed_responses(files: Sequence[Path], options: ImportOptions) -> Tokens:
    """JSON lines of responses of SGLang or vLLM."""
    return Tokens(
        blocks=_responses(files, options),
        num_experts=options.num_experts,
        source="routed experts of requests",
    )


def read_routed_arrays(files: Sequence[Path], options: ImportOptions) -> Tokens:
    """``.npy`` files [tokens, layers, top-k], one request each."""
    return Tokens(
        blocks=_arrays(files, options),
        num_experts=options.num_experts,
        source="routed experts of requests",
    )


def _arrays(files: Sequence[Path], options: ImportOptions) -> Iterator[Trace]:
    layers, done = _Layers(options), 0
    total = sum(path.stat().st_size for path in files)
    for sequence, path in enumerate(files):
        array = open_npy(path)
        if len(array.shape) != 3 or not math.prod(array.shape[1:]):
            raise InvalidTraceError(
                f"{path}: routed experts must be [tokens, layers, top-k], got "
                f"{list(array.shape)}"
            )
        num_tokens, num_layers, top_k = array.shape
        rows = block_rows(num_layers, top_k)
        for start in range(0, num_tokens, rows):
            try:
                ids = as_ids(array.read(start, start + rows))
                yield layers.block(ids, sequence, start, None)
            except InvalidTraceError as error:
                raise InvalidTraceError(f"{path}: {error}") from error
            read = min(start + rows, num_tokens) * path.stat().st_size // num_tokens
            options.progress(done + read, total)
        done += path.stat().st_size


def _responses(files: Sequence[Path], options: ImportOptions) -> Iterator[Trace]:
    layers, done, sequence, without = _Layers(options), 0, 0, 0
    total = sum(path.stat().st_size for path in files)
    for path in files:
        for number, (line, response) in enumerate(json_lines(path), start=1):
            try:
                found = list(_routed(response))
                for encoded, prompt_tokens in found:
                    ids = _decode(encoded, options)
                    rows = block_rows(*ids.shape[1:])
                    for start in range(0, len(ids), rows):
                        yield layers.block(
                            as_ids(ids[start : start + rows]),
                            sequence,
                            start,
                            prompt_tokens,
                        )
                    sequence += 1
            except InvalidTraceError as error:
                raise InvalidTraceError(f"{path}, line {number}: {error}") from error
            without += not found
            done += line
            options.progress(done, total)
    if not sequence:
        raise InvalidTraceError(
            "no response has routed experts: start the server with "
            "--enable-return-routed-experts (SGLang: and ask for "
            "return_routed_experts)"
        )
    if without:
        options.note(f"{without} responses without routed experts: left out")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Length in bytes and value of each line that is not blank.

    Raises
    ------
    InvalidTraceError
        When a line is no JSON, or too long, or of too many values, to be unpacked.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if line.isspace():
                continue
            if len(line) > MAX_LINE_BYTES:
                raise InvalidTraceError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes"
                )
            if sum(map(line.count, (b",", b"[", b"{"))) > MAX_LINE_VALUES:
                raise InvalidTraceError(
                    f"{path}, line {number}: more than {MAX_LINE_VALUES} values"
                )
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidTraceError(
                    f"{path}, line {number}: not JSON: {error}; wanted one response, "
                    f"or one record, a line"
                ) from error
            yield len(line), value


def _routed(response: Any) -> Iterator[tuple[str, int | None]]:
    """Encoded ids and number of prompt tokens, for each answer of a response."""
    if isinstance(response, list):
        for one in response:
            if isinstance(one, list):
                raise InvalidTraceError("a response must be a JSON object, got a list")
            yield from _routed(one)
        return
    if not isinstance(response, dict):
        raise InvalidTraceError(
            f"a response must be a JSON object, got {type(response).__name__}"
        )
    usage = response.get("usage")
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    places = [response, response.get("meta_info"), response.get("sglext")]
    choices = response.get("choices")
    if isinstance(choices, list):
        places += choices
    for place in places:
        if not isinstance(place, dict) or place.get("routed_experts") is None:
            continue
        encoded = place["routed_experts"]
        if not isinstance(encoded, str):
            raise InvalidTraceError(
                f"routed_experts must be base64 text, got {type(encoded).__name__}"
            )
        count = place.get("prompt_tokens", prompt_tokens)
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 0
        yield encoded, count if whole else None


def _decode(encoded: str, options: ImportOptions) -> NDArray[Any]:
    """Ids [tokens, layers, top-k]."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidTraceError(f"routed_experts is not base64: {error}") from error
    if not data.startswith(_NPY):
        return _flat(data, options)
    stream = io.BytesIO(data)
    shape, fortran, dtype = npy_header("routed_experts", stream, len(data))
    if dtype.kind not in "iu" or len(shape) != 3 or not math.prod(shape[1:]):
        raise InvalidTraceError(
            f"routed_experts must be integers [tokens, layers, top-k], got {dtype} "
            f"{list(shape)[:8]}"
        )
    ids = np.frombuffer(data, dtype, offset=stream.tell())
    return ids.reshape(shape, order="F" if fortran else "C")


def _flat(data: bytes, options: ImportOptions) -> NDArray[np.int32]:
    if options.num_layers is None or options.top_k is None:
        raise InvalidTraceError(
            "routed_experts is a flat list of int32, as SGLang returns it: say with "
            "--num-layers (all hidden layers) and --top-k how to cut it"
        )
    width = options.num_layers * options.top_k
    if len(data) % (4 * width):
        raise InvalidTraceError(
            f"{len(data)} bytes of int32 are no whole rows of {options.num_layers} "
            f"layers x top-{options.top_k}"
        )
    shape = (-1, options.num_layers, options.top_k)
    return np.frombuffer(data, "<i4").reshape(shape)
