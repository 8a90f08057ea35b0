"""Plans every cell that a calibrated machine is scored on; needs no torch.

    python benchmarks/planning/calibrated_plans.py --hardware EXACT.toml,FIXED.toml \\
        --ranks 8 --ranks-per-node 4 --out PLANS.json

`calibrated.py` runs this itself, unless it is given PLANS.json: so a machine that is
dear need not wait for plans. Each cell is planned on batches of its own size, of other
tokens than are measured; nothing is known of where tokens start.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from calibrated_cells import (
    PLACEMENTS,
    PLANS,
    SCORED,
    add_cell_options,
    cells_asked,
)
from moetuner.calibration.samples import Form
from moetuner.errors import MoetunerError
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware_file import find_hardware
from moetuner.evaluation.workload import BatchKind, Workload
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver

ALONE = ("contiguous",)  # one rank has no choice
QUICK_SECONDS = 10.0


def machines_of(names: str):
    """The machine of each form; one name stands for both."""
    found = [find_hardware(name) for name in names.split(",")]
    return dict(zip(Form, (found[0], found[-1]), strict=True))


def problem_of(cell, hardware, topology) -> PlacementProblem:
    """What is planned for a cell: batches of its size."""
    workload = Workload(
        traces=(cell.planned_trace(topology.num_ranks),),
        cost=CostModel(hardware=hardware, shape=cell.model_shape),
        batch_tokens=topology.num_ranks * cell.num_tokens,
        batch_kind=BatchKind.MIXED if cell.decodes else BatchKind.SEQUENCES,
    )
    return PlacementProblem.from_workload(workload, topology)


def plan(cell, names, hardware, topology, seconds, threads):
    """By name: slots [L, P] of a placement, or why there is none."""
    problem, found = problem_of(cell, hardware, topology), {}
    for name in names:
        solver, objective, spare = PLACEMENTS[name]
        asked = replace(
            problem, objective=objective, slots_per_rank=problem.slots_per_rank + spare
        )
        limit = seconds if name in PLANS else QUICK_SECONDS
        options = SolverOptions(time_limit=limit, seed=0, threads=threads)
        try:
            solution = get_solver(solver).solve(asked, options)
        except MoetunerError as error:
            found[name] = str(error)
        else:
            found[name] = solution.placement.slot_experts.tolist()
    return found


def plan_all(cells, machines, topology, options):
    """By cell and name; a cell's tokens are drawn once for all that take no time."""
    names = options.placements if topology.num_ranks > 1 else ALONE
    quick = [name for name in names if name not in PLANS]
    tasks = [[name] for name in names if name in PLANS] + [quick] * bool(quick)
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = [
            (
                cell.key,
                pool.submit(
                    plan,
                    cell,
                    own,
                    machines[cell.form],
                    topology,
                    options.plan_seconds,
                    options.threads,
                ),
            )
            for cell in cells
            for own in tasks
        ]
        found = {cell.key: {} for cell in cells}
        for key, future in futures:
            found[key] |= future.result()
    return {
        key: {name: own[name] for name in names if name in own}
        for key, own in found.items()
    }


def read_plans(path: Path, cell, topology: Topology) -> dict[str, Placement]:
    """The placements of a cell; what could not be planned is not there."""
    content = json.loads(path.read_text())
    ranks = [topology.num_ranks, topology.ranks_per_node]
    if content["ranks"] != ranks:
        raise SystemExit(
            f"{path} is of {content['ranks'][0]} ranks in nodes of "
            f"{content['ranks'][1]}, here are {ranks[0]} in nodes of {ranks[1]}"
        )
    if cell.key not in content["plans"]:
        raise SystemExit(f"{path} has no plan for {cell.key}")
    return {
        name: Placement(
            slot_experts=np.array(slots, np.int32),
            layer_ids=np.arange(cell.num_layers, dtype=np.int32),
            num_experts=cell.routing.num_experts,
            topology=topology,
        )
        for name, slots in content["plans"][cell.key].items()
        if not isinstance(slots, str)
    }


def add_plan_options(parser) -> None:
    """Those that say how plans are made."""
    parser.add_argument(
        "--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS
    )
    parser.add_argument("--plan-seconds", type=float, default=3.0, help="of joint")
    parser.add_argument("--threads", type=int, default=2, help="of a plan")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=max(cores // 2, 1), help="plans")


def plan_arguments(options) -> list[str]:
    """The same options for another program."""
    return [
        *("--placements", *options.placements),
        *("--plan-seconds", str(options.plan_seconds)),
        *("--threads", str(options.threads)),
        *("--jobs", str(options.jobs)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hardware", required=True, help="EXACT.toml[,FIXED.toml]")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, help="default: all")
    parser.add_argument("--kind", choices=SCORED, default="cuda", help="of device")
    parser.add_argument("--out", type=Path, required=True)
    add_cell_options(parser)
    add_plan_options(parser)
    options = parser.parse_args()
    topology = Topology(
        num_ranks=options.ranks, ranks_per_node=options.ranks_per_node or options.ranks
    )
    machines = machines_of(options.hardware)
    cells = cells_asked(options, options.kind)
    content = {
        "ranks": [topology.num_ranks, topology.ranks_per_node],
        "seconds": options.plan_seconds,
        "plans": plan_all(cells, machines, topology, options),
    }
    options.out.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
