"""Times whole models whose routers replay a real trace, under several placements.

    torchrun --nproc-per-node 2 benchmarks/exchange/model.py --plans PLANS --out FILE

Random weights in the shapes of real models, attention on each rank's own sequences,
experts spread over the ranks. PLANS holds ``MODEL-PLACEMENT-RANKS.json``, planned on
one half of the trace; the tokens are of the other. The placements take turns. Where the
planning core is installed, rank 0 adds what the evaluator says of the same tokens:
rows, which must be equal, and seconds.

Of Mixtral only loads were recorded, per question: `counted.draw_tokens` says what is
real about its routing and what is not.

Legend: B sequences, S their length, T = B x S tokens of a rank, K top-k, L layers, H
hidden.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from cases import read_held_out, tokens_of_ranks
from methods import Layer, Moetuner
from moetuner import read_placement
from moetuner.ops import check_overflow
from prediction import predicted_step
from run import join_group, summary, write_results
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from moetuner import Placement
    from moetuner.trace import Trace

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
    Model(
        "mixtral-8x7b",
        "mixtral-8x7b-mmlu-ajtejankar/per_question_counts.npz",
        4096,
        14336,
    ),
]
PLACEMENTS = ("contiguous", "lpt", "joint")
PARTS = ("model", "experts")  # that are timed


class Phase(NamedTuple):
    """Tokens of a rank in one step; a decoded token attends to CONTEXT others."""

    name: str
    batch: int
    length: int

    @property
    def num_tokens(self):
        return self.batch * self.length

    @property
    def decodes(self):
        return self.length == 1


PHASES = [Phase("prefill", 4, 1024), Phase("decode", 128, 1)]


class Network:
    """Attention and experts of all layers; the experts' places can be changed."""

    def __init__(self, model: Model, num_layers: int, num_experts: int) -> None:
        self.model = model
        self.num_experts = num_experts
        rng = torch.Generator(device="cuda").manual_seed(0)

        def weight(*shape: int) -> torch.Tensor:
            made = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            return made.normal_(std=shape[-1] ** -0.5, generator=rng)

        hidden, inner = model.hidden, model.inner
        self.attention = [
            (
                weight((model.heads + 2 * model.kv_heads) * HEAD, hidden),
                weight(hidden, hidden),
            )
            for _ in range(num_layers)
        ]
        size = num_experts // dist.get_world_size()
        # The weights of this rank's slots, the same numbers whoever the experts are.
        self.weights = [
            (weight(size, 2 * inner, hidden), weight(size, hidden, inner))
            for _ in range(num_layers)
        ]

    def place(self, slots, sizes) -> list[Moetuner]:
        size = self.num_experts // dist.get_world_size()
        return [
            Moetuner(
                Layer(torch.from_numpy(row.astype(np.int64)), size, *own), sizes=sizes
            )
            for row, own in zip(slots, self.weights, strict=True)
        ]

    def forward(self, phase: Phase, given: Inputs, layers) -> torch.Tensor:
        x = given.x
        for number, (moe, ids) in enumerate(zip(layers, given.ids, strict=True)):
            x = x + self.attend(phase, number, x, given.cache)
            x = x + self.think(moe, x, ids, given.weights)
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


class Inputs(NamedTuple):
    """What a step reads; the same for all placements, so that graphs share it."""

    x: torch.Tensor  # [T, H]
    cache: list[torch.Tensor] | None
    ids: list[torch.Tensor]  # of each layer, int64 [T, K]
    weights: torch.Tensor  # [T, K]

    @classmethod
    def of(cls, model: Model, phase: Phase, tokens: Trace) -> Inputs:
        chosen = torch.from_numpy(tokens.topk_ids[tokens.home_rank == dist.get_rank()])
        ids = [layer.contiguous().cuda() for layer in chosen.long().unbind(1)]
        rng = torch.Generator(device="cuda").manual_seed(dist.get_rank())
        shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": rng}
        x = torch.randn(phase.num_tokens, model.hidden, **shape)
        cache = None
        if phase.decodes:
            past = (phase.batch, model.kv_heads, CONTEXT, HEAD)
            cache = [torch.randn(past, **shape) for _ in "kv"]
        weights = torch.full(ids[0].shape, 1 / tokens.top_k, device="cuda")
        return cls(x, cache, ids, weights)


