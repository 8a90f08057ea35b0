"""Every example in the documentation runs and prints what it says it prints.

Blocks of a page run in order, in one empty folder:

- ``python``: prints the ``text`` block that stands under it, if one does;
- ``console``: every ``$`` line ends well and prints what stands under it, if anything
  does (``...`` for what varies); without ``$`` it is set-up: what it names must exist;
- ``json``, ``toml``: is read by what reads such files.
"""

import contextlib
import doctest
import importlib
import io
import itertools
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import moetuner
import pytest
from moetuner.cli import app
from typer.testing import CliRunner

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")])
OTHERS = [*REPOSITORY.glob("examples/**/*.md"), REPOSITORY / "CONTRIBUTING.md"]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(moetuner.__path__, "moetuner.")
    if not name.endswith(("__main__", "worker", "_core", "libmoetuner_ops"))
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
PLAIN = re.compile(  # nothing that bash reads otherwise, nor ranks of this process
    r"moetuner (?!calibrate)[\w\s./,:=\"'\\-]*"
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    alone = name.startswith("moetuner.integrations.eplb")  # needs no library
    if name.split(".")[1] in ("ops", "nn", "integrations") and not alone:
        pytest.importorskip("torch")
    if name.startswith("moetuner.integrations.") and not alone:
        pytest.importorskip(name.split(".")[2].lstrip("_").partition("_")[0])
    assert doctest.testmod(importlib.import_module(name), optionflags=FLAGS).failed == 0


@pytest.mark.parametrize("name", sorted(set(moetuner.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name):
    doc = getattr(moetuner, name).__doc__
    assert doc
    assert not doc.startswith(f"{name}(")  # what dataclass makes up


def page_id(page):
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_run(page, tmp_path, monkeypatch):
    for library in ("torch", "transformers"):
        if re.search(rf"^(import|from) {library}\b", page.read_text(), re.MULTILINE):
            pytest.importorskip(library, reason=f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    blocks = [*FENCE.findall(page.read_text()), ("", "")]
    names = {}
    for (kind, body), (next_kind, wanted) in itertools.pairwise(blocks):
        if kind == "python":
            printed = run_python(body, page.name, names)
            if next_kind == "text" and follows(page, body, wanted):
                assert printed == wanted
        elif kind == "console":
            run_console(body)
        elif kind == "json":
            read_json(body)
        elif kind == "toml":
            Path("read.toml").write_text(body)
            moetuner.read_hardware("read.toml")
        else:
            assert kind == "text", f"a {kind or 'nameless'} block that nothing runs"


def follows(page, body, wanted):
    """Whether the one block stands right under the other."""
    return f"{body}```\n\n```text\n{wanted}" in page.read_text()


def run_python(body, name, names):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(body, name, "exec"), names)
    return printed.getvalue()


def run_console(body):
    if "$ " not in body:
        for line in body.splitlines():
            check_set_up(shlex.split(line, comments=True))
        return
    scripts = sysconfig.get_path("scripts")
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "80"}
    for command, wanted in COMMAND.findall(body):
        if PLAIN.fullmatch(command):
            code, printed, errors = run_moetuner(command, environment)
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                capture_output=True,
                text=True,
                env=environment,
                timeout=200,
            )
            code, printed, errors = done.returncode, done.stdout, done.stderr
        assert code == 0, f"{command}\n{printed}{errors}"
        if wanted:
            assert doctest.OutputChecker().check_output(wanted, printed, FLAGS), (
                f"{command}\nwanted\n{wanted}\nprinted\n{printed}"
            )


def run_moetuner(command, environment):
    """A command without a shell's doings, in this process: a start takes longer."""
    words = shlex.split(command.replace("\\\n", " "))
    done = CliRunner().invoke(app, words[1:], env=environment)
    return done.exit_code, done.stdout, done.stderr


def check_set_up(words):
    """Commands that set up a machine are not run; what they name must be there."""
    if words[0] == "make":
        subprocess.run([*words, "-n"], cwd=REPOSITORY, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        extras = (REPOSITORY / "pyproject.toml").read_text()
        for package in words[2:]:
            name, _, listed = package.partition("[")
            assert name in (".", "moetuner")
            for extra in filter(None, listed.rstrip("]").split(",")):
                assert f"\n{extra} = [" in extras
    else:
        pytest.fail(f"{' '.join(words)}: begin what is to run with '$ '")


def read_json(body):
    content = json.loads(body)
    if content.get("format") == "moetuner.placement":
        Path("read.json").write_text(body)
        moetuner.read_placement("read.json")


def test_links_lead_somewhere():
    for page in [*PAGES, *OTHERS]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("$ moetuner --version\nmoetuner 0.0\n", "wanted"),
        ("$ moetuner describe missing.npz\n", "missing.npz"),
        ("moetuner describe\n", "begin what is to run"),
    ],
)
def test_a_wrong_example_would_fail(tmp_path, monkeypatch, body, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        run_console(body)


def test_missing_targets_and_extras_would_fail():
    for words in (["make", "nonsense"], ["pip", "install", ".[nonsense]"]):
        with pytest.raises((AssertionError, subprocess.CalledProcessError)):
            check_set_up(words)
