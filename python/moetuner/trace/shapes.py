"""What an array without a name may be, told by its shape *and* its content.

A shape alone is never enough: [500, 6, 4] may be a request's experts, loads in groups,
or loads by rank. What fits one meaning only is taken for that, anything else is refused
by name, with the ``--format`` that decides.

Legend: T tokens, L layers, K top-k, E experts, Q groups, G ranks.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import numpy as np

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_LAYERS = 256
"""More layers than any model has; more rows than that are tokens."""
MAX_TOP_K = 64
"""More experts per token than any model has."""
SAMPLE_ROWS = 512
"""Of the first axis, which are looked at."""
_LARGEST = 1e300
_PERSISTENT = 0.5  # correlation of a layer's loads from group to group


class Meaning(enum.Enum):
    """What an array may hold, with the ``--format`` that says so."""

    EXPERTS = (
        "the experts of tokens [tokens, layers, top-k], or [tokens, top-k] of a layer",
        "routed-arrays",
    )
    LOADS = "loads [layers, experts] or [groups, layers, experts]", "eplb"
    RANK_LOADS = "loads by rank [layers, ranks, experts of a rank]", "rank-loads"
    SCORES = "a router's scores [tokens, experts]", ""
    PLACEMENT = "the experts in slots [layers, slots], for import-placement", ""

    @property
    def choice(self) -> str:
        """The meaning, and how to say that it is meant."""
        text, format_ = self.value
        return f"{text} (`format` {format_})" if format_ else f"{text} (no recording)"


def judge(sample: NDArray[Any], shape: Sequence[int]) -> Meaning:
    """The one meaning that an array has.

    Parameters
    ----------
    sample
        Its first rows, at most `SAMPLE_ROWS` of them.
    shape
        Of the whole array.

    Raises
    ------
    InvalidTraceError
        When it has none, or several.
    """
    if sample.dtype.kind not in "iuf":
        raise InvalidTraceError(f"wanted numbers, got {sample.dtype}")
    what = f"an array {list(shape)} of {sample.dtype}"
    if len(shape) not in (2, 3) or 0 in shape:
        raise InvalidTraceError(
            f"{what}; wanted a request's experts [tokens, layers, top-k] or loads "
            f"[layers, experts]"
        )
    found = _flat(sample, shape) if len(shape) == 2 else _stacked(sample, shape)
    sure = len(shape) == 3 or found == [Meaning.LOADS]
    if len(found) == 1 and sure and found[0].value[1]:
        return found[0]
    if not found:
        raise InvalidTraceError(
            f"{what} is no recording that moetuner knows{_why(sample)}"
        )
    choices = ", or ".join(meaning.choice for meaning in found)
    readable = any(meaning.value[1] for meaning in found)
    advice = "say which with `format`" if readable else "record the experts instead"
    raise InvalidTraceError(f"{what} may hold {choices}: {advice}")


def _why(sample: NDArray[Any]) -> str:
    """What is wrong with the numbers, whatever they are."""
    if not np.isfinite(sample).all():
        return ": numbers must be finite"
    if sample.min() < 0:
        return f": loads must be >= 0, got {sample.min()}"
    return ""


def plausible_loads(table: NDArray[Any], what: str) -> None:
    """Refuse a table [L, E] that is none of loads, or may be something else.

    Raises
    ------
    InvalidTraceError
        Saying what it looks like.
    """
    try:
        meaning = judge(table[:SAMPLE_ROWS], table.shape)
    except InvalidTraceError as error:
        raise InvalidTraceError(f"{what}: {error}") from error
    if meaning is not Meaning.LOADS:
        raise InvalidTraceError(f"{what}: no loads, but {meaning.choice}")


def check_layers(num_layers: int) -> None:
    """Refuse more layers than any model has.

    Raises
    ------
    InvalidTraceError
        When there are; those rows are tokens.
    """
    if num_layers > MAX_LAYERS:
        raise InvalidTraceError(
            f"implausible loads: {num_layers} layers are more than any model has "
            f"({MAX_LAYERS}); rows may be tokens, but wanted [layers, experts]"
        )


def _flat(sample: NDArray[Any], shape: Sequence[int]) -> list[Meaning]:
    """Meanings of [rows, columns]."""
    loads = shape[0] <= MAX_LAYERS and _never_negative(sample)
    if loads and _names_all_experts(sample):
        return [Meaning.PLACEMENT, Meaning.LOADS]
    if loads and shape[0] > 1 and _even_layers(sample):
        return [Meaning.LOADS]  # each layer routed the same tokens
    found = [Meaning.LOADS] if loads else []
    if shape[0] > shape[1] and _distinct(sample):
        found.append(Meaning.EXPERTS)
    if _scores(sample):
        found.append(Meaning.SCORES)
    return found


def _stacked(sample: NDArray[Any], shape: Sequence[int]) -> list[Meaning]:
    """Meanings of three axes."""
    ids, positive = _distinct(sample), _never_negative(sample)
    if ids and sample.dtype.itemsize == 1:
        return [Meaning.EXPERTS]  # counts do not fit a byte
    if shape[1] > 1 and shape[1] <= MAX_LAYERS and _even_layers(sample):
        return [Meaning.LOADS]
    if ids and sample.dtype == np.uint16:
        return [Meaning.EXPERTS]  # as engines return them
    if not ids and shape[1] <= MAX_LAYERS and positive and _persistent(sample):
        return [Meaning.LOADS]
    found = [Meaning.EXPERTS] if ids else []
    if positive and shape[1] <= MAX_LAYERS:
        found.append(Meaning.LOADS)
    if positive and shape[0] <= MAX_LAYERS:
        found.append(Meaning.RANK_LOADS)
    if _scores(sample):
        found.append(Meaning.SCORES)
    return found


def _never_negative(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(values).all() and values.min() >= 0)


def _scores(values: NDArray[Any]) -> bool:
    """Whether these may be probabilities or logits: no whole number above 1."""
    if values.dtype.kind != "f" or not np.isfinite(values).all() or not values.any():
        return False
    return bool(values.max() <= 1 or values.min() < 0)


def _names_all_experts(values: NDArray[Any]) -> bool:
    """Whether each row holds every number from 0 to the largest: no loads do."""
    if (values % 1).any() or not 3 <= values.max() < values.shape[1]:
        return False
    largest = int(values.max())
    return all(np.unique(row).size == largest + 1 for row in values)


def _distinct(values: NDArray[Any]) -> bool:
    """Whether each row lists different experts, or nothing at all (zeros, -1)."""
    width = values.shape[-1]
    if width > MAX_TOP_K or not np.isfinite(values).all():
        return False
    if values.dtype.kind == "f" and (values % 1).any():
        return False
    rows = values.reshape(-1, width).astype(np.int64)
    if rows.min() < -1 or rows.max() >= 1 << 15:
        return False
    if width == 1:
        return True
    rising = np.sort(rows, axis=1)
    twice = (rising[:, 1:] == rising[:, :-1]) & (rising[:, 1:] >= 0)
    written = (rows > 0).any(axis=1)
    return bool(not (twice.any(axis=1) & written).any() and written.any())


def _even_layers(values: NDArray[Any]) -> bool:
    """Whether every layer that counted has the same total: all routed all tokens."""
    if not _never_negative(values):
        return False
    most = float(values.max(initial=0))
    scale = most if most > _LARGEST else 1.0  # sums must not overflow
    sums = (
        (values.astype(np.float64) / scale).sum(axis=-1).reshape(-1, values.shape[-2])
    )
    largest = sums.max(axis=1, keepdims=True)
    same = (np.abs(sums - largest) <= 1e-6 * largest) | (sums == 0)
    # Ones are what a router's probabilities add up to, of each token.
    counted = (sums > 0).sum(axis=1) > 1
    return bool(same.all() and counted.any() and largest.max() * scale > 1.5)


def _persistent(values: NDArray[Any]) -> bool:
    """Whether a layer's loads stay alike from one group to the next."""
    if len(values) < 2 or values.shape[2] < 4:
        return False
    table = values.astype(np.float64) / max(
        float(values.max()), 1.0
    )  # squares must not overflow
    table = table - table.mean(axis=2, keepdims=True)
    norms = np.sqrt((table * table).sum(axis=2))
    products = (table[1:] * table[:-1]).sum(axis=2)
    scale = norms[1:] * norms[:-1]
    known = scale > 0
    return bool(known.any() and (products[known] / scale[known]).mean() >= _PERSISTENT)
