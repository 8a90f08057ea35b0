"""Whole layers, exchange and experts, inside a node: in one piece, overlapped, peers.

    torchrun --nproc-per-node 2 benchmarks/exchange/whole_layers.py --out FILE

Shapes of DeepSeek-V2-Lite and gpt-oss-20b, experts chosen evenly, contiguous blocks of
experts. All methods run the same experts and must make the same sums. Every rank
launches a call after a barrier; a time is that of the slowest rank, from events on its
stream, in microseconds: median, first and ninth decile. *overlap* cuts a rank's tokens
in two (`ExchangeOptions.overlap`); *replayed* are CUDA graphs of the fixed form. DeepEP
takes part where it can be imported.

Legend: T tokens of a rank, K top-k, H hidden.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from cases import CASES, routings
from methods import Layer, Moetuner, PerExpert
from moetuner.nn.halves import halves_of
from moetuner.nn.overlap import run_halves
from moetuner.ops import check_overflow, describe_transport, set_transport
from one_node import times
from run import inputs_of, make_layer, slots_of, write_results

SHAPES = ("DeepSeek-V2-Lite law", "gpt-oss mmlu")  # of `cases.py`, without their traces


class Overlapped(Moetuner):
    """A layer that takes its tokens in two halves; with sizes, of the fixed form."""

    def __init__(self, layer: Layer, inputs, sizes=None):
        halves = {name: (rows + 1) // 2 for name, rows in (sizes or {}).items()}
        super().__init__(layer, "contiguous, overlap", inputs, halves)
        self.overflow = torch.zeros(1, dtype=torch.int32, device="cuda")

    def whole(self):
        halves = halves_of(*self.inputs, lambda _: self.candidates)
        return run_halves(halves, self._send, self._compute)

    def _send(self, half):
        self.dispatch(half.x, half.topk_ids, half.topk_weights)
        if self.sizes:
            self.overflow += self.sent.handle.overflow
        return self.sent

    def _compute(self, sent):
        return self.layer.experts(sent.rows, sent.end_offsets)


def whole_layer(method):
    """One call of a layer in one piece."""
    rows, ends = method.dispatch(*method.inputs)
    return method.combine(method.layer.experts(rows, ends))


def captured(call):
    """A call as a CUDA graph, and what it makes."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def check_sums(name, out, wanted):
    error = float((out.float() - wanted).norm() / wanted.norm())
    assert error < 0.02, (name, error)


def run_shape(case, options):
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    (shape,) = (c for c in CASES if c.name == case)
    shape = shape._replace(
        name=case.rpartition(" ")[0], num_tokens=options.tokens, trace=""
    )
    (routing,) = routings(shape, num_ranks, Path(), 1)
    slots = slots_of(routing.placements["contiguous"], routing)
    layer = make_layer(shape, slots, rank, num_ranks)
    inputs = inputs_of(shape, routing, rank)
    room = {"capacity": options.tokens, "max_rows": options.tokens * shape.top_k * 2}
    group = dist.group.WORLD.group_name

    def measure(method, call, transport, **blocks):
        set_transport(group, transport, **blocks)
        out = call()
        check_sums(method.name, out, wanted)
        found = {"case": str(shape), "method": method.name, "transport": transport}
        found |= blocks | {"layer_us": times(call)}
        if getattr(method, "sizes", None):
            graph, out = captured(call)
            graph.replay()
            check_sums(method.name, out, wanted)
            found["replayed_us"] = times(graph.replay)
            del graph
        for lost in (getattr(method, "overflow", None), _overflow(method)):
            if lost is not None:
                check_overflow(lost)
        if rank == 0:
            print(json.dumps(found), describe_transport(group), flush=True)
        return found

    per_expert = PerExpert(layer, "all_to_all per expert", inputs)
    wanted = whole_layer(per_expert).float()
    results = [measure(per_expert, partial(whole_layer, per_expert), "collectives")]
    if find_spec("deep_ep"):
        from deep_ep_method import DeepEp

        deep_ep = DeepEp(layer, inputs)
        results.append(measure(deep_ep, partial(whole_layer, deep_ep), "collectives"))
    for way in options.ways:
        for sizes in (None, room):
            one = Moetuner(layer, "contiguous", inputs, sizes)
            results.append(measure(one, partial(whole_layer, one), way))
            for blocks in options.blocks if way == "peers" else [0]:
                two = Overlapped(layer, inputs, sizes)
                results.append(measure(two, two.whole, way, blocks=blocks))
    return results


def _overflow(method):
    sent = getattr(method, "sent", None)
    return None if sent is None else sent.handle.overflow


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--shape", nargs="+", default=SHAPES, choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=["peers", "collectives"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 32, 48, 64])
    parser.add_argument("--backend", default="nccl")
    options = parser.parse_args()
    torch.cuda.set_device(int(os.environ["RANK"]) % torch.cuda.device_count())
    dist.init_process_group(options.backend)
    results = []
    for case in options.shape:
        results += run_shape(case, options)
        write_results(options.out, results)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
