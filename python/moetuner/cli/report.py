"""`moetuner report`: placements and what they do, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner.cli.options import CostOptions, Quiet, TopK, TracePath, priced_words
from moetuner.errors import InvalidPlacementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moetuner.placement.model import Placement


def report(
    trace: TracePath,
    placements: Annotated[
        list[Path],
        typer.Argument(help="Placement files; the first is the result, others compare"),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("report.html"),
    before: Annotated[
        Path | None,
        typer.Option(help="Placement in use now  [default: contiguous blocks]"),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the figures as PNG and SVG")
    ] = None,
    *,
    cost: CostOptions,
    top_k: TopK = None,
    quiet: Quiet = False,
) -> None:
    """Show what placements do: one HTML file with figures and their numbers.

    What no option says is priced as the first placement was planned.
    """
    from moetuner.planning.comparison import compare_placements
    from moetuner.report.html import write_report
    from moetuner.report.outputs import check_folder, check_report
    from moetuner.report.terminal import print_content, print_sentences
    from moetuner.report.verdict import verdict
    from moetuner.trace import read_trace

    check_report(out, [trace, *placements, *([before] if before else [])])
    if plots is not None:
        check_folder(plots)
    routing = read_trace(trace, top_k=top_k)
    given = [*placements, *([before] if before else [])]
    named = _read(given)
    first = next(iter(named.values()))
    pricing = cost.pricing([routing], quiet, first)
    comparison = compare_placements(
        routing,
        named,
        pricing.cost,
        before=None if before is None else list(named)[given.index(before)],
        batch_tokens=pricing.batch_tokens,
        batch_kind=pricing.batch_kind,
        phase=pricing.phase,
    )
    write_report(comparison, out)
    print_sentences(priced_words(pricing, first, str(placements[0])))
    print_sentences(verdict(comparison))
    print_content(f"wrote {out}")
    if plots is not None:
        from moetuner.report.figures import write_figures

        for path in write_figures(comparison, plots):
            print_content(f"wrote {path}")


def _read(paths: Sequence[Path]) -> dict[str, Placement]:
    """Placements by file name, or by path where names are not enough."""
    from moetuner.placement.file import read_placement
    from moetuner.planning.baselines import BASELINES

    stems = [path.stem for path in paths]
    alone = len(set(stems)) == len(stems) and not set(stems) & set(BASELINES)
    named = {
        stem if alone else str(path): read_placement(path)
        for stem, path in zip(stems, paths, strict=True)
    }
    if len(named) < len(paths):
        raise InvalidPlacementError("report: one placement file is given twice")
    return named
