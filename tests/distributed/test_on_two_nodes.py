"""A program on the two nodes that one machine makes: what torchrun would tell it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "exchange"
NOT_PERMITTED = 3
PROGRAM = """
import os, sys
names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR")
names += ("CUDA_VISIBLE_DEVICES",)
told = " ".join(os.environ[name] for name in names)
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(told)
sys.exit(int(os.environ["RANK"] == "3") * 7)
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(FOLDER / "on_two_nodes.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | environment,
    )


# Each node has a GPU of its own, or all share what there is.
@pytest.mark.parametrize(("visible", "of_node"), [("5,7", "57"), ("4", "44")])
def test_ranks_are_told_what_torchrun_tells(visible, of_node, tmp_path):
    script, told = tmp_path / "program.py", tmp_path / "told"
    script.write_text(PROGRAM)
    told.mkdir()
    options = ("--gbit", 0, "--ranks-per-node", 2, "--", script, told)
    done = run(*options, CUDA_VISIBLE_DEVICES=visible)
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 7, done.stderr
    found = {path.name: path.read_text().split() for path in told.iterdir()}
    assert found == {
        str(rank): f"{rank} {rank % 2} 2 4 10.77.0.1 {of_node[rank // 2]}".split()
        for rank in range(4)
    }


def test_one_that_fails_ends_the_others(monkeypatch):
    """They would wait for it until their own timeout; here for ever."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import network

    monkeypatch.setattr(network, "_GRACE", 0.5)
    says = ["signal.pause()", "sys.exit(7)", "signal.pause()"]
    ranks = [
        subprocess.Popen([sys.executable, "-c", f"import signal, sys; {what}"])
        for what in says
    ]
    assert network.wait_for(ranks) == [-9, 7, -9]


def test_a_rank_that_a_signal_ends_is_a_failure(tmp_path):
    """Whatever the others say: a signal is a negative code."""
    script = tmp_path / "program.py"
    script.write_text("import os\nif '1' == os.environ['RANK']: os.abort()")
    done = run("--gbit", 0, "--ranks-per-node", 1, "--", script)
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 128 + signal.SIGABRT


def test_a_program_is_wanted():
    done = run("--gbit", 1)
    assert done.returncode == 2
    assert "wanted -- and a program" in done.stderr
