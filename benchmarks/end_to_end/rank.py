r"""One rank of a run: of torchrun, or of `two_nodes.py`.

    torchrun --nproc-per-node 8 benchmarks/end_to_end/rank.py CASE --out FILE.json
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST \
        benchmarks/end_to_end/rank.py CASE --out FILE.json

Several cases run one after another. Every machine needs the folders of the cases; rank
0 writes the file. Where ranks are more than GPUs, Gloo carries rows, or NCCL >= 2.30
with NCCL_MULTI_RANK_GPU_ENABLE=1.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beside  # noqa: F401
import told
import torch
import torch.distributed as dist
from bench import Bench
from case import read_case
from feeds import Text
from harness import environment
from place import join
from rehearsal import Rehearsed, rehearse
from repetitions import Limits, repeat, take_apart
from torch.nn.attention import SDPBackend, sdpa_kernel
from trained import TrainedExperts
from variants import Variant, runnable

if TYPE_CHECKING:
    from case import Case
    from place import Place

COMMAND = "MOETUNER_BENCH_COMMAND"  # what a person typed, where ranks were started
SHARE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"  # of a GPU's processors, for each rank


def run_case(case: Case, options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Everything of one case, the same on all ranks."""
    wanted = runnable(case, options.only)
    say = Progress(case)
    bench = make_bench(case, wanted, place, options)
    say(f"{len(wanted)} variants made")
    limits = Limits(
        repeats=options.repeats, seconds=options.seconds, parts=options.parts
    )
    rehearsed = rehearse(bench)
    say("all rehearsed, and right")
    turns = repeat(bench, limits)
    say(f"{len(turns[0])} repetitions timed")
    parts = take_apart(bench, limits)
    say("parts timed")
    results = []
    for number, (variant, one) in enumerate(zip(wanted, rehearsed, strict=True)):
        results.append(
            {"variant": variant.name, **asdict(variant)}
            | {"how": one.how, "difference": one.difference, **one.counted}
            | {"prefill_ms": [turn.prefill for turn in turns[number]]}
            | {"decode_ms": [turn.decode for turn in turns[number]]}
            | {"lost": [turn.lost for turn in turns[number]]}
            | {"parts": parts[number], "said": said(bench, number, one)}
        )
    return {"case": case.about(), "shaped": bool(place.node), "results": results}


class Progress:
    """Rank 0 says how far a case is, and since when it is at work."""

    def __init__(self, case: Case) -> None:
        self.name, self.begun = case.family.name, time.monotonic()

    def __call__(self, what: str) -> None:
        if dist.get_rank() == 0:
            since = time.monotonic() - self.begun
            print(f"{self.name}: {what}, {since:.1f} s", file=sys.stderr, flush=True)


def make_bench(
    case: Case, wanted: list[Variant], place: Place, options: argparse.Namespace
) -> Bench:
    """Weights drawn and routing replayed, or a trained model on real text."""
    if options.weights is None:
        return Bench(case, wanted, place)
    trained, text = TrainedExperts(options.weights), Text(case, options.text)
    return Bench(case, wanted, place, trained, text)


def said(bench: Bench, number: int, one: Rehearsed) -> dict[str, Any]:
    """Predicted milliseconds of both phases over all batches, rank 0 alone.

    Where routers choose by themselves: of the steps that were counted.
    """
    if dist.get_rank():
        return {}
    traces = dict(one.traces)
    if not bench.routes_itself:
        batches, sizes = bench.feed.batches, bench.case.sizes
        every = range(sizes.batches)
        steps = [batches.prefill(batch) for batch in every]
        traces["prefill"] = batches.as_trace(steps)
        if sizes.decode:
            pairs = itertools.product(every, range(sizes.decode))
            traces["decode"] = batches.as_trace([batches.decoded(*p) for p in pairs])
    stack = bench.stacks[number]
    return {
        phase: asdict(told.seconds(bench.case, stack.variant, stack.placement, trace))
        for phase, trace in traces.items()
    }


def attention_of(device: str):
    """Not cuDNN's: with grouped queries it met an illegal instruction once."""
    if device == "cpu":
        return nullcontext()
    flash, memory = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    return sdpa_kernel([flash, memory, SDPBackend.MATH])


def look_around() -> dict[str, str]:
    """The machine; leaves its GPU empty."""
    found = environment()
    torch.cuda.empty_cache()
    return found


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--task", type=json.loads, help="from two_nodes.py")
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that both ways to start a run have."""
    parser.add_argument("cases", nargs="+", type=Path, help="folders of plan.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="after which no repetition of a case begins",
    )
    parser.add_argument("--parts", type=int, default=2, help="repetitions by parts")
    parser.add_argument("--weights", type=Path, help="of train.py: routes by itself")
    parser.add_argument("--text", type=Path, help="of corpus.py, for it to read")
    parser.add_argument("--only", action="append", help="variants with that in a name")


def main() -> None:
    options = options_of()
    # Newer torch calls some collectives by other names; older knows only these.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    if options.task is None:
        first = os.environ["RANK"] == "0"
        machine = look_around() if first else {}  # before there is work on its GPU
    else:
        first, machine = options.task["rank"] == 0, options.task["machine"]
    place = join(options.task, device=options.device, backend=options.backend)
    found = []
    with torch.no_grad(), attention_of(options.device):
        for folder in options.cases:
            case = read_case(folder)
            if case.topology.num_ranks != dist.get_world_size():
                raise SystemExit(
                    f"{folder} is for {case.topology.num_ranks} ranks, here are "
                    f"{dist.get_world_size()}"
                )
            found.append(run_case(case, options, place))
            if first:  # what there is so far
                write(options, found, place, machine)
            gc.collect()
            torch.cuda.empty_cache()
    place.settle()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads abort the interpreter's own exit now and then


def write(
    options: argparse.Namespace,
    found: list[Any],
    place: Place,
    machine: dict[str, str],
) -> None:
    """The file, with what made it."""
    about = machine | {
        "command": os.environ.get(COMMAND, " ".join(["torchrun", "...", *sys.argv])),
        "ranks": str(dist.get_world_size()),
        "backend": options.backend,
        "network": place.network(),
    }
    if SHARE in os.environ:
        about["share_of_gpu"] = f"{os.environ[SHARE]} % of its processors for a rank"
    text = json.dumps({"environment": about, "cases": found}, indent=1)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
