"""Dispatch and combine inside a node, over mapped memory and over the communicator:

    torchrun --nproc-per-node 2 benchmarks/exchange/one_node.py --out FILE

Ways `deepep` and `deepep-ll` are those of DeepEP, where its wheel is installed: normal
with our permute, which cannot be captured, and low latency, of few tokens.

Every rank launches a call after a barrier; a time is that of the slowest rank, from
events on its stream. Eager calls have exact sizes; replays are of a CUDA graph of the
fixed form, which has room for the routing at hand. Rows of FP8 have a scale for each
128 values, which is joined to them in the time measured; BF16 comes back.

Legend: T tokens of a rank, K top-k, E experts, G ranks, H hidden.
"""

import argparse
import json
import os
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from deep_ep_method import DeepEp, DeepEpLowLatency
from methods import Layer
from moetuner.ops import Transport, combine, describe_transport, dispatch, set_transport

TOP_K, NUM_EXPERTS, HIDDEN = 8, 256, 7168
MOST_OF_FEW = 256  # tokens of the low-latency kernels
TURNS = 51


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 1024, 128, 32])
    parser.add_argument("--senders", type=int, nargs="+", default=[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=["bf16"], choices=["bf16", "fp8"])
    parser.add_argument("--backend", default="nccl")
    ways = ["peers", "collectives", "deepep", "deepep-ll"]
    parser.add_argument("--ways", nargs="+", default=ways[:2], choices=ways)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(options.backend)
    results = []
    group = dist.group.WORLD.group_name
    for way, num_tokens in product(options.ways, options.tokens):
        if way.startswith("deepep") and (way == "deepep" or num_tokens <= MOST_OF_FEW):
            results.append({"way": way, "senders": 0, "blocks": 0})
            results[-1] |= {"tokens": num_tokens, "rows": "bf16"}
            results[-1] |= measure_deep_ep(num_tokens, way)
            if rank == 0:
                print(json.dumps(results[-1]), flush=True)
    for way in [each for each in options.ways if not each.startswith("deepep")]:
        sizes = product(options.senders, options.blocks) if way == "peers" else [(0, 0)]
        for senders, blocks in sizes:
            set_transport(group, Transport(way), senders=senders, blocks=blocks)
            for num_tokens, dtype in product(options.tokens, options.rows):
                found = {"way": way, "senders": senders, "blocks": blocks}
                found |= {"tokens": num_tokens, "rows": dtype}
                results.append(found | measure(num_tokens, group, dtype))
                if rank == 0:
                    print(json.dumps(results[-1]), flush=True)
            if rank == 0:
                print(describe_transport(group), flush=True)
    if rank == 0 and options.out:
        options.out.write_text(json.dumps(results, indent=1))
    dist.barrier()
    os._exit(0)


def measure(num_tokens, group, dtype):
    """Microseconds of both ways, eager and replayed: median, deciles 1 and 9."""
    num_ranks = dist.get_world_size()
    x, ids, weights = make_inputs(num_tokens)
    slots = torch.arange(NUM_EXPERTS, dtype=torch.int32, device="cuda")[:, None]
    one = torch.ones(NUM_EXPERTS, dtype=torch.int32, device="cuda")
    tables = (slots, one, NUM_EXPERTS // num_ranks)
    sizes = {}
    room = int(num_tokens * TOP_K * 1.3 + 512)
    if dtype == "fp8":
        sizes["scales"] = torch.rand(num_tokens, HIDDEN // 128, device="cuda")
        x, answers = x.to(torch.float8_e4m3fn), x.new_empty(room, HIDDEN)

    def both():
        sent = dispatch(x, ids, weights, *tables, group, **sizes)
        done = sent.rows if dtype == "bf16" else answers[: len(sent.rows)]
        return combine(done, sent.handle)

    if dtype == "bf16":
        check(both(), x, weights)
    eager = times(both)
    sizes |= {"capacity": num_tokens, "max_rows": room}
    for _ in range(3):
        both()
    torch.cuda.synchronize()
    return {"eager": eager, "replayed": replayed(both)}


def measure_deep_ep(num_tokens, way):
    """As `measure`; the normal kernels wait on the host and are not replayed."""
    inputs = make_inputs(num_tokens)
    none = torch.empty(0)
    layer = Layer(
        torch.arange(NUM_EXPERTS), NUM_EXPERTS // dist.get_world_size(), none, none
    )
    method = (DeepEp if way == "deepep" else DeepEpLowLatency)(layer, inputs)

    def both():
        return method.combine(method.dispatch(*inputs)[0])

    check(both(), inputs[0], inputs[2])
    eager = times(both)
    return {"eager": eager, "replayed": replayed(both) if way == "deepep-ll" else None}


def make_inputs(num_tokens):
    torch.manual_seed(dist.get_rank())
    x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    ids = torch.rand(num_tokens, NUM_EXPERTS, device="cuda").topk(TOP_K).indices
    return x, ids, torch.rand(num_tokens, TOP_K, device="cuda")


def check(sums, x, weights):
    """Of experts that return their rows as they are."""
    wanted = x.float() * weights.sum(1, keepdim=True)
    error = float((sums.float() - wanted).norm() / wanted.norm())
    assert error < 0.02, error


def replayed(call):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return times(graph.replay)


def times(call):
    found = []
    for turn in range(TURNS + 5):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 5:
            found.append(begin.elapsed_time(end) * 1000)
    all_found = [None] * dist.get_world_size()
    dist.all_gather_object(all_found, found)
    slowest = sorted(map(max, zip(*all_found, strict=True)))
    tenth = len(slowest) // 10
    return [round(slowest[i], 1) for i in (len(slowest) // 2, tenth, -1 - tenth)]


if __name__ == "__main__":
    main()
