"""Other programs' recordings and placements: ``import``, ``export`` and back."""

from __future__ import annotations

import enum
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated

import typer

from moetuner._words import amount
from moetuner.cli.messages import note
from moetuner.cli.options import ExpertHiddenSize, HiddenSize, Quiet  # noqa: TC001
from moetuner.errors import InvalidPlacementError, InvalidTraceError
from moetuner.export import Engine
from moetuner.export.vllm import PULL_REQUESTS
from moetuner.trace.importers import RecordingFormat

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from moetuner.placement.model import Placement

FormatName = enum.Enum(  # type: ignore[misc]
    "FormatName", {f.value: f.value for f in RecordingFormat}, type=str
)
EngineName = enum.Enum(  # type: ignore[misc]
    "EngineName", {e.value: e.value for e in Engine}, type=str
)
LayersOption = Annotated[
    str | None, typer.Option(help="MoE layers: 3-60, or 1,3,5  [default: seen]")
]


def import_(
    files: Annotated[
        list[Path], typer.Argument(help="Files of one recording, or their folder")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Trace file to write")],
    format: Annotated[
        FormatName | None,
        typer.Option(
            metavar="<kind>",
            help=f"{', '.join(each.value for each in RecordingFormat)}  "
            f"[default: detected]",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Name of the model")] = "",
    dataset: Annotated[str, typer.Option(help="Name of what was asked")] = "",
    num_experts: Annotated[
        int | None, typer.Option(help="Routed experts, when not recorded", min=1)
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(help="All hidden layers, when not recorded", min=1),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token, when not recorded", min=1)
    ] = None,
    layers: LayersOption = None,
    placement: Annotated[
        Path | None,
        typer.Option(help="trtllm: what was active while slots were recorded"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Turn a recording of a serving engine or trainer into a trace."""
    from moetuner.cli.progress import ByteProgress
    from moetuner.report.outputs import check_writable
    from moetuner.report.terminal import print_content, print_sentences
    from moetuner.trace.importers import ImportOptions, import_recording

    check_writable(out)
    if any(out.resolve() == file.resolve() for file in files):
        raise InvalidTraceError(f"--out {out}: that is the recording")
    with ByteProgress(quiet) as progress:
        imported = import_recording(
            files,
            out,
            format=None if format is None else RecordingFormat(format.value),
            options=ImportOptions(
                model=model,
                dataset=dataset,
                num_experts=num_experts,
                num_layers=num_layers,
                top_k=top_k,
                layers=None if layers is None else parse_layers(layers),
                slot_experts=None if placement is None else _slots_of(placement),
                progress=progress.update,
                note=lambda text: note(text, quiet),
            ),
        )
    unit = "tokens" if imported.tokens_known else "choices of experts a layer"
    print_sentences(
        f"{imported.format.value}: {imported.num_tokens:,} {unit}, "
        f"{amount(imported.num_layers, 'layer')} of {imported.num_experts} experts"
    )
    if imported.missing:
        print_sentences(
            f"counts only, no {' and no '.join(imported.missing)}: solvers and costs "
            f"that need them will refuse"
        )
    print_content(f"wrote {out}")


def export(
    placement: Annotated[Path, typer.Argument(help="Placement file of moetuner")],
    to: Annotated[EngineName, typer.Option(help="Whose file to write")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write")],
    num_layers: Annotated[
        int | None,
        typer.Option(
            help="Hidden layers of the model; sglang has a row for each", min=1
        ),
    ] = None,
    moe_layers: Annotated[
        str | None,
        typer.Option(help="Layers with experts, 3-60  [default: the placement's]"),
    ] = None,
    mtp_layers: Annotated[
        int,
        typer.Option(help="Layers of multi-token prediction, after all others", min=0),
    ] = 0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Trace whose coldest experts fill spare slots"),
    ] = None,
    pull_request: Annotated[
        int,
        typer.Option(help=f"vllm: which proposal {', '.join(map(str, PULL_REQUESTS))}"),
    ] = PULL_REQUESTS[0],
    hidden_size: HiddenSize = None,
    expert_hidden_size: ExpertHiddenSize = None,
    quiet: Quiet = False,
) -> None:
    """Write a placement as the file that a serving engine loads."""
    from moetuner.export import ExportOptions, export_placement
    from moetuner.placement.file import read_placement
    from moetuner.report.outputs import check_writable
    from moetuner.report.terminal import print_content, print_sentences

    check_writable(out)
    if out.resolve() == placement.resolve():
        raise InvalidPlacementError(f"--out {out}: that is the placement")
    plan = read_placement(placement)
    exported = export_placement(
        plan,
        out,
        Engine(to.value),
        options=ExportOptions(
            num_layers=num_layers,
            moe_layers=None
            if moe_layers is None
            else parse_layers(moe_layers, "--moe-layers"),
            mtp_layers=mtp_layers,
            load=None if trace is None else _load_of(trace, plan),
            expert_bytes=_expert_bytes(plan, hidden_size, expert_hidden_size),
            pull_request=pull_request,
        ),
    )
    print_content(f"wrote {out}")
    if exported.num_replicas:
        size = "of unknown size (--hidden-size, --expert-hidden-size)"
        if exported.extra_bytes is not None:
            size = f"{exported.extra_bytes / 2**30:.2f} GiB over all ranks"
        print_sentences(
            f"{exported.num_replicas} empty slots hold replicas now: {size}, for "
            f"engines know no empty ones"
        )
    print_content(f"load it with:\n  {exported.command}")
    for text in exported.notes:
        note(text, quiet)


def import_placement(
    file: Annotated[Path, typer.Argument(help="Placement file of a serving engine")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Placement file to write")],
    format: Annotated[
        EngineName | None, typer.Option(help="Whose file it is  [default: detected]")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="GPUs, where the file does not say", min=1)
    ] = None,
    ranks_per_node: Annotated[
        int | None, typer.Option(help="GPUs per node  [default: one node]", min=1)
    ] = None,
    layers: LayersOption = None,
    model: Annotated[str, typer.Option(help="Name of the model")] = "",
) -> None:
    """Read a serving engine's placement, to score it beside others."""
    from moetuner.export import ReadOptions, read_engine_placement
    from moetuner.placement.file import write_placement
    from moetuner.report.outputs import check_writable
    from moetuner.report.terminal import print_content, print_sentences

    check_writable(out)
    if out.resolve() == file.resolve():
        raise InvalidPlacementError(f"--out {out}: that is the engine's file")
    placement = read_engine_placement(
        file,
        engine=None if format is None else Engine(format.value),
        options=ReadOptions(
            num_ranks=ranks,
            ranks_per_node=ranks_per_node,
            layers=None if layers is None else parse_layers(layers),
            model=model,
        ),
    )
    write_placement(placement, out)
    print_sentences(
        f"{placement.provenance.solver}: {amount(placement.num_layers, 'layer')}, "
        f"{placement.num_experts} experts in {placement.num_slots} slots of "
        f"{amount(placement.topology.num_ranks, 'rank')}"
    )
    print_content(f"wrote {out}")


def _slots_of(path: Path) -> dict[int, NDArray[Any]]:
    """Expert of each slot, by the model's layer number."""
    from moetuner.placement.file import read_placement

    placement = read_placement(path)
    layers = placement.layer_ids.tolist()
    return dict(zip(layers, placement.slot_experts, strict=True))


def _load_of(trace: Path, placement: Placement) -> NDArray[Any]:
    """Load [L, E] of the placement's own layers and experts."""
    from moetuner.trace import read_trace
    from moetuner.trace.statistics import RoutingStatistics

    statistics = RoutingStatistics.from_trace(
        read_trace(trace), coactivation=False, transitions=False
    )
    same = (
        statistics.layer_ids.tolist() == placement.layer_ids.tolist()
        and statistics.num_experts == placement.num_experts
    )
    if not same:
        raise InvalidTraceError(
            f"--trace {trace}: other layers or experts than the placement has"
        )
    return statistics.load


def _expert_bytes(
    placement: Placement, hidden_size: int | None, expert_hidden_size: int | None
) -> float | None:
    """By the sizes given, else those that it was planned with, else its model's."""
    from moetuner.evaluation.models import ModelShape, shape_for_model
    from moetuner.planning.provenance import pricing_of

    if hidden_size and expert_hidden_size:
        shape = ModelShape(
            hidden_size=hidden_size, expert_hidden_size=expert_hidden_size
        )
        return shape.expert_bytes
    told = pricing_of(placement)
    if told is not None and not told.cost.shape.guessed:
        return told.cost.shape.expert_bytes
    known = shape_for_model(placement.provenance.model)
    return None if known is None else known.expert_bytes


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Layer numbers from ``3-60`` or ``1,3,5-7``, as `option` was given.

    Raises
    ------
    InvalidTraceError
        When it is neither.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last) if dash else (first, first)
        if not all(n.isascii() and n.isdigit() and len(n) < 6 for n in numbers):
            raise InvalidTraceError(
                f"{option}: wanted numbers like 3-60 or 1,3,5, got {text!r:.40}"
            )
        span = range(int(numbers[0]), int(numbers[1]) + 1)
        if not span:
            raise InvalidTraceError(f"{option}: {part.strip()!r} holds no layer")
        layers += span
    return tuple(layers)
