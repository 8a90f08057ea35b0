"""The paper's own table: both tails and the step of Mixtral, on one node and on two.

    python benchmarks/end_to_end/paper_table.py ONE-NODE.json TWO-NODES.json > FILE.md

Prefill of cases of Mixtral-8x7B. Changes are against contiguous blocks on the same
exchange, so that they are the placement's alone, as arXiv 2502.06643 has them. Then
what differs in the set-ups.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from figures import PAPER, PHASES, Figures, figures_of, kind_of
from table import table
from variants import CONTIGUOUS, OURS, PER_EXPERT, Variant

MODEL = "mixtral-8x7b"
PREFILL = PHASES[0]
COLUMNS = ("token processing", "all-to-all", "step")
PRINTED = "as printed in the paper"
ROWS = {
    "the paper's two programs, all-to-all per expert": ("paper", PER_EXPERT),
    "joint for it, all-to-all per expert": ("joint for per-expert", PER_EXPERT),
    "the paper's two programs, our exchange": ("paper", OURS),
    "joint, our exchange": ("joint", OURS),
    "joint with a replica a rank, our exchange": ("joint + replicas", OURS),
}


def changes(found: dict[str, Figures], placement: str, exchange: str) -> list[str]:
    """Both tails, and the step with its quartiles; dashes where it was not run."""
    base = found.get(Variant(placement=CONTIGUOUS.placement, exchange=exchange).name)
    one = found.get(Variant(placement=placement, exchange=exchange).name)
    if base is None or one is None:
        return ["-"] * len(COLUMNS)
    step = one.change(base, PREFILL)
    tails = [f"{value:+.1f}" for value in one.tail_changes(base, PREFILL)]
    return [*tails, f"{step.median:+.1f} ({step.low:+.1f} to {step.high:+.1f})"]


def link(case: dict[str, Any]) -> str:
    """Between nodes; where a measured machine was planned for it has no name."""
    shaped = f"{case['gbit']:g} Gbit/s a node" if case["gbit"] else ""
    return case["network"] or shaped


def set_up(cases: list[dict[str, Any]], machine: dict[str, str]) -> list[str]:
    """What the paper ran, and what these cases did."""
    first, sizes = cases[0], cases[0]["sizes"]
    groups = [case["topology"] for case in cases]
    ranks = [f"{g['num_ranks']} ranks, {g['ranks_per_node']} a node" for g in groups]
    here = [machine.get("gpu", "no GPU"), machine.get("share_of_gpu", "")]
    rows = {
        "software": ("Megatron-LM", "plain torch, `benchmarks/end_to_end`"),
        "machine": ("8 H100; 2 x 8 H200", ", ".join(filter(None, here))),
        "ranks": ("4EP-2TP; 4EP-4TP", f"expert parallel alone: {'; '.join(ranks)}"),
        "between nodes": (
            "the cluster's own",
            ", ".join(sorted({link(case) for case in cases} - {""})) or "-",
        ),
        "model": ("Mixtral-8x7B", f"{first['layers']} layers of it, weights drawn"),
        "routing": ("of the model", first["source"]),
        "step": (
            "end to end",
            f"prefill of {sizes['sequences']} prompts of {sizes['prompt']} a rank",
        ),
        "solver of the programs": ("Gurobi", "CBC"),
    }
    heads = ["what differs", "the paper", "here"]
    return table(heads, [[name, *cells] for name, cells in rows.items()])


def page(contents: list[dict[str, Any]]) -> str:
    """Of result files; the last case of a kind counts."""
    cases = {
        kind_of(case["case"]): case
        for content in contents
        for case in content["cases"]
        if case["case"]["family"]["name"] == MODEL
    }
    if not cases:
        raise SystemExit(f"paper_table: no case of {MODEL} in these files")
    kinds = [kind for kind in PAPER if kind in cases]
    found = {kind: figures_of(cases[kind]) for kind in kinds}
    heads = ["change in %", *(f"{kind}: {name}" for kind in kinds for name in COLUMNS)]
    rows = [
        [PRINTED, *(f"{value:+.1f}" for kind in kinds for value in PAPER[kind])],
        *(
            [name, *(cell for kind in kinds for cell in changes(found[kind], *one))]
            for name, one in ROWS.items()
        ),
    ]
    abouts = [cases[kind]["case"] for kind in kinds]
    lines = ["# The paper's own table", *table(heads, rows)]
    lines += set_up(abouts, contents[0]["environment"])
    return "\n".join(lines) + "\n"


def main() -> None:
    contents = [json.loads(Path(file).read_text()) for file in sys.argv[1:]]
    print(page(contents), end="")


if __name__ == "__main__":
    main()
