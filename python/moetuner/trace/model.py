"""What a routing trace is: which experts each token chose, layer by layer.

Legend: T tokens, L recorded MoE layers, K top-k, E experts, Q groups.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner._checks import is_array, is_whole, kind_of
from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_EXPERTS = 32767  # ids are int16
MAX_COUNT = 2**53  # sums stay exact, in float64 too
PADDING = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceMetadata:
    """Where a trace comes from, in words."""

    model: str = ""
    source: str = ""
    dataset: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "source", "dataset"):
            _check_text(f"TraceMetadata: {name}", getattr(self, name))
        for key, value in self.extra.items():
            _check_text("TraceMetadata: extra key", key)
            _check_text(f"TraceMetadata: extra {key!r}", value)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """The experts that each token chose, per layer; validated once, here.

    Parameters
    ----------
    topk_ids
        int16 [T, L, K], logical expert ids; -1 is padding. C-contiguous.
    num_experts
        Number of routed experts E.
    layer_ids
        int32 [L], the model's own layer numbers, strictly increasing.
    topk_weights
        float16 or float32 [T, L, K], the router's weights, or None.
    sequence, position
        int32 [T], the sequence of each token and its place in it, or None.
    home_rank
        int16 [T], the rank where the token's hidden state lives, or None.
    phase
        uint8 [T], 0 for prefill and 1 for decode, or None.
    request
        int32 [T], the request of each token, where one request has several sequences
        (answers to one prompt), or None. A split never parts a request.
    ranked
        True when each row lists its experts by falling weight, so that the
        first one is the token's strongest.
    metadata
        Model, source, dataset.

    Raises
    ------
    InvalidTraceError
        Naming the field, what was wanted and what came.
    """

    topk_ids: NDArray[np.int16]
    num_experts: int
    layer_ids: NDArray[np.int32]
    topk_weights: NDArray[np.floating[Any]] | None = None
    sequence: NDArray[np.int32] | None = None
    position: NDArray[np.int32] | None = None
    home_rank: NDArray[np.int16] | None = None
    phase: NDArray[np.uint8] | None = None
    request: NDArray[np.int32] | None = None
    ranked: bool = False
    metadata: TraceMetadata = field(default_factory=TraceMetadata)

    def __post_init__(self) -> None:
        _check_ids(self.topk_ids, self.num_experts)
        check_layer_ids(self.layer_ids, self.num_layers)
        if self.topk_weights is not None:
            _check_weights(self.topk_weights, self.topk_ids, self.ranked)
        for name, dtype in _PER_TOKEN.items():
            _check_per_token(name, getattr(self, name), dtype, self.num_tokens)
        if self.phase is not None and self.phase.size and self.phase.max() > 1:
            raise InvalidTraceError(
                f"Trace: phase must be 0 (prefill) or 1 (decode), "
                f"got {int(self.phase.max())}"
            )
        for name, array in self.arrays().items():
            view = array.view()  # the caller's own array stays writeable
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        """Number of recorded MoE layers L."""
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts per token K."""
        return int(self.topk_ids.shape[2])

    @property
    def num_sequences(self) -> int:
        """Number of distinct sequences; 0 when the trace does not tell."""
        return 0 if self.sequence is None else int(np.unique(self.sequence).size)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every array of the trace by field name, absent ones left out."""
        names = ("topk_ids", "layer_ids", "topk_weights", *_PER_TOKEN)
        return {n: a for n in names if (a := getattr(self, n)) is not None}

    def sha256(self) -> str:
        """Hash of the content (ids, layers, experts), hexadecimal.

        Equal for the same routing whatever file it was read from.
        """
        digest = hashlib.sha256(f"{self.num_experts} {self.topk_ids.shape}".encode())
        digest.update(self.layer_ids.astype("<i4").tobytes())
        digest.update(self.topk_ids.astype("<i2").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CountTrace:
    """A source that only counted: loads per group, no tokens.

    Parameters
    ----------
    counts
        int64 [Q, L, E], tokens routed to each expert in each group (a question,
        a theme, a domain).
    num_tokens
        int64 [Q], tokens of each group.
    layer_ids
        int32 [L], the model's own layer numbers.
    labels
        Name of each group; may be empty.
    metadata
        Model, source, dataset.
    tokens_known
        False when nobody said how many experts a token has: `num_tokens` then holds
        choices of experts, which are as many tokens only for top-1.
    """

    counts: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    layer_ids: NDArray[np.int32]
    labels: tuple[str, ...] = ()
    metadata: TraceMetadata = field(default_factory=TraceMetadata)
    tokens_known: bool = True

    def __post_init__(self) -> None:
        counts = self.counts
        if not is_array(counts, np.int64, 3) or 0 in counts.shape:
            raise InvalidTraceError(
                f"CountTrace: counts must be int64 [groups, layers, experts], none "
                f"of them empty, got {kind_of(counts)}"
            )
        check_layer_ids(self.layer_ids, counts.shape[1])
        tokens = self.num_tokens
        if not is_array(tokens, np.int64, 1) or tokens.shape != counts.shape[:1]:
            raise InvalidTraceError(
                f"CountTrace: num_tokens must be int64 [{counts.shape[0]}], one per "
                f"group, got {kind_of(tokens)}"
            )
        for name, array in (("counts", counts), ("num_tokens", tokens)):
            if array.min() < 0:
                raise InvalidTraceError(
                    f"CountTrace: {name} must be >= 0, got {array.min()}"
                )
            if array.sum(dtype=np.float64) > MAX_COUNT:
                raise InvalidTraceError(
                    f"CountTrace: {name} must add up to at most 2**53"
                )
        if self.labels and len(self.labels) != counts.shape[0]:
            raise InvalidTraceError(
                f"CountTrace: {len(self.labels)} labels for {counts.shape[0]} groups"
            )
        for label in self.labels:
            _check_text("CountTrace: label", label)

    @property
    def num_experts(self) -> int:
        """Number of routed experts E."""
        return int(self.counts.shape[2])

    @property
    def num_layers(self) -> int:
        """Number of recorded MoE layers L."""
        return int(self.counts.shape[1])

    @property
    def num_groups(self) -> int:
        """Number of groups Q."""
        return int(self.counts.shape[0])

    @property
    def top_k(self) -> int | None:
        """Experts per token, as the counts tell it (rounded); None if unknown."""
        if not self.tokens_known:
            return None
        per_layer = self.counts.sum(axis=2, dtype=np.int64).sum(axis=0).max()
        return round(int(per_layer) / max(int(self.num_tokens.sum()), 1))

    @property
    def missing(self) -> tuple[str, ...]:
        """Statistics that no count-only source can give."""
        return ("coactivation", "transitions")

    def sha256(self) -> str:
        """Hash of the content, hexadecimal."""
        digest = hashlib.sha256(str(self.counts.shape).encode())
        digest.update(self.counts.astype("<i8").tobytes())
        return digest.hexdigest()


_PER_TOKEN: dict[str, Any] = {
    "sequence": np.int32,
    "position": np.int32,
    "home_rank": np.int16,
    "phase": np.uint8,
    "request": np.int32,
}


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise InvalidTraceError(f"{name} must be text, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTraceError(f"{name} is not Unicode text: {error}") from error


def _check_ids(ids: NDArray[np.int16], num_experts: Any) -> None:
    if not is_whole(num_experts):
        raise InvalidTraceError(
            f"Trace: num_experts must be a whole number, got {num_experts!r}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise InvalidTraceError(
            f"Trace: num_experts must be 1..{MAX_EXPERTS}, got {num_experts}"
        )
    if not is_array(ids, np.int16, 3) or not ids.flags.c_contiguous:
        raise InvalidTraceError(
            f"Trace: topk_ids must be int16 [tokens, layers, top_k], C-contiguous, "
            f"got {kind_of(ids)}"
        )
    if ids.shape[1] == 0 or ids.shape[2] == 0:
        raise InvalidTraceError(
            f"Trace: topk_ids needs at least one layer and one expert per token, "
            f"got {list(ids.shape)}"
        )
    if not ids.size:
        return
    if ids.min() < PADDING or ids.max() >= num_experts:
        token, layer, choice = np.argwhere((ids < PADDING) | (ids >= num_experts))[0]
        raise InvalidTraceError(
            f"Trace: expert id {ids[token, layer, choice]} at token {token}, layer "
            f"column {layer} is outside 0..{num_experts - 1} (-1 is padding)"
        )
    rising = np.sort(ids, axis=2)
    twice = (rising[..., 1:] == rising[..., :-1]) & (rising[..., 1:] != PADDING)
    if twice.any():
        token, layer, choice = np.argwhere(twice)[0]
        raise InvalidTraceError(
            f"Trace: token {token} lists expert {rising[token, layer, choice]} "
            f"twice at layer column {layer}"
        )


def check_layer_ids(layer_ids: NDArray[np.int32], num_layers: int) -> None:
    """Refuse layer numbers that are not int32 [L], >= 0 and strictly increasing."""
    if not is_array(layer_ids, np.int32, 1) or len(layer_ids) != num_layers:
        raise InvalidTraceError(
            f"layer_ids must be int32 [{num_layers}], one number per layer, "
            f"got {kind_of(layer_ids)}"
        )
    if (np.diff(layer_ids) <= 0).any() or (layer_ids < 0).any():
        raise InvalidTraceError(
            f"layer_ids must be >= 0 and strictly increasing, got {layer_ids.tolist()}"
        )


def _check_weights(
    weights: NDArray[np.floating[Any]], ids: NDArray[np.int16], ranked: bool
) -> None:
    real = is_array(weights, np.float16, 3) or is_array(weights, np.float32, 3)
    if not real or weights.shape != ids.shape:
        raise InvalidTraceError(
            f"Trace: topk_weights must be float16 or float32 {list(ids.shape)} like "
            f"topk_ids, got {kind_of(weights)}"
        )
    bad = ~np.isfinite(weights) | (weights < 0)
    if bad.any():
        token, layer, choice = np.argwhere(bad)[0]
        raise InvalidTraceError(
            f"Trace: topk_weights must be finite and >= 0, got "
            f"{weights[token, layer, choice]} at token {token}, layer column {layer}"
        )
    if ranked and (weights[..., 1:] > weights[..., :-1]).any():
        raise InvalidTraceError(
            "Trace: ranked=True needs each row's weights in falling order"
        )


def _check_per_token(
    name: str, array: NDArray[Any] | None, dtype: Any, num_tokens: int
) -> None:
    if array is None:
        return
    if not is_array(array, dtype, 1) or len(array) != num_tokens:
        raise InvalidTraceError(
            f"Trace: {name} must be {np.dtype(dtype)} [{num_tokens}], one per token, "
            f"got {kind_of(array)}"
        )
    if array.size and array.min() < 0:
        raise InvalidTraceError(f"Trace: {name} must be >= 0, got {array.min()}")
