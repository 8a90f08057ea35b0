"""Measured times of a model's layers, from the files that tools write.

- a plain CSV: ``part`` and ``seconds``, ``ms`` or ``us``; ``layer``, ``rank`` and
  ``step`` where they are known;
- a CSV of Nsight Systems: ``nsys stats --format csv`` with the report ``nvtx_sum`` or
  ``nvtx_gpu_proj_sum`` of a run with ``MOETUNER_NVTX=1``;
- what ``torch.profiler`` says of a run: ``key_averages().table()`` as text, or the same
  as a JSON list of objects with ``key``, ``count`` and times in microseconds.
"""

from __future__ import annotations

import csv
import enum
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetuner.errors import InvalidTraceError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable


class LayerPart(str, enum.Enum):
    """What a layer is made of."""

    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"
    TOTAL = "total"
    """All of a layer, whatever it is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTime:
    """What a part takes in one step."""

    part: LayerPart
    seconds: float
    """The median of the steps, each the slowest rank's."""
    layer: int | None = None
    """The model's number of the layer; None: as ``of_each_layer`` says."""
    of_each_layer: bool = False
    """Without a layer: a mean over layers, not their sum."""


_UNITS = {"seconds": 1.0, "ms": 1e-3, "us": 1e-6}
_NAMES = {
    **{part.value: part for part in LayerPart},
    "expert": LayerPart.EXPERTS,  # the NVTX range
    "compute": LayerPart.EXPERTS,
    "layer": LayerPart.TOTAL,
}
_PRODUCTS = ("aten::_grouped_mm", "moetuner::grouped_mm")
"""What torch's profiler knows of experts: two for each call of a layer. The time of the
second holds that of the first, which it calls: only one of them counts."""
_SUFFIX = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "μs": 1e-6, "µs": 1e-6, "ns": 1e-9}


def read_times(path: str | os.PathLike[str]) -> list[MeasuredTime]:
    """Read any of the formats; which it is, is seen from its first lines.

    Raises
    ------
    OSError
        When the file cannot be read.
    InvalidTraceError
        Naming the file, the line, what was wanted and what is there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidTraceError(f"{path}: not a text file: {error}") from error
    if text.lstrip().startswith("["):
        found = _of_objects(_json_list(text, path), path)
    elif re.search(r"^\s*Name\s.*# of Calls", text, re.MULTILINE):
        found = _of_objects(_table_rows(text), path)
    elif any(_is_range_head(line) for line in text.splitlines()):
        found = _of_ranges(text, path)
    else:
        found = _of_plain(text, path)
    if not found:
        raise InvalidTraceError(
            f"{path}: no time of dispatch, experts, combine or total in it: record the "
            f"run with MOETUNER_NVTX=1 or torch.profiler, or name parts so in a CSV"
        )
    return found


def _of_plain(text: str, path: Any) -> list[MeasuredTime]:
    lines = csv.DictReader(text.splitlines())
    heads = [(head or "").strip().lower() for head in lines.fieldnames or ()]
    lines.fieldnames = heads
    units = [head for head in heads if head in _UNITS]
    if "part" not in heads or len(units) != 1:
        raise InvalidTraceError(
            f"{path}: wanted a CSV with the columns part and one of seconds, ms or us "
            f"(and layer, rank, step where known), a CSV of nsys stats with NVTX "
            f"ranges, or a table of torch.profiler; got the columns {heads}"
        )
    times: dict[tuple[LayerPart, int | None], dict[str, dict[str, float]]] = {}
    for row in lines:
        where = f"{path}: line {lines.line_num}"
        name = (row["part"] or "").strip().lower()
        if name not in _NAMES:
            wanted = ", ".join(part.value for part in LayerPart)
            raise InvalidTraceError(
                f"{where}: part: wanted one of {wanted}, got {name!r:.60}"
            )
        layer = _whole((row.get("layer") or "").strip(), where)
        seconds = _number(row[units[0]], where) * _UNITS[units[0]]
        step = (row.get("step") or "").strip() or f"line {lines.line_num}"
        if "rank" in heads and "step" not in heads:
            step = ""  # one step, all ranks of it
        ranks = times.setdefault((_NAMES[name], layer), {}).setdefault(step, {})
        rank = (row.get("rank") or "").strip()
        if rank in ranks:
            raise InvalidTraceError(
                f"{where}: {name} of layer {layer}, rank {rank or 'unknown'} is there "
                f"twice in step {step or 'unknown'}: number the steps in a column step"
            )
        ranks[rank] = seconds
    return [
        MeasuredTime(
            part=part,
            layer=layer,
            seconds=statistics.median(max(of.values()) for of in steps.values()),
        )
        for (part, layer), steps in times.items()
    ]


def _of_ranges(text: str, path: Any) -> list[MeasuredTime]:
    """The tables of nsys; of several, the one that knows the GPU's own time.

    Columns are those of nsys 2024 and 2025. Times are in ns unless ``--timeunit`` was
    given, and their heads name the unit.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if _is_range_head(line)]
    starts.sort(key=lambda i: "Proj" in lines[i], reverse=True)
    body = lines[starts[0] :]
    end = next((i for i, line in enumerate(body) if not line.strip()), len(body))
    median, unit = _median_of(body[0])
    found = []
    for row in csv.DictReader(body[:end]):
        name = (row.get("Range") or "").strip().lower()
        domain, _, own = name.rpartition(":")
        if domain not in ("", "moetuner") or own not in _NAMES:
            continue
        value = (row.get(median) or "").replace(",", "")
        found.append(
            MeasuredTime(
                part=_NAMES[own],
                seconds=_number(value, f"{path}: {name}") * unit,
                of_each_layer=True,
            )
        )
    return found


