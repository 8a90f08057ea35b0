"""MoE layers on the ops: what runs the model. Importing this needs torch."""

from moetuner.nn.experts import grouped_linear
from moetuner.nn.recorder import Recorder

__all__ = ["Recorder", "grouped_linear"]
