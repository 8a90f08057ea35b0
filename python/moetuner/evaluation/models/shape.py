"""Sizes of one expert and of the rows that travel to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetuner._checks import check_positive, is_number, one_of
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.models.value_type import ValueType

if TYPE_CHECKING:
    from typing import Any

MAX_SIZE = 1 << 24
"""Beyond it a width that somebody names is a mistake."""
_SIZES = (
    "hidden_size",
    "expert_hidden_size",
    "num_projections",
    "dispatch_bytes",
    "combine_bytes",
    "weight_bytes",
)
_TYPES = ("weight_type", "dispatch_type", "combine_type")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of one expert and of the rows that travel to it.

    Parameters
    ----------
    hidden_size
        Values per row H. Of a model whose experts work in a latent space, that one's:
        rows are made narrow before they travel.
    expert_hidden_size
        Inner width of one expert.
    num_projections
        Weight matrices of an expert: 3 for SwiGLU, 2 without a gate.
    dispatch_bytes, combine_bytes, weight_bytes
        Bytes per value on the way out, on the way back and in the weights, scales
        included (bf16 = 2; fp8 rows with a 32-bit scale per 128 values = 1.03125).
    weight_type, dispatch_type, combine_type
        What those values are, where it was said; `with_types` sets bytes by it.
    shared_values
        Weights of a layer's shared experts, which every token passes on its own rank,
        whatever the placement; 0 without any.
    guessed
        Whether sizes are assumed, because nobody said the model's own.

    Raises
    ------
    InvalidProblemError
        When a size is not positive, or a type has not so few or so many bytes.
    """

    hidden_size: int
    expert_hidden_size: int
    num_projections: int = 3
    dispatch_bytes: float = 2
    combine_bytes: float = 2
    weight_bytes: float = 2
    weight_type: ValueType | None = None
    dispatch_type: ValueType | None = None
    combine_type: ValueType | None = None
    shared_values: int = 0
    guessed: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_positive("ModelShape", name, getattr(self, name))
        for name in _TYPES:
            self._check_type(name, f"{name.removesuffix('_type')}_bytes")
        shared = self.shared_values
        if not is_number(shared) or not 0 <= shared < np.inf:
            raise InvalidProblemError(
                f"ModelShape: shared_values must be >= 0, got {shared!r}"
            )

    def _check_type(self, name: str, bytes_name: str) -> None:
        told: Any = getattr(self, name)
        if told is None:
            return
        kind = one_of(ValueType, told, f"ModelShape: {name}")
        object.__setattr__(self, name, kind)
        least, value_bytes = kind.bits / 8, getattr(self, bytes_name)
        if not least <= value_bytes <= 1.5 * least:
            raise InvalidProblemError(
                f"ModelShape: {bytes_name} of {kind.value} must be {least:g} and its "
                f"scales, got {value_bytes}; with_types sets both"
            )

    def with_types(
        self,
        *,
        weights: ValueType | None = None,
        rows_out: ValueType | None = None,
        rows_back: ValueType | None = None,
    ) -> ModelShape:
        """The same sizes, stored and sent in these types; None leaves one as it is."""
        changes: dict[str, Any] = {}
        if weights is not None:
            changes |= {"weight_type": weights, "weight_bytes": weights.weight_bytes()}
        for name, kind in (("dispatch", rows_out), ("combine", rows_back)):
            if kind is not None:
                row_bytes = kind.row_bytes(self.hidden_size)
                changes |= {f"{name}_type": kind, f"{name}_bytes": row_bytes}
        return replace(self, **changes)

    @property
    def expert_values(self) -> int:
        """Weights of one expert."""
        return self.num_projections * self.hidden_size * self.expert_hidden_size

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return self.expert_values * self.weight_bytes

    @property
    def dispatch_share(self) -> float:
        """Of the bytes that a row takes both ways, those on the way out."""
        return self.dispatch_bytes / (self.dispatch_bytes + self.combine_bytes)

    @property
    def flops_per_row(self) -> float:
        """Operations of one (token, expert): a multiply and an add per weight."""
        return 2.0 * self.expert_values

    def words(self) -> str:
        """For people: sizes, and what is not two bytes a value."""
        said = f"experts of {self.hidden_size} x {self.expert_hidden_size}"
        if self.guessed:
            said += " (assumed)"
        weights = _named(self.weight_type, self.weight_bytes)
        out = _named(self.dispatch_type, self.dispatch_bytes)
        back = _named(self.combine_type, self.combine_bytes)
        if weights != "bf16":
            said += f" in {weights}"
        if (out, back) != ("bf16", "bf16"):
            said += f" and rows in {out}, back in {back}"
        return said


def _named(kind: ValueType | None, value_bytes: float) -> str:
    if kind is not None:
        return kind.value
    return "bf16" if value_bytes == 2 else f"{value_bytes:g} bytes a value"


DEFAULT_SHAPE = ModelShape(hidden_size=4096, expert_hidden_size=2048, guessed=True)
"""Of a model that nobody knows the sizes of."""
