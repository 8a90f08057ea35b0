"""Times the exchange on all ranks of a machine, every method in turn.

    torchrun --nproc-per-node 8 benchmarks/exchange/run.py --plans PLANS --out FILE.json

Times are the slowest rank's, medians over repetitions that run the methods one after
another; rows are those that leave a rank, added up over ranks. ``follow``: the same
tokens, each held where its first expert of the layer before is under that placement,
and left where that of this layer is. All methods must make the same sums; where the
planning core is installed, rows from rank to rank must equal the evaluator's.

PLANS holds ``NAME-joint-RANKS.json`` and, from `moetuner plan --homes follow --favour
few-ranks`, ``NAME-joint-follow-RANKS.json``, planned on the other half of each real
trace.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from cases import CASES, FOLLOW, GRID, Case, Routing, routings
from methods import AllGather, Follow, Layer, Method, Moetuner, PerExpert
from moetuner.ops import check_overflow
from prediction import predicted_traffic

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import environment

if TYPE_CHECKING:
    from moetuner import Placement

STEPS = ("dispatch", "experts", "combine", "layer")  # of one call with experts


def make_layer(case: Case, slots: torch.Tensor, rank: int, num_ranks: int) -> Layer:
    size = len(slots) // num_ranks
    rng = torch.Generator(device="cuda").manual_seed(7)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": rng}
    gate_up = torch.randn(case.num_experts, 2, case.hidden, **shape) * 0.02
    mine = slots[rank * size : (rank + 1) * size].clamp(min=0).cuda()
    # An expert is its own row of numbers, repeated: small to make, unlike others.
    inner = torch.ones(1, case.inner, 1, device="cuda", dtype=torch.bfloat16)
    gate = gate_up[mine, 0][:, None] * inner
    up = gate_up[mine, 1][:, None] * inner
    down = gate.transpose(1, 2).contiguous() / case.inner
    return Layer(slots, size, torch.cat([gate, up], dim=1), down)


def timed(method: Method) -> tuple[dict[str, float], Any]:
    """Milliseconds of each step, by events on this rank; and what came of it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    dist.barrier()
    torch.cuda.synchronize()
    events[0].record()
    rows, ends = method.dispatch(*method.inputs)
    events[1].record()
    done = method.layer.experts(rows, ends)
    events[2].record()
    out = method.combine(done)
    events[3].record()
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) for a, b in pairwise(events)]
    return dict(zip(STEPS, [*spans, sum(spans)], strict=True)), out


