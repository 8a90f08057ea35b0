"""Routing of a running model, kept on its device until it is asked for.

Legend: T tokens, L layers, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moetuner.errors import InvalidTraceError
from moetuner.nn.recompute import recomputing
from moetuner.trace import Trace, TraceMetadata

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WIDE = -2  # in place of an id beyond int32: refused where ids come to the host


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """The tokens of one forward pass."""

    sequence: NDArray[np.int32]  # [T]
    position: NDArray[np.int32]  # [T]
    phase: NDArray[np.uint8]  # [T], 0 prefill, 1 decode
    kept: NDArray[np.bool_]  # [T], False: padding
    ids: dict[int, torch.Tensor]  # by layer, int16 [T, K], on the model's device
    weights: dict[int, torch.Tensor]  # by layer, float32 [T, K]


class Recorder:
    """Collects a trace step by step: `begin_step`, then `add` once for each MoE layer.

    Nothing is read from the device before `trace`: a layer costs two small copies.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._steps: list[_Step] = []

    def begin_step(
        self,
        sequence: NDArray[np.int32],
        position: NDArray[np.int32],
        phase: NDArray[np.uint8],
        kept: NDArray[np.bool_],
    ) -> None:
        """Name the tokens of a forward pass, [T] each, in the order of its rows.

        Parameters
        ----------
        sequence, position
            Which sequence a token belongs to, and its place there.
        phase
            0 prefill, 1 decode.
        kept
            False for padding, which the trace leaves out.
        """
        self._steps.append(
            _Step(
                sequence=sequence,
                position=position,
                phase=phase,
                kept=kept,
                ids={},
                weights={},
            )
        )

    def add(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> None:
        """Keep the choices [T, K] of one layer; copied, so both may be reused.

        What activation checkpointing computes again is here already.

        Raises
        ------
        InvalidTraceError
            When no step was begun, its tokens are others, or it has the layer already.
        """
        if recomputing():
            return
        if not self._steps:
            raise InvalidTraceError("Recorder: add before begin_step")
        step = self._steps[-1]
        if len(topk_ids) != len(step.sequence):
            raise InvalidTraceError(
                f"Recorder: layer {layer} routes {len(topk_ids)} tokens, the step has "
                f"{len(step.sequence)}"
            )
        if layer in step.ids:
            raise InvalidTraceError(f"Recorder: layer {layer} came twice in one step")
        ids = topk_ids.detach()
        narrow = ids.to(torch.int32)
        kept = narrow.clamp(-1, self._num_experts)  # before int16 wraps around
        step.ids[layer] = kept.masked_fill_(narrow != ids, _WIDE).to(torch.int16)
        step.weights[layer] = topk_weights.detach().to(torch.float32, copy=True)

    def drop_step(self) -> None:
        """Forget the last step, which did not end well."""
        if not self._steps:
            raise InvalidTraceError("Recorder: drop_step before begin_step")
        self._steps.pop()

    def forget(self, sequence: NDArray[np.int32], length: NDArray[np.int32]) -> None:
        """Leave out what sequences [B] had from their length [B] on: it was undone."""
        if not sequence.size:
            return
        limit = np.full(int(sequence.max()) + 1, np.iinfo(np.int32).max, np.int32)
        limit[sequence] = length
        for step in self._steps:
            mine = step.sequence < len(limit)
            step.kept[mine] &= step.position[mine] < limit[step.sequence[mine]]

    def layers(self) -> set[int]:
        """Layers that any step has."""
        return set().union(*(step.ids for step in self._steps))

    def trace(self, metadata: TraceMetadata | None = None) -> Trace:
        """What was recorded so far: each token's experts by falling weight.

        Raises
        ------
        InvalidTraceError
            When nothing was recorded, a step misses a layer that another has, or a
            token chose an id beyond int32.
        """
        steps = [step for step in self._steps if step.ids]
        if not steps:
            raise InvalidTraceError("Recorder: no layer was recorded")
        layers = sorted(steps[0].ids)
        for step in steps:
            if sorted(step.ids) != layers:
                raise InvalidTraceError(
                    f"Recorder: a step has layers {sorted(step.ids)}, the first "
                    f"{layers}"
                )
        ids = np.concatenate([_stack(step.ids, layers)[step.kept] for step in steps])
        wide = (ids == _WIDE).any(axis=(0, 2))
        if wide.any():
            raise InvalidTraceError(
                f"Recorder: layers {np.array(layers)[wide].tolist()} chose ids beyond "
                f"int32: -1 is padding"
            )
        ids[ids >= self._num_experts] = -1
        weights = np.concatenate(
            [_stack(step.weights, layers)[step.kept] for step in steps]
        )
        order = np.argsort(-weights, axis=2, kind="stable")

        def per_token(name: str) -> NDArray[np.generic]:
            return np.concatenate([getattr(step, name)[step.kept] for step in steps])

        # Batched decoding interleaves sequences; a trace has each in one piece.
        sequence, position = per_token("sequence"), per_token("position")
        place = np.lexsort((position, sequence))
        return Trace(
            topk_ids=np.take_along_axis(ids, order, axis=2)[place],
            topk_weights=np.take_along_axis(weights, order, axis=2)[place],
            num_experts=self._num_experts,
            layer_ids=np.array(layers, np.int32),
            sequence=sequence[place].astype(np.int32),
            position=position[place].astype(np.int32),
            phase=per_token("phase")[place].astype(np.uint8),
            ranked=True,
            metadata=metadata or TraceMetadata(),
        )


def _stack(by_layer: dict[int, torch.Tensor], layers: list[int]) -> NDArray[np.generic]:
    """[T, L, K] on the host."""
    found: NDArray[np.generic] = (
        torch.stack([by_layer[n] for n in layers], 1).cpu().numpy()
    )
    return found
