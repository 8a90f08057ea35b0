"""Does CBC as a kernel find what annealing does not? After joint, lns or more joint.

    python benchmarks/planning/kernel.py --seconds 15 --seeds 3 --jobs 2
    python benchmarks/planning/kernel.py --seconds 15 --jobs 2 --ranks 4 \
        --ranks-per-node 2 --traces "generated, 12 experts" --name planning-kernel-4

Plans on one half of each trace, split by sequence, and scores both halves; every seed
splits anew. `joint` has one share of seconds, then `lns` one more from its placement,
or `joint` two from the beginning: it does not go on from a placement. Once with joint's
default, which is smoothed for batches that it has not seen, and once with what it finds
for the planning half alone, `Favour.TRACE`, without its own last stage of exact methods
for few experts, which is what is measured here. Models of 8 experts are compared with
the proven optimum of the planning half as well.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import report
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.shapes import MODEL_SHAPES, shape_for_model
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.joint import small_layers
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.trace import TOPIC_PRESETS, read_trace, split_by_sequence, topic_trace

RECORDED = {
    "gpt-oss mmlu": ("gpt-oss-20b-fingerprinting/mmlu.npz", "gpt-oss"),
    "V2-Lite law": ("deepseek-v2-lite-esft/law.npz", "deepseek-v2-lite"),
}
# Layers and experts, otherwise like Mixtral.
GENERATED = {
    "generated, 8 experts": (32, 8),
    "generated, 12 experts": (8, 12),
    "generated, 16 experts": (8, 16),
}
FAVOURS = {"new batches (default)": Favour.TIME, "these batches": Favour.TRACE}
HALVES = ("planned on", "held out")


def trace_and_shape(label, seed):
    """A trace with sequences, and its model's sizes."""
    if label in RECORDED:
        file, model = RECORDED[label]
        return read_trace(report.traces_folder() / file), MODEL_SHAPES[model]
    layers, experts = GENERATED[label]
    routing = replace(TOPIC_PRESETS["mixtral"], num_layers=layers, num_experts=experts)
    trace = topic_trace(routing, num_tokens=20_000, seed=seed)
    return trace, shape_for_model(routing.model)


def compare(args, label, favour, seed):
    """Batch milliseconds on both halves, by planner."""
    trace, shape = trace_and_shape(label, seed)
    split = split_by_sequence(trace, 0.5, seed)
    topology = Topology(num_ranks=args.ranks, ranks_per_node=args.ranks_per_node)
    problem, held_out = (
        PlacementProblem.from_workload(
            Workload(traces=(half,), cost=CostModel(shape=shape)), topology
        )
        for half in (split.plan, split.score)
    )
    small_layers.MAX_EXPERTS = 0
    joint = JointSolver(config=JointConfig(favour=FAVOURS[favour]))

    def limits(shares):
        limit = shares * args.seconds
        return SolverOptions(time_limit=limit, seed=seed, threads=args.threads)

    first = joint.solve(problem, limits(1))
    found = {
        "joint": first,
        "joint, twice the time": joint.solve(problem, limits(2)),
        "joint, then lns": get_solver("lns").solve(
            problem, limits(1), warm_start=first.placement
        ),
    }
    if problem.num_experts <= 8:
        found["exact"] = get_solver("exact").solve(problem, limits(10))
    scores = {
        name: {
            **{
                half: 1e3 * each.objective_value(solution.placement)
                for half, each in zip(HALVES, (problem, held_out), strict=True)
            },
            "seconds": solution.seconds,
            "status": solution.status.value,
        }
        for name, solution in found.items()
    }
    print(label, favour, seed, scores, flush=True)
    return scores


def rows_of(label, favour, runs):
    """Lines of the table: each planner against joint, on both halves."""
    rows = []
    for half in HALVES:
        first = [run["joint"][half] for run in runs]
        cells = [label, favour, half, report.spread(first, 3)]
        for name in ("joint, twice the time", "joint, then lns", "exact"):
            changes = [
                100 * (run[name][half] / run["joint"][half] - 1)
                for run in runs
                if name in run
            ]
            cells.append(report.spread(changes, 2) if changes else "")
        rows.append(cells)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each planner")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    labels = (*RECORDED, *GENERATED)
    parser.add_argument("--traces", nargs="*", default=labels, choices=labels)
    parser.add_argument("--name", default="planning-kernel")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    env = report.environment(args.note)
    cases = [(label, favour) for label in args.traces for favour in FAVOURS]
    with ProcessPoolExecutor(args.jobs) as pool:
        waiting = {
            case: [pool.submit(compare, args, *case, s) for s in range(args.seeds)]
            for case in cases
        }
        found = {case: [one.result() for one in runs] for case, runs in waiting.items()}
    lines = report.head("CBC as a kernel after the joint planner", env)
    lines += [
        f"{args.ranks} ranks in nodes of {args.ranks_per_node}, dedup, homes uniform. "
        f"Median (smallest-largest) over {args.seeds} splits and seeds; "
        f"{args.seconds:g} s, then as long again; {args.threads} thread(s) of each. "
        f"Changes of the mean batch in % of the first column.",
        "",
    ]
    header = ["trace", "joint plans for", "scored on half", "joint, ms"]
    header += ["joint, twice the time", "joint, then lns", "exact"]
    rows = [row for case, runs in found.items() for row in rows_of(*case, runs)]
    lines += report.table(header, rows)
    named = {" / ".join(case): runs for case, runs in found.items()}
    report.write(args.name, {"environment": env, "cases": named}, lines)


if __name__ == "__main__":
    main()
