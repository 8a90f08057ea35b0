"""One request of a server: its prompt once, and the rows of each answer to it.

Where rows lie in their sequence is told, or worked out from ``usage``: an answer of c
tokens to a prompt of p has rows for positions 0..p + c - 2, as the last token has not
run. Fewer rows are the last of those (the request asked for no more, or the prompt's
are elsewhere); more are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._words import amount, verb
from moetuner.errors import InvalidTraceError
from moetuner.trace.importers.encoded_ids import Rows, decode_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from moetuner.trace.importers.base import ImportOptions

_EXTENSIONS = ("meta_info", "sglext", "sgl_ext")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """What one request returned.

    Parameters
    ----------
    answers
        Rows of each answer, with or without those of the prompt.
    prompt
        Rows of the prompt, where they are returned by themselves.
    prompt_tokens, completion_tokens
        As ``usage`` has them, the latter of all answers together; None unless told.
    """

    answers: tuple[Rows, ...]
    prompt: Rows | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Piece:
    """Rows of one answer at consecutive positions.

    Parameters
    ----------
    answer
        Index of the answer; the prompt is part of the first.
    start
        Position of the first row.
    ids
        int16 [t, layers, top-k].
    """

    answer: int
    start: int
    ids: NDArray[np.int16]


@dataclass(kw_only=True, slots=True)
class Checked:
    """What a comparison with ``usage`` found, over all requests."""

    requests: int = 0
    rows: int = 0

    def missing(self, rows: int) -> None:
        """Count rows of one request that are not there."""
        self.requests += rows > 0
        self.rows += max(rows, 0)

    @property
    def text(self) -> str:
        """The note about it; empty when all rows are there."""
        if not self.requests:
            return ""
        return (
            f"{amount(self.requests, 'request')} {verb(self.requests, 'has', 'have')} "
            f"{amount(self.rows, 'row')} fewer than usage counts: the first ones are "
            f"taken as missing (ask for all of the prompt)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """The pieces of a request, and how long its prompt is (None if unknown)."""

    pieces: tuple[Piece, ...]
    prompt_tokens: int | None = None


def requests_of(response: Any, options: ImportOptions) -> Iterator[Request]:
    """The requests of one JSON value: a response, or a list of them.

    Answers to one prompt that come as a list of responses are one request.

    Raises
    ------
    InvalidTraceError
        When it is neither, or its rows are damaged.
    """
    if not isinstance(response, list):
        yield _request(response, options)
        return
    last: Request | None = None
    for one in response:
        if isinstance(one, list):
            raise InvalidTraceError("a response must be a JSON object, got a list")
        request = _request(one, options)
        if last is not None and _same_prompt(last, request):
            tokens = (last.completion_tokens, request.completion_tokens)
            last = replace(
                last,
                answers=last.answers + request.answers,
                completion_tokens=None if None in tokens else sum(filter(None, tokens)),
            )
            continue
        if last is not None:
            yield last
        last = request
    if last is not None:
        yield last


def place(request: Request, checked: Checked) -> Placed:
    """Where the rows of a request lie, those of the prompt once.

    Raises
    ------
    InvalidTraceError
        When there are more rows than ``usage`` counts.
    """
    answers, prompt = request.answers, request.prompt
    length = request.prompt_tokens
    if length is None and prompt is not None:
        length = (prompt.start or 0) + len(prompt.ids)
    starts = _starts(request, length, checked)
    if length is None and len(answers) > 1:
        length = _common_rows(answers) if not any(starts) else None
    pieces = []
    if prompt is not None and len(prompt.ids):
        first = _prompt_start(prompt, length or 0, checked)
        pieces.append(Piece(answer=0, start=first, ids=prompt.ids))
    for number, (rows, start) in enumerate(zip(answers, starts, strict=True)):
        again = bool(pieces) and length is not None
        skip = max(length - start, 0) if again and length is not None else 0
        if len(rows.ids) > skip:
            pieces.append(Piece(answer=number, start=start + skip, ids=rows.ids[skip:]))
    return Placed(pieces=tuple(pieces), prompt_tokens=length)


def _request(response: Any, options: ImportOptions) -> Request:
    if not isinstance(response, dict):
        raise InvalidTraceError(
            f"a response must be a JSON object, got {type(response).__name__}"
        )
    usage: Any = response.get("usage")
    choices = response.get("choices", response.get("outputs"))
    answers = choices if isinstance(choices, list) else []
    answers = [answer for answer in answers if isinstance(answer, dict)]
    found = [rows for answer in answers for rows in _rows_of(answer, options)]
    if not found:
        found = list(_rows_of(response, options))[:1]
    whole = [response, *(response.get(name) for name in _EXTENSIONS)]
    inside = [one.get(name) for one in answers for name in _EXTENSIONS]
    prompt = _first([*whole, *answers, *inside], "prompt_routed_experts")
    told = [*whole, usage, *inside]
    return Request(
        answers=tuple(found),
        prompt=None if prompt is None else decode_rows(prompt, options),
        prompt_tokens=_count(told, "prompt_tokens", _length(response)),
        completion_tokens=_count(told, "completion_tokens"),
    )


def _length(response: dict[str, Any]) -> int | None:
    """Tokens of a prompt whose ids are there (vLLM's own output objects)."""
    ids = response.get("prompt_token_ids")
    return len(ids) if isinstance(ids, list) and ids else None


def _rows_of(place: dict[str, Any], options: ImportOptions) -> Iterator[Rows]:
    """The rows that a response or a choice holds; at most one answer's."""
    inside = [place, *(place.get(name) for name in _EXTENSIONS)]
    for name in ("routed_experts", "completion_routed_experts"):
        value = _first(inside, name)
        if value is not None:
            yield decode_rows(value, options)
            return


def _first(places: list[Any], name: str) -> Any:
    for place in places:
        if isinstance(place, dict) and place.get(name) is not None:
            return place[name]
    return None


def _count(places: list[Any], name: str, default: int | None = None) -> int | None:
    value = _first(places, name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 1 << 31 else default


def _same_prompt(one: Request, other: Request) -> bool:
    length = one.prompt_tokens
    if not length or other.prompt_tokens != length or not other.answers:
        return False
    if not one.answers or one.prompt is not None or other.prompt is not None:
        return False
    first, second = one.answers[0].ids, other.answers[0].ids
    return (
        min(len(first), len(second)) >= length
        and first.shape[1:] == second.shape[1:]
        and np.array_equal(first[:length], second[:length])
    )


def _common_rows(answers: tuple[Rows, ...]) -> int:
    """Rows that all answers begin with: the prompt, where nobody says its length."""
    first = answers[0].ids
    common = min(len(rows.ids) for rows in answers)
    for rows in answers[1:]:
        if rows.ids.shape[1:] != first.shape[1:]:
            return 0
        same = (rows.ids[:common] == first[:common]).all(axis=(1, 2))
        common = common if same.all() else int(np.argmin(same))
    return common


def _prompt_start(prompt: Rows, length: int, checked: Checked) -> int:
    """Position of the first row of a prompt's own rows."""
    if prompt.start is not None:
        return prompt.start
    if len(prompt.ids) > length:
        raise InvalidTraceError(
            f"{amount(len(prompt.ids), 'row')} of a prompt of "
            f"{amount(length, 'token')}, as usage counts "
            f"them"
        )
    checked.missing(length - len(prompt.ids))
    return length - len(prompt.ids)


def _starts(request: Request, length: int | None, checked: Checked) -> list[int]:
    """Position of the first row of each answer."""
    wanted = _rows_wanted(request, length)
    starts = []
    for rows in request.answers:
        if rows.start is not None:
            starts.append(rows.start)
        elif request.prompt is not None:
            starts.append(0 if _is_whole(rows, request, wanted) else length or 0)
        else:
            starts.append(_start_by_usage(rows, request, length, wanted, checked))
    return starts


def _rows_wanted(request: Request, length: int | None) -> int | None:
    """Rows of all answers when each has those of the prompt; None if nobody knows."""
    if length is None or request.completion_tokens is None:
        return None
    return len(request.answers) * (length - 1) + request.completion_tokens


def _is_whole(rows: Rows, request: Request, wanted: int | None) -> bool:
    """Whether rows that come beside the prompt's hold those once more."""
    assert request.prompt is not None
    prompt = request.prompt.ids
    if not len(prompt) or len(rows.ids) < len(prompt):
        return False
    if wanted is not None and len(request.answers) == 1:
        return len(rows.ids) >= wanted
    return rows.ids.shape[1:] == prompt.shape[1:] and np.array_equal(
        rows.ids[: len(prompt)], prompt
    )


def _start_by_usage(
    rows: Rows,
    request: Request,
    length: int | None,
    wanted: int | None,
    checked: Checked,
) -> int:
    if wanted is None or length is None:
        return 0
    number, there = len(request.answers), sum(len(a.ids) for a in request.answers)
    if there > wanted + number:
        raise InvalidTraceError(
            f"{amount(there, 'row')} of routed experts, but usage counts "
            f"{amount(length, 'token')} of the prompt "
            f"and {request.completion_tokens} of {amount(number, 'answer')}: wanted "
            f"{amount(wanted, 'row')}"
        )
    if wanted <= there or len(rows.ids) == length:  # all of them, or the prompt alone
        return 0
    if number > 1:  # with or without the prompt; how long each is, nobody says
        return length if there <= wanted - number * length + number else 0
    checked.missing(wanted - there)
    return wanted - there
