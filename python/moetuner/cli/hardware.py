"""`moetuner hardware`: known machines and networks, and what is said of them."""

from __future__ import annotations

from typing import Annotated

import typer


def hardware(
    which: Annotated[
        str,
        typer.Argument(
            metavar="[NAME|FILE]",
            help="One of them, or a file to check; nothing: a list of all",
        ),
    ] = "",
) -> None:
    """List the known machines and networks, or print one as a file, with sources."""
    from moetuner.evaluation.hardware import HARDWARE, NETWORKS
    from moetuner.evaluation.hardware_file import find_hardware, hardware_text
    from moetuner.report.hardware import hardware_table, network_table
    from moetuner.report.terminal import print_content

    if not which:
        print_content(hardware_table(list(HARDWARE.values())))
        print_content(network_table(list(NETWORKS.values())))
        return
    for known in (HARDWARE, NETWORKS):
        if which in known:
            typer.echo(known.path(which).read_text(encoding="utf-8"), nl=False)
            return
    typer.echo(hardware_text(find_hardware(which)), nl=False)
