"""Pages of results hold what their programs make of the measured files beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = {"end-to-end": "end_to_end", "exchange": "exchange", "model": "exchange"}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_pages_are_of_their_files(kind):
    program = BENCHMARKS / PROGRAMS[kind] / "table.py"
    pages = sorted((BENCHMARKS / "results").glob(f"{kind}-*.md"))
    assert pages
    for page in pages:
        made = subprocess.run(
            [sys.executable, program, page.with_suffix(".json")],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        assert made.stdout == page.read_text(), page.name
