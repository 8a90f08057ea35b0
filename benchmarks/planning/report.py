"""What the planning benchmarks share: environment, result files, tables."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

traces_folder = harness.traces_folder
RESULTS = Path(__file__).parents[1] / "results"


def environment(note: str) -> dict[str, str]:
    """Hardware, commit, command, and how busy the machine was."""
    found = harness.environment()
    found["command"] = " ".join(["python", *sys.argv])
    found["load_average_at_start"] = f"{os.getloadavg()[0]:.1f}"
    if note:
        found["note"] = note
    return found


def peak_gigabytes() -> float:
    """Largest resident memory of this process and of any child so far."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 2**20


def write(name: str, content: dict[str, object], lines: list[str]) -> None:
    """NAME.json and NAME.md among the results."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(text)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def head(title: str, env: dict[str, str]) -> list[str]:
    """Title and environment of a result page."""
    return [f"# {title}", "", *(f"- {key}: {value}" for key, value in env.items()), ""]


def row(*cells: str) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [row(*header), row(*["---"] * len(header)), *(row(*r) for r in rows), ""]


def spread(values: list[float], digits: int) -> str:
    """Median, and smallest to largest where there are several."""
    middle = f"{np.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"