def _is_range_head(line: str) -> bool:
    return "Range" in next(csv.reader([line]), []) and bool(_median_of(line)[0])


def _median_of(line: str) -> tuple[str, float]:
    """Head and unit of the median, on the GPU where that is told; else nothing."""
    for head in sorted(next(csv.reader([line]), []), reverse=True):  # "Proj Med" first
        match = re.fullmatch(r"(?:Proj )?Med \((\w+)\)", head)
        if match and match[1] in _SUFFIX:
            return head, _SUFFIX[match[1]]
    return "", 0.0


def _of_objects(rows: Iterable[dict[str, Any]], path: Any) -> list[MeasuredTime]:
    """Of torch's profiler: totals and calls of each op, which may have several rows."""
    spent: Counter[str] = Counter()  # ps
    calls: Counter[str] = Counter()
    for row in rows:
        name = str(row.get("key", row.get("name", "")))
        if name not in _PRODUCTS:
            name = name.removeprefix("moetuner::").removeprefix("moetuner:")
            if name not in _NAMES:
                continue
        where = f"{path}: {name}"
        device = row.get("device_time_total", row.get("cuda_time_total")) or 0
        micro = _number(device, where) or _number(row.get("cpu_time_total"), where)
        spent[name] += round(micro * 1e6)
        calls[name] += int(_number(row.get("count", row.get("calls")), where))
    found = []
    for part in LayerPart:
        names = [name for name in calls if _NAMES.get(name) is part]
        number: float = sum(calls[name] for name in names)
        if part is LayerPart.EXPERTS:
            if not names:
                names = [name for name in _PRODUCTS if calls[name]][:1]
                number = sum(calls[name] for name in names) / 2
            number = (calls["dispatch"] or number) if names else 0
        if number:
            seconds = sum(spent[name] for name in names) * 1e-12 / number
            found.append(MeasuredTime(part=part, seconds=seconds, of_each_layer=True))
    return found


def _json_list(text: str, path: Any) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidTraceError(f"{path}: not JSON: {error}") from error
    if not all(isinstance(row, dict) for row in value):
        raise InvalidTraceError(
            f"{path}: wanted a list of objects with key, count and cpu_time_total or "
            f"device_time_total in microseconds"
        )
    found: list[dict[str, Any]] = value
    return found


def _table_rows(text: str) -> list[dict[str, Any]]:
    """Of ``key_averages().table()``: columns stand two spaces apart, or more."""
    lines = [line for line in text.splitlines() if line.strip(" -")]
    start = next(i for i, line in enumerate(lines) if "# of Calls" in line)
    heads = re.split(r"\s{2,}", lines[start].strip())
    rows = []
    for line in lines[start + 1 :]:
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) == len(heads):
            row = dict(zip(heads, cells, strict=True))
            rows.append(
                {
                    "key": row["Name"],
                    "count": row["# of Calls"],
                    "cpu_time_total": _micro(row.get("CPU total")),
                    "device_time_total": _micro(
                        row.get("CUDA total") or row.get("Device total")
                    ),
                }
            )
    return rows


def _micro(text: str | None) -> float:
    """Microseconds of "1.234ms"; 0 where there is nothing."""
    match = re.fullmatch(r"([\d.]+)(\D+)", (text or "").strip())
    if match is None or match[2] not in _SUFFIX:
        return 0.0
    return float(match[1]) * _SUFFIX[match[2]] * 1e6


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise InvalidTraceError(f"{where}: wanted a time >= 0, got {value!r:.60}")
    return number


def _whole(text: str, where: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidTraceError(f"{where}: layer: wanted a whole number, got {text!r}")
    return int(text)
