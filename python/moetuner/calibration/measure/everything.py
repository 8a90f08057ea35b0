"""All parts of a calibration, one after another, within their time."""

from __future__ import annotations

import os
import time
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from moetuner.calibration.budget import SHARES, Allowance, Part
from moetuner.calibration.machine import Machine, cpu_name, driver_version
from moetuner.calibration.measure.clock import Clock
from moetuner.calibration.measure.layers import cases_of, measure_layers, path_of
from moetuner.calibration.measure.links import (
    can_send,
    link_series,
    measure_collectives,
    measure_links,
    measure_pairs,
)
from moetuner.calibration.measure.local import (
    expert_cases,
    measure_experts,
    measure_permutes,
)
from moetuner.calibration.measure.ranks import num_cores
from moetuner.calibration.options import SIZES
from moetuner.calibration.samples import (
    Collective,
    LayerSample,
    LinkSample,
    Measurements,
    PairSample,
)
from moetuner.ops import describe_transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moetuner.calibration.measure.ranks import Ranks
    from moetuner.calibration.options import CalibrationOptions

    Say = Callable[[str], None]
    Measure = Callable[[Clock, Allowance], Iterator[Any]]


def measure(ranks: Ranks, options: CalibrationOptions, say: Say) -> Measurements:
    """Measure everything; **every rank of the group calls this**, all get the same.

    Parameters
    ----------
    ranks
        Of `join`, or of `ranks_of` where a group exists already.
    options
        The same on all ranks.
    say
        Is told what is measured next.

    Raises
    ------
    CalibrationError
        On every rank that is still there: too little memory on one, or one is gone.
    """
    kind = ranks.device.type
    sizes, shapes = SIZES[kind], options.shapes_on(kind)
    topology = ranks.topology
    cases = cases_of(shapes, sizes.tokens, topology, mapped=ranks.on_cuda)
    experts = expert_cases(shapes, sizes, topology.num_ranks)
    series, messages = link_series(topology), sizes.messages
    parts: dict[Part, tuple[int, Measure]] = {}
    if series and can_send(ranks):
        parts[Part.LINKS] = (
            len(series) * len(messages),
            lambda clock, own: chain(
                measure_links(ranks, clock, own, messages),
                measure_pairs(ranks, clock, own, messages[len(messages) // 2]),
            ),
        )
    if topology.num_ranks > 1:
        parts[Part.COLLECTIVES] = (
            len(Collective) * len(messages),
            lambda clock, own: measure_collectives(ranks, clock, own, messages),
        )
    parts[Part.EXCHANGE] = (
        len(cases),
        lambda clock, own: measure_layers(ranks, clock, own, cases, options.seed),
    )
    parts[Part.EXPERTS] = (
        len(experts),
        lambda clock, own: measure_experts(
            ranks, clock, own, experts, sizes.cold_bytes
        ),
    )
    parts[Part.PERMUTE] = (
        len(shapes) * len(sizes.tokens) * 2,
        lambda clock, own: measure_permutes(ranks, clock, own, shapes, sizes.tokens),
    )
    begin, found, notes = time.monotonic(), {}, []
    if series and not can_send(ranks):
        notes.append(f"links: {ranks.backend} sends no messages between GPUs")
    with torch.no_grad():
        for part, (num_cases, run) in parts.items():
            share = SHARES[part] / sum(SHARES[each] for each in parts)
            own = Allowance(
                seconds=options.seconds * share,
                num_cases=num_cases,
                clock=Clock(ranks).elapsed,
            )
            say(f"{part.value}: {num_cases} cases in about {own.seconds:.1f} s")
            found[part] = tuple(run(Clock(ranks), own))
            notes += [
                f"{part.value}: {name}: {what}" for name, what in own.left_out.items()
            ]
            if ranks.on_cuda:
                torch.cuda.empty_cache()
    exchange, links = found[Part.EXCHANGE], found.get(Part.LINKS, ())
    return Measurements(
        machine=machine_of(ranks),
        topology=topology,
        links=tuple(s for s in links if isinstance(s, LinkSample)),
        pairs=tuple(s for s in links if isinstance(s, PairSample)),
        collectives=found.get(Part.COLLECTIVES, ()),
        exchanges=tuple(s for s in exchange if not isinstance(s, LayerSample)),
        layers=tuple(s for s in exchange if isinstance(s, LayerSample)),
        experts=found[Part.EXPERTS],
        permutes=found[Part.PERMUTE],
        seconds=ranks.largest([time.monotonic() - begin])[0],
        notes=tuple(notes),
    )


def machine_of(ranks: Ranks) -> Machine:
    """What rank 0 sees."""
    cuda, cpu, path = ranks.on_cuda, cpu_name(), path_of(ranks)
    inside = path.group_name if path.nodes is None else path.nodes.inside
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.topology.ranks_per_node))
    return Machine(
        device=torch.cuda.get_device_name() if cuda else cpu,
        num_devices=min(torch.cuda.device_count(), local) if cuda else 0,
        num_ranks=ranks.topology.num_ranks,
        cpu=cpu,
        num_cores=num_cores(),
        backend=ranks.backend,
        transport=describe_transport(inside) if cuda else "gloo",
        torch=str(torch.__version__),
        cuda=str(torch.version.cuda) if cuda else "",
        nccl=_nccl_version() if ranks.backend == "nccl" else "",
        driver=driver_version() if cuda else "",
    )


def _nccl_version() -> str:
    found: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call,unused-ignore]
    return ".".join(map(str, found))
