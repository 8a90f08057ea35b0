"""Markdown tables of result files.

python benchmarks/end_to_end/table.py FILE.json > FILE.md
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import beside  # noqa: F401
from figures import (
    PAPER,
    PHASES,
    Figures,
    figures_of,
    kind_of,
    link_of,
    ranked,
    reference,
    rivals,
)
from variants import ABLATION, BASELINE, Variant

HOW = """
Milliseconds on the slowest rank. *Step*: the median, and in brackets what lies between
the quartiles; a prefill step ends with the first token on the host. *Change*: against
the row that it names, repetition by repetition, the median and the quartiles.
*Experts* and *exchange* are the tails of the paper: layer by layer the slowest rank,
all ranks beginning each exchange together; *other* is the rest. *Predicted* is what the
evaluator says of experts and exchanges together, on the hardware that is named. Rows
were counted, and are equal to the evaluator's. MB leave a node in one step: rows that
were counted times their bytes, and what the kernel read on the link, where the run made
the network."""


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return ["", row(heads), "|---" * len(heads) + "|", *map(row, rows)]


def about(content: dict[str, Any]) -> list[str]:
    """A heading, and what was run."""
    case = content["case"]
    family, sizes, topology = (case[name] for name in ("family", "sizes", "topology"))
    nodes = topology["num_ranks"] // topology["ranks_per_node"]
    lines = [
        f"\n## {family['name']}, {nodes} x {topology['ranks_per_node']} ranks"
        f"{link_of(content)}\n",
        f"- model: {case['layers']} layers, hidden {family['hidden']}, "
        f"{family['experts']} experts of {family['inner']}, top {family['top_k']}, "
        f"{case['dtype']}",
        f"- routing: {case['source']}",
        f"- step of a rank: {sizes['sequences']} prompts of {sizes['prompt']} tokens, "
        f"then {sizes['decode']} decoded ones each; {sizes['batches']} batches in turn",
        f"- predicted for: {case['hardware']}, {case['network'] or 'its own network'}",
    ]
    if "command" in case:
        lines.append(f"- planned with: {case['command']}")
    planned = [f"{name} {said}" for name, said in case["told"].items()]
    return [*lines, f"- planning: {'; '.join(planned)}"]


def repeated(results: list[dict[str, Any]]) -> str:
    """How often each variant was timed."""
    one = results[0]
    turns, by_parts = len(one["prefill_ms"]), len(one["parts"]["prefill"])
    return f"- timed: {turns} repetitions, and {by_parts} by parts"


def losses(found: dict[str, Figures]) -> str:
    """What the network lost while steps were timed; "" where none was made."""
    lost = {name: one.losses() for name, one in found.items()}
    turns = [(name, number, turn) for name in lost for number, turn in lost[name]]
    if not turns:
        return ""
    total = Counter()
    for _, _, turn in turns:
        total.update(turn)
    late = [f"{name} ({number})" for name, number, turn in turns if turn["timeouts"]]
    return (
        f"- network: {total['dropped']} packets dropped, {total['sent_again']} sent "
        f"again, {total['timeouts']} timeouts of TCP"
        + (f", these in (repetition): {', '.join(late)}" if late else "")
    )


def steps(found: dict[str, Figures], phase: str) -> list[str]:
    """All variants."""
    heads = [phase, "step", "p90", "p99", "tokens/s", "change", "other", "experts"]
    heads += ["exchange", "predicted", "rows out of ranks", "out of nodes"]
    heads += ["MB", "MB, link"]
    against = reference(found)
    rows = []
    for name, one in found.items():
        step, counted = one.step(phase), one.result[phase]
        said = one.result["said"].get(phase)
        rows.append(
            [
                name,
                f"{step.median:.1f} ({step.width:.1f})",
                *(f"{one.tail(phase, percent):.1f}" for percent in (90, 99)),
                f"{one.tokens_per_second(phase):,.0f}",
                change(one, against, phase),
                f"{one.part(phase, 'other'):.2f}",
                f"{one.token_tail(phase):.2f}",
                f"{one.exchange_tail(phase):.2f}",
                f"{said['step']:.2f}" if said else "-",
                f"{counted['out_of_ranks']:,}",
                f"{counted['out_of_nodes']:,}",
                megabytes(counted["node_bytes"]),
                megabytes(counted["link_bytes"]),
            ]
        )
    return table(heads, rows)


def verdicts(found: dict[str, Figures]) -> list[str]:
    """Our plans against the fastest of the others; whether predictions rank."""
    lines = [""]
    for phase in PHASES:
        for name, other in sorted(rivals(found, phase).items()):
            mine = found[Variant(placement=name).name]
            said = change(mine, other, phase)
            lines.append(f"- {phase}, {mine.name} against {other.name}: {said}")
        right, apart = ranked(found, phase)
        lines.append(
            f"- {phase}, pairs of placements on our exchange further apart than either "
            f"spread: {apart}, of which {right} were ranked as predicted"
        )
    return lines


def megabytes(number: int | None) -> str:
    return f"{number / 1e6:.2f}" if number else "-"


def change(one: Figures, against: Figures | None, phase: str) -> str:
    if against is None or one is against:
        return "-"
    found = one.change(against, phase)
    return f"{found.median:+.1f} % ({found.low:+.1f} to {found.high:+.1f})"


def ablation(found: dict[str, Figures]) -> list[str]:
    """What each part brings, against the paper's own stack."""
    against = reference(found, stack=True)
    rows = [
        [label, variant.name]
        + [
            cell
            for phase in PHASES
            for cell in (
                f"{found[variant.name].step(phase).median:.1f}",
                change(found[variant.name], against, phase),
            )
        ]
        for label, variant in ABLATION.items()
        if variant.name in found
    ]
    heads = ["ablation", "variant", *(c for p in PHASES for c in (p, "change"))]
    return table(heads, rows)


def tails(case: dict[str, Any], found: dict[str, Figures]) -> list[str]:
    """The paper's table: both tails and the step against contiguous blocks."""
    base = reference(found, stack=True)
    if base is None:
        return []
    heads = [
        "prefill, change in %",
        "token processing",
        "all-to-all",
        "step",
    ]
    rows = []
    wanted = [Variant(placement="paper", exchange=BASELINE.exchange)]
    wanted += [ABLATION["placement alone"], ABLATION["both"]]
    for name in (variant.name for variant in wanted):
        if name not in found:
            continue
        one = found[name]
        changes = *one.tail_changes(base, "prefill"), one.change(base, "prefill").median
        rows.append([name, *(f"{value:+.1f}" for value in changes)])
    kind = kind_of(case)
    printed = [f"{value:+.1f}" for value in PAPER[kind]]
    rows.append([f"as printed, Mixtral-8x7B, {kind}", *printed])
    return table(heads, rows)


def page(content: dict[str, Any]) -> str:
    """All of a result file."""
    lines = ["# Whole models\n"]
    lines += [f"- {name}: {value}" for name, value in content["environment"].items()]
    lines.append(HOW)
    for case in content["cases"]:
        found = figures_of(case)
        lines += [*about(case), repeated(case["results"])]
        lines += filter(None, [losses(found)])
        for phase in PHASES:
            lines += steps(found, phase)
        lines += verdicts(found)
        lines += ablation(found) + tails(case["case"], found)
        ways = {one.result["how"]: None for one in found.values()}
        lines += ["", *(f"- {way}" for way in ways)]
    return "\n".join(lines) + "\n"


def main() -> None:
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")


if __name__ == "__main__":
    main()
