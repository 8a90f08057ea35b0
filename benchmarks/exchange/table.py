"""Makes a Markdown table of a result file of `run.py`.

python benchmarks/exchange/table.py FILE.json > FILE.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    print("# Exchange between ranks\n")
    for name, value in found["environment"].items():
        print(f"- {name}: {value}")
    print(
        "\nMilliseconds on the slowest rank, medians (interquartile); real traces: "
        "means over their layers. *exchange*: dispatch and combine, no experts; "
        "*replayed*: the same from a CUDA graph. Rows that leave a rank, all ranks "
        "together."
    )
    groups: dict[str, dict[str, list[dict]]] = {}
    for result in found["results"]:
        groups.setdefault(result["case"], {}).setdefault(result["method"], []).append(
            result
        )
    for case, methods in groups.items():
        print(f"\n## {case}\n")
        print("| method | rows | MB | exchange | replayed | layer |")
        print("|---|---|---|---|---|---|")
        for method, results in methods.items():
            cells = [method]
            for name, scale in (("rows", 1), ("bytes", 1e-6)):
                mean = statistics.mean(r[name] for r in results) * scale
                cells.append(f"{mean:,.0f}")
            cells += [_time(results, s) for s in ("exchange", "replayed", "layer")]
            print("| " + " | ".join(cells) + " |")


def _time(results: list[dict], step: str) -> str:
    if step not in results[0]:
        return "-"
    medians = [r[step]["median_ms"] for r in results]
    spread = statistics.mean(r[step]["iqr_ms"] for r in results)
    return f"{statistics.mean(medians):.3g} ({spread:.2g})"


if __name__ == "__main__":
    main()
