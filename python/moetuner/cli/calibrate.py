"""`moetuner calibrate`: measures this machine, and writes a hardware file of it."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - typer reads annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetuner.calibration.options import CalibrationOptions, Device
from moetuner.calibration.samples import LayerShape, ValueKind
from moetuner.cli.messages import note
from moetuner.cli.model_options import named_model
from moetuner.errors import InvalidProblemError, MissingDependencyError

if TYPE_CHECKING:
    from moetuner.calibration.fit import Calibrated
    from moetuner.calibration.samples import Measurements
    from moetuner.evaluation.hardware import Hardware

_TORCHRUN = "torchrun --nproc-per-node RANKS -m moetuner calibrate ..."


def calibrate(
    out: Annotated[Path, typer.Option(help="Hardware file to write")],
    out_fixed: Annotated[
        Path | None,
        typer.Option(help="A second one, of the exchange's fixed form: for decoding"),
    ] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(help="Ranks of a node  [default: those started here]", min=1),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="To measure for, about; starting comes on top")
    ] = 40.0,
    device: Annotated[Device, typer.Option(help="Where ranks compute")] = Device.AUTO,
    model: Annotated[
        str, typer.Option(help="Of whose layers: a known name, or config.json")
    ] = "",
    hidden_size: Annotated[
        int | None, typer.Option("--hidden-size", "--hidden", help="H of the layer")
    ] = None,
    expert_hidden_size: Annotated[
        int | None,
        typer.Option(
            "--expert-hidden-size", "--inner", help="Inner width of its experts"
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts of the layer")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token")] = None,
    values: Annotated[
        ValueKind, typer.Option(help="What rows and weights are")
    ] = ValueKind.BFLOAT16,
    like: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What cannot be measured here is as on this machine",
        ),
    ] = "h100",
    measurements: Annotated[
        Path | None, typer.Option(help="JSON file for every time, measured and fitted")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Measured against fitted times, as .svg or .png"),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, no notes")
    ] = False,
) -> None:
    """Measure links, exchange and experts of this machine; write a hardware file.

    Under torchrun every process is a rank; alone, one rank measures what it can.
    """
    from moetuner.evaluation.hardware_file import find_hardware

    if _is_first():  # the others may be on other machines, and write nothing
        files = (out, out_fixed, measurements, plot)
        _check_files([path for path in files if path is not None], plot)
    base = find_hardware(like, argument="like")
    options = CalibrationOptions(
        shapes=_shapes(model, hidden_size, expert_hidden_size, experts, top_k, values),
        values=values,
        seconds=seconds,
        ranks_per_node=ranks_per_node,
        device=device,
    )
    found = _measure(options, quiet)
    if found is None:  # another rank writes
        return
    _write(found, options, base, out, out_fixed, measurements, plot, quiet)


def _is_first() -> bool:
    """Whether this is rank 0, which writes and talks."""
    return os.environ.get("RANK", "0") == "0"


def _check_files(files: list[Path], plot: Path | None) -> None:
    """Find out before a minute of measuring that a result has nowhere to go."""
    from moetuner.report.outputs import can_plot, check_writable

    for path in files:
        check_writable(path)
    if len({path.resolve() for path in files}) < len(files):
        raise InvalidProblemError("calibrate: two of the files to write are the same")
    if plot is not None and not can_plot():
        raise MissingDependencyError("--plot needs pip install 'moetuner[plot]'")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise InvalidProblemError(f"--plot {plot}: wanted a name with .svg or .png")


def _shapes(
    model: str,
    hidden_size: int | None,
    inner_size: int | None,
    experts: int | None,
    top_k: int | None,
    values: ValueKind,
) -> tuple[LayerShape, ...]:
    """The one that was asked for; none: those that suit the device."""
    if not any((model, hidden_size, inner_size, experts, top_k)):
        return ()
    if model:
        known = named_model(model)
        hidden_size = hidden_size or known.shape.hidden_size
        inner_size = inner_size or known.shape.expert_hidden_size
        experts, top_k = experts or known.num_experts, top_k or known.top_k
    if not (hidden_size and inner_size and experts and top_k):
        raise InvalidProblemError(
            "calibrate: of a layer wanted --hidden-size, --expert-hidden-size (or "
            "--model), --experts and --top-k"
        )
    return (
        LayerShape(
            hidden_size=hidden_size,
            inner_size=inner_size,
            num_experts=experts,
            top_k=top_k,
            values=values,
        ),
    )


def _measure(options: CalibrationOptions, quiet: bool) -> Measurements | None:
    """What was measured, on rank 0; None on all others."""
    try:
        from moetuner.calibration.measure import join, measure
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            "calibrate needs torch: pip install 'moetuner[torch]'"
        ) from error
    first = _is_first()

    def say(what: str) -> None:
        note(what, quiet or not first)

    with join(options) as ranks:
        if ranks.topology.num_ranks == 1:
            say(f"one rank alone: links are not measured; {_TORCHRUN} measures them")
        found = measure(ranks, options, say)
        ranks.wait()  # nobody leaves while another still listens
    return found if first else None


def _write(
    measured: Measurements,
    options: CalibrationOptions,
    base: Hardware,
    out: Path,
    out_fixed: Path | None,
    measurements: Path | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Fit, print, and write every file that was asked for."""
    from moetuner.calibration.fit import Origin, fit_hardware
    from moetuner.calibration.samples import Form
    from moetuner.evaluation.hardware_file import write_hardware
    from moetuner.report.calibration import (
        figures_table,
        links_table,
        residual_table,
        worst_table,
        write_plot,
    )
    from moetuner.report.terminal import print_content

    now = datetime.datetime.now(datetime.timezone.utc)
    origin = Origin(
        name=out.stem,
        date=now.strftime("%Y-%m-%d"),
        command=_command(measured.topology.num_ranks),
    )
    results: dict[str, Calibrated] = {}
    for form, path in ((Form.EXACT, out), (Form.FIXED, out_fixed)):
        if path is not None:
            own = replace(origin, name=path.stem)
            results[form.value] = fit_hardware(measured, own, base, form, options.seed)
    first = results[Form.EXACT.value]
    for said in (*first.notes, *_cut_short(measured)):
        note(said, quiet)
    if measured.links or measured.collectives:
        print_content(links_table(measured))
    for found in results.values():
        print_content(figures_table(found.hardware))
        print_content(residual_table(found))
    print_content(worst_table(first))
    if plot is not None:
        write_plot(first, plot)
    if measurements is not None:
        _write_measurements(measured, results, measurements)
    for form, path in ((Form.EXACT, out), (Form.FIXED, out_fixed)):
        if path is not None:
            write_hardware(results[form.value].hardware, path)
    print_content(f"measured for {measured.seconds:.1f} s")
    for path in (plot, measurements, out, out_fixed):
        if path is not None:
            print_content(f"wrote {path}")


def _cut_short(measured: Measurements) -> list[str]:
    """What was left out, in a line for each part."""
    parts = [each.partition(":")[0] for each in measured.notes]
    return [
        f"{part}: {parts.count(part)} series were cut short, for want of time or "
        f"memory; --seconds gives more time, --measurements FILE names them"
        for part in dict.fromkeys(parts)
    ]


def _command(num_ranks: int) -> str:
    """What makes the file again."""
    program = ["moetuner"]
    if "RANK" in os.environ:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(num_ranks))
        program = ["torchrun", "--nproc-per-node", local, "-m", "moetuner"]
    return shlex.join([*program, *sys.argv[1:]])


def _write_measurements(
    measured: Measurements, results: dict[str, Calibrated], path: Path
) -> None:
    from moetuner._files import atomic_write_text
    from moetuner._plain import to_plain

    compared = {
        form: [to_plain(one) | {"error": one.error} for one in found.comparisons]
        for form, found in results.items()
    }
    content: dict[str, Any] = {"measured": to_plain(measured), "fitted": compared}
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")
