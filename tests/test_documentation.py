"""Every example in the documentation runs and prints what it says it prints."""

import doctest
import importlib
import io
import pkgutil
import re
from contextlib import redirect_stdout
from pathlib import Path

import moetuner
import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")])
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(moetuner.__path__, "moetuner.")
    if not name.endswith(("__main__", "worker", "_core", "libmoetuner_ops"))
]
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    if name.split(".")[1] in ("ops", "nn", "integrations"):
        pytest.importorskip("torch")
    if name.startswith("moetuner.integrations."):
        pytest.importorskip(name.split(".")[2])
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=flags).failed == 0


@pytest.mark.parametrize("name", sorted(set(moetuner.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name):
    doc = getattr(moetuner, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}(")  # what dataclass makes up


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_run(page, tmp_path, monkeypatch):
    """The Python blocks of a page run in order and print the text block after them."""
    for library in ("torch", "transformers"):
        if re.search(rf"^(import|from) {library}\b", page.read_text(), re.MULTILINE):
            pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, wanted in BLOCK.findall(page.read_text()):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(code, page.name, "exec"), names)
        if wanted:
            assert printed.getvalue() == wanted


def test_links_lead_somewhere():
    others = [*REPOSITORY.glob("examples/**/*.md"), REPOSITORY / "CONTRIBUTING.md"]
    for page in [*PAGES, *others]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
