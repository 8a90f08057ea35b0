"""Plans and their proven gaps on generated instances, from 32 x 8 to 96 x 512.

    python benchmarks/planning/certificates.py --seconds 60
    python benchmarks/planning/certificates.py --homes follow --wire per_expert \
        --batch-tokens 0 --cases models --name planning-certificates-follow

60 % of the seconds plan, the others prove. Instances are presets of the calibrated
generator (docs/bounds.md says what is proven); values are modelled times of the
planning trace itself, because a bound is about that. Each case runs in a process of its
own, so that peak memory is its own, children included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import report
from moetuner.bounds import certify
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.evaluate import evaluate
from moetuner.evaluation.models import shape_for_model
from moetuner.evaluation.workload import Workload
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.solver import SolverOptions, SolveStatus, get_solver
from moetuner.solver.joint.profiles import Favour
from moetuner.solver.joint.solver import JointConfig, JointSolver
from moetuner.trace import TOPIC_PRESETS, topic_trace

MODELS = [
    ("mixtral", 4),
    ("mixtral", 8),
    ("gpt-oss", 8),
    ("deepseek-v2-lite", 8),
    ("qwen3", 8),
    ("deepseek-v3", 8),
    ("deepseek-v3", 32),
    ("deepseek-v3", 64),
]
PLAN_SHARE = 0.6
# A proof is about this trace's batches, so the plan is too.
TRACE_ALONE = JointSolver(config=JointConfig(favour=Favour.TRACE))
LARGEST = [("96x512", 64), ("96x512", 256)]
CASES = {"models": MODELS, "largest": LARGEST, "all": MODELS + LARGEST}


def make_problem(args, preset, ranks):
    """The problem of one generated trace."""
    routing = TOPIC_PRESETS[preset]
    trace = topic_trace(routing, num_tokens=args.tokens, seed=args.seed)
    shape = shape_for_model(routing.model)
    cost = CostModel(shape=shape, wire=Wire(args.wire), homes=Homes(args.homes))
    workload = Workload(traces=(trace,), cost=cost, batch_tokens=args.batch_tokens)
    topology = Topology(num_ranks=ranks, ranks_per_node=min(ranks, args.ranks_per_node))
    return PlacementProblem.from_workload(workload, topology)


def two_stage(problem, options):
    """Balance, then exact alignment of the layers: LPT and the assignment chain."""
    asked = replace(problem, objective=Objective.LINK_TRAFFIC)
    return get_solver("chain").solve(asked, options)


def run_case(args, preset, ranks):
    """Plan, prove, compare; one dictionary of plain numbers."""
    began = time.monotonic()
    problem = make_problem(args, preset, ranks)
    made = time.monotonic() - began
    plan_seconds = PLAN_SHARE * args.seconds
    options = SolverOptions(
        time_limit=plan_seconds, threads=args.threads, seed=args.seed
    )
    staged = two_stage(problem, options)
    staged_value = problem.objective_value(staged.placement)
    solver = "exact" if problem.num_experts <= 8 else "joint"
    method = TRACE_ALONE if solver == "joint" else get_solver(solver)
    solution = method.solve(problem, options)
    if solver == "exact" and solution.status is SolveStatus.OPTIMAL:
        bound = counted = solution.lower_bound
        prove_seconds = 0.0
    else:
        proof = certify(
            problem,
            solution.placement,
            time_limit=args.seconds - solution.seconds,
            threads=args.threads,
        )
        bound, counted = proof.lower_bound, proof.counting_bound
        prove_seconds = proof.seconds
    scored = evaluate(
        problem.workload.traces[0],
        solution.placement,
        problem.workload.cost,
        batch_tokens=args.batch_tokens,
    )
    routing = TOPIC_PRESETS[preset]
    return {
        "case": f"{preset} {routing.num_layers} x {routing.num_experts} on {ranks}",
        "experts": routing.num_layers * routing.num_experts * ranks,
        "solver": solver,
        "value_ms": solution.value * 1e3,
        "bound_ms": bound * 1e3,
        "counting_bound_ms": counted * 1e3,
        "two_stage_ms": staged_value * 1e3,
        "gap": 1 - bound / solution.value,
        "two_stage_gap": 1 - bound / staged_value,
        "gain": 1 - solution.value / staged_value,
        "imbalance": scored.imbalance_mean,
        "remote_ranks": scored.remote_ranks_per_token,
        "remote_nodes": scored.remote_nodes_per_token,
        "plan_seconds": solution.seconds,
        "prove_seconds": prove_seconds,
        "generate_seconds": made,
        "peak_gb": report.peak_gigabytes(),
    }


def run_apart(args, preset, ranks):
    """`run_case` in a process of its own."""
    command = [sys.executable, __file__, "--single", preset, str(ranks)]
    for name in (
        "seconds",
        "threads",
        "seed",
        "tokens",
        "batch_tokens",
        "homes",
        "wire",
    ):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--ranks-per-node", str(args.ranks_per_node)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:]
        return {"case": f"{preset} on {ranks}", "failed": " ".join(tail)}
    return json.loads(done.stdout.splitlines()[-1])


def lines_of(args, env, found):
    """The result page."""
    rows = []
    for case in found:
        if "failed" in case:
            rows.append([case["case"], f"failed: {case['failed']}", *[""] * 8])
            continue
        rows.append(
            [
                case["case"],
                case["solver"],
                f"{case['value_ms']:.3f}",
                f"{case['bound_ms']:.3f}",
                f"{case['gap']:.2%}",
                f"{case['counting_bound_ms']:.3f}",
                f"{-case['gain']:+.1%}",
                f"{case['plan_seconds']:.1f} + {case['prove_seconds']:.1f}",
                f"{case['peak_gb']:.1f}",
            ]
        )
    lines = report.head("Plans and proven gaps on generated instances", env)
    lines += [
        f"{args.tokens:,} tokens, batches of {args.batch_tokens or 'all'}, homes "
        f"{args.homes}, wire {args.wire}, nodes of {args.ranks_per_node}; "
        f"{args.threads} threads.",
        "",
    ]
    header = ["instance", "solver", "ms", "bound", "gap", "by counting"]
    header += ["against two-stage", "plan + prove, s", "peak GB"]
    return lines + report.table(header, rows)


def plot(args, found):
    """Gap and time against the size of the instance."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    known = [case for case in found if "failed" not in case]
    sizes = [case["experts"] for case in known]
    figure, (gap, seconds) = plt.subplots(1, 2, figsize=(11, 4.5))
    gap.plot(sizes, [100 * case["gap"] for case in known], "o", label="joint or exact")
    gap.plot(
        sizes, [100 * case["two_stage_gap"] for case in known], "x", label="two-stage"
    )
    gap.set_ylabel("gap to the proven bound, %")
    seconds.plot(sizes, [case["plan_seconds"] for case in known], "o", label="plan")
    seconds.plot(sizes, [case["prove_seconds"] for case in known], "s", label="prove")
    seconds.set_ylabel("seconds")
    figure.suptitle(f"homes {args.homes}, wire {args.wire}")
    for axes in (gap, seconds):
        axes.set_xscale("log")
        axes.set_xlabel("layers x experts x ranks")
        axes.legend()
    for case in known:
        gap.annotate(
            case["case"], (case["experts"], 100 * case["gap"]), fontsize=6, rotation=30
        )
    figure.tight_layout()
    figure.savefig(report.RESULTS / f"{args.name}.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="all", choices=CASES)
    parser.add_argument("--only", nargs="*", help="presets to keep")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2, help="of each case")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--no-plot", action="store_true", help="without matplotlib")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--homes", default="uniform", choices=["uniform", "follow"])
    parser.add_argument("--wire", default="dedup", choices=["dedup", "per_expert"])
    parser.add_argument("--name", default="planning-certificates")
    parser.add_argument("--note", default="")
    parser.add_argument("--single", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.single:
        print(json.dumps(run_case(args, args.single[0], int(args.single[1]))))
        return
    env, found = report.environment(args.note), []
    wanted = [
        (preset, ranks)
        for preset, ranks in CASES[args.cases]
        if not args.only or preset in args.only
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for case in pool.map(lambda which: run_apart(args, *which), wanted):
            found.append(case)
            print(case, flush=True)
            content = {"environment": env, "cases": found}
            report.write(args.name, content, lines_of(args, env, found))
    if not args.no_plot:
        plot(args, found)


if __name__ == "__main__":
    main()
