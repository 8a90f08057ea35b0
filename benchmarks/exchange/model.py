"""Times whole models whose routers replay a real trace, under several placements.

    torchrun --nproc-per-node 2 benchmarks/exchange/model.py --plans PLANS --out FILE

Random weights in the shapes of real models, attention on each rank's own sequences,
experts spread over the ranks. PLANS holds ``MODEL-PLACEMENT-RANKS.json``, planned on
one half of the trace; the tokens are of the other. The placements take turns. Where the
planning core is installed, rank 0 adds what the evaluator says of the same tokens:
rows, which must be equal, and seconds.

Legend: B sequences, S their length, T = B x S tokens of a rank, L layers, H hidden.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from cases import read_held_out
from methods import Layer, Moetuner
from moetuner import read_placement
from moetuner.ops import check_overflow
from moetuner.trace import Trace
from run import join_group, leave_group, summary

sys.path.insert(0, str(Path(__file__).parents[1]))

HEAD = 64
CONTEXT = 1024  # tokens that a decoded one attends to


class Model(NamedTuple):
    """Sizes, and the trace that its router replays."""

    name: str
    trace: str
    hidden: int
    inner: int

    @property
    def heads(self):
        return self.hidden // HEAD

    @property
    def kv_heads(self):
        return self.heads // (5 if self.heads % 5 == 0 else 4)


MODELS = [
    Model("gpt-oss", "gpt-oss-20b-fingerprinting/mmlu.npz", 2880, 2880),
    Model("deepseek-v2-lite", "deepseek-v2-lite-esft/law.npz", 2048, 1408),
]
PLACEMENTS = ("contiguous", "lpt", "joint")


class Phase(NamedTuple):
    """Tokens of a rank in one step; a decoded token attends to CONTEXT others."""

    name: str
    batch: int
    length: int

    @property
    def num_tokens(self):
        return self.batch * self.length


PHASES = [Phase("prefill", 4, 1024), Phase("decode", 128, 1)]


class Network:
    """Attention and experts of all layers; the experts' places can be changed."""

    def __init__(self, model: Model, num_layers: int, num_experts: int) -> None:
        self.model = model
        self.num_experts = num_experts
        rng = torch.Generator(device="cuda").manual_seed(0)
        shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": rng}
        hidden, scale = model.hidden, model.hidden**-0.5
        self.attention = [
            (
                torch.randn((model.heads + 2 * model.kv_heads) * HEAD, hidden, **shape)
                * scale,
                torch.randn(hidden, hidden, **shape) * scale,
            )
            for _ in range(num_layers)
        ]
        size = num_experts // dist.get_world_size()
        # The weights of this rank's slots, the same numbers whoever the experts are.
        self.weights = [
            (
                torch.randn(size, 2 * model.inner, hidden, **shape) * scale,
                torch.randn(size, hidden, model.inner, **shape) * model.inner**-0.5,
            )
            for _ in range(num_layers)
        ]

    def place(self, slots, sizes) -> list[Moetuner]:
        size = self.num_experts // dist.get_world_size()
        return [
            Moetuner(
                Layer(torch.from_numpy(row.astype(np.int64)), size, *own), "", sizes
            )
            for row, own in zip(slots, self.weights, strict=True)
        ]

    def forward(self, phase: Phase, x, cache, ids, weights, layers) -> torch.Tensor:
        for number, moe in enumerate(layers):
            x = x + self.attend(phase, number, x, cache)
            x = x + self.think(moe, x, ids[number], weights)
        return x

    def think(self, moe: Moetuner, x, ids, weights) -> torch.Tensor:
        rows, ends = moe.dispatch(_norm(x), ids, weights)
        return moe.combine(moe.layer.experts(rows, ends))

    def attend(self, phase: Phase, number: int, x, cache) -> torch.Tensor:
        into, out = self.attention[number]
        model = self.model
        every = torch.nn.functional.linear(_norm(x), into)
        every = every.view(phase.batch, phase.length, -1, HEAD).transpose(1, 2)
        q, k, v = every.split([model.heads, model.kv_heads, model.kv_heads], dim=1)
        if cache is not None:  # its last place is this token's
            for kept, own in zip(cache, (k, v), strict=True):
                kept[:, :, -1:] = own
            k, v = cache
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=cache is None, enable_gqa=True
        )
        return torch.nn.functional.linear(mixed.transpose(1, 2).reshape(x.shape), out)


def _norm(x):
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


