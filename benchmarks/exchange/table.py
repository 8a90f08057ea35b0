"""Makes a Markdown table of a result file of this folder's programs.

python benchmarks/exchange/table.py FILE.json > FILE.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from two_nodes import table as table_of_nodes

EXCHANGE = """
Milliseconds on the slowest rank, medians (interquartile); real traces: means over their
layers. *exchange*: dispatch and combine, no experts; *replayed*: the same from a CUDA
graph. Rows that leave a rank, all ranks together, on the way to the experts and back;
MB of those to the experts."""
FOLLOW = """
*follow*: the same tokens, each held by the rank of its first expert of the layer
before, and left at that of this layer, under that placement. Nothing returns home
between layers, so attention has to accept tokens in any order, as where it is
tensor-parallel and gathers them anyway; ranks hold unequal numbers of tokens."""
MODELS = """
Milliseconds of one step on the slowest rank, medians (interquartile): the whole model,
and its exchanges and experts alone, which is what the cost model predicts. Rows that
leave a rank, all layers and ranks together."""

NODES = """
Milliseconds of dispatch and combine on the slowest rank, no experts. Rows that leave a
node; bytes as the kernel counted them on the link, and rows times their size.
"""
LAYERS = """
Microseconds of a whole layer on the slowest rank: median (first to ninth decile). A
barrier stands before each call. *replayed*: the same from a CUDA graph. *blocks*: the
most of a GPU that an exchange has beside the experts, 0 its own choice."""
ONE_NODE = """
Microseconds of dispatch and combine on the slowest rank, no experts: median (first to
ninth decile). A barrier stands before each call. Calls have exact sizes, replays are of
a CUDA graph of the fixed form. *peers*: over mapped memory; *collectives*: over the
group's communicator; *deepep*: its normal kernels and our permute; *deepep-ll*: its
low-latency kernels. *senders*: blocks of a GPU that send; 0 its own choice.
"""


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    first = found["results"][0]
    models = "phase" in first
    print("# Whole models\n" if models else "# Exchange between ranks\n")
    for name, value in found["environment"].items():
        print(f"- {name}: {value}")
    by_key = {
        "phase": _models,
        "sent_bytes": _nodes,
        "layer_us": _layers,
        "eager": _one_node,
    }
    (own,) = [write for key, write in by_key.items() if key in first] or [_exchange]
    own(found["results"])


def _nodes(results: list[dict]) -> None:
    print(NODES)
    print(table_of_nodes(results))


def _layers(results: list[dict]) -> None:
    print(LAYERS)
    for case, own in _grouped(results, "case").items():
        print(f"\n## {case}\n")
        print("| method | rows carried by | blocks | layer | replayed |")
        print("|---|---|---|---|---|")
        for r in own:
            cells = [r["method"], r["transport"], str(r.get("blocks", "-"))]
            cells += [_microseconds(r.get(n)) for n in ("layer_us", "replayed_us")]
            print("| " + " | ".join(cells) + " |")


def _one_node(results: list[dict]) -> None:
    print(ONE_NODE)
    print("| tokens a rank | rows out | carried by | senders | launched | replayed |")
    print("|---|---|---|---|---|---|")
    for r in results:
        cells = [r["tokens"], r["rows"], r["way"], r["senders"]]
        cells += [_microseconds(r[name]) for name in ("eager", "replayed")]
        print("| " + " | ".join(map(str, cells)) + " |")


def _microseconds(found: list[float] | None) -> str:
    """Of median, first and ninth decile."""
    if found is None:
        return "-"
    median, low, high = found
    return f"{median:.0f} ({low:.0f}-{high:.0f})"


def _exchange(results: list[dict]) -> None:
    print(EXCHANGE)
    if any(result["method"].endswith("follow") for result in results):
        print(FOLLOW)
    for case, own in _grouped(results, "case").items():
        print(f"\n## {case}\n")
        print("| method | rows | back | MB | exchange | replayed | layer |")
        print("|---|---|---|---|---|---|---|")
        for method, layers in _grouped(own, "method").items():
            cells = [method]
            for name, scale in (("rows", 1), ("rows_back", 1), ("bytes", 1e-6)):
                mean = statistics.mean(r.get(name, r["rows"]) for r in layers) * scale
                cells.append(f"{mean:,.0f}")
            cells += [_mean_time(layers, s) for s in ("exchange", "replayed", "layer")]
            print("| " + " | ".join(cells) + " |")


def _models(results: list[dict]) -> None:
    print(MODELS)
    for shape, own in _grouped(results, "shape").items():
        print(f"\n## {shape}\n")
        print(
            "| phase | placement | rows | model | exchanges and experts | predicted |"
        )
        print("|---|---|---|---|---|---|")
        for r in own:
            tokens = f"{r['phase']}, {r['tokens_per_rank']} per rank"
            rows = sum(
                count
                for source, row in enumerate(r["traffic"])
                for target, count in enumerate(row)
                if source != target
            )
            said = r["predicted"]["milliseconds"] if r.get("predicted") else None
            cells = [tokens, r["placement"], f"{rows:,.0f}"]
            cells += [_mean_time([r], part, 4) for part in ("model", "experts")]
            print("| " + " | ".join([*cells, f"{said:.4g}" if said else "-"]) + " |")


def _grouped(results: list[dict], key: str) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for result in results:
        groups[result[key]].append(result)
    return groups


def _mean_time(results: list[dict], part: str, digits: int = 3) -> str:
    if part not in results[0]:
        return "-"
    medians = [r[part]["median_ms"] for r in results]
    spread = statistics.mean(r[part]["iqr_ms"] for r in results)
    return f"{statistics.mean(medians):.{digits}g} ({spread:.2g})"


if __name__ == "__main__":
    main()
