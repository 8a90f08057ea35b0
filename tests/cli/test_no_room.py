"""A full disk: the message names the file, and nothing half-written is left."""

import resource
import shlex
import subprocess

import numpy as np
import pytest
from moetuner.placement.file import read_placement
from terminal import MOETUNER

LITTLE, SOME = 500, 8000  # bytes that any one file may have


@pytest.fixture
def places(folder, ids):
    """A trace, a plan and an engine's file, with room for them."""
    found = {"trace": folder.trace(ids), "plan": folder.out, "new": folder.path / "new"}
    found |= {"folder": folder.path, "npz": folder.path / "ids.npz"}
    found |= {"engine": folder.path / "engine.json", "kept": folder.path / "kept"}
    np.savez(found["npz"], experts=np.tile(ids, (9, 1, 1)))  # more than a buffer
    assert folder.plan(found["trace"], solver="random").exit_code == 0
    export = ("export", folder.out, "--to", "vllm-ascend", "-o", found["engine"])
    assert folder.run(*export).exit_code == 0
    return found


def with_room(room, command):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.run(
        [*MOETUNER, *command], capture_output=True, text=True, preexec_fn=limit
    )


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("import {npz} -o {new}", "{new}"),
        ("plan {trace} --ranks 4 --solver lpt --prove 0 --out {new}", "{new}"),
        ("report {trace} {plan} --out {new}", "{new}"),
        ("export {plan} --to eplb -o {new}", "{new}"),
        ("import-placement {engine} -o {new}", "{new}"),
        ("demo --time-limit 1 --out-dir {new}", "{new}/placement.json"),
    ],
)
def test_the_file_that_had_no_room_is_named(places, command, file):
    before = sorted(places["folder"].iterdir())
    done = with_room(LITTLE, shlex.split(command.format(**places)))
    wanted = f"error: {file.format(**places)}: File too large"
    assert done.stderr.splitlines()[-1] == wanted
    assert done.returncode == 1
    left = [p for p in places["folder"].rglob("*") if p.is_file() and p not in before]
    assert left == []


def test_a_page_without_room_leaves_the_placement(places):
    """The result of a long solve is kept, whatever becomes of the page."""
    command = (
        "plan {trace} --ranks 4 --solver lpt --prove 0 --out {kept} --report {new}"
    )
    done = with_room(SOME, shlex.split(command.format(**places)))
    page = places["new"]
    assert done.stderr.splitlines()[-1] == f"error: {page}: File too large"
    assert read_placement(places["kept"]).num_layers == 3
    assert not page.exists()


@pytest.mark.parametrize("command", ["describe {trace}", "--help", "plan --help"])
def test_standard_output_without_room_is_no_traceback(places, command):
    line = shlex.join([*MOETUNER, *shlex.split(command.format(**places))])
    done = subprocess.run(
        f"{line} > /dev/full", shell=True, capture_output=True, text=True
    )
    assert done.stderr == "error: standard output: No space left on device\n"
    assert done.returncode == 1
