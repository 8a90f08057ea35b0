"""Peak memory and time of importing a recording of several gigabytes.

    python benchmarks/import_memory.py --gigabytes 2.5 --folder /tmp

The recordings repeat the routing of the trace that ships with the package at 48 layers.
The peak is that of a child process (ru_maxrss), beside that of importing one of a few
megabytes: what Python, NumPy and torch take by themselves.
"""

import argparse
import base64
import io
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from moetuner.planning.plan import demo_trace
from moetuner.trace.importers import ImportOptions, import_recording

NUM_LAYERS, PASS_TOKENS = 48, 8192


def routing(start):
    """uint8 [8192, 48, 4]: a pass of tokens of the shipped trace."""
    ids = np.tile(demo_trace().topk_ids.astype(np.uint8), (1, 4, 1))
    return np.roll(ids, -start, axis=0)[:PASS_TOKENS]


def sglang(folder, num_bytes):
    """One dump of the recorder in mode per_token."""
    import torch

    slots = torch.arange(64).repeat(NUM_LAYERS, 1)
    records, size = [], 0
    while size < num_bytes:
        wide = np.full((NUM_LAYERS, PASS_TOKENS, 8), -1, np.int32)
        wide[:, :, :4] = routing(size % 10_007).transpose(1, 0, 2)
        tokens = list(range(1000, 1000 + PASS_TOKENS))
        records.append(
            {
                "forward_pass_id": len(records),
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": tokens,
                "positions": tokens,
                "extend_seq_lens": [1024] * 8,
                "forward_mode": 1,
                "topk_ids_of_layer": torch.from_numpy(wide),
                "misc_objects": [],
            }
        )
        size += wide.nbytes
    path = folder / "expert_distribution_recorder_0_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": slots}, path)
    return path


def vllm(folder, num_bytes):
    """Responses of 8192 tokens, one a line."""
    path = folder / "responses.jsonl"
    with path.open("w") as file:
        while file.tell() < num_bytes:
            stream = io.BytesIO()
            np.save(stream, routing(file.tell() % 10_007))
            encoded = base64.b64encode(stream.getvalue()).decode()
            choice = {"index": 0, "routed_experts": encoded}
            file.write(json.dumps({"choices": [choice]}) + "\n")
    return path


def archive(folder, num_bytes):
    """A NumPy archive, written array by array."""
    count = -(-num_bytes // (2 * PASS_TOKENS * NUM_LAYERS * 4))
    ids = np.lib.format.open_memmap(
        folder / "experts.npy", "w+", np.int16, (count * PASS_TOKENS, NUM_LAYERS, 4)
    )
    for index in range(count):
        part = slice(index * PASS_TOKENS, (index + 1) * PASS_TOKENS)
        ids[part] = routing(index * 997)
    path = folder / "recording.npz"
    np.savez(path, experts=ids, seq=np.arange(len(ids), dtype=np.int32) // 1024)
    (folder / "experts.npy").unlink()
    return path


def child(path, out, queue):
    start = time.perf_counter()
    imported = import_recording([path], out, options=ImportOptions(num_experts=64))
    queue.put(
        {
            "tokens": imported.num_tokens,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
    )


def measured(make, num_bytes, folder):
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        context = multiprocessing.get_context("spawn")
        maker = context.Process(target=make, args=(Path(inner), num_bytes))
        maker.start()
        maker.join()
        path = next(p for p in Path(inner).iterdir())
        queue = context.Queue()
        process = context.Process(
            target=child, args=(path, Path(inner) / "out.safetensors", queue)
        )
        process.start()
        result = queue.get()
        process.join()
        size = path.stat().st_size
        written = (Path(inner) / "out.safetensors").stat().st_size
        shutil.rmtree(inner, ignore_errors=True)
    return {"mib": size >> 20, "written_mib": written >> 20, **result}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    for make in (sglang, vllm, archive):
        small = measured(make, 1 << 22, arguments.folder)
        large = measured(make, int(arguments.gigabytes * 2**30), arguments.folder)
        print(json.dumps({"recording": make.__name__, "small": small, "large": large}))


if __name__ == "__main__":
    main()
