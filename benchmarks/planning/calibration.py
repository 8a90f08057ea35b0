"""The generator beside the recordings that it was fitted to.

python benchmarks/planning/calibration.py
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import report
from moetuner.evaluation.workload import batch_index
from moetuner.trace import TOPIC_PRESETS, read_trace, topic_trace
from moetuner.trace.description import describe

RECORDED = {
    "DeepSeek-V2-Lite-Chat, prompts": (
        "deepseek-v2-lite-chat-moe-beyond/prompts.npz",
        "deepseek-v2-lite",
    ),
    "gpt-oss-20b, mmlu": ("gpt-oss-20b-fingerprinting/mmlu.npz", "gpt-oss"),
}
TOKENS = 20_000


def figures(trace):
    """Medians over layers: skew, two lifts, and the skew of single batches."""
    found = describe(trace)
    batches = batch_index(trace, 2048)
    peaks = []
    for layer in range(trace.num_layers):
        ids = trace.topk_ids[:, layer]
        rows = np.zeros((int(batches.max()) + 1, trace.num_experts))
        np.add.at(rows, (np.repeat(batches, ids.shape[1]), ids.ravel()), 1)
        peaks.append((rows.max(axis=1) / rows.mean(axis=1)).mean())
    return {
        "busiest expert / mean": found.load_skew.median,
        "the same in a batch of 2,048": float(np.median(peaks)),
        "co-activation lift": found.coactivation_lift.median,
        "transition lift": found.transition_lift.median,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="*", default=list(TOPIC_PRESETS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    env = report.environment("")
    rows, content = [], {}
    real = {}
    for label, (file, preset) in RECORDED.items():
        path = report.traces_folder() / file
        real[preset] = (label, figures(read_trace(path)))
    for name in args.presets:
        routing, values, seconds = TOPIC_PRESETS[name], [], 0.0
        for seed in range(args.seeds):
            began = time.monotonic()
            trace = topic_trace(routing, num_tokens=TOKENS, seed=seed)
            seconds += (time.monotonic() - began) / args.seeds
            values.append(figures(trace))
        label, recorded = real.get(name, ("", {}))
        shape = f"{routing.num_layers} x {routing.num_experts}, k {routing.top_k}"
        for figure in values[0]:
            rows.append(
                [
                    name,
                    shape,
                    figure,
                    report.spread([each[figure] for each in values], 2),
                    f"{recorded[figure]:.2f} ({label})" if recorded else "",
                ]
            )
        content[name] = {"generated": values, "recorded": recorded, "seconds": seconds}
        print(name, f"{seconds:.1f} s", values[0], recorded, flush=True)
    lines = report.head("The generator beside the recordings it was fitted to", env)
    lines += [
        f"Medians over layers; generated: median (smallest-largest) of "
        f"{args.seeds} seeds, {TOKENS:,} tokens.",
        "",
    ]
    header = ["preset", "layers x experts", "figure", "generated", "recorded"]
    lines += report.table(header, rows)
    report.write("planning-calibration", {"environment": env, **content}, lines)


if __name__ == "__main__":
    main()
