"""Times the exchange on all ranks of a machine, every method in turn.

    torchrun --nproc-per-node 8 benchmarks/exchange/run.py --plans PLANS --out FILE.json

Times are the slowest rank's, medians over repetitions that run the methods one after
another; rows are those that leave a rank, added up over ranks.
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

import torch
import torch.distributed as dist
from cases import CASES, GRID, Case, routings
from methods import AllGather, Layer, Method, Moetuner, PerExpert
from moetuner.ops import check_overflow

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import environment

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


def timed(method: Method, x, ids, weights) -> tuple[dict[str, float], torch.Tensor]:
    """Milliseconds of each step, by events on this rank."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    dist.barrier()
    torch.cuda.synchronize()
    events[0].record()
    rows, ends = method.dispatch(x, ids, weights)
    events[1].record()
    done = method.layer.experts(rows, ends)
    events[2].record()
    out = method.combine(done)
    events[3].record()
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) for a, b in pairwise(events)]
    return dict(zip(STEPS, [*spans, sum(spans)], strict=True)), out


def timed_exchange(method: Method, x, ids, weights) -> float:
    """Milliseconds of dispatch and combine with no experts between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    start.record()
    rows, _ = method.dispatch(x, ids, weights)
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


def replayed(method: Moetuner, x, ids, weights, repeats: int) -> dict[str, float]:
    """Dispatch + combine from a CUDA graph of the fixed form, without experts."""

    def both():
        rows, _ = method.dispatch(x, ids, weights)
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


def methods_of(case, routing, rank, num_ranks):
    size = -(-case.num_experts // num_ranks)
    blocks = torch.arange(size * num_ranks)
    layer = make_layer(case, blocks, rank, num_ranks)
    found = [PerExpert(layer, "all_to_all per expert"), AllGather(layer, "all_gather")]
    layers = {"contiguous": layer}
    if routing.tuned is not None:
        layers["tuned"] = make_layer(case, routing.tuned, rank, num_ranks)
    # Real routing and few tokens are uneven: room for twice the mean.
    choices = case.num_tokens * case.top_k
    uneven = routing.tuned is not None or choices < 1024
    room = choices * 2 if uneven else choices * 5 // 4
    sizes = {"capacity": case.num_tokens, "max_rows": room}
    for name, own in layers.items():
        found.append(Moetuner(own, f"moetuner, {name}"))
        found.append(Moetuner(own, f"moetuner, {name}, fixed", sizes))
    return found


def run_case(case: Case, options: argparse.Namespace) -> list[dict[str, object]]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    results = []
    layers = routings(case, rank, num_ranks, options.plans, options.layers)
    for number, routing in enumerate(layers):
        ids = routing.ids
        rng = torch.Generator(device="cuda").manual_seed(rank)
        x = torch.randn(
            len(ids), case.hidden, device="cuda", dtype=torch.bfloat16, generator=rng
        )
        weights = torch.rand(ids.shape, device="cuda", generator=rng)
        methods = methods_of(case, routing, rank, num_ranks)
        first = None
        for method in methods:
            _, out = timed(method, x, ids, weights)
            first = out.float() if first is None else first
            error = float((out.float() - first).norm() / first.norm().clamp(min=1e-9))
            assert error < 0.02, (case, method.name, error)
            if isinstance(method, Moetuner):
                method.count_rows_sent(x, ids, weights)
                if method.sizes:  # all shares travel, however full
                    method.rows_sent = (num_ranks - 1) * method.sizes["capacity"]
                    check_overflow(method.sent.overflow)
        samples = {m.name: {s: [] for s in (*STEPS, "exchange")} for m in methods}
        for _ in range(options.repeats):
            for method in methods:
                times, _ = timed(method, x, ids, weights)
                times["exchange"] = timed_exchange(method, x, ids, weights)
                for step, value in slowest(times).items():
                    samples[method.name][step].append(value)
        for method in methods:
            rows = torch.tensor(method.rows_sent, device="cuda")
            dist.all_reduce(rows)
            result = {
                "case": str(case),
                "layer": number,
                "method": method.name,
                "rows": int(rows),
                "bytes": int(rows) * case.hidden * 2,
            }
            result |= {s: summary(v) for s, v in samples[method.name].items()}
            if isinstance(method, Moetuner) and method.sizes:
                result["replayed"] = replayed(method, x, ids, weights, options.repeats)
            results.append(result)
        del methods, method, out, first
        torch.cuda.empty_cache()
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


def leave_group(out: Path, results: list[dict[str, object]]) -> None:
    """Rank 0 writes the results, with what made them."""
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
    dist.destroy_process_group()


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
        if dist.get_rank() == 0:
            for r in results[-6:]:
                print(r["case"], r["method"], r["rows"], r["exchange"], flush=True)
    leave_group(options.out, results)


if __name__ == "__main__":
    main()
