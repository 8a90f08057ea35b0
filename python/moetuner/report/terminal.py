"""Results on standard output: tables for eyes, JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from moetuner._words import amount
from moetuner.report.table import (
    LEGEND,
    batch_table,
    score_table,
    stage_table,
)
from moetuner.report.verdict import verdict
from moetuner.report.words import left_out, unit_of

if TYPE_CHECKING:
    from moetuner.planning.scores import Comparison


def print_comparison(report: Comparison) -> None:
    """What was planned on what, the solver's claims, the scores, the verdict."""
    unit = unit_of(report)
    scored = f"scored on {report.score_tokens:,} others (split by sequence)"
    if report.in_sample:
        scored = "scored on the same: nothing was held out"
    replicas = any(each.placement.has_replicas for each in report.candidates)
    rule = f", replica rule {report.cost.replica_rule.value}" if replicas else ""
    print_sentences(
        f"planned on {report.plan_tokens:,} {unit}, {scored}; "
        f"{amount(report.topology.num_ranks, 'rank')}, "
        f"{report.topology.ranks_per_node} per node; "
        f"wire {report.cost.wire.value}, "
        f"homes {report.cost.homes.value}{rule}"
    )
    if report.result.solution is not None:
        print_content(stage_table(report.result.name, report.result.solution))
    print_content(score_table(report))
    print_left_out(report)
    print_sentences(LEGEND)
    for each in (report, *report.others):
        if each is not report:
            print_sentences(
                f"{each.name}: planned on {each.plan_tokens:,} {unit} too, scored on "
                f"{each.score_tokens:,} others"
            )
        names = [scored.name for scored in each.candidates]
        print_content(batch_table(names, [s.evaluation for s in each.candidates]))
    print_sentences(verdict(report))


def print_left_out(report: Comparison) -> None:
    """Baselines that are missing, by the reason that they share."""
    for names, reason in left_out(report):
        print_sentences(f"left out {names}: {reason}")


def print_content(content: Any) -> None:
    """A table, or a line in one piece: paths can be copied from it."""
    _print(content, whole=isinstance(content, str))


def print_sentences(text: str) -> None:
    """A text, wrapped between words at the width of a terminal."""
    _print(text, whole=not sys.stdout.isatty())


def _print(content: Any, *, whole: bool) -> None:
    # Lines are folded for eyes only; a pipe gets each row whole.
    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(content, markup=False, highlight=False, soft_wrap=whole)


def print_json(value: Any) -> None:
    """One JSON value; numbers that JSON does not know are a bug, not output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
