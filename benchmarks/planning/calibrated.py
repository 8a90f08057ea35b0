"""How well a calibrated machine predicts, and whether plans made with it are faster.

    torchrun --nproc-per-node 4 benchmarks/planning/calibrated.py --device cpu
    torchrun --nproc-per-node 2 benchmarks/planning/calibrated.py --out FILE.json
    python benchmarks/planning/calibrated.py --seconds 25 --out FILE.json

Calibrates on some shapes, plans for others, and measures the plans and every baseline.
A cell is a model's shape, a number of tokens of a rank and a placement: some layers of
made-up routing, of tokens that no placement was planned on, run behind each other.
Prefill is launched, in the exact form; decoding is replayed from a CUDA graph of the
fixed form where one can hold it. Placements take turns, so that none has the better
moment. Scores: the error of each cell, how many are within 15 %, how many pairs of
placements are ranked as they were measured, predicted gains that were losses, and each
plan beside the fastest baseline. Writes nothing where the machine was busy when it
began.

In three steps, where the machine is dear: `--calibrate-only --machines FOLDER` there,
`calibrated_plans.py` anywhere, then `--hardware FOLDER/exact.toml,FOLDER/fixed.toml
--plans PLANS.json`.

Legend: T tokens of a rank, L layers, G ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import report
import torch
from calibrated_cells import (
    MAX_BATCHES,
    Cell,
    add_cell_options,
    cell_arguments,
    cells_asked,
    one_layer,
)
from calibrated_plans import add_plan_options, machines_of, plan_arguments, read_plans
from calibrated_scores import page, row_of, summary
from moetuner._plain import to_plain
from moetuner.calibration.fit import Origin, fit_hardware
from moetuner.calibration.measure import join, measure
from moetuner.calibration.measure.clock import Clock
from moetuner.calibration.measure.graphs import captured
from moetuner.calibration.measure.layers import path_of
from moetuner.calibration.measure.memory import need_memory
from moetuner.calibration.measure.timed_layer import TimedLayer, make_experts
from moetuner.calibration.options import CalibrationOptions, Device
from moetuner.calibration.samples import Form
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.hardware_file import find_hardware, hardware_text
from moetuner.evaluation.step_times import part_seconds
from moetuner.evaluation.tally import tally

PLANNER = Path(__file__).with_name("calibrated_plans.py")
PARTS = ("dispatch", "experts", "combine")
_POLL = 0.5  # s


def predicted(trace, placement, cost) -> dict[str, float]:
    """Seconds of all layers, part by part."""
    told = part_seconds(tally(trace, placement, homes=Homes.RECORDED), cost)
    return {part.value: float(seconds.sum()) for part, seconds in told.items()}


def mean(dicts) -> dict[str, float]:
    """Of each key that all have."""
    keys = set.intersection(*map(set, dicts))
    return {key: float(np.mean([d[key] for d in dicts])) for key in sorted(keys)}


@dataclass(frozen=True, kw_only=True)
class Run:
    """All layers of one batch under one placement, ready to be timed."""

    steps: list
    replay: object | None

    @classmethod
    def of(cls, cell: Cell, batch, placement, experts, ranks, path) -> Run:
        layers = [
            TimedLayer(
                one_layer(batch, placement, i), cell.form, cell.shape, own, ranks, path
            )
            for i, own in enumerate(experts)
        ]
        if cell.form is Form.FIXED:
            for layer in layers:
                layer.check()
        steps = [s for own in layers for s in (own.dispatch, own.experts, own.combine)]
        replay = captured(ranks, steps) if cell.form is Form.FIXED else None
        return cls(steps=steps, replay=replay)

    def time(self, clock: Clock, seconds: float) -> dict[str, float]:
        """Seconds of all layers behind each other and their spread; of the parts, too,
        where they are launched."""
        if self.replay is not None:
            (_, total) = clock.time([self.replay], seconds)
            return {"total": total.seconds, "spread": total.spread}
        *parts, total = clock.time(self.steps, seconds)
        found = {"total": total.seconds, "spread": total.spread}
        for number, name in enumerate(PARTS):
            found[name] = sum(one.seconds for one in parts[number :: len(PARTS)])
        return found


def score_cell(
    cell, batches, placements, hardware, experts, ranks, options
) -> list[dict]:
    """Every placement on the same batches, in turns, forwards and back again."""
    cost = CostModel(hardware=hardware, shape=cell.model_shape, homes=Homes.RECORDED)
    path, clock = path_of(ranks), Clock(ranks)
    runs = {
        name: [
            Run.of(
                cell, batch, placement, experts[placement.slots_per_rank], ranks, path
            )
            for batch in batches
        ]
        for name, placement in placements.items()
    }
    seconds = options.cell_seconds / (options.rounds * len(batches))
    rounds = {name: [] for name in placements}
    for number in range(options.rounds):
        for name in list(placements)[:: -1 if number % 2 else 1]:
            rounds[name].append(mean([run.time(clock, seconds) for run in runs[name]]))
    cells = []
    for name, placement in placements.items():
        measured = mean(rounds[name])
        totals = [of["total"] for of in rounds[name]]
        spread = max(measured.pop("spread"), max(totals) - min(totals))
        cells.append(
            {
                "model": cell.model,
                "form": cell.form.value,
                "replayed": runs[name][0].replay is not None,
                "tokens_per_rank": cell.num_tokens,
                "placement": name,
                "measured": measured,
                "spread": spread,
                "predicted": mean(
                    [predicted(batch, placement, cost) for batch in batches]
                ),
            }
        )
        if ranks.rank == 0:
            print(*row_of(cells[-1]), sep="  ", flush=True)
    return cells


def score_model(cells, drawn, machines, plans, options, ranks):
    """Scores of each cell of one model, whose experts are made once."""
    placements = {cell.key: read_plans(plans, cell, ranks.topology) for cell in cells}
    sizes = {p.slots_per_rank for own in placements.values() for p in own.values()}
    first = cells[0]
    weights = 6 * sum(sizes) * first.hidden_size * first.inner_size
    need_memory(ranks, first.num_layers * weights, f"experts of {first.model}")
    experts = {
        size: [
            make_experts(first.shape, size, ranks.device)
            for _ in range(first.num_layers)
        ]
        for size in sizes
    }
    for cell in cells:
        yield score_cell(
            cell,
            drawn[cell.key],
            placements[cell.key],
            machines[cell.form],
            experts,
            ranks,
            options,
        )


def calibrate(options, ranks, say):
    """The machine of each form; `options.hardware` stands for a new calibration."""
    if options.hardware:
        return machines_of(options.hardware)
    wanted = CalibrationOptions(seconds=options.seconds, device=Device(options.device))
    measured = measure(ranks, wanted, say)
    if options.machines and ranks.rank == 0:
        options.machines.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_plain(measured)) + "\n"
        (options.machines / "measurements.json").write_text(text)
    origin = Origin(name="calibrated", date="", command="")
    like = find_hardware("h100")
    return {
        form: fit_hardware(measured, origin, like, form, wanted.seed).hardware
        for form in Form
    }


def write_machines(machines, folder: Path) -> str:
    """Their files, as options take them."""
    folder.mkdir(parents=True, exist_ok=True)
    for form, machine in machines.items():
        (folder / f"{form.value}.toml").write_text(hardware_text(machine))
    return ",".join(str(folder / f"{form.value}.toml") for form in machines)


def plan(machines, options, ranks, folder: Path) -> Path:
    """Plans of all cells, by another program on rank 0; no call waits for long."""
    program, out = None, folder / "plans.json"
    if ranks.rank == 0:
        topology = ranks.topology
        command = [sys.executable, str(PLANNER), "--out", str(out)]
        command += ["--hardware", write_machines(machines, folder)]
        command += ["--ranks", str(topology.num_ranks), "--kind", ranks.device.type]
        command += ["--ranks-per-node", str(topology.ranks_per_node)]
        command += [*cell_arguments(options), *plan_arguments(options)]
        program = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    code = None
    while code is None:
        if program is not None:
            try:
                mine = abs(program.wait(_POLL))  # a signal's is negative
            except subprocess.TimeoutExpired:
                mine = -1
        code = (
            None
            if (ended := ranks.largest([mine if program else -1])[0]) < 0
            else ended
        )
    if code:
        raise SystemExit(f"calibrated: planning ended with {code:g}")
    return out


def shared_folder(ranks, mine: str) -> Path:
    """Of rank 0: all ranks are on one machine."""
    return Path(ranks.every(mine)[0])


def draw(cells, num_ranks: int, most: int, drawn: dict[str, list]) -> None:
    """The batches of all cells, by their keys."""
    for cell in cells:
        drawn[cell.key] = cell.batches(num_ranks, most)


def score(options, ranks, say):
    """Machines by form, and all cells so far, after each."""
    machines = calibrate(options, ranks, say)
    if options.machines and ranks.rank == 0:
        write_machines(machines, options.machines)
    if options.calibrate_only:
        return
    cells = cells_asked(options, ranks.device.type)
    # Tokens are drawn while another program plans.
    drawn: dict[str, list] = {}
    told = cells, ranks.topology.num_ranks, options.batches, drawn
    drawing = Thread(target=draw, args=told, daemon=True)
    drawing.start()
    with tempfile.TemporaryDirectory() as own:
        plans = options.plans
        if plans is None:
            say("plans")
            folder = shared_folder(ranks, str(options.machines or own))
            plans = plan(machines, options, ranks, folder)
        drawing.join()
        found = []
        for model in options.models:
            own_cells = [cell for cell in cells if cell.model == model]
            for scores in score_model(
                own_cells, drawn, machines, plans, options, ranks
            ):
                found += scores
                yield machines, found
        ranks.wait()


def busy_load() -> float:
    """Of the last minute, or what runs now where that is less: what ended is over."""
    load = os.getloadavg()[0]
    try:
        now = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except OSError:
        return load
    return min(load, float(now))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=[d.value for d in Device])
    parser.add_argument("--seconds", type=float, default=40, help="to calibrate")
    parser.add_argument(
        "--hardware", default="", help="EXACT.toml[,FIXED.toml] made before, instead"
    )
    parser.add_argument(
        "--machines", type=Path, help="folder for machine files, their times, and plans"
    )
    parser.add_argument("--calibrate-only", action="store_true")
    parser.add_argument("--plans", type=Path, help="of calibrated_plans.py")
    parser.add_argument("--cell-seconds", type=float, default=0.5)
    parser.add_argument(
        "--batches", type=int, default=4, choices=range(1, MAX_BATCHES + 1)
    )
    parser.add_argument("--rounds", type=int, default=2, help="turns of placements")
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--out", type=Path, help="JSON; a page of the same name beside")
    add_cell_options(parser)
    add_plan_options(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    load = busy_load() if os.environ.get("RANK", "0") == "0" else 0.0
    joined = CalibrationOptions(
        device=Device(options.device), ranks_per_node=options.ranks_per_node
    )
    with join(joined) as ranks, torch.no_grad():

        def say(what):
            if ranks.rank == 0:
                print(what, flush=True)

        busy = load > (os.cpu_count() or 1)
        env = environment(load) if ranks.rank == 0 else {}
        for machines, cells in score(options, ranks, say):
            if ranks.rank == 0 and options.out and not busy:
                write(options.out, env, machines, cells)
        rank = ranks.rank
    if rank or options.calibrate_only:
        return
    print(json.dumps(summary(cells), indent=1))
    if options.out is None or busy:
        print("nothing is written" + (f": the machine was busy, {load:.1f}" * busy))


def environment(load: float) -> dict[str, str]:
    """Of the page; `load` is of the beginning."""
    return report.environment("") | {"load_average_at_start": f"{load:.1f}"}


def write(out: Path, env, machines, cells) -> None:
    """As it goes: a run that is cut short leaves the cells that it ended."""
    told = summary(cells)
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
    out.write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join(page(env, machines, cells, told)) + "\n"
    out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
