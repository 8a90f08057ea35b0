"""What homes chosen by routing gain over homes chosen by length; split by sequence.

    python benchmarks/planning/request_homes.py --seconds 10 --seeds 5

Experts are planned on one half (joint, homes uniform). Sequences of the other half are
then assigned to ranks, batch by batch, and scored with homes recorded.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import report
from held_out import TRACES
from moetuner.evaluation.cost import CostModel, Homes
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.shapes import MODEL_SHAPES
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.planning.request_affinity import assign_homes
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.trace import read_trace, split_by_sequence

KNOWN = {"lengths alone": 0, "first 8": 8, "first 32": 32, "all (hindsight)": None}


def score_homes(args, trace, model, seed):
    """Batch milliseconds and remote ranks of each choice, for one split."""
    split = split_by_sequence(trace, 0.5, seed)
    cost = CostModel(shape=MODEL_SHAPES[model])
    topology = Topology(num_ranks=8, ranks_per_node=4)
    problem = PlacementProblem.from_workload(
        Workload(traces=(split.plan,), cost=cost), topology
    )
    options = SolverOptions(time_limit=args.seconds, seed=seed, threads=args.threads)
    placement = get_solver("joint").solve(problem, options).placement
    found = {"uniform": evaluate(split.score, placement, cost)}
    for name, known in KNOWN.items():
        homed = assign_homes(split.score, placement, cost, known_tokens=known)
        recorded = replace(cost, homes=Homes.RECORDED)
        found[name] = evaluate(homed, placement, recorded)
    return {
        name: {"ms": 1e3 * e.batch_seconds_mean, "remote": e.remote_ranks_per_token}
        for name, e in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    env, cases, rows = report.environment(args.note), {}, []
    for label, (file, model) in TRACES.items():
        trace = read_trace(report.traces_folder() / file)
        runs = [score_homes(args, trace, model, seed) for seed in range(args.seeds)]
        cases[label] = runs
        for name in runs[0]:
            ms = [run[name]["ms"] for run in runs]
            gains = [
                100 * (run[name]["ms"] / run["lengths alone"]["ms"] - 1) for run in runs
            ]
            remote = [run[name]["remote"] for run in runs]
            cells = [report.spread(ms, 3), report.spread(gains, 2)]
            rows.append([label, name, *cells, report.spread(remote, 3)])
            print(rows[-1], flush=True)
    lines = report.head("Homes by routing: 8 ranks in nodes of 4, dedup", env)
    lines += [
        f"Median (smallest-largest) over {args.seeds} splits and seeds; joint "
        f"{args.seconds:g} s. Times of held-out batches of about 2,048 tokens.",
        "",
    ]
    header = [
        "trace",
        "known of a sequence",
        "batch ms",
        "% of lengths alone",
        "remote ranks",
    ]
    lines += report.table(header, rows)
    report.write("planning-request-homes", {"environment": env, "cases": cases}, lines)


if __name__ == "__main__":
    main()