class Step:
    """One step of a phase under one placement, from a CUDA graph where it decodes.

    ``model`` is all of it, ``experts`` the exchange and the experts of all layers.
    ``counters`` [L, ...] are those of one run of ``model``.
    """

    def __init__(self, network: Network, phase: Phase, slots, given: Inputs) -> None:
        sizes = None
        if phase.decodes:
            room = dist.get_world_size() * given.ids[0].numel()
            sizes = {"capacity": phase.num_tokens, "max_rows": room}
        self.layers = network.place(slots, sizes)
        self.network, self.phase, self.given = network, phase, given
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, object]] = {}
        self.run("model")  # makes the communicator, loads kernels
        for layer in self.layers:
            layer.counters.zero_()
        self.run("model")
        self.counters = torch.stack([layer.counters for layer in self.layers]).cpu()
        if phase.decodes:
            for layer in self.layers:
                check_overflow(layer.sent.handle.overflow)
            for part in PARTS:
                self.capture(part)

    def run(self, part: str) -> object:
        if part in self.graphs:
            return self.graphs[part][0].replay()
        if part == "model":
            return self.network.forward(self.phase, self.given, self.layers)
        for moe, ids in zip(self.layers, self.given.ids, strict=True):
            self.network.think(moe, self.given.x, ids, self.given.weights)
        return None

    def capture(self, part: str) -> None:
        """From now on `run` replays a graph.

        What it reads belongs to this object: inputs, weights, tables, counters. Memory
        made inside belongs to the graph.
        """
        self.run(part)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = self.run(part)
        self.graphs[part] = graph, made

    def milliseconds(self, part: str) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        self.run(part)
        end.record()
        torch.cuda.synchronize()
        found = torch.tensor(start.elapsed_time(end), device="cuda")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def traffic(self) -> np.ndarray:
        """Rows from rank to rank, all layers together, int64 [G, G]."""
        num_ranks = dist.get_world_size()
        every = [torch.empty(0)] * num_ranks
        dist.all_gather_object(every, self.counters)
        return torch.stack(every)[:, :, 1 : 1 + num_ranks].sum(1).numpy()


def run_model(model: Model, options, results: list[dict[str, object]]) -> None:
    """Adds to the results, and writes them, phase by phase."""
    num_ranks = dist.get_world_size()
    most = num_ranks * max(phase.num_tokens for phase in PHASES)
    held_out = read_held_out(model.trace, most)
    placements = {
        name: read_placement(options.plans / f"{model.name}-{name}-{num_ranks}.json")
        for name in PLACEMENTS
    }
    network = Network(model, held_out.num_layers, held_out.num_experts)
    for phase in PHASES:
        tokens = tokens_of_ranks(held_out, num_ranks, phase.num_tokens)
        results += run_phase(network, phase, tokens, placements, options.repeats)
        write_results(options.out, results)
        gc.collect()
        torch.cuda.empty_cache()  # for NCCL, which takes its own


def run_phase(
    network: Network,
    phase: Phase,
    tokens: Trace,
    placements: dict[str, Placement],
    repeats: int,
) -> list[dict[str, object]]:
    model, rank = network.model, dist.get_rank()
    given = Inputs.of(model, phase, tokens)
    steps = {
        name: Step(network, phase, placement.slot_experts, given)
        for name, placement in placements.items()
    }
    if rank == 0:
        used = torch.cuda.max_memory_allocated() / 1e9
        print(model.name, phase.name, f"is ready, {used:.1f} GB at most", flush=True)
    samples = {name: {part: [] for part in PARTS} for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            for part, times in samples[name].items():
                times.append(step.milliseconds(part))
    results = []
    for name, step in steps.items():
        traffic = step.traffic()
        result = {
            "shape": model.name,
            "phase": phase.name,
            "tokens_per_rank": phase.num_tokens,
            "placement": name,
            **{part: summary(times) for part, times in samples[name].items()},
            "traffic": traffic.tolist(),
        }
        if rank == 0:
            said = predicted_step(model.name, tokens, placements[name])
            assert said is None or np.array_equal(said["traffic"], traffic), name
            result["predicted"] = said
            print(name, *(result[part] for part in PARTS), flush=True)
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=Path, default=Path())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--model", action="append", help="only these, by name")
    options = parser.parse_args()
    join_group()
    results: list[dict[str, object]] = []
    # Not cuDNN's attention: with grouped queries it met an illegal instruction once.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(backends):
        for model in MODELS:
            if not options.model or model.name in options.model:
                run_model(model, options, results)
                gc.collect()
                torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
