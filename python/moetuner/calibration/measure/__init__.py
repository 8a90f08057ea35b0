"""Measuring a machine, on every rank of a process group. Importing this needs torch."""

from moetuner.calibration.measure.everything import measure
from moetuner.calibration.measure.ranks import Ranks, join, ranks_of

__all__ = ["Ranks", "join", "measure", "ranks_of"]