class Step:
    """One step of a phase under one placement, from a CUDA graph where it decodes.

    ``model`` is all of it, ``experts`` the exchange and the experts of all layers.
    """

    def __init__(self, network: Network, phase: Phase, slots, ids, weights) -> None:
        num_tokens, model = phase.num_tokens, network.model
        decodes = phase.length == 1
        sizes = None
        if decodes:
            room = dist.get_world_size() * num_tokens * ids[0].shape[1]
            sizes = {"capacity": num_tokens, "max_rows": room}
        layers = network.place(slots, sizes)
        rng = torch.Generator(device="cuda").manual_seed(dist.get_rank())
        shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": rng}
        x = torch.randn(num_tokens, model.hidden, **shape)
        cache = None
        if decodes:
            past = (phase.batch, model.kv_heads, CONTEXT, HEAD)
            cache = [torch.randn(past, **shape) for _ in "kv"]

        def experts():
            for number, moe in enumerate(layers):
                network.think(moe, x, ids[number], weights)

        self.runs = {
            "model": lambda: network.forward(phase, x, cache, ids, weights, layers),
            "experts": experts,
        }
        self.runs["model"]()  # makes the communicator, loads kernels
        for layer in layers:
            layer.counters.zero_()
        self.runs["model"]()
        self.counters = torch.stack([layer.counters for layer in layers]).cpu()
        if decodes:
            for layer in layers:
                check_overflow(layer.sent.overflow)
            self.runs = {name: captured(run) for name, run in self.runs.items()}

    def milliseconds(self, name: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        self.runs[name]()
        end.record()
        torch.cuda.synchronize()
        found = torch.tensor(start.elapsed_time(end), device="cuda")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)


def captured(run):
    """The same from a CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(graph=graph, kept=(run, kept)):  # what the graph reads and writes
        graph.replay()

    return replay


def predicted(model, held_out, tokens, placement) -> dict[str, object] | None:
    """The evaluator on the same tokens, each rank's at its home; or None."""
    try:
        from moetuner.evaluation import evaluate
    except ImportError:
        return None
    from moetuner.cost import CostModel, Homes, shape_for_model

    homes = np.repeat(np.arange(len(tokens), dtype=np.int16), len(tokens[0]))
    part = Trace(
        topk_ids=held_out.topk_ids[np.concatenate(tokens)],
        num_experts=held_out.num_experts,
        layer_ids=held_out.layer_ids,
        home_rank=homes,
    )
    cost = CostModel(shape=shape_for_model(model), homes=Homes.RECORDED)
    found = evaluate(part, placement, cost)
    return {
        "milliseconds": found.modelled_seconds * 1e3,
        "exchange_milliseconds": (found.dispatch_seconds + found.combine_seconds) * 1e3,
        "traffic": found.traffic.tolist(),
    }


def run_model(model: Model, options) -> list[dict[str, object]]:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    held_out = read_held_out(model.trace)
    network = Network(model, held_out.num_layers, held_out.num_experts)
    results = []
    for phase in PHASES:
        first = np.arange(num_ranks)[:, None] * phase.num_tokens
        tokens = (first + np.arange(phase.num_tokens)) % held_out.num_tokens
        ids = held_out.topk_ids[tokens[rank]].astype(np.int64)
        ids = [
            torch.from_numpy(np.ascontiguousarray(ids[:, n])).cuda()
            for n in range(held_out.num_layers)
        ]
        weights = torch.full(ids[0].shape, 1 / ids[0].shape[1], device="cuda")
        placements, steps = {}, {}
        for name in PLACEMENTS:
            file = options.plans / f"{model.name}-{name}-{num_ranks}.json"
            placements[name] = read_placement(file)
            steps[name] = Step(
                network, phase, placements[name].slot_experts, ids, weights
            )
        if rank == 0:
            print(model.name, phase.name, "is ready", flush=True)
        samples = {name: {"model": [], "experts": []} for name in steps}
        for _ in range(options.repeats):
            for name, step in steps.items():
                for part, times in samples[name].items():
                    times.append(step.milliseconds(part))
        for name, step in steps.items():
            every = [torch.empty_like(step.counters) for _ in range(num_ranks)]
            dist.all_gather_object(every, step.counters)
            traffic = torch.stack(every)[:, :, 1 : 1 + num_ranks].sum(1)
            result = {
                "shape": model.name,
                "phase": phase.name,
                "tokens_per_rank": phase.num_tokens,
                "placement": name,
                **{part: summary(times) for part, times in samples[name].items()},
                "traffic": traffic.tolist(),
            }
            if rank == 0:
                said = predicted(model.name, held_out, tokens, placements[name])
                assert said is None or np.array_equal(said["traffic"], traffic), name
                result["predicted"] = said
            results.append(result)
        del steps
        torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=Path, default=Path())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    join_group()
    results = []
    with torch.no_grad():
        for model in MODELS:
            results += run_model(model, options)
    leave_group(options.out, results)


if __name__ == "__main__":
    main()
