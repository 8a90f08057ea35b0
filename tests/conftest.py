import itertools
import os
import zlib
from pathlib import Path

# Tensors of tests are tiny: threads of libraries would wait for each other, longer than
# they compute, above all on a busy machine. NumPy and torch read this when they load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from matrix_table import outcomes_of, page_of, summary_of, table_of

# torch keeps what it compiled for later programs. It knows a graph by its calls, not by
# what our ops tell the compiler of themselves: a stale one left an exchange out.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# Kernels are compiled by the process that asks for them: a pool of helpers for each
# rank takes longer to start than the few kernels of a test.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# What an op returns may not share memory: elsewhere a warning, here an error.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"

# `make test-examples` takes the last, by its name.
for profile, examples, same in (
    ("dev", 50, False),
    ("ci", 50, True),
    ("all", 200, True),
):
    hypothesis.settings.register_profile(
        profile, max_examples=examples, deadline=None, derandomize=same
    )
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto`: a process for each core that this one may use, but not too many.

    Each imports torch, and its tests start up to eight ranks.
    """
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.fixture(scope="session")
def traces_dir() -> Path:
    """Folder of recordings of real models; too large for the repository."""
    named = os.environ.get("MOETUNER_TRACES")
    if not named:
        pytest.skip("MOETUNER_TRACES names no folder of recordings")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"MOETUNER_TRACES={named}: no such folder", pytrace=False)
    return folder


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Generator seeded by the test's own name, so that each case runs alone alike."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail("needs a CUDA device, and FAIL_WITHOUT_CUDA=1", pytrace=False)
    pytest.skip("needs a CUDA device")


def pytest_addoption(parser):
    parser.addoption(
        "--matrix", metavar="FILE", help="write the table of the matrix's cells there"
    )


def pytest_terminal_summary(terminalreporter, config):
    """What the tests of the matrix went through; also where they ran elsewhere."""
    reports = itertools.chain.from_iterable(terminalreporter.stats.values())
    outcomes = outcomes_of(reports)
    if not outcomes:
        return
    terminalreporter.section(f"matrix: {summary_of(outcomes)}")
    for line in table_of(outcomes):
        terminalreporter.write_line(line)
    named = config.getoption("--matrix")
    if named:
        Path(named).write_text(page_of(outcomes))
