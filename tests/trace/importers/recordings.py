"""Recordings of TensorRT-LLM and Megatron made by hand."""

import json

import numpy as np
from safetensors.numpy import save_file


def statistics(folder, tensors, meta=None, name="rank0.safetensors"):
    folder.mkdir(exist_ok=True)
    meta = meta or {"num_experts": 4, "num_experts_per_token": 2}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    save_file(tensors, folder / name)
    return folder


COUNTS = np.array([1, 2, 3, 4], np.int64)


def megatron(path, *records):
    base = {"step": 0, "block": "decoder", "layer": 0, "rank": 0}
    lines = [json.dumps(base | record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path
