"""NVTX ranges of a layer, as a tool that the process loads sees them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("nvtx", reason="nvtx is not installed")

PROGRAM = """
import sys
import torch, torch.distributed as dist
from moetuner.nn import Experts, MoELayer, TopKRouter, contiguous_placement
from moetuner.ops import Transport, set_transport

device, transport, store = sys.argv[1:]
backend = {"cpu": "gloo", "cuda": "nccl"}[device]
store = dist.FileStore(store, 1)
dist.init_process_group(backend, store=store, rank=0, world_size=1)
set_transport(dist.group.WORLD.group_name, Transport(transport))
placement = contiguous_placement(num_layers=1, num_experts=4, num_ranks=1)
layer = MoELayer(TopKRouter(64, 4, top_k=2), Experts(4, 64, 32), placement)
with torch.no_grad():
    layer.to(device, torch.bfloat16)(torch.randn(5, 64, device=device).bfloat16())
dist.destroy_process_group()
"""
FROM_PYTHON = "route() dispatch() expert() combine()"
FROM_CPP_TOO = {
    "collectives": "route() dispatch(route() pack() send() place()) expert() "
    "combine(return() sum())",
    "peers": "route() dispatch(route() counts() spread()) expert() combine(sum())",
}


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    """`nvtx_log.cpp`, built."""
    compiler, headers = shutil.which("c++"), _nvtx_headers()
    if compiler is None or headers is None:
        pytest.skip("needs a C++ compiler and the NVTX headers of a CUDA toolkit")
    built = tmp_path_factory.mktemp("nvtx") / "libnvtx_log.so"
    source = Path(__file__).with_name("nvtx_log.cpp")
    flags = ["-std=c++17", "-shared", "-fPIC", f"-I{headers}", "-o", str(built)]
    subprocess.run([compiler, *flags, str(source)], check=True)
    return built


@pytest.mark.parametrize(
    ("device", "transport"),
    [
        ("cpu", "collectives"),
        pytest.param("cuda", "collectives", marks=pytest.mark.gpu),
        pytest.param("cuda", "peers", marks=pytest.mark.gpu),
    ],
)
def test_a_layer_opens_and_closes_its_ranges(
    device, transport, tool, tmp_path, monkeypatch
):
    monkeypatch.setenv("MOETUNER_NVTX", "1")
    monkeypatch.setenv("NVTX_INJECTION64_PATH", str(tool))
    monkeypatch.setenv("MOETUNER_RANGES_LOG", str(tmp_path / "log"))
    program = [sys.executable, "-c", PROGRAM, device, transport]
    done = subprocess.run(
        [*program, str(tmp_path / "store")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "log").read_text().split()
    wanted = FROM_CPP_TOO[transport] if _built_with_cuda() else FROM_PYTHON
    assert _nested(lines) == wanted


def _nvtx_headers():
    """Of a CUDA toolkit, installed or from wheels beside torch."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    folders += Path(torch.__file__).parents[1].glob("nvidia/*/include")
    return next((f for f in folders if (f / "nvtx3/nvToolsExt.h").exists()), None)


def _built_with_cuda():
    """C++ ranges are part of such a build alone, for every device."""
    import moetuner.ops  # noqa: F401

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel("moetuner::permute", "CUDA")


def _nested(lines):
    """Ranges as calls, each with those inside it."""
    open_ranges = [("", [])]
    for line in lines:
        if line.startswith("+"):
            open_ranges.append((line[1:], []))
        else:
            name, inner = open_ranges.pop()
            open_ranges[-1][1].append(f"{name}({' '.join(inner)})")
    ((_, outermost),) = open_ranges  # all are closed
    return " ".join(outermost)
