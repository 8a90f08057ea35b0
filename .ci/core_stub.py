"""Writes `python/moetuner/_core.pyi` from the built module: `make stub`."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parents[1] / "python" / "moetuner" / "_core.pyi"


def make_stub() -> str:
    """The types of `moetuner._core`, as they are bound."""
    with tempfile.TemporaryDirectory() as folder:
        run(
            *(sys.executable, "-m", "pybind11_stubgen", "moetuner._core"),
            *("--exit-code", "--output-dir", folder),
        )
        (written,) = Path(folder).rglob("_core.pyi")
        text = written.read_text()
    # What the generator does not know of: members of enums, and types of values.
    for pattern, better in (
        (r"\b(\w+): typing\.ClassVar\[\w+\]\n", r"\1 = ...\n"),
        (r"    @classmethod\n    def __new__\(cls, value\):\n        \.\.\.\n", ""),
        (r"-> dict:", "-> dict[str, typing.Any]:"),
        (r'"""\n *(.+)\n *"""', r'"""\1"""'),
    ):
        text = re.sub(pattern, better, text)
    for command in ("check --select I --fix --quiet", "format --quiet"):
        ruff = ("ruff", *command.split(), "--stdin-filename", str(STUB), "-")
        text = run(sys.executable, "-m", *ruff, text=text)
    return text


def run(*command: str, text: str = "") -> str:
    """What a command writes."""
    return subprocess.run(
        command, input=text, capture_output=True, text=True, check=True
    ).stdout


def main() -> None:
    """Write the stub, or with ``--check`` say whether it is what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    made = make_stub()
    if not parser.parse_args().check:
        STUB.write_text(made)
    elif made != STUB.read_text():
        sys.exit(f"{STUB.name} is not what csrc/python binds: run make stub")


if __name__ == "__main__":
    main()
