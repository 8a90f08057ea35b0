"""What a rank does by itself: experts on their rows, rows into order and back.

Legend: T tokens, K top-k, S slots of a rank, M rows of its experts, H hidden.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from moetuner.calibration.loads import uneven
from moetuner.calibration.measure.graphs import captured
from moetuner.calibration.measure.memory import has_memory, need_memory
from moetuner.calibration.measure.timed_layer import dtype_of, make_experts
from moetuner.calibration.samples import (
    ExpertsSample,
    LayerShape,
    PermuteSample,
    Way,
)
from moetuner.ops import permute, unpermute

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moetuner.calibration.budget import Allowance
    from moetuner.calibration.measure.clock import Clock, Step
    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.calibration.options import Sizes
    from moetuner.calibration.samples import Timing

_ROUNDS = {"cuda": 10, "cpu": 1}
"""Calls of a repetition: a GPU begins one while it works on another."""


def active_counts(num_slots: int) -> list[int]:
    """How many experts have rows: one, all, and some between."""
    return sorted({max(num_slots // divisor, 1) for divisor in (num_slots, 8, 4, 2, 1)})


def expert_cases(
    shapes: Sequence[LayerShape], sizes: Sizes, num_ranks: int
) -> list[tuple[LayerShape, int, int]]:
    """Shape, rows and active experts; few rows first."""
    return [
        (shape, each * active, active)
        for each in sizes.rows_per_expert
        for shape in shapes
        for active in active_counts(slots_of_rank(shape, num_ranks))
        if each * active <= sizes.max_rows
    ]


def slots_of_rank(shape: LayerShape, num_ranks: int) -> int:
    """S, where experts are spread evenly."""
    return -(-shape.num_experts // num_ranks)


def measure_experts(
    ranks: Ranks,
    clock: Clock,
    allowance: Allowance,
    cases: Sequence[tuple[LayerShape, int, int]],
    cold_bytes: int,
) -> Iterator[ExpertsSample]:
    """Experts of one rank on `uneven` rows: launched, and replayed on GPUs."""
    made: dict[LayerShape, _ColdExperts] = {}
    for shape, rows, active in cases:
        series = f"{active} active, {shape}"
        if not allowance.has_room(series, rows):
            continue
        if shape not in made:
            made[shape] = _ColdExperts(shape, ranks, cold_bytes)
        own = made[shape]
        inner = rows * (4 * shape.inner_size + 3 * shape.hidden_size)
        wanted = 2 * inner * shape.values.num_bytes
        what = f"{rows} rows of experts of {shape}"
        if not has_memory(ranks, allowance, series, rows, wanted, what):
            continue
        step = own.step(rows, active)
        for times, replayed in _both_ways(ranks, clock, step, allowance.case_seconds):
            slowest, *each = times
            if not replayed:
                rounds = _ROUNDS[ranks.device.type]
                allowance.took(series, rows, slowest.seconds * rounds)
            yield ExpertsSample(
                shape=shape,
                rows=rows,
                active=active,
                replayed=replayed,
                timing=slowest,
                of_ranks=tuple(each),
            )


def measure_permutes(
    ranks: Ranks,
    clock: Clock,
    allowance: Allowance,
    shapes: Sequence[LayerShape],
    tokens: Sequence[int],
) -> Iterator[PermuteSample]:
    """Rows of T tokens to all experts, and back: by this rank alone."""
    for num_tokens in tokens:
        for shape in shapes:
            rows = num_tokens * shape.top_k
            series = str(shape)
            if not allowance.has_room(series, num_tokens):
                continue
            row_bytes = shape.row_bytes
            wanted, what = 4 * rows * row_bytes, f"{rows} rows of {shape}"
            if not has_memory(ranks, allowance, series, num_tokens, wanted, what):
                continue
            for way, step in _there_and_back(ranks, shape, num_tokens).items():
                for (timing, *_), replayed in _both_ways(
                    ranks, clock, step, allowance.case_seconds / 2
                ):
                    if not replayed:
                        rounds = _ROUNDS[ranks.device.type]
                        allowance.took(series, num_tokens, timing.seconds * rounds)
                    yield PermuteSample(
                        way=way,
                        rows=rows,
                        row_bytes=row_bytes,
                        replayed=replayed,
                        timing=timing,
                    )


class _ColdExperts:
    """Experts of several layers, used in turn, so that caches do not hold them."""

    def __init__(self, shape: LayerShape, ranks: Ranks, cold_bytes: int) -> None:
        self._shape, self._device = shape, ranks.device
        self._num_slots = slots_of_rank(shape, ranks.topology.num_ranks)
        size = shape.expert_bytes
        layers = max(-(-cold_bytes // (size * self._num_slots)), 1)
        need_memory(
            ranks,
            layers * self._num_slots * size,
            f"{layers} layers of {self._num_slots} experts of {shape}",
        )
        self._layers = [
            make_experts(shape, self._num_slots, ranks.device) for _ in range(layers)
        ]

    def step(self, rows: int, active: int) -> Step:
        """A call on `rows`; each call has other experts active."""
        size = rows, self._shape.hidden_size
        x = torch.randn(size, dtype=dtype_of(self._shape), device=self._device)
        starts = range(0, self._num_slots - active + 1, active)
        offsets = [self._ends(rows, active, start) for start in starts]
        number = count()

        def run(_: Any) -> torch.Tensor:
            turn = next(number)
            layer = self._layers[turn // len(offsets) % len(self._layers)]
            out: torch.Tensor = layer(x, offsets[turn % len(offsets)])
            return out

        return run

    def _ends(self, rows: int, active: int, start: int) -> torch.Tensor:
        """int32 [S], where `active` slots from `start` on share the rows."""
        each = torch.zeros(self._num_slots, dtype=torch.int32)
        each[start : start + active] = torch.from_numpy(uneven(rows, active))
        return each.cumsum(0).to(torch.int32).to(self._device)


def _there_and_back(
    ranks: Ranks, shape: LayerShape, num_tokens: int
) -> dict[Way, Step]:
    noise = torch.rand(num_tokens, shape.num_experts, device=ranks.device)
    ids = noise.topk(shape.top_k, dim=1).indices.contiguous()
    size = num_tokens, shape.hidden_size
    x = torch.randn(size, dtype=dtype_of(shape), device=ranks.device)
    weights = torch.rand(ids.shape, device=ranks.device)
    permuted = permute(x, ids, shape.num_experts)
    return {
        Way.DISPATCH: lambda _: permute(x, ids, shape.num_experts),
        Way.COMBINE: lambda _: unpermute(permuted.rows, permuted.row_map, weights),
    }


def _both_ways(
    ranks: Ranks, clock: Clock, step: Step, seconds: float
) -> Iterator[tuple[list[Timing], bool]]:
    """Launched one by one, and on GPUs replayed from a graph of several calls.

    The slowest rank's time, then each rank's.
    """
    rounds = _ROUNDS[ranks.device.type]
    yield clock.time_ranks(step, seconds / 2, rounds), False
    replay = captured(ranks, [lambda _: step(None)] * rounds)
    if replay is not None:
        times = clock.time_ranks(replay, seconds / 2)
        yield [timing.each_of(rounds) for timing in times], True
