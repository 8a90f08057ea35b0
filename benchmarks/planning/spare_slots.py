"""What spare slots cost by the replica rules of the engines, and how to fill them.

    MOETUNER_TRACES=FOLDER python benchmarks/planning/spare_slots.py

Each trace is planned for without spare slots on one half, in batches of decoding. Then
every rank gets one slot more, filled in several ways, and all are scored on the other
half. "Own coldest twice" repeats the coldest expert of the rank itself.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import moetuner._core as _core
import numpy as np
import report
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import shape_for_model
from moetuner.evaluation.replica_rule import ReplicaRule
from moetuner.evaluation.tally import RoutingTally
from moetuner.evaluation.workload import BatchKind, Workload, num_batches, price
from moetuner.export import fill_slots
from moetuner.placement.topology import Topology
from moetuner.problem import PlacementProblem
from moetuner.solver import SolverOptions, get_solver
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import spread_replicas
from moetuner.trace import read_trace, split_by_sequence

TRACES = {
    "DeepSeek-V2-Lite intent": (
        "deepseek-v2-lite-esft/intent.npz",
        "deepseek-v2-lite",
    ),
    "gpt-oss gpqa": ("gpt-oss-20b-fingerprinting/gpqa.npz", "gpt-oss"),
}
WAYS = ("coldest that the rank lacks", "own coldest twice", "busiest, spread evenly")
RULES = [rule for rule in ReplicaRule if rule is not ReplicaRule.SGLANG_STATIC]
"""That one's slots are asked for by placements, which hold no expert twice."""


def mean_seconds(problem: PlacementProblem, slots: np.ndarray) -> float:
    """Mean batch of slots [L, P], in which a rank may hold an expert twice."""
    (trace,), (batches,) = problem.workload.traces, problem.workload.batches
    cost, topology = problem.workload.cost, problem.topology
    counts = _core.tally_routing(
        trace.topk_ids,
        np.ascontiguousarray(slots),
        trace.num_experts,
        topology.num_ranks,
        topology.ranks_per_node,
        cost.wire.rules,
        cost.homes,
        cost.replica_rule,
        None,
        None,
        batches,
        num_batches(batches),
    )
    scale = counts.pop("scale")
    rows = RoutingTally(
        topology=topology,
        tokens=np.bincount(batches).astype(float),
        **{name: array / scale for name, array in counts.items()},
    )
    return float(price(rows, cost).total.mean())


def problem_of(part, cost, args, batch_tokens, slots=0):
    """One half of a trace, in batches of decoding."""
    workload = Workload(
        traces=(part,),
        cost=cost,
        batch_tokens=batch_tokens,
        batch_kind=BatchKind.MIXED,
    )
    topology = Topology(num_ranks=args.ranks, ranks_per_node=args.ranks)
    return PlacementProblem.from_workload(workload, topology, slots_per_rank=slots)


def solved(problem, args):
    """The placement by `joint`, by rounds."""
    solver = get_solver("joint", JointConfig(rounds=args.rounds))
    options = SolverOptions(time_limit=1e4, seed=args.seed, threads=args.threads)
    return solver.solve(problem, options).placement


def repeat_own(placement, load) -> np.ndarray:
    """The coldest expert of each rank twice; one spare slot a rank."""
    num_layers, ranks = placement.num_layers, placement.topology.num_ranks
    slots = np.array(placement.slot_experts).reshape(num_layers, ranks, -1)
    for layer, rows in zip(slots, load, strict=True):
        for rank in layer:
            own = rank[rank >= 0]
            rank[rank < 0] = own[rows[own].argmin()]
    return slots.reshape(num_layers, -1)


def changes(label, batch_tokens, args) -> list[list[float]]:
    """Relative change of the held-out mean batch, [rules][ways]."""
    file, model = TRACES[label]
    split = split_by_sequence(read_trace(report.traces_folder() / file), 0.5, args.seed)
    cost = CostModel(hardware=HARDWARE[args.hardware], shape=shape_for_model(model))
    tight = problem_of(split.plan, cost, args, batch_tokens)
    plain = solved(tight, args)
    spare = replace(tight, slots_per_rank=tight.slots_per_rank + 1)
    wide, load = widened(plain, spare), spare.statistics.load
    filled = (
        fill_slots(wide, load=load).slots,
        repeat_own(wide, load),
        spread_replicas(spare, wide).slot_experts,
    )
    found = []
    for rule in RULES:
        priced = replace(cost, replica_rule=rule)
        score = problem_of(split.score, priced, args, batch_tokens)
        before = mean_seconds(score, wide.slot_experts)
        found.append([mean_seconds(score, slots) / before - 1 for slots in filled])
    return found


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command says, with the options of every plan by rounds."""
    parser.add_argument("--hardware", default="h200")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--note", default="")
    return parser.parse_args()


def main() -> None:
    """Write planning-spare-slots.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 256, 2048])
    parser.add_argument("--ranks", type=int, default=8)
    args = parsed(parser)
    env = report.environment(args.note)
    content: dict[str, object] = {"environment": env}
    lines = report.head("Spare slots by replica rule", env)
    for label in TRACES:
        rows = []
        for batch_tokens in args.batches:
            for rule, by_way in zip(
                RULES, changes(label, batch_tokens, args), strict=True
            ):
                content[f"{label}, {batch_tokens}, {rule.value}"] = by_way
                cells = [f"{100 * change:+.1f} %" for change in by_way]
                rows.append([str(batch_tokens), rule.value, *cells])
                print(label, *rows[-1], flush=True)
        lines += [f"## {label}", ""]
        lines += report.table(["tokens in a batch", "replica rule", *WAYS], rows)
    report.write("planning-spare-slots", content, lines)


if __name__ == "__main__":
    main()