def timed_exchange(method: Method) -> float:
    """Milliseconds of dispatch and combine with no experts between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    rows, _ = method.dispatch(*method.inputs)
    method.combine(rows)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def slowest(times: dict[str, float]) -> dict[str, float]:
    found = torch.tensor(list(times.values()), device="cuda")
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return dict(zip(times, found.tolist(), strict=True))


def summary(samples: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_ms": round(median, 4), "iqr_ms": round(high - low, 4)}


def replayed(method: Moetuner, repeats: int) -> dict[str, float]:
    """Dispatch + combine from a CUDA graph of the fixed form, without experts."""

    def both():
        rows, _ = method.dispatch(*method.inputs)
        return method.combine(rows)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    found = []
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(repeats):
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    worst = torch.tensor(found, device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    del graph, out
    return summary(worst.tolist())


def inputs_of(case: Case, routing: Routing, rank: int) -> tuple[torch.Tensor, ...]:
    """x [T, H], ids [T, K], weights [T, K] of the tokens that begin on this rank."""
    ids = routing.ids(routing.here(rank))
    rng = torch.Generator(device="cuda").manual_seed(rank)
    shape = (len(ids), case.hidden)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=rng)
    return x, ids, torch.rand(ids.shape, device="cuda", generator=rng)


def methods_of(case: Case, routing: Routing, rank: int, num_ranks: int) -> list[Method]:
    inputs = inputs_of(case, routing, rank)
    layers = {
        name: make_layer(case, slots_of(placement, routing), rank, num_ranks)
        for name, placement in routing.placements.items()
    }
    layer = layers["contiguous"]
    found = [
        PerExpert(layer, "all_to_all per expert", inputs),
        AllGather(layer, "all_gather", inputs),
    ]
    # Real routing and few tokens are uneven: room for twice the mean.
    choices = case.num_tokens * case.top_k
    room = choices * 2 if case.trace or choices < 1024 else choices * 5 // 4
    sizes = {"capacity": case.num_tokens, "max_rows": room}
    for name, own in layers.items():
        if name != FOLLOW:
            found.append(Moetuner(own, name, inputs))
            found.append(Moetuner(own, name, inputs, sizes))
        if case.trace and name != "tuned":
            found.append(follow(case, routing, name, own, inputs))
    return found


def follow(case: Case, routing: Routing, name: str, layer: Layer, inputs) -> Follow:
    """The same tokens, held where their first experts of the layer before are."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    tokens = routing.followed(routing.placements[name], rank)
    number = torch.from_numpy(tokens).cuda()
    gathered = []
    for mine in (inputs[0], inputs[2]):
        every = mine.new_empty(num_ranks * len(mine), mine.shape[1])
        dist.all_gather_into_tensor(every, mine)
        gathered.append(every[number])
    keys = torch.stack([number // case.num_tokens, number % case.num_tokens], dim=1)
    here = (gathered[0], routing.ids(tokens), gathered[1])
    return Follow(layer, name, here, keys, case.num_tokens)


def slots_of(placement: Placement, routing: Routing) -> torch.Tensor:
    return torch.from_numpy(placement.slot_experts[routing.layer].astype(np.int64))


def check(case: Case, routing: Routing, methods: list[Method]) -> None:
    """Every method makes the same sums, and sends the rows that it should."""
    num_ranks, first = dist.get_world_size(), None
    for method in methods:
        out = method.at_home(timed(method)[1]).float()
        first = out if first is None else first
        error = float((out - first).norm() / first.norm().clamp(min=1e-9))
        assert error < 0.02, (case, method.name, error)
        if not isinstance(method, Moetuner):
            continue
        mine = method.count_rows()
        if method.sizes:  # all shares travel, however full
            method.rows_sent = (num_ranks - 1) * method.sizes["capacity"]
            check_overflow(method.sent.handle.overflow)
        every = [None] * num_ranks
        dist.all_gather_object(every, mine.tolist())
        placement = routing.placements[method.placement]
        said = predicted_traffic(routing.tokens, placement, method.homes)
        wrong = said is not None and (said[routing.layer] != np.array(every)).any()
        assert not wrong, (case, method.name, every, said[routing.layer])


def run_layer(case: Case, routing: Routing, options) -> list[dict[str, object]]:
    methods = methods_of(case, routing, dist.get_rank(), dist.get_world_size())
    check(case, routing, methods)
    samples = {m.name: {s: [] for s in (*STEPS, "exchange")} for m in methods}
    for _ in range(options.repeats):
        for method in methods:
            times, _ = timed(method)
            times["exchange"] = timed_exchange(method)
            for step, value in slowest(times).items():
                samples[method.name][step].append(value)
    results = []
    for method in methods:
        back = method.rows_sent if method.rows_back is None else method.rows_back
        rows = torch.tensor([method.rows_sent, back], device="cuda")
        dist.all_reduce(rows)
        result = {
            "case": str(case),
            "trace_layer": int(routing.tokens.layer_ids[routing.layer]),
            "method": method.name,
            "rows": int(rows[0]),
            "rows_back": int(rows[1]),
            "bytes": int(rows[0]) * case.hidden * 2,
        }
        result |= {s: summary(v) for s, v in samples[method.name].items()}
        if isinstance(method, Moetuner) and method.sizes:
            result["replayed"] = replayed(method, options.repeats)
        results.append(result)
    return results


def run_case(case: Case, options: argparse.Namespace) -> list[dict[str, object]]:
    results = []
    for routing in routings(case, dist.get_world_size(), options.plans, options.layers):
        results += run_layer(case, routing, options)
        torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        for r in results:
            print(r["case"], r["trace_layer"], r["method"], r["rows"], flush=True)
            print("   ", *(r[name]["median_ms"] for name in ("exchange", "layer")))
    return results


def nccl_version() -> list[int]:
    """Of the library that is loaded, which may not be the one torch was built with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return [version.value // 10000, version.value // 100 % 100, version.value % 100]


def join_group() -> None:
    """This process becomes a rank of the machine that torchrun started it on."""
    local = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))


def write_results(out: Path, results: list[dict[str, object]]) -> None:
    """Rank 0 writes what there is so far, with what made it."""
    if dist.get_rank() == 0:
        about = environment() | {
            "command": " ".join(["torchrun", "...", *sys.argv]),
            "ranks": dist.get_world_size(),
            "devices": torch.cuda.device_count(),
            "nccl": ".".join(map(str, nccl_version())),
        }
        text = json.dumps({"environment": about, "results": results}, indent=1)
        out.write_text(text + "\n")
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=Path, default=Path())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--layers", type=int, default=4, help="of a real trace")
    parser.add_argument("--case", action="append", help="only these, by name")
    parser.add_argument("--grid", action="store_true", help="tokens x hidden instead")
    options = parser.parse_args()
    join_group()
    results = []
    for case in GRID if options.grid else CASES:
        if options.case and case.name not in options.case:
            continue
        results += run_case(case, options)
        write_results(options.out, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
