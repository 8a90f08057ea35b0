"""Files of the repository that are pages too, links between the two, a sample report.

On the site README.md is the first page and CONTRIBUTING.md and its kind are pages;
links to them work there as they do in the repository, and links to source files, which
are no pages, become their paths.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File
from moetuner import (
    CostModel,
    PlanOptions,
    SolverOptions,
    Topology,
    demo_trace,
    plan_trace,
    shape_for_model,
)
from moetuner.report.html import render_page

REPOSITORY = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/ops-h100.md": "results/ops-h100.md",
    "examples/train_demo_model/README.md": "demo-trace.md",
    "examples/exchange/README.md": "exchange-example.md",
    "tests/fixtures/engines/README.md": "engine-fixtures.md",
}
SAMPLE = "sample-report.html"
RUNS = "<!-- tables of benchmarks/results/end-to-end-*.md -->"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]+)(#[^)]*)?\)")


def on_files(files, config):
    """Add the repository's own pages."""
    for source, page in PAGES.items():
        text = (REPOSITORY / source).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, SAMPLE, content=sample_report()))
    return files


def sample_report():
    """The report of the shipped trace."""
    trace = demo_trace()
    plan = plan_trace(
        trace,
        Topology(num_ranks=8, ranks_per_node=4),
        PlanOptions(
            cost=CostModel(shape=shape_for_model(trace.metadata.model)),
            solver_options=SolverOptions(time_limit=10),
        ),
    )
    return render_page(plan)


def runs_of_models():
    """Result pages of whole models, their headings one step down."""
    pages = sorted((REPOSITORY / "benchmarks" / "results").glob("end-to-end-*.md"))
    texts = [re.sub(r"^#", "##", page.read_text("utf-8"), flags=re.M) for page in pages]
    return "\n".join(texts) or "No run is recorded yet."


def on_page_markdown(markdown, page, config, files):
    """Let links lead to pages of the site."""
    sources = {page: source for source, page in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def lead(link):
        text, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (REPOSITORY / path).exists():
            return link.group(0)  # mkdocs will say so
        uri = PAGES.get(path) or path.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return f"{text} (`{path}`)"
        here = posixpath.dirname(page.file.src_uri)
        return f"[{text}]({os.path.relpath(uri, here or '.')}{anchor})"

    if page.file.src_uri == "proof.md":
        markdown = markdown.replace(RUNS, runs_of_models())
    if page.file.src_uri == "report.md":
        markdown += f"\n## A sample\n\n[The report of the shipped trace]({SAMPLE})\n"
    return LINK.sub(lead, markdown)
