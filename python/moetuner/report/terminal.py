"""Results on standard output: tables for eyes, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moetuner.report.table import (
    LEGEND,
    batch_table,
    homes_table,
    plan_table,
    stage_table,
)
from moetuner.report.verdict import verdict

if TYPE_CHECKING:
    from moetuner.planning.plan import PlanReport


def print_plan(report: PlanReport) -> None:
    """What was planned on what, the solver's claims, the scores, the verdict."""
    print_content(
        f"planned on {report.plan_tokens:,} tokens, scored on {report.score_tokens:,} "
        f"others (split by sequence); {report.topology.num_ranks} ranks, "
        f"{report.topology.ranks_per_node} per node; "
        f"wire {report.options.cost.wire.value}, "
        f"homes {report.options.cost.homes.value}"
    )
    print_content(stage_table(report))
    print_content(plan_table(report))
    for name, reason in report.left_out.items():
        print_content(f"left out {name}: {reason}")
    print_content(LEGEND)
    names = [candidate.name for candidate in report.candidates]
    print_content(batch_table(names, [each.evaluation for each in report.candidates]))
    for domain in report.domains:
        print_content(
            f"{domain.name}: planned on {domain.plan_tokens:,} tokens too, scored on "
            f"{domain.score_tokens:,} others"
        )
        print_content(batch_table(names, [domain.evaluations[name] for name in names]))
    if report.request_homes is not None:
        print_content(homes_table({report.result.name: report.request_homes}))
    print_content(verdict(report))


def print_content(content: Any) -> None:
    """A table, or a text in one piece."""
    # Lines are folded for eyes only; a pipe gets each row whole.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(
        content, markup=False, highlight=False, soft_wrap=isinstance(content, str)
    )


def print_json(value: Any) -> None:
    """One JSON value; numbers that JSON does not know are a bug, not output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
