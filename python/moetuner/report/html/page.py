"""The whole page: one file that needs nothing else."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from moetuner._files import atomic_write_text
from moetuner._words import amount
from moetuner.report.changes import changes_in
from moetuner.report.html.content import Numbers
from moetuner.report.html.markup import Markup, tag
from moetuner.report.html.palette import variables
from moetuner.report.html.sections.convergence import convergence
from moetuner.report.html.sections.flow import flow
from moetuner.report.html.sections.load import load
from moetuner.report.html.sections.method import method
from moetuner.report.html.sections.moves import moves
from moetuner.report.html.sections.scores import scores
from moetuner.report.html.sections.summary import summary
from moetuner.report.html.sections.together import coactivation
from moetuner.report.html.sections.traffic import traffic

if TYPE_CHECKING:
    import os

    from moetuner.planning.scores import Comparison

_LINKS = {
    "scores": "Scores",
    "load": "Load",
    "traffic": "Traffic",
    "together": "Co-activation",
    "flow": "Flow",
    "convergence": "Convergence",
    "moves": "Changes",
    "method": "Method",
}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; " + (
    "script-src 'unsafe-inline'"
)
"""Even if something got past the escaping, the page could load nothing."""


def write_report(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write `comparison` as one HTML file."""
    atomic_write_text(path, render_page(comparison))


def render_page(comparison: Comparison) -> str:
    """The page as text; the same comparison gives the same text."""
    numbers = Numbers()
    moved = changes_in(comparison)
    title = _title(comparison)
    body = tag(
        "main",
        _header(comparison, title),
        summary(comparison, moved),
        scores(comparison),
        load(comparison, numbers),
        traffic(comparison, numbers),
        coactivation(comparison, numbers),
        flow(comparison, numbers),
        convergence(comparison, numbers),
        moves(comparison, moved, numbers),
        method(comparison),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} - moetuner report"),
        tag("style", Markup(variables()), _asset("style.css")),
    )
    script = tag("script", _asset("script.js"))
    page = tag("html", head, tag("body", body, script), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _title(comparison: Comparison) -> str:
    topology = comparison.topology
    nodes = f", {topology.num_nodes} nodes" if topology.num_nodes > 1 else ""
    model = comparison.metadata.model or "Unknown model"
    return f"{model} on {amount(topology.num_ranks, 'rank')}{nodes}"


def _header(comparison: Comparison, title: str) -> Markup:
    statistics = comparison.statistics
    facts = (
        f"{amount(statistics.num_layers, 'layer')} of {statistics.num_experts} experts",
        f"{comparison.result.name} against {comparison.baseline.name}",
        f"wire {comparison.cost.wire.value}, homes {comparison.cost.homes.value}, "
        f"{comparison.cost.hardware.name}",
    )
    return tag(
        "header",
        tag("p", "moetuner report", class_="brand"),
        tag("h1", title),
        tag("p", " · ".join(facts), class_="facts-line"),
        tag(
            "nav",
            *(tag("a", text, href=f"#{name}") for name, text in _LINKS.items()),
            aria_label="Sections",
        ),
    )


def _asset(name: str) -> Markup:
    """A file of this folder, which is ours and needs no escaping."""
    return Markup(resources.files(__package__).joinpath(name).read_text("utf-8"))
