"""Reference and site list what there is; the picture shows the figures."""

import runpy
from pathlib import Path

import moetuner
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def listed(page):
    lines = (DOCS / "reference" / page).read_text().splitlines()
    return {line.rpartition(".")[2] for line in lines if line.startswith("::: ")}


def test_the_library_reference_lists_every_public_name():
    assert set(moetuner.__all__) - {"__version__"} <= listed("library.md")


def test_the_op_reference_lists_every_op():
    ops = pytest.importorskip("moetuner.ops")
    assert set(ops.__all__) <= listed("ops.md")


def test_the_site_lists_every_page():
    site = (DOCS.parent / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}\n" in site


def test_the_picture_is_what_its_script_draws_from_the_figures():
    names = runpy.run_path(str(DOCS / "picture.py"))
    assert names["TARGET"].read_text() == names["draw"]()
