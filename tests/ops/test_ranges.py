import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="torch is not installed")

PROGRAM = """
import sys, types

marked = []

class annotate:
    def __init__(self, name, domain):
        self.name = f"{domain}.{name}"
    def __enter__(self):
        marked.append(self.name)
    def __exit__(self, *error):
        pass

sys.modules["nvtx"] = types.SimpleNamespace(annotate=annotate)
import torch
from moetuner.ops import permute, unpermute, count_routing

ids = torch.tensor([[0, 1]])
rows, row_map, _, _ = permute(torch.ones(1, 4), ids, 2)
unpermute(rows, row_map)
count_routing(ids, torch.zeros(2, dtype=torch.int64))
print(*marked)
"""


@pytest.mark.parametrize(
    ("asked", "marked"),
    [("1", "moetuner.permute moetuner.unpermute moetuner.count_routing"), ("0", "")],
)
def test_ranges_when_asked(asked, marked, monkeypatch):
    """A stand-in for nvtx notes what a profiler would see."""
    monkeypatch.setenv("MOETUNER_NVTX", asked)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == marked
