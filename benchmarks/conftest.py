import sys
from pathlib import Path

import harness
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


@pytest.hookimpl
def pytest_benchmark_update_json(config, output_json):
    """Keep what a reader needs: the environment, and statistics instead of samples.

    Beside the JSON file goes a table of what was timed by the GPU's own clock.
    """
    output_json["environment"] = harness.environment()
    output_json.pop("machine_info", None)
    output_json.pop("commit_info", None)
    kept = ("min", "median", "iqr", "max", "rounds")
    for entry in output_json["benchmarks"]:
        entry["stats"] = {name: entry["stats"][name] for name in kept}
        entry.pop("options", None)
    table = gpu_table(output_json)
    if table:
        path = Path(config.getoption("benchmark_json").name).with_suffix(".md")
        path.write_text(table)


def gpu_table(results):
    """Markdown: one section per group, medians in microseconds, IQR in brackets."""
    timed = [b for b in results["benchmarks"] if "replayed_us" in b["extra_info"]]
    if not timed:
        return ""
    environment = results["environment"].items()
    lines = [
        "# Microbenchmarks",
        "",
        "Microseconds per call: median (interquartile)",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in environment]
    for group in dict.fromkeys(b["group"] for b in timed):
        lines += ["", f"## {group}", ""]
        lines += [
            "| | eager | replayed | floor | floor / replayed |",
            "|---|---|---|---|---|",
        ]
        for info in (b["extra_info"] for b in timed if b["group"] == group):
            floor = info.get("floor_us")
            lines.append(
                f"| {info.get('implementation', '')} "
                f"| {info['eager_us']:.1f} ({info['eager_iqr_us']:.1f}) "
                f"| {info['replayed_us']:.1f} ({info['replayed_iqr_us']:.1f}) "
                + (
                    f"| {floor:.1f} | {floor / info['replayed_us']:.0%} |"
                    if floor
                    else "| | |"
                )
            )
    return "\n".join(lines) + "\n"
