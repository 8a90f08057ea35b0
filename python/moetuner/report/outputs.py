"""Output paths that are refused before the work, not after it."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import TYPE_CHECKING

from moetuner.errors import InvalidProblemError, MissingDependencyError

if TYPE_CHECKING:
    from pathlib import Path

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def check_outputs(trace: Path, out: Path, plot: Path | None) -> None:
    """Find out before a minute of solving that a result has nowhere to go."""
    check_writable(out)
    taken = {trace.resolve(), out.resolve()}
    if len(taken) < 2:
        raise InvalidProblemError(f"--out {out}: that is the trace")
    if plot is None:
        return
    check_writable(plot)
    if plot.resolve() in taken:
        raise InvalidProblemError(f"--plot {plot}: that is the trace, or --out")
    if plot.suffix.lower() not in PLOT_SUFFIXES:
        raise InvalidProblemError(f"--plot {plot}: must end in .png, .svg or .pdf")
    if not can_plot():
        raise MissingDependencyError("--plot needs pip install 'moetuner[plot]'")


def check_writable(path: Path) -> None:
    """Refuse what cannot become a file: folders, devices, folders closed to us."""
    try:
        if path.exists() and not path.is_file():
            raise InvalidProblemError(f"{path}: not a file, and in the way of one")
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InvalidProblemError(
            f"{path}: cannot write there: {error.strerror or error}"
        ) from error


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None
