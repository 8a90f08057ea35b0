r"""Draws result files: how placements change the step, and what each part brings.

    python benchmarks/end_to_end/plot.py FILE.json FILE.json --out docs/proof.svg

A row of two pictures for each case: prefill of every placement on our exchange against
contiguous blocks, and the ablation against the paper's own stack. Bars are medians over
repetitions, lines reach from quartile to quartile. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
from figures import Figures, figures_of, link_of, reference
from moetuner.report.plot import new_figure
from variants import ABLATION, CONTIGUOUS, OURS

if TYPE_CHECKING:
    from figures import Spread

WIDTH, HEIGHT = 11.0, 3.6  # inches of a row
PHASE = "prefill"
OTHERS, JOINT = "#8c959f", "#0969da"


def placements(found: dict[str, Figures]) -> dict[str, Spread]:
    """Change of the step by each, on our exchange."""
    base = reference(found)
    return {
        one.result["placement"]: one.change(base, PHASE)
        for name, one in found.items()
        if one.result["exchange"] == OURS and name != CONTIGUOUS.name
    }


def ablation(found: dict[str, Figures]) -> dict[str, Spread]:
    """Change of the step by each part."""
    base = reference(found, stack=True)
    return {
        label: found[variant.name].change(base, PHASE)
        for label, variant in ABLATION.items()
        if variant.name in found and found[variant.name] is not base
    }


def bars(axis: Any, changes: dict[str, Spread], title: str) -> None:
    """One for each name, from the top; ours in another colour."""
    names = list(changes)[::-1]
    spreads = [changes[name] for name in names]
    middle = [spread.median for spread in spreads]
    reach = [
        [spread.median - spread.low for spread in spreads],
        [spread.high - spread.median for spread in spreads],
    ]
    ours = [name.startswith(("joint", "both", "follow")) for name in names]
    colours = [JOINT if one else OTHERS for one in ours]
    axis.barh(names, middle, color=colours, xerr=reach, ecolor="#24292f", capsize=2)
    axis.axvline(0, color="#24292f", linewidth=0.8)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("change of the prefill step, %")


def draw(cases: list[dict[str, Any]]) -> Any:
    """A figure of all cases that have what it shows."""
    figure = new_figure()
    figure.set_size_inches(WIDTH, HEIGHT * len(cases))
    rows = figure.subplots(len(cases), 2, squeeze=False)
    for (left, right), case in zip(rows, cases, strict=True):
        found, about = figures_of(case), case["case"]
        ranks = about["topology"]["num_ranks"]
        name = f"{about['family']['name']}, {ranks} ranks{link_of(case)}"
        if reference(found):
            bars(left, placements(found), f"{name}: placements, against contiguous")
        if reference(found, stack=True):
            bars(right, ablation(found), "against contiguous, all-to-all per expert")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args()
    contents = [json.loads(file.read_text()) for file in options.files]
    cases = [case for content in contents for case in content["cases"]]
    draw(cases).savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
