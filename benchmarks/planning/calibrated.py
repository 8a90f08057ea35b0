"""How well a calibrated machine predicts: calibrates on some shapes, scores others.

    torchrun --nproc-per-node 4 benchmarks/planning/calibrated.py --device cpu
    torchrun --nproc-per-node 2 benchmarks/planning/calibrated.py --out FILE.json
    python benchmarks/planning/calibrated.py --seconds 25 --out FILE.json

A cell is a model's shape, a number of tokens of a rank and a placement: some layers of
made-up routing that none of the placements was planned on, run behind each other.
Prefill is launched, in the exact form; decoding is replayed from a CUDA graph of the
fixed form where one can hold it. Scores: the error of each cell, how many are within
15 %, how many pairs of placements are ranked as they were measured, and predicted
gains that were losses. Writes nothing where the machine was busy when it began.

Legend: T tokens of a rank, L layers, G ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import report
import torch
from moetuner.calibration.fit import Origin, fit_hardware
from moetuner.calibration.loads import KnownLoad
from moetuner.calibration.measure import join, measure
from moetuner.calibration.measure.clock import Clock
from moetuner.calibration.measure.graphs import captured
from moetuner.calibration.measure.layers import path_of
from moetuner.calibration.measure.memory import need_memory
from moetuner.calibration.measure.timed_layer import TimedLayer, make_experts
from moetuner.calibration.options import CalibrationOptions, Device
from moetuner.calibration.samples import Form, LayerShape
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.hardware_file import find_hardware, hardware_text
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.step_times import part_seconds
from moetuner.evaluation.tally import tally
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.trace import TOPIC_PRESETS, Trace, topic_trace

# Sizes of the models that score. On CPUs their routing, with smaller experts.
SCORED = {
    "cuda": {
        "deepseek-v2-lite": (2048, 1408),
        "gpt-oss": (2880, 2880),
        "mixtral": (4096, 14336),
    },
    "cpu": {
        "deepseek-v2-lite": (320, 176),
        "gpt-oss": (360, 360),
        "mixtral": (448, 448),
    },
}
TOKENS = {
    "cuda": {Form.EXACT: (512, 2048, 8192), Form.FIXED: (16, 64, 256)},
    "cpu": {Form.EXACT: (128, 512), Form.FIXED: (8, 32)},
}
PLANNERS = {
    "contiguous": Objective.MAX_LOAD,
    "random": Objective.MAX_LOAD,
    "lpt": Objective.MAX_LOAD,
    "joint": Objective.MODELLED_TIME,
}
ALONE = {"contiguous": Objective.MAX_LOAD}  # one rank has no choice
WITHIN, CERTAIN_GAIN = 0.15, 0.02
MEASURED_SEED, PLANNED_SEED = 1, 2


def first_tokens(whole: Trace, num_tokens: int, num_ranks: int) -> Trace:
    """The first of a trace, `num_tokens` on each rank in turn."""
    number = np.arange(num_tokens * num_ranks)
    return Trace(
        topk_ids=whole.topk_ids[number],
        num_experts=whole.num_experts,
        layer_ids=whole.layer_ids,
        sequence=whole.sequence[number],
        home_rank=(number // num_tokens).astype(np.int16),
        ranked=whole.ranked,
    )


def planned(trace: Trace, cost: CostModel, ranks, seconds: float):
    """Placements by name, planned on rank 0, the same on all."""
    found = None
    if ranks.rank == 0:
        workload = Workload(traces=(trace,), cost=cost, batch_tokens=0)
        problem = PlacementProblem.from_workload(workload, ranks.topology)
        options = SolverOptions(time_limit=seconds, seed=0)
        planners = PLANNERS if ranks.topology.num_ranks > 1 else ALONE
        found = {
            name: get_solver(name)
            .solve(replace(problem, objective=objective), options)
            .placement.slot_experts
            for name, objective in planners.items()
        }
    slots = ranks.every(found)[0]
    return {
        name: Placement(
            slot_experts=own,
            layer_ids=trace.layer_ids,
            num_experts=trace.num_experts,
            topology=ranks.topology,
        )
        for name, own in slots.items()
    }


def one_layer(trace: Trace, placement: Placement, layer: int) -> KnownLoad:
    only = np.zeros(1, np.int32)
    return KnownLoad(
        trace=Trace(
            topk_ids=np.ascontiguousarray(trace.topk_ids[:, layer : layer + 1]),
            num_experts=trace.num_experts,
            layer_ids=only,
            home_rank=trace.home_rank,
        ),
        placement=replace(
            placement,
            slot_experts=placement.slot_experts[layer : layer + 1],
            layer_ids=only,
        ),
    )


def predicted(trace, placement, cost) -> dict[str, float]:
    """Seconds of all layers, part by part."""
    told = part_seconds(tally(trace, placement, homes=Homes.RECORDED), cost)
    return {part.value: float(seconds.sum()) for part, seconds in told.items()}


def timed(layers: list[TimedLayer], form: Form, ranks, seconds: float):
    """Seconds of all layers behind each other; and of the parts where launched."""
    clock = Clock(ranks)
    steps = [s for own in layers for s in (own.dispatch, own.experts, own.combine)]
    replay = captured(ranks, steps) if form is Form.FIXED else None
    if replay is not None:
        (_, total) = clock.time([replay], seconds)
        return {"total": total}, True
    *parts, total = clock.time(steps, seconds)
    found = {"total": total}
    for number, name in enumerate(("dispatch", "experts", "combine")):
        own = parts[number::3]
        found[name] = replace(total, seconds=sum(one.seconds for one in own))
    return found, False


def score_model(model, machines, options, ranks) -> list[dict]:
    """The cells of one model: all its phases, sizes and placements."""
    kind, num_ranks = ranks.device.type, ranks.topology.num_ranks
    hidden, inner = SCORED[kind][model]
    routing = TOPIC_PRESETS[model]
    shape = LayerShape(
        hidden_size=hidden,
        inner_size=inner,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
    )
    size = -(-routing.num_experts // num_ranks)
    need_memory(
        ranks, 6 * options.layers * size * hidden * inner, f"experts of {model}"
    )
    experts = [make_experts(shape, size, ranks.device) for _ in range(options.layers)]
    routing = replace(routing, num_layers=options.layers)
    most = num_ranks * max(max(sizes) for sizes in TOKENS[kind].values())
    traces = [
        topic_trace(routing, num_tokens=most, seed=seed)
        for seed in (MEASURED_SEED, PLANNED_SEED)
    ]
    path, cells = path_of(ranks), []
    for form, sizes in TOKENS[kind].items():
        for num_tokens in sizes:
            cost = CostModel(
                hardware=machines[form],
                shape=ModelShape(hidden_size=hidden, expert_hidden_size=inner),
                homes=Homes.RECORDED,
            )
            run, seen = (first_tokens(t, num_tokens, num_ranks) for t in traces)
            placements = planned(seen, cost, ranks, options.plan_seconds)
            for name, placement in placements.items():
                layers = [
                    TimedLayer(
                        one_layer(run, placement, i), form, shape, own, ranks, path
                    )
                    for i, own in enumerate(experts)
                ]
                times, replayed = timed(layers, form, ranks, options.cell_seconds)
                cells.append(
                    {
                        "model": model,
                        "form": form.value,
                        "replayed": replayed,
                        "tokens_per_rank": num_tokens,
                        "placement": name,
                        "measured": {part: t.seconds for part, t in times.items()},
                        "spread": times["total"].spread,
                        "repeats": times["total"].repeats,
                        "predicted": predicted(run, placement, cost),
                    }
                )
                if ranks.rank == 0:
                    print(*row_of(cells[-1]), sep="  ", flush=True)
    return cells


def error_of(cell) -> float:
    return cell["predicted"]["total"] / cell["measured"]["total"] - 1


def row_of(cell) -> list[str]:
    measured, told = cell["measured"], cell["predicted"]
    parts = [
        f"{told[part] / measured[part]:.2f}" if part in measured else "-"
        for part in ("dispatch", "experts", "combine")
    ]
    return [
        cell["model"],
        f"{cell['form']}{', replayed' if cell['replayed'] else ''}",
        str(cell["tokens_per_rank"]),
        cell["placement"],
        f"{measured['total'] * 1e3:.4g} ({cell['spread'] * 1e3:.2g})",
        f"{told['total'] * 1e3:.4g}",
        f"{error_of(cell):+.0%}",
        *parts,
    ]


def summary(cells) -> dict[str, float | int]:
    """Errors of cells; pairs of placements of one model and size, and their order."""
    errors = [abs(error_of(cell)) for cell in cells]
    pairs = right = gains = losses = 0

    def group(cell):
        return cell["model"], cell["form"], cell["tokens_per_rank"]

    for _, own in itertools.groupby(sorted(cells, key=group), key=group):
        for a, b in itertools.combinations(list(own), 2):
            measured = a["measured"]["total"] - b["measured"]["total"]
            told = a["predicted"]["total"] - b["predicted"]["total"]
            certain = abs(measured) > max(a["spread"], b["spread"])
            pairs += certain
            right += certain and measured * told > 0
            slower = max(a["predicted"]["total"], b["predicted"]["total"])
            gain = abs(told) > CERTAIN_GAIN * slower
            gains += gain
            losses += gain and certain and measured * told < 0
    return {
        "cells": len(cells),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "within_15_percent": sum(error <= WITHIN for error in errors) / len(errors),
        "pairs_beyond_spread": pairs,
        "ranked_right": right,
        "predicted_gains": gains,
        "gains_that_were_losses": losses,
    }


def page(env, machines, cells, told) -> list[str]:
    lines = report.head("Calibrated predictions beside measured times", env)
    lines += [
        f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in told.items()
    ]
    for form, machine in machines.items():
        lines += ["", f"Fitted times, {form.value} form:", ""]
        head = ["part", "times", "median error", "worst"]
        rows = [
            [r.part, str(r.points), f"{r.median:.1%}", f"{r.worst:.1%}"]
            for r in machine.calibration.residuals
        ]
        lines += report.table(head, rows)
    lines += [
        "Milliseconds of all layers, medians (interquartile range) of the slowest "
        "rank. Parts: predicted over measured.",
        "",
    ]
    head = ["model", "form", "tokens of a rank", "placement", "measured", "predicted"]
    head += ["error", "dispatch", "experts", "combine"]
    return lines + report.table(head, [row_of(cell) for cell in cells])


def calibrate(options, ranks, say):
    """The machine of each form; `options.hardware` stands for a new calibration."""
    if options.hardware:
        names = options.hardware.split(",")
        found = [find_hardware(name) for name in names]
        return dict(zip(Form, (found[0], found[-1]), strict=True))
    wanted = CalibrationOptions(seconds=options.seconds, device=Device(options.device))
    measured = measure(ranks, wanted, say)
    origin = Origin(name="calibrated", date="", command="")
    like = find_hardware("h100")
    return {
        form: fit_hardware(measured, origin, like, form, wanted.seed).hardware
        for form in Form
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", choices=[d.value for d in Device])
    parser.add_argument("--seconds", type=float, default=40, help="to calibrate")
    parser.add_argument(
        "--hardware", default="", help="EXACT.toml[,FIXED.toml] made before, instead"
    )
    parser.add_argument("--models", nargs="+", default=list(SCORED["cuda"]))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--cell-seconds", type=float, default=0.5)
    parser.add_argument("--plan-seconds", type=float, default=1.0)
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--out", type=Path, help="JSON; a page of the same name beside")
    options = parser.parse_args()
    load = os.getloadavg()[0] if os.environ.get("RANK", "0") == "0" else 0.0
    joined = CalibrationOptions(
        device=Device(options.device), ranks_per_node=options.ranks_per_node
    )
    with join(joined) as ranks, torch.no_grad():

        def say(what):
            if ranks.rank == 0:
                print(what, flush=True)

        machines = calibrate(options, ranks, say)
        cells = []
        for model in options.models:
            cells += score_model(model, machines, options, ranks)
        ranks.wait()
        rank = ranks.rank
    if rank:
        return
    told = summary(cells)
    print(json.dumps(told, indent=1))
    busy = load > (os.cpu_count() or 1)
    if options.out is None or busy:
        print("nothing is written" + (f": the machine was busy, {load:.1f}" * busy))
        return
    env = report.environment("")
    env["load_average_at_start"] = f"{load:.1f}"
    content = {
        "environment": env,
        "summary": told,
        "machines": {form.value: hardware_text(own) for form, own in machines.items()},
        "residuals": {
            form.value: [asdict(r) for r in own.calibration.residuals]
            for form, own in machines.items()
        },
        "cells": cells,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join(page(env, machines, cells, told)) + "\n"
    options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
