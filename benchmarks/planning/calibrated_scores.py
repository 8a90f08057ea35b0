"""Scores of calibrated predictions, and of plans that were made with them."""

from __future__ import annotations

import itertools
import statistics

import report
from calibrated_cells import BASELINES, PLACEMENTS, PLANS

WITHIN, CERTAIN_GAIN = 0.15, 0.02


def error_of(cell) -> float:
    return cell["predicted"]["total"] / cell["measured"]["total"] - 1


def row_of(cell) -> list[str]:
    measured, told = cell["measured"], cell["predicted"]
    parts = [
        f"{told[part] / measured[part]:.2f}" if part in measured else "-"
        for part in ("dispatch", "experts", "combine")
    ]
    return [
        cell["model"],
        f"{cell['form']}{', replayed' if cell['replayed'] else ''}",
        str(cell["tokens_per_rank"]),
        cell["placement"],
        f"{measured['total'] * 1e3:.4g} ({cell['spread'] * 1e3:.2g})",
        f"{told['total'] * 1e3:.4g}",
        f"{error_of(cell):+.0%}",
        *parts,
    ]


def grouped(cells):
    """Cells of one model, form and size: they differ by their placement alone."""

    def key(cell):
        return cell["model"], cell["form"], cell["tokens_per_rank"]

    for name, own in itertools.groupby(sorted(cells, key=key), key=key):
        yield name, list(own)


def certain(a, b) -> bool:
    """Whether two times differ by more than either's spread."""
    measured = a["measured"]["total"] - b["measured"]["total"]
    return abs(measured) > max(a["spread"], b["spread"])


def summary(cells) -> dict[str, float | int]:
    """Errors of cells; pairs of placements of one model and size, and their order."""
    errors = [abs(error_of(cell)) for cell in cells]
    pairs = right = gains = losses = 0
    for _, own in grouped(cells):
        for a, b in itertools.combinations(own, 2):
            measured = a["measured"]["total"] - b["measured"]["total"]
            told = a["predicted"]["total"] - b["predicted"]["total"]
            known = certain(a, b)
            pairs += known
            right += known and measured * told > 0
            slower = max(a["predicted"]["total"], b["predicted"]["total"])
            gain = abs(told) > CERTAIN_GAIN * slower
            gains += gain
            losses += gain and known and measured * told < 0
    planned = beside_baselines(cells)
    return {
        "cells": len(cells),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "within_15_percent": sum(error <= WITHIN for error in errors) / len(errors),
        "pairs_beyond_spread": pairs,
        "ranked_right": right,
        "predicted_gains": gains,
        "gains_that_were_losses": losses,
        "plans": len(planned),
        "plans_faster_beyond_spread": sum(p["certain"] > 0 for p in planned),
        "plans_slower_beyond_spread": sum(p["certain"] < 0 for p in planned),
    }


def beside_baselines(cells) -> list[dict]:
    """Each plan beside the fastest baseline with as much memory, as measured.

    ``certain``: 1 where the plan is faster beyond the spread, -1 where it is slower.
    """
    found = []
    for (model, form, num_tokens), own in grouped(cells):
        by_name = {cell["placement"]: cell for cell in own}
        for name in PLANS:
            memory = PLACEMENTS[name][2]
            rivals = [
                cell
                for other, cell in by_name.items()
                if other in BASELINES and PLACEMENTS[other][2] <= memory
            ]
            if name not in by_name or not rivals:
                continue
            plan = by_name[name]
            best = min(rivals, key=lambda cell: cell["measured"]["total"])
            saved = {
                of: 1 - plan[of]["total"] / best[of]["total"]
                for of in ("measured", "predicted")
            }
            faster = 1 if saved["measured"] > 0 else -1
            found.append(
                {
                    "model": model,
                    "form": form,
                    "tokens_per_rank": num_tokens,
                    "plan": name,
                    "best_baseline": best["placement"],
                    **{f"{of}_gain": value for of, value in saved.items()},
                    "certain": faster * certain(plan, best),
                }
            )
    return found


def page(env, machines, cells, told) -> list[str]:
    lines = report.head("Calibrated predictions beside measured times", env)
    lines += [
        f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in told.items()
    ]
    for form, machine in machines.items():
        lines += ["", f"Fitted times, {form.value} form:", ""]
        head = ["part", "times", "median error", "worst"]
        rows = [
            [r.part, str(r.points), f"{r.median:.1%}", f"{r.worst:.1%}"]
            for r in machine.calibration.residuals
        ]
        lines += report.table(head, rows)
    lines += _plans(beside_baselines(cells))
    lines += [
        "Milliseconds of all layers, medians (spread) of the slowest rank, mean of the "
        "batches. Parts: predicted over measured.",
        "",
    ]
    head = ["model", "form", "tokens of a rank", "placement", "measured", "predicted"]
    head += ["error", "dispatch", "experts", "combine"]
    return lines + report.table(head, [row_of(cell) for cell in cells])


def _plans(planned) -> list[str]:
    if not planned:
        return []
    words = {1: "faster", 0: "within the spread", -1: "SLOWER"}
    rows = [
        [
            p["model"],
            p["form"],
            str(p["tokens_per_rank"]),
            p["plan"],
            p["best_baseline"],
            f"{p['measured_gain']:+.1%}",
            f"{p['predicted_gain']:+.1%}",
            words[p["certain"]],
        ]
        for p in planned
    ]
    head = ["model", "form", "tokens of a rank", "plan", "fastest baseline"]
    head += ["less time", "predicted", ""]
    return [
        "Plans made with these machine files, beside the baseline that was measured to "
        "be the fastest of those with as many slots:",
        "",
        *report.table(head, rows),
    ]
