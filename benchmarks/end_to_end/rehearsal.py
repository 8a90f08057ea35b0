"""Every variant once: outputs must agree, and counters must be as predicted."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
import numpy as np
import told
import torch
from feeds import Replayed
from moetuner.nn import gather_counts, record_run
from variants import OURS, PER_EXPERT

if TYPE_CHECKING:
    from bench import Bench, Step
    from moetuner.trace import Trace
    from stacks import Stack

SAME = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of the norm of the logits: variants add up in other orders."""


@dataclass(kw_only=True)
class Rehearsed:
    """What came of one variant."""

    how: str
    counted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rows and bytes of the first step of each phase."""
    traces: dict[str, Trace] = field(default_factory=dict)
    """Routing of these steps."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    """Logits of each step; kept of the first variant alone."""
    difference: float = 0.0
    """Of the logits to the first variant's, of their norm."""


def rehearse(bench: Bench) -> list[Rehearsed]:
    """Run all, and end the program where something is not as it must be."""
    found: list[Rehearsed] = []
    for stack in bench.stacks:
        stack.install(bench.source)
        one = Rehearsed(how=stack.describe())
        for step in bench.steps(stack, 0):
            if step.phase in one.counted:
                with step.given():
                    one.outputs.append(step.run().float())
            else:
                _count(bench, stack, step, one)
        found.append(one)
        one.difference = _difference(bench, one, found[0])
        _check_same(bench, stack, one.difference)
        if one is not found[0]:
            one.outputs.clear()  # logits are many
    return found


def _count(bench: Bench, stack: Stack, step: Step, into: Rehearsed) -> None:
    """Run a step, looking at counters and links before and after."""
    stack.count(True)
    # Tokens that follow are not at home, and baselines are not recorded.
    recorded = bench.routes_itself and stack.variant.exchange == OURS
    with step.given(), record_run(bench.decoder) if recorded else nullcontext() as run:
        bench.place.settle()
        before = bench.place.sent_bytes()
        bench.place.settle()
        into.outputs.append(step.run().float())
        bench.place.settle()
        after = bench.place.sent_bytes()
    stack.count(False)
    trace = run.trace() if run else _replayed(bench, step)
    counts = gather_counts(bench.decoder).counts
    seen, rows = told.rows(stack.variant, stack.placement.topology, counts)
    if trace is not None:
        said = told.traffic(stack.variant, stack.placement, trace)
        if not np.array_equal(seen, np.rint(said)):
            raise SystemExit(f"{stack.variant.name}: rows are not those predicted")
        into.traces[step.phase] = trace
    into.counted[step.phase] = asdict(rows) | {
        "node_bytes": _payload(bench, stack, rows),
        "link_bytes": max(bench.place.gather(after - before)),
    }


def _replayed(bench: Bench, step: Step) -> Trace | None:
    if not isinstance(bench.feed, Replayed):
        return None
    return bench.feed.batches.as_trace([bench.feed.ids(0, step.number)])


def _payload(bench: Bench, stack: Stack, rows: told.Rows) -> int | None:
    """Bytes out of a node, mean over nodes; None where a collective has its own ways.

    What goes out comes back; with ours slots and weights ride along on the way out.
    """
    kind, family = stack.variant.exchange, bench.case.family
    if kind not in (OURS, PER_EXPERT):
        return None
    row = family.hidden * bench.like.element_size()
    along = 8 * family.top_k if kind == OURS else 0
    total = rows.out_of_nodes * (2 * row + along)
    return round(total / stack.placement.topology.num_nodes)


def _difference(bench: Bench, one: Rehearsed, first: Rehearsed) -> float:
    mine = max(
        float((own - other).norm() / other.norm())
        for own, other in zip(one.outputs, first.outputs, strict=True)
    )
    return max(bench.place.gather(mine))


def _check_same(bench: Bench, stack: Stack, difference: float) -> None:
    # In few bits a router may choose another expert for the sake of a last digit.
    if bench.routes_itself and bench.like.dtype != torch.float32:
        return
    if not difference < SAME[bench.like.dtype]:
        raise SystemExit(f"{stack.variant.name}: logits differ by {difference:.2g}")
