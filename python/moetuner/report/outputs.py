"""Output paths that are refused before the work, not after it."""

from __future__ import annotations

import importlib.util
import tempfile
from typing import TYPE_CHECKING

from moetuner.errors import InvalidProblemError, MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def check_outputs(
    traces: Sequence[Path],
    out: Path,
    page: Path | None,
    moves: Path | None = None,
    stay: Path | None = None,
) -> None:
    """Find out before a minute of solving that a result has nowhere to go."""
    taken = {trace.resolve(): "the trace" for trace in traces}
    if stay is not None:
        taken.setdefault(stay.resolve(), "the placement in use, --from")
    for name, path in (
        ("--out", out),
        ("--moves", moves),
        ("--report", page),
    ):
        if path is None:
            continue
        check_writable(path)
        if path.resolve() in taken:
            raise InvalidProblemError(f"{name} {path}: that is {taken[path.resolve()]}")
        taken[path.resolve()] = name


def check_report(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write a page over what it is about."""
    check_writable(out)
    if out.resolve() in {path.resolve() for path in inputs}:
        raise InvalidProblemError(f"--out {out}: that is an input")


def check_folder(folder: Path) -> None:
    """Make the folder for figures, which need matplotlib."""
    if not can_plot():
        raise MissingDependencyError("--plots needs pip install 'moetuner[plot]'")
    if folder.exists() and not folder.is_dir():
        raise InvalidProblemError(f"--plots {folder}: a file, wanted a folder")
    folder.mkdir(parents=True, exist_ok=True)


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
