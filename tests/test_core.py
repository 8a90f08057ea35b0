"""Runs the tests of the planning core in plain C++, built by the editable install."""

import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "cpp"
BUILT = sorted(
    (SOURCES.parents[1] / "build").glob("cp*/tests/cpp/core_tests"),
    key=lambda program: program.stat().st_mtime,
)


@pytest.mark.skipif(not BUILT, reason="MOETUNER_CORE_TESTS=ON pip install -e . first")
@pytest.mark.parametrize("suite", sorted(p.stem for p in SOURCES.glob("test_*.cpp")))
def test_the_core_in_plain_cpp(suite):
    found = subprocess.run([BUILT[-1], suite], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
