"""Spare slots for the hottest experts on every rank, beside the rules that joint tries.

    MOETUNER_TRACES=FOLDER python benchmarks/planning/hot_everywhere.py

Each trace is planned for on one half and scored on the other, by rounds. The rules fill
the spare slots of a plan without them, and each layer takes the one that is fastest on
the planning half. The shape has the hottest experts of a layer on every rank, as many
as there are spare slots a rank, and the others placed jointly as if these had no rows.
It stands alone, and as one more of the rules.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

import numpy as np
import report
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import shape_for_model
from moetuner.solver.base import Clock
from moetuner.solver.joint.replan import widened
from moetuner.solver.joint.replicas import cheapest_layers, filled
from moetuner.trace import read_trace, split_by_sequence
from spare_slots import parsed, problem_of, solved

TRACES = {
    "DeepSeek-V2-Lite intent": (
        "deepseek-v2-lite-esft/intent.npz",
        "deepseek-v2-lite",
    ),
    "gpt-oss mmlu": ("gpt-oss-20b-fingerprinting/mmlu.npz", "gpt-oss"),
}
HEAD = ("ranks", "spare slots a rank", "tokens in a batch")
WAYS = ("alone", "as one more rule")


def hottest(problem, number) -> np.ndarray:
    """The experts of each layer with most rows, [L, number]."""
    order = np.argsort(-problem.statistics.load, axis=1, kind="stable")
    return order[:, :number]


def without_rows(trace, experts):
    """The trace as if nobody chose these experts [L, n]."""
    ids = np.array(trace.topk_ids)
    for layer, chosen in enumerate(experts):
        ids[:, layer][np.isin(ids[:, layer], chosen)] = -1
    return replace(trace, topk_ids=ids)


def on_every_rank(problem, placement, experts):
    """The placement with these experts [L, n] on every rank."""
    ranks = problem.topology.num_ranks
    wide = widened(placement, problem)
    slots = np.array(wide.slot_experts).reshape(problem.num_layers, ranks, -1)
    for layer, chosen in zip(slots, experts, strict=True):
        for rank in layer:
            lacking = chosen[~np.isin(chosen, rank)]
            rank[np.flatnonzero(rank < 0)[: lacking.size]] = lacking
    return replace(wide, slot_experts=slots.reshape(problem.num_layers, -1))


def changes(trace, model, ranks, spare, batch_tokens, args) -> list[float]:
    """Held-out change of the mean batch against the rules alone, by `WAYS`."""
    args = argparse.Namespace(**{**vars(args), "ranks": ranks})
    split = split_by_sequence(trace, 0.5, args.seed)
    cost = CostModel(hardware=HARDWARE[args.hardware], shape=shape_for_model(model))
    tight = problem_of(split.plan, cost, args, batch_tokens)
    roomy = replace(tight, slots_per_rank=tight.slots_per_rank + spare)
    plain = solved(tight, args)
    hot = hottest(tight, spare)
    cold = problem_of(without_rows(split.plan, hot), cost, args, batch_tokens)
    shape = on_every_rank(roomy, solved(cold, args), hot)
    rules = list(filled(roomy, [plain]))
    clock = Clock(time_limit=1e4)
    by_rules = cheapest_layers(roomy, rules, clock)[0]
    with_shape = cheapest_layers(roomy, [*rules, shape], clock)[0]
    score = problem_of(split.score, cost, args, batch_tokens, roomy.slots_per_rank)
    before = score.objective_value(by_rules)
    return [score.objective_value(each) / before - 1 for each in (shape, with_shape)]


def main() -> None:
    """Write planning-hot-everywhere.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--spare", type=int, nargs="+", default=[1, 2])
    args = parsed(parser)
    env = report.environment(args.note)
    content: dict[str, object] = {"environment": env}
    lines = report.head("The hottest experts on every rank", env)
    for label, (file, model) in TRACES.items():
        trace, rows = read_trace(report.traces_folder() / file), []
        for cell in itertools.product(args.ranks, args.spare, args.batches):
            found = changes(trace, model, *cell, args)
            content[f"{label}, {', '.join(map(str, cell))}"] = found
            rows.append([*map(str, cell), *(f"{100 * each:+.1f} %" for each in found)])
            print(label, *rows[-1], flush=True)
        lines += [f"## {label}", ""]
        lines += report.table([*HEAD, *WAYS], rows)
    report.write("planning-hot-everywhere", content, lines)


if __name__ == "__main__":
    main()
