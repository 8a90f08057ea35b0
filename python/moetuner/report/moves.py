"""The moves from one placement to another, as a JSON file."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from moetuner._files import atomic_write_text
from moetuner.placement.moves import moves_between

if TYPE_CHECKING:
    from pathlib import Path

    from moetuner.placement.model import Placement


def write_moves(old: Placement, new: Placement, path: Path) -> None:
    """Write the steps of `moves_between`, in order."""
    steps = [dataclasses.asdict(step) for step in moves_between(old, new)]
    content = json.dumps({"format": "moetuner-moves", "version": 1, "moves": steps})
    atomic_write_text(path, content + "\n")
