"""Which sequence a token of a call belongs to, and its place there.

A cache is a conversation: its length says what the model has read, and which drafts
were rejected; its first keys say which row goes on as which, as beams exchange theirs.
Legend: B rows of a batch, N slots of a cache, S tokens of a call in each row.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAST = 64  # slots by which rows are told apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The tokens of a call, [B, S] each."""

    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    kept: NDArray[np.bool_]
    """False: padding."""
    decode: bool


@dataclass(kw_only=True, slots=True)
class _Conversation:
    """What a cache holds."""

    sequences: NDArray[np.int32]  # [B]
    kept: NDArray[np.bool_]  # [B, N], False: padding, or from before the recording
    rows: _Rows | None = None


class Sequences:
    """Names the tokens of one call after the other.

    `begin` and `finish` stand around a call. Between them and later, `rejected` are
    tokens that a cache has dropped since.
    """

    def __init__(self) -> None:
        self._next = 0
        self._known: dict[int, tuple[weakref.ref[Any], _Conversation]] = {}
        self.last: Any = None
        """The cache of the last call: held, so that its last length can be read."""
        self._said: set[str] = set()
        self.rejected: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        """Sequences [B], and the number of tokens [B] of each that stays."""

    def begin(
        self, cache: Any, shape: tuple[int, int], mask: torch.Tensor | None
    ) -> tuple[Tokens, _Conversation]:
        """Tokens of a call, and what it makes of its conversation, for `finish`."""
        batch, length = shape
        self.settle(cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        talk = self._continue(cache, past, batch) if past else None
        if talk is None:
            talk = _Conversation(
                sequences=self._new(batch), kept=np.zeros((batch, past), bool)
            )
        kept = np.ones((batch, length), bool)
        if mask is not None and mask.dim() == 2:
            kept = mask[:, -length:].bool().cpu().numpy()
        before = talk.kept.sum(axis=1, keepdims=True)
        tokens = Tokens(
            sequence=np.repeat(talk.sequences[:, None], length, axis=1),
            position=(before + np.cumsum(kept, axis=1) - 1).astype(np.int32),
            kept=kept,
            decode=past > 0 and length == 1,
        )
        whole = np.concatenate([talk.kept, kept], axis=1)
        return tokens, _Conversation(sequences=talk.sequences, kept=whole)

    def finish(self, cache: Any, talk: _Conversation) -> None:
        """The call ended well; `cache` is what it leaves behind."""
        if cache is None:
            return
        talk.rows = _Rows.of(cache, talk.kept.shape[1])
        gone = [key for key, (alive, _) in self._known.items() if alive() is None]
        for key in gone:
            del self._known[key]
        self._known[id(cache)] = weakref.ref(cache), talk
        self.last = cache

    def settle(self, cache: Any = None) -> None:
        """See what the last cache has dropped; let go of it unless it goes on."""
        if self.last is not None:
            self._cut(self._known[id(self.last)][1], int(self.last.get_seq_length()))
        if self.last is not cache:
            self.last = None

    def _continue(self, cache: Any, past: int, batch: int) -> _Conversation | None:
        """The conversation of the cache, as this call finds it."""
        alive, talk = self._known.get(id(cache), (None, None))
        if alive is None or talk is None or alive() is not cache:
            self._say("a cache came from before the recording")
            return None
        if past > talk.kept.shape[1]:
            self._say("a cache has grown outside the recorded calls")
            return None
        if past < talk.kept.shape[1]:
            self._cut(talk, past)
        elif talk.rows is not None:
            came_from = talk.rows.now(cache, past)
            if came_from is not None:
                talk = self._follow(talk, came_from)
        if len(talk.sequences) != batch:
            self._say(f"a cache for {len(talk.sequences)} rows met {batch}")
            return None
        return talk

    def _cut(self, talk: _Conversation, past: int) -> None:
        if past >= talk.kept.shape[1]:
            return
        talk.kept, talk.rows = talk.kept[:, :past], None
        stays = talk.kept.sum(axis=1).astype(np.int32)
        self.rejected.append((talk.sequences, stays))

    def _follow(
        self, talk: _Conversation, came_from: NDArray[np.int64]
    ) -> _Conversation:
        """Rows that were exchanged; where one goes on as two, the second is new."""
        if (came_from < 0).any():
            self._say("rows of a cache were replaced by others")
        sequences = talk.sequences[came_from]
        kept = talk.kept[came_from]
        kept[came_from < 0] = False
        first = np.zeros(len(came_from), bool)
        first[np.unique(came_from, return_index=True)[1]] = True
        new = ~first | (came_from < 0)
        sequences[new] = self._new(int(new.sum()))
        return _Conversation(sequences=sequences, kept=kept)

    def _new(self, count: int) -> NDArray[np.int32]:
        first, self._next = self._next, self._next + count
        return np.arange(first, self._next, dtype=np.int32)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(
                f"record: {what}: what follows is recorded as new sequences, which "
                f"begin there",
                stacklevel=2,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """By what the rows of a cache are known again."""

    tensor: weakref.ref[torch.Tensor]
    values: torch.Tensor  # [B, at most 64] of the last keys

    @classmethod
    def of(cls, cache: Any, filled: int) -> _Rows | None:
        keys = _keys(cache)
        if keys is None:
            return None
        return cls(tensor=weakref.ref(keys), values=_last(keys, filled).clone())

    def now(self, cache: Any, filled: int) -> NDArray[np.int64] | None:
        """Which row each one was, int64 [B]; -1: none. None: nobody moved them."""
        keys = _keys(cache)
        if keys is None or keys is self.tensor():
            return None
        now = _last(keys, filled).to(self.values.device)
        same = (now[:, None] == self.values[None]).all(dim=2).cpu().numpy()
        own = np.eye(*same.shape, dtype=np.bool_) & same  # of equal rows: its own
        found = np.where(own.any(axis=1), own.argmax(axis=1), same.argmax(axis=1))
        found = np.where(same.any(axis=1), found, -1)
        unmoved = same.shape[0] == same.shape[1] and own.any(axis=1).all()
        return None if unmoved else found


def _keys(cache: Any) -> torch.Tensor | None:
    """[B, heads, N, values] of the first layer that keeps all of them."""
    for layer in getattr(cache, "layers", ()):
        keys = getattr(layer, "keys", None)
        if getattr(layer, "is_sliding", False) or not torch.is_tensor(keys):
            continue
        if keys.dim() == 4 and keys.numel():
            return keys
    return None


def _last(keys: torch.Tensor, filled: int) -> torch.Tensor:
    return keys[:, 0, :filled, 0][:, -_LAST:].detach()
