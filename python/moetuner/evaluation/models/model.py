"""A model as its config.json describes it, beside a recording of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.evaluation.models.shape import ModelShape
    from moetuner.trace import CountTrace, Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A Mixture-of-Experts model: sizes of its experts, and where they are.

    Parameters
    ----------
    name
        As it was asked for.
    shape
        Sizes; the weights' type and bytes are those of the published checkpoint.
    num_experts, top_k
        Routed experts of a layer, and how many of them a token has; None where models
        of that name differ.
    num_layers
        Hidden layers, or None where models of that name differ.
    moe_layers
        The layers with experts; empty where models of that name differ.
    num_mtp_layers
        Layers of multi-token prediction behind them, which have experts too.
    source
        Whose config.json this is.
    """

    name: str
    shape: ModelShape
    num_experts: int | None
    top_k: int | None
    num_layers: int | None
    moe_layers: tuple[int, ...]
    num_mtp_layers: int = 0
    source: str = ""

    def check_experts(self, trace: Trace | CountTrace) -> None:
        """Refuse a recording of another number of experts.

        Raises
        ------
        InvalidTraceError
            When there are more or fewer.
        """
        if self.num_experts in (None, trace.num_experts):
            return
        raise InvalidTraceError(
            f"{self.name} has {self.num_experts} routed experts a layer, the recording "
            f"{trace.num_experts}: it is of another model; or it does not say how many "
            f"there are (import it again with `num_experts`), or shared experts were "
            f"recorded among the routed ones"
        )

    def differences(self, trace: Trace | CountTrace) -> tuple[str, ...]:
        """What else of a recording is not as in this model, in words."""
        found = []
        top_k = trace.top_k
        if top_k is not None and self.top_k not in (None, top_k):
            found.append(
                f"a token of the recording has {top_k} experts, one of {self.name} "
                f"{self.top_k}"
            )
        layers = self._layer_difference(trace.layer_ids.tolist())
        return (*found, layers) if layers else tuple(found)

    def _layer_difference(self, recorded: list[int]) -> str:
        if not self.moe_layers or self.num_layers is None:
            return ""
        own = set(self.moe_layers)
        behind = range(self.num_layers, self.num_layers + self.num_mtp_layers)
        strange = [each for each in recorded if each not in own and each not in behind]
        if strange and len(recorded) == len(own):
            return (
                f"the recording numbers its layers {spans(recorded)}, {self.name} has "
                f"its experts in {spans(self.moe_layers)}: exports need these numbers "
                f"(moetuner import `layers`)"
            )
        if strange:
            return (
                f"layers {spans(strange)} of the recording have no experts in "
                f"{self.name}, which has them in {spans(self.moe_layers)}"
            )
        if len(own & set(recorded)) < len(own):
            return (
                f"{len(own & set(recorded))} of the {len(own)} layers with experts of "
                f"{self.name} were recorded: times are of those"
            )
        return ""


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers as 3-60, or 1,3,5."""
    ends = np.flatnonzero(np.diff(numbers) != 1).tolist()
    firsts, lasts = [0, *(end + 1 for end in ends)], [*ends, len(numbers) - 1]
    parts = [
        f"{numbers[first]}" if first == last else f"{numbers[first]}-{numbers[last]}"
        for first, last in zip(firsts, lasts, strict=True)
    ]
    return ",".join(parts if len(parts) < 9 else [*parts[:8], "..."])
