"""A process group that was destroyed leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from moetuner.nn import Experts, MoELayer, TopKRouter, contiguous_placement

store = dist.FileStore(sys.argv[1], 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
layer = MoELayer(TopKRouter(8, 4, 2), Experts(4, 8, 16), contiguous_placement(1, 4, 1))
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(torch.randn(6, 8)).sum().backward()
optimizer.step()
dist.destroy_process_group()
for thread in Path("/proc/self/task").iterdir():
    print((thread / "comm").read_text().strip())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads as on Linux")
def test_no_thread_of_gloo_outlives_its_group(tmp_path):
    """One that does can abort the process when the interpreter ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert [name for name in done.stdout.split() if "gloo" in name] == []
