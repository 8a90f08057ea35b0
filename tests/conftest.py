import os
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# torch keeps what it compiled for later programs. It knows a graph by its calls, not by
# what our ops tell the compiler of themselves: a stale one left an exchange out.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
# What an op returns may not share memory: elsewhere a warning, here an error.
os.environ["TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING"] = "1"

hypothesis.settings.register_profile("dev", max_examples=50, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=200, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


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
