"""Every planner on one part of real traces, scored on the other; split by sequence.

    python benchmarks/planning/held_out.py --seconds 60 --seeds 5

Each seed splits anew and plans anew. Baselines that need no clock have none; the
paper's two stages (CBC) get the seconds of `--ilp-seconds`, the joint planner those of
`--seconds`. Batches are whole sequences of about `--batch-tokens` tokens.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import report
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.models import shape_for_model
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.trace import read_trace, split_by_sequence

TRACES = {
    "V2-Lite law": ("deepseek-v2-lite-esft/law.npz", "deepseek-v2-lite"),
    "V2-Lite intent": ("deepseek-v2-lite-esft/intent.npz", "deepseek-v2-lite"),
    "V2-Lite-Chat prompts": (
        "deepseek-v2-lite-chat-moe-beyond/prompts.npz",
        "deepseek-v2-lite",
    ),
    "gpt-oss mmlu": ("gpt-oss-20b-fingerprinting/mmlu.npz", "gpt-oss"),
    # Nobody looked at these while the planner was made.
    "V2-Lite translation": (
        "deepseek-v2-lite-esft/translation.npz",
        "deepseek-v2-lite",
    ),
    "gpt-oss gpqa": ("gpt-oss-20b-fingerprinting/gpqa.npz", "gpt-oss"),
    "gpt-oss mmlu_pro": ("gpt-oss-20b-fingerprinting/mmlu_pro.npz", "gpt-oss"),
}
TWO_STAGE = "paper's two stages"
PLANNERS = {
    # name: (solver, objective, extra slots per rank)
    "contiguous": ("contiguous", Objective.MAX_LOAD, 0),
    "random": ("random", Objective.MAX_LOAD, 0),
    "LPT + swaps": ("lpt", Objective.MAX_LOAD, 0),
    "EPLB": ("eplb", Objective.MODELLED_TIME, 0),
    "affinity only": ("affinity", Objective.TOTAL_TRAFFIC, 0),
    "co-activation only": ("coactivation", Objective.MODELLED_TIME, 0),
    "LPT, then chain": ("chain", Objective.LINK_TRAFFIC, 0),
    TWO_STAGE: ("ilp2", Objective.LINK_TRAFFIC, 0),
    "joint": ("joint", Objective.MODELLED_TIME, 0),
    "joint, few copies": ("joint", Objective.MODELLED_TIME, 0),
    "joint, fewer copies": ("joint", Objective.MODELLED_TIME, 0),
    "joint, fewest copies": ("joint", Objective.MODELLED_TIME, 0),
    "EPLB + 1 replica": ("eplb", Objective.MODELLED_TIME, 1),
    "joint + 1 replica": ("joint", Objective.MODELLED_TIME, 1),
}
RANK_WEIGHTS = {
    "joint, few copies": 1.0,
    "joint, fewer copies": 2.0,
    "joint, fewest copies": 4.0,
}
SCORES = {
    # field of Evaluation: (heading, digits, factor)
    "imbalance_mean": ("max/mean load", 3, 1.0),
    "remote_ranks_per_token": ("remote ranks", 2, 1.0),
    "remote_nodes_per_token": ("remote nodes", 3, 1.0),
    "modelled_seconds": ("pooled ms", 2, 1e3),
    "batch_seconds_mean": ("batch ms, mean", 3, 1e3),
    "batch_seconds_p95": ("p95", 3, 1e3),
    "batch_seconds_p99": ("p99", 3, 1e3),
}


def score(args, label, homes, seed, name):
    """Scores of one planner on one split, by field; None where it is left out."""
    solver, objective, extra = PLANNERS[name]
    if solver == "ilp2" and seed >= args.ilp_seeds:
        return None
    file, model = TRACES[label]
    split = split_by_sequence(read_trace(report.traces_folder() / file), 0.5, seed)
    cost = CostModel(shape=shape_for_model(model), homes=homes, wire=args.wire)
    topology = Topology(num_ranks=args.ranks, ranks_per_node=args.ranks_per_node)
    workload = Workload(traces=(split.plan,), cost=cost, batch_tokens=args.batch_tokens)
    problem = PlacementProblem.from_workload(workload, topology)
    asked = replace(
        problem, objective=objective, slots_per_rank=problem.slots_per_rank + extra
    )
    seconds = args.ilp_seconds if solver == "ilp2" else args.seconds
    options = SolverOptions(time_limit=seconds, seed=seed, threads=args.threads)
    method = get_solver(solver)
    if name in RANK_WEIGHTS:
        config = JointConfig(favour=Favour.FEW_RANKS, rank_weight=RANK_WEIGHTS[name])
        method = JointSolver(config=config)
    solution = method.solve(asked, options)
    found = evaluate(
        split.score, solution.placement, cost, batch_tokens=args.batch_tokens
    )
    scores = {field: getattr(found, field) for field in SCORES}
    scores["seconds"] = solution.seconds
    batch_ms = found.batch_seconds_mean * 1e3
    print(
        f"{label}, {homes.value}, {seed}, {name}: {batch_ms:.3f} ms, "
        f"{solution.seconds:.1f} s",
        flush=True,
    )
    return scores


def cases_of(args):
    """(trace, homes) that are asked for and make sense."""
    for label in args.traces:
        trace = read_trace(report.traces_folder() / TRACES[label][0])
        for homes in map(Homes, args.homes):
            # Without weights nobody knows the first expert.
            if homes is not Homes.FOLLOW or trace.ranked:
                yield label, homes


def score_all(args, cases):
    """After each split: by case, for each seed so far, the scores of the planners."""
    tasks = [
        (seed, case, name)
        for seed in range(args.seeds)
        for case in cases
        for name in args.planners
    ]
    runs = {case: [] for case in cases}
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = {
            (seed, case, name): pool.submit(score, args, *case, seed, name)
            for seed, case, name in tasks
        }
        for seed in range(args.seeds):
            for case, own in runs.items():
                found = {
                    name: futures[seed, case, name].result() for name in args.planners
                }
                own.append({name: s for name, s in found.items() if s is not None})
            yield runs


def relative(runs, name, others):
    """Change of the mean batch time against another planner, in %, per seed."""
    changes = []
    for scores in runs:
        other = next((scores[o] for o in others if o in scores), None)
        if other is not None and name in scores:
            mine, its = (s["batch_seconds_mean"] for s in (scores[name], other))
            changes.append(100 * (mine / its - 1))
    return changes


def section(title, runs):
    """The table of one trace and kind of home."""
    lines = [f"## {title}", ""]
    headings = [heading for heading, _, _ in SCORES.values()]
    rows = []
    for name in PLANNERS:
        own = [scores[name] for scores in runs if name in scores]
        if not own:
            continue
        cells = [
            report.spread([score[field] * factor for score in own], digits)
            for field, (_, digits, factor) in SCORES.items()
        ]
        seconds = report.spread([score["seconds"] for score in own], 1)
        changes = relative(runs, name, ["LPT, then chain"])
        rows.append([name, *cells, report.spread(changes, 1), seconds])
    header = ["planner", *headings, "mean, % of chain's", "s"]
    return lines + report.table(header, rows)


def verdict(title, runs):
    """Where the joint planner wins and where it does not, by the mean batch time."""
    if not all("joint" in scores for scores in runs):
        return []
    known = {name for scores in runs for name in scores}
    known = {name for name in known if not name.startswith("joint")}
    known -= {"EPLB + 1 replica"}  # needs more memory
    means = {name: float(np.median(relative(runs, "joint", [name]))) for name in known}
    closest = max(means, key=lambda name: means[name])
    staged = relative(runs, "joint", [TWO_STAGE])
    return [
        [
            title,
            report.spread(relative(runs, "joint", ["LPT, then chain"]), 1),
            report.spread(staged, 1) if staged else "-",
            f"{closest}: {means[closest]:+.1f}",
            "yes" if means[closest] < 0 else "NO",
        ]
    ]


def lines_of(args, env, named):
    """The result page."""
    title = (
        f"Held-out halves of real traces: {args.ranks} ranks in nodes of "
        f"{args.ranks_per_node}, {args.wire}"
    )
    splits = len(next(iter(named.values())))
    lines = report.head(title, env)
    lines += [
        f"Median (smallest-largest) over {splits} splits and seeds; joint "
        f"{args.seconds:g} s, CBC {args.ilp_seconds:g} s (first {args.ilp_seeds} "
        f"seeds), {args.threads} threads, {args.jobs} at a time.",
        "",
    ]
    header = ["case", "chain", "paper's two stages", "closest", "below all?"]
    verdicts = [row for title, runs in named.items() for row in verdict(title, runs)]
    if verdicts:
        lines += ["## Joint against the others: mean time of a held-out batch, %", ""]
        lines += report.table(header, verdicts)
    for title, runs in named.items():
        lines += section(title, runs)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--ilp-seconds", type=float, default=60)
    parser.add_argument("--ilp-seeds", type=int, default=1, help="0: leave CBC out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each planner")
    parser.add_argument("--jobs", type=int, default=1, help="planners at a time")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--ranks-per-node", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--wire", default="dedup", choices=[w.value for w in Wire])
    parser.add_argument("--traces", nargs="*", default=list(TRACES), choices=TRACES)
    parser.add_argument(
        "--homes", nargs="*", default=["uniform", "follow"], choices=list(Homes)
    )
    parser.add_argument("--planners", nargs="*", default=list(PLANNERS))
    parser.add_argument("--name", default="planning-held-out")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    env = report.environment(args.note)
    # As it goes: a run that is cut short leaves the splits that it ended.
    for runs in score_all(args, list(cases_of(args))):
        named = {
            f"{label}, homes {homes.value}": own for (label, homes), own in runs.items()
        }
        content = {"environment": env, "cases": named}
        report.write(args.name, content, lines_of(args, env, named))


if __name__ == "__main__":
    main()
