"""Messages name what the user typed, and fit the terminal that shows them."""

import ast
import json
import re
from pathlib import Path

import moetuner
import pytest
from moetuner.cli import app
from moetuner.cli.messages import as_typed
from terminal import MOETUNER, run_in_terminal
from typer.main import get_command

PACKAGE = Path(moetuner.__file__).parent
OPTIONS = {
    name
    for command in get_command(app).commands.values()
    for option in command.params
    for name in option.opts
}
PLANNING = (
    *("bounds", "evaluation", "export", "placement"),
    *("planning", "solver", "trace"),
)


def literals():
    """Every text of the planning half, docstrings aside, with its place."""
    for room in PLANNING:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            bare = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in bare
                ):
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node.value


def test_every_argument_in_backquotes_is_an_option():
    found = {
        name: place
        for place, text in literals()
        for name in re.findall(r"`[a-z_]+`", text)
    }
    assert len(found) > 8
    strange = {
        name: place
        for name, place in found.items()
        if as_typed(name, ()) not in OPTIONS
    }
    assert strange == {}


def test_the_library_names_arguments_not_options():
    """Engines' own options may stand in what is printed for them."""
    ours = {name for name in OPTIONS if name.startswith("--")}
    found = {
        place
        for place, text in literals()
        for name in re.findall(r"(?<![\w`-])--[a-z][a-z-]+", text)
        if name in ours
    }
    assert found == set()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--top-k", 3), "--top-k is 3, but the recording says 2"),
        (("--split", 0), "error: --split must be in (0, 1], got 0"),
        (("--ranks-per-node", 3), "error: --ranks-per-node must divide --ranks 4"),
        (("--slots-per-rank", 99), "error: --slots-per-rank must be 4..16"),
        (("--time-limit", 0), "error: --time-limit must be > 0 s"),
        (("--prove", "nan"), "error: --prove must be >= 0 s"),
        (("--homes", "recorded"), "error: --homes recorded, but this trace"),
        (("--rank-speeds", "1,2"), "error: --rank-speeds names 2 ranks"),
    ],
)
def test_what_plan_refuses_is_called_as_it_was_typed(folder, ids, arguments, wanted):
    result = folder.plan(folder.trace(ids), *arguments)
    assert result.exit_code == 2
    assert wanted in result.stderr


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("import", "{npz}", "-o", "{new}", "--num-experts", 9), "--num-experts is 9"),
        (("import", "{npz}", "-o", "{new}", "--top-k", 9), "--top-k is 9"),
        (("import", "{npz}", "-o", "{new}", "--layers", "x"), "--layers: wanted"),
        (
            ("export", "{plan}", "--to", "eplb", "-o", "{new}", "--moe-layers", "x"),
            "--moe-layers: wanted numbers",
        ),
        (
            ("export", "{plan}", "--to", "sglang", "-o", "{new}"),
            "say how many there are with --num-layers",
        ),
        (("certify", "{trace}", "{plan}", "--time-limit", 0), "--time-limit must be"),
        (("evaluate", "{trace}", "{plan}", "--top-k", 3), "--top-k is 3"),
    ],
)
def test_what_other_commands_refuse_is_too(folder, ids, command, wanted):
    import numpy as np

    metadata = json.dumps({"num_experts": 16})
    np.savez(folder.path / "t.npz", experts=ids, meta=metadata)
    places = {"trace": folder.trace(ids), "plan": folder.out}
    places |= {"npz": folder.path / "t.npz", "new": folder.path / "new"}
    assert folder.plan(places["trace"]).exit_code == 0
    result = folder.run(*(str(each).format(**places) for each in command))
    assert result.exit_code == 2
    assert wanted in result.stderr
    assert "`" not in result.stderr


@pytest.mark.parametrize("columns", [40, 80])
def test_long_messages_break_between_words(folder, ids, columns):
    trace = folder.trace(ids)
    command = [*MOETUNER, "plan", str(trace), "--ranks", "17", "--out", "p.json"]
    shown = run_in_terminal(command, columns=columns, code=2)
    lines = shown.replace("\r", "").splitlines()
    assert lines[0].startswith("error: --ranks 17 does not fill nodes")
    assert len(lines) > 1
    assert max(map(len, lines)) <= columns
    assert " ".join(lines).endswith("say how they are spread with --ranks-per-node")
