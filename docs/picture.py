"""Draws docs/planners.svg from the held-out figures under benchmarks/results.

`python docs/picture.py` writes the file; a test compares it with what this draws.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
TARGET = HERE / "planners.svg"
FIGURES = HERE.parent / "benchmarks" / "results" / "planning-held-out.json"
CASE = "V2-Lite law, homes uniform"
TITLE = "DeepSeek-V2-Lite on legal texts: 64 experts, top-6, 8 GPUs in 2 nodes"
SUBTITLE = "Modelled time of a held-out batch against contiguous, median of {} splits"
NAMES = {  # as `moetuner plan` prints them
    "contiguous": "contiguous",
    "LPT + swaps": "lpt",
    "EPLB": "eplb",
    "affinity only": "affinity",
    "co-activation only": "coactivation",
    "joint": "moetuner (joint)",
}
WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 160, 70, 64
X_RANGE, Y_RANGE = (1.0, 2.0), (2.6, 4.2)
X_TICKS, Y_TICKS = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0), (3.0, 3.5, 4.0)
BELOW = {"eplb": 18, "affinity": -12, "coactivation": 6}  # so that no labels meet
STYLE = (
    "text{font:13px sans-serif;fill:#57606a}"
    ".t{font-weight:bold;font-size:15px;fill:#24292f}"
    ".a{stroke:#8c959f}.g{stroke:#d0d7de}.o{fill:#8c959f}.b{fill:#0969da}"
    "text.b{font-weight:bold}rect{fill:#fff}"
)


def draw() -> str:
    """The picture: the load of the busiest GPU against the GPUs that a token visits."""
    splits = json.loads(FIGURES.read_text())["cases"][CASE]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        f"<title>{escape(TITLE)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        _text(LEFT - 56, 28, TITLE, "t"),
        _text(LEFT - 56, 48, SUBTITLE.format(len(splits))),
        *_axes(),
    ]
    slowest = _median(splits, "contiguous", "batch_seconds_mean")
    for planner, name in NAMES.items():
        load = _median(splits, planner, "imbalance_mean")
        ranks = _median(splits, planner, "remote_ranks_per_token")
        gain = _median(splits, planner, "batch_seconds_mean") / slowest - 1
        ours = planner == "joint"
        label = name if planner == "contiguous" else f"{name}  {100 * gain:+.1f} %"
        kind = "b" if ours else "o"
        parts.append(
            f'<circle class="{kind}" cx="{_x(load):.1f}" cy="{_y(ranks):.1f}" r="6"/>'
        )
        y = _y(ranks) + 4 + BELOW.get(name, 0)
        parts.append(_text(_x(load) + 12, y, label, "b" if ours else ""))
    return "\n".join([*parts, "</svg>", ""])


def _axes() -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = [
        f'<path class="a" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>',
        _text(LEFT, HEIGHT - 18, "load of the busiest GPU / mean GPU  →  more waiting"),
        f'<g transform="translate(22 {bottom}) rotate(-90)">'
        + _text(0, 0, "remote ranks per token  →  more traffic")
        + "</g>",
    ]
    for tick in X_TICKS:
        lines.append(_text(_x(tick) - 10, bottom + 20, f"{tick:.1f}"))
    for tick in Y_TICKS:
        lines.append(_text(LEFT - 30, _y(tick) + 4, f"{tick:.1f}"))
        lines.append(f'<path class="g" d="M{LEFT} {_y(tick):.1f}H{right}"/>')
    return lines


def _median(splits: list[dict[str, dict[str, float]]], planner: str, of: str) -> float:
    return median(split[planner][of] for split in splits)


def _x(load: float) -> float:
    low, high = X_RANGE
    return LEFT + (load - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _y(ranks: float) -> float:
    low, high = Y_RANGE
    return HEIGHT - BOTTOM - (ranks - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.0f}" y="{y:.0f}"{shown}>{escape(words)}</text>'


if __name__ == "__main__":
    TARGET.write_text(draw())
