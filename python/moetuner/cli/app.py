"""The program: its commands, and errors as messages and exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from moetuner._files import NO_ROOM
from moetuner.cli import commands, engines, plan
from moetuner.cli.calibrate import calibrate
from moetuner.cli.certify import certify
from moetuner.cli.drift import drift
from moetuner.cli.groups import spelt_out
from moetuner.cli.hardware import hardware
from moetuner.cli.interrupts import (
    INTERRUPTED,
    NOTHING,
    SIGNALS,
    keep_in_mind,
    last_words,
    obeyed,
)
from moetuner.cli.messages import as_typed, fail
from moetuner.cli.report import report
from moetuner.cli.sweep import sweep
from moetuner.cli.verify import verify
from moetuner.errors import (
    InvalidPlacementError,
    InvalidProblemError,
    InvalidTraceError,
    MissingStatisticsError,
    MoetunerError,
    SolverError,
)

_USAGE_ERRORS = (
    InvalidTraceError,
    InvalidPlacementError,
    InvalidProblemError,
    MissingStatisticsError,
    SolverError,
)
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_BAD_PATH = (*_NO_FILE, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)


class _Group(TyperGroup):
    """Turns the package's errors into messages and exit codes."""

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        try:
            return super().make_context(*arguments, **more)
        except KeyboardInterrupt:  # typer would end without a word
            fail(NOTHING, INTERRUPTED)

    def invoke(self, ctx: Any) -> Any:
        keep_in_mind(NOTHING)
        try:
            return super().invoke(ctx)
        except MoetunerError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            options = [] if command is None else command.params
            typed = (name for option in options for name in option.opts)
            code = 2 if isinstance(error, _USAGE_ERRORS) else 1
            fail(as_typed(str(error), typed), code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has seen enough
                raise
            _fail_of_system(error)
        except MemoryError:
            fail("out of memory", 1)
        except KeyboardInterrupt:
            fail(last_words(), INTERRUPTED)


app = typer.Typer(
    name="moetuner",
    cls=_Group,
    help="Which GPU should hold which expert? Plan and score expert placements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose help cuts long option names at 80 columns
)

for _command in (
    commands.describe,
    plan.plan,
    commands.evaluate,
    verify,
    calibrate,
    report,
    certify,
    hardware,
    drift,
    sweep,
    plan.demo,
):
    app.command()(spelt_out(_command))
app.command("import")(engines.import_)
app.command()(engines.export)
app.command("import-placement")(engines.import_placement)


def _fail_of_system(error: OSError) -> NoReturn:
    """Say which file it is about; files of ours have their name in the error."""
    unnamed = "standard output" if error.errno in NO_ROOM else "system"
    code = 2 if error.errno in _BAD_PATH else 1
    fail(f"{error.filename or unnamed}: {error.strerror or error}", code)


def main() -> None:
    """What `moetuner.__main__` runs."""
    # Also when a shell started us in the background with SIGINT ignored: whoever sends
    # a signal to a long solve wants its best placement, not to wait.
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        with obeyed():
            app(prog_name="moetuner")
    except OSError as error:  # what prints help and usage is not one of our commands
        _fail_of_system(error)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version")
    ] = False,
) -> None:
    if version:
        import moetuner

        typer.echo(f"moetuner {moetuner.__version__}")
        raise typer.Exit
