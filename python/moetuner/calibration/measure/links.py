"""Messages between ranks, and the communicator's own collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moetuner.calibration.measure.memory import has_memory
from moetuner.calibration.samples import (
    Collective,
    CollectiveSample,
    Direction,
    Level,
    LinkSample,
    PairSample,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moetuner.calibration.budget import Allowance
    from moetuner.calibration.measure.clock import Clock, Step
    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.placement.topology import Topology

    Pair = tuple[int | None, int | None]
    """To whom this rank sends, and from whom it receives."""

MAX_PAIRED = 16
"""Ranks whose pairs are measured one by one: there are 240 pairs."""


def link_series(topology: Topology) -> list[tuple[Level, Direction]]:
    """What there is to measure between these ranks."""
    levels = [Level.RANK] if topology.ranks_per_node > 1 else []
    levels += [Level.NODE] if topology.num_nodes > 1 else []
    return [(level, direction) for level in levels for direction in Direction]


def measure_links(
    ranks: Ranks, clock: Clock, allowance: Allowance, sizes: tuple[int, ...]
) -> Iterator[LinkSample]:
    """Messages of every size over every kind of link."""
    for num_bytes in sizes:
        wanted, what = 2 * num_bytes, f"messages of {num_bytes} bytes"
        if not has_memory(ranks, allowance, "messages", num_bytes, wanted, what):
            break
        sent = torch.zeros(num_bytes, dtype=torch.uint8, device=ranks.device)
        received = torch.empty_like(sent)
        for level, direction in link_series(ranks.topology):
            series = f"{direction.value} between {level.value}s"
            if not allowance.has_room(series, num_bytes):
                continue
            to, source = _partners(level, direction, ranks)
            step = _message(sent, received, to, source)
            timing, _ = clock.time([step], allowance.case_seconds)
            allowance.took(series, num_bytes, timing.seconds)
            allowance.took("messages", num_bytes, timing.seconds)
            yield LinkSample(
                level=level, direction=direction, num_bytes=num_bytes, timing=timing
            )


def measure_pairs(
    ranks: Ranks, clock: Clock, allowance: Allowance, num_bytes: int
) -> Iterator[PairSample]:
    """A message from each rank to each other one; all pairs, or as many as fit."""
    topology = ranks.topology
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=ranks.device)
    received = torch.empty_like(sent)
    for source, target in pairs_of(topology):
        if not allowance.has_room("pairs", num_bytes):
            break
        to = target if ranks.rank == source else None
        step = _message(sent, received, to, source if ranks.rank == target else None)
        timing, _ = clock.time([step], 0.0)
        allowance.took("pairs", num_bytes, timing.seconds)
        near = source // topology.ranks_per_node == target // topology.ranks_per_node
        yield PairSample(
            level=Level.RANK if near else Level.NODE,
            source=source,
            target=target,
            num_bytes=num_bytes,
            timing=timing,
        )


def pairs_of(topology: Topology) -> list[tuple[int, int]]:
    """Pairs of ranks to compare; none of two ranks, or of too many to try."""
    count = topology.num_ranks
    if not 2 < count <= MAX_PAIRED:
        return []
    return [(a, b) for a in range(count) for b in range(count) if a != b]


def measure_collectives(
    ranks: Ranks, clock: Clock, allowance: Allowance, sizes: tuple[int, ...]
) -> Iterator[CollectiveSample]:
    """Every collective with so many bytes for each other rank."""
    num_ranks = ranks.topology.num_ranks
    for num_bytes in sizes:
        what = f"collectives with {num_bytes} bytes for each of {num_ranks} ranks"
        wanted = 3 * num_ranks * num_bytes
        if not has_memory(ranks, allowance, "collectives", num_bytes, wanted, what):
            break
        part, whole, other = (
            torch.zeros(n * num_bytes // 4, device=ranks.device)
            for n in (1, num_ranks, num_ranks)
        )
        steps = {
            Collective.ALL_TO_ALL: _to_all(other, whole),
            Collective.ALL_GATHER: _gather(whole, part),
            Collective.REDUCE_SCATTER: _scatter(part, whole),
        }
        for collective, step in steps.items():
            if not allowance.has_room(collective.value, num_bytes):
                continue
            if not allowance.knows(collective.value) and not _works(ranks, step):
                why = f"{ranks.backend} has none on {ranks.device.type}"
                allowance.give_up(collective.value, why)
                continue
            timing, _ = clock.time([step], allowance.case_seconds)
            allowance.took(collective.value, num_bytes, timing.seconds)
            allowance.took("collectives", num_bytes, timing.seconds)
            yield CollectiveSample(
                collective=collective, num_bytes=num_bytes, timing=timing
            )


def _works(ranks: Ranks, step: Step) -> bool:
    """Whether all ranks can call it: a backend refuses what it does not have."""
    refused = 0.0
    try:
        step(None)
    except (RuntimeError, ValueError):
        refused = 1.0
    return not ranks.largest([refused])[0]


def can_send(ranks: Ranks) -> bool:
    """Whether the backend carries messages between two ranks: Gloo has none on GPUs."""
    return ranks.backend == "nccl" or not ranks.on_cuda


def _partners(level: Level, direction: Direction, ranks: Ranks) -> Pair:
    topology, rank = ranks.topology, ranks.rank
    size, num_ranks = topology.ranks_per_node, topology.num_ranks
    if direction is Direction.ALL:
        if level is Level.NODE:
            return (rank + size) % num_ranks, (rank - size) % num_ranks
        first = rank - rank % size
        return first + (rank + 1) % size, first + (rank - 1) % size
    other = 1 if level is Level.RANK else size
    both = direction is Direction.BOTH_WAYS
    if rank == 0:
        return other, other if both else None
    if rank == other:
        return 0 if both else None, 0
    return None, None


def _message(
    sent: torch.Tensor, received: torch.Tensor, to: int | None, source: int | None
) -> Step:
    def step(_: Any) -> None:
        wanted = []
        if to is not None:
            wanted.append(dist.P2POp(dist.isend, sent, to))
        if source is not None:
            wanted.append(dist.P2POp(dist.irecv, received, source))
        for work in dist.batch_isend_irecv(wanted) if wanted else ():
            work.wait()

    return step


def _to_all(out: torch.Tensor, given: torch.Tensor) -> Step:
    return lambda _: dist.all_to_all_single(out, given)


def _gather(out: torch.Tensor, given: torch.Tensor) -> Step:
    call = _newest("all_gather_single", "all_gather_into_tensor")
    return lambda _: call(out, given)


def _scatter(out: torch.Tensor, given: torch.Tensor) -> Step:
    call = _newest("reduce_scatter_single", "reduce_scatter_tensor")
    return lambda _: call(out, given)


def _newest(name: str, former: str) -> Any:
    """Torch 2.13 gave some collectives another name, and warns of the old one."""
    return getattr(dist, name, None) or getattr(dist, former)
