"""What the exchanges of a model counted and saw, on all ranks.

Legend: L layers, T tokens, K top-k.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from moetuner.errors import InvalidTraceError
from moetuner.evaluation.verify import ExchangeRecord
from moetuner.nn.exchange import ATTRIBUTE, Exchange, Seen
from moetuner.nn.recompute import RECOMPUTED
from moetuner.ops._collectives import group_named
from moetuner.placement.tables import fingerprint
from moetuner.trace import Trace, TraceMetadata

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def exchanges_of(model: torch.nn.Module) -> list[Exchange]:
    """The exchanges of a model in the order of their layers.

    Raises
    ------
    InvalidTraceError
        When it has none, or two of one layer.
    """
    found: list[Exchange] = []
    for module in model.modules():
        candidate = vars(module).get(ATTRIBUTE, module)
        if isinstance(candidate, Exchange):
            found.append(candidate)
    found.sort(key=lambda exchange: exchange.layer)
    layers = [exchange.layer for exchange in found]
    if not found or len(set(layers)) < len(layers):
        raise InvalidTraceError(
            f"{type(model).__name__} must have exchanges of distinct layers, got "
            f"layers {layers}: give each MoELayer its layer="
        )
    return found


def gather_counts(model: torch.nn.Module) -> ExchangeRecord:
    """What all ranks counted; **every rank of the group calls this**, all get it."""
    exchanges = exchanges_of(model)
    group = group_named(exchanges[0].group_name)
    mine = torch.stack([exchange.counters for exchange in exchanges])
    every = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(every, mine, group=group)
    return ExchangeRecord(
        counts=torch.stack(every, dim=1).cpu().numpy(),
        layer_ids=np.array([exchange.layer for exchange in exchanges], np.int32),
        placement_fingerprint=fingerprint(exchanges[0].placement),
    )


class RunRecording:
    """Ids that the exchanges of a model saw, row by row, padding too."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges = exchanges
        self._seen: list[Seen] = []  # of all layers, in the order of calls

    def trace(self) -> Trace:
        """The run on all ranks; **every rank of the group calls this**, all get it.

        ``home_rank`` is the rank that saw a token, ``sequence`` one call on one rank,
        ``position`` the row there: what `moetuner.evaluation.verify.verify` takes.

        Raises
        ------
        InvalidTraceError
            On every rank: when nothing ran, or layers of any rank saw different tokens.
        """
        group = group_named(self._exchanges[0].group_name)
        every: list[tuple[str, list[NDArray[np.int16]]]]
        every = [("", [])] * group.size()
        trouble = self._trouble()
        mine = (trouble, [] if trouble else self._steps())
        dist.all_gather_object(every, mine, group=group)
        for rank, (trouble, _) in enumerate(every):
            if trouble:
                raise InvalidTraceError(f"record_run: rank {rank}: {trouble}")
        if not any(steps for _, steps in every):
            raise InvalidTraceError("record_run: no layer ran")
        ids, step, row, home = [], [], [], []
        for rank, (_, steps) in enumerate(every):
            for number, one in enumerate(steps):
                ids.append(one)
                step.append(np.full(len(one), number * group.size() + rank))
                row.append(np.arange(len(one)))
                home.append(np.full(len(one), rank))
        return Trace(
            topk_ids=np.ascontiguousarray(np.concatenate(ids)),
            num_experts=self._exchanges[0].placement.num_experts,
            layer_ids=np.array([e.layer for e in self._exchanges], np.int32),
            sequence=np.concatenate(step).astype(np.int32),
            position=np.concatenate(row).astype(np.int32),
            home_rank=np.concatenate(home).astype(np.int16),
            metadata=TraceMetadata(source="moetuner.nn.record_run"),
        )

    def _trouble(self) -> str:
        """Why this rank's ids make no trace; empty when they do."""
        self._drop_unfinished()
        sizes = [[seen.ids.shape for seen in layer] for layer in self._by_layer()]
        if all(size == sizes[0] for size in sizes):
            return ""
        return "layers saw different tokens; record where all layers see the same"

    def _by_layer(self) -> list[list[Seen]]:
        layers = [exchange.layer for exchange in self._exchanges]
        return [[seen for seen in self._seen if seen.layer == n] for n in layers]

    def _drop_unfinished(self) -> None:
        """Leave out passes that ended before their last layer, as Ctrl-C ends them.

        They are told where layers are called in their order, once in a pass; others
        stay, and make no trace.
        """
        by_layer = self._by_layer()
        if len({len(calls) for calls in by_layer}) == 1:
            return
        layers = [exchange.layer for exchange in self._exchanges]
        passes: list[list[Seen]] = [[]]
        for seen in self._seen:
            if seen.layer == layers[0]:
                passes.append([])
            if seen.layer != layers[len(passes[-1]) % len(layers)]:
                return
            passes[-1].append(seen)
        now = {
            exchange.layer: exchange.counters.clone() for exchange in self._exchanges
        }
        for one in reversed(passes):
            for exchange, seen in zip(self._exchanges, one, strict=False):
                if len(one) < len(layers):
                    exchange.counters -= now[seen.layer] - seen.counted
                now[seen.layer] = seen.counted
        finished = [one for one in passes if len(one) == len(layers)]
        self._seen[:] = itertools.chain.from_iterable(finished)

    def _steps(self) -> list[NDArray[np.int16]]:
        """[T, L, K] of each call on this rank."""
        experts = self._exchanges[0].placement.num_experts
        steps = []
        for call in zip(*self._by_layer(), strict=True):
            ids = torch.stack([seen.ids for seen in call], dim=1).cpu().numpy()
            if (ids[:1] == RECOMPUTED).any():  # by compiled code: it was here already
                continue
            ids[(ids < 0) | (ids >= experts)] = -1  # padding
            steps.append(ids.astype(np.int16))
        return steps


@contextmanager
def record_run(model: torch.nn.Module) -> Iterator[RunRecording]:
    """Keep the ids that every exchange of `model` sees while the context lasts.

    Counters are set to zero at its beginning, so that afterwards they and the trace
    tell of the same tokens. Ids stay on the device, 4 bytes per choice.
    """
    exchanges = exchanges_of(model)
    recording = RunRecording(exchanges)
    for exchange in exchanges:
        exchange.reset()
        exchange.routing = recording._seen
    try:
        yield recording
    finally:
        for exchange in exchanges:
            exchange.routing = None
        recording._drop_unfinished()
