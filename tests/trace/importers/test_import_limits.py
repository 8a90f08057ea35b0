"""Files that would fill the memory or the day, imported under a limit of both."""

import io
import json
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

MEMORY_LIMIT = 2 << 30  # of data; Python, NumPy and torch take a third of a gigabyte
SECONDS = 100


def limited(path, kind):
    """Import in a process of its own that may not take more than `MEMORY_LIMIT`."""
    code = (
        f"import resource, sys; sys.argv = ['moetuner', 'import', {str(path)!r}, "
        f"'-o', {str(path) + '.out'!r}, '--format', {kind!r}]\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY_LIMIT},) * 2)\n"
        "from moetuner.cli import main\nmain()"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS
    )


def huge_npy(path):
    header = (
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 2, 2)}\n"
    )
    size = len(header).to_bytes(2, "little")
    path.write_bytes(b"\x93NUMPY\x01\x00" + size + header.encode())


def huge_tensor(path):
    entry = {"dtype": "I64", "shape": [2**20, 2**20], "data_offsets": [0, 2**43]}
    header = json.dumps({"weight": entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def huge_header(path):
    path.write_bytes((2**62).to_bytes(8, "little") + b'{"a": 1}')


def zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        stream = io.BytesIO()
        np.save(stream, np.zeros((1 << 18, 64, 16), np.int16))
        archive.writestr("experts.npy", stream.getvalue())


def endless_line(path):
    with path.open("wb") as file:
        file.write(b'{"routed_experts": "')
        file.truncate(1 << 32)  # a hole: it takes no disk


def many_lists(path):
    path.write_bytes(b'{"routed_experts": [' + b"[]," * (1 << 25))


def deep_lists(path):
    path.write_bytes(b'{"routed_experts": ' + b"[" * (1 << 20) + b"\n")


def many_objects(path):
    """Lists as small as a pickle has them; an eighth of what a small file may hold."""
    save(path, b"\x80\x02](" + b"]" * (1 << 20) + b"e.")


def endless_records(path):
    """One tensor in ten thousand records."""
    import torch

    ids = torch.zeros(2, 1000, 8, dtype=torch.int32)
    record = {"rank": 0, "topk_ids_of_layer": ids}
    records = [{"forward_pass_id": n, **record} for n in range(10_000)]
    slots = torch.arange(8).repeat(2, 1)
    torch.save({"records": records, "last_physical_to_logical_map": slots}, path)


def shared_lists(path):
    """Thirty lists, each twice in the next: a billion when walked."""
    inner = [1.5]
    for _ in range(30):
        inner = [inner, inner]
    save(path, pickle.dumps({"lists": inner}, protocol=2))


def save(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/version", b"3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (huge_npy, "routed-arrays", "declares"),
        (huge_tensor, "eplb", "the file has 0 bytes for it"),
        (huge_header, "eplb", "truncated"),
        (zip_bomb, "npz", "would unpack to"),
        (endless_line, "routed-responses", "longer than"),
        (many_lists, "routed-responses", "more than"),
        (deep_lists, "megatron", "not JSON"),
        (many_objects, "sglang-recorder", "recorder"),
        (shared_lists, "sglang-recorder", "wanted the key"),
        (endless_records, "sglang-recorder", "more than the file has bytes"),
    ],
)
def test_hostile_files_are_refused_in_bounds(tmp_path, make, kind, message):
    if kind == "sglang-recorder":
        pytest.importorskip("torch")
    path = tmp_path / "hostile"
    make(path)
    done = limited(path, kind)
    assert done.returncode == 2, done.stderr[-500:]
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["hostile"]
