"""Programs that use torch, forked from one server that has imported it.

An import takes as long as most tests. What a program does is the same: it has its own
process, arguments, folder, streams, and what torchrun tells its ranks.
"""

import dataclasses
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

IMPORTED_ONCE = [
    "pytest",
    "torch.distributed",
    "moetuner.nn",
    "moetuner.evaluation.verify",
    "moetuner.planning.plan",
    "moetuner.integrations.transformers",  # passed over where there is no Transformers
    "torch._inductor.compile_fx",
]
LIMIT = 280  # seconds until what hangs is ended


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """How a program ended, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def fork_server():
    """The one context whose processes come from that server."""
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    return multiprocessing.get_context("forkserver")


def run_programs(programs, *, cwd, ranked=True):
    """A `Done` of each; they are the ranks of one node, or none of them is a rank.

    A program is what comes after ``python``: ``-m`` and a module, ``-c`` and its text,
    or a script; then its arguments.
    """
    from torch.distributed import TCPStore

    told = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if ranked:  # the store is the starter's, as torchrun has it
        store = TCPStore(
            "127.0.0.1",
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=LIMIT),
        )
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        told |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        told |= {key: str(len(programs)) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    with tempfile.TemporaryDirectory() as said:
        started = []
        for rank, words in enumerate(programs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranked else {}
            streams = [f"{said}/{rank}-{name}" for name in ("out", "err")]
            given = (list(map(str, words)), str(cwd), os.environ | told | own, streams)
            started.append(fork_server().Process(target=_be, args=given, daemon=True))
            started[-1].start()
        try:
            for each in started:
                each.join(LIMIT)
        finally:
            for each in started:
                each.kill()
                each.join()
        return [
            Done(
                returncode=each.exitcode,
                stdout=Path(f"{said}/{rank}-out").read_text(),
                stderr=Path(f"{said}/{rank}-err").read_text(),
            )
            for rank, each in enumerate(started)
        ]


def torchrun(*words, ranks, cwd=None):
    """What a program prints that torchrun itself starts, from its first import on."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), *map(str, words)),
        ],
        cwd=cwd,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _be(words, cwd, environment, streams):
    """Become the program, in a process that was forked for it."""
    for number, name in enumerate(streams, start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        code = _run(words)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # At the interpreter's own exit Gloo's threads abort the process now and then.
    os._exit(code or 0)


def _run(words):
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<program>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
