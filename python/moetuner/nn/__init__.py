"""MoE layers on the ops: what runs the model. Importing this needs torch."""

from moetuner.nn.counter import RoutingCounter
from moetuner.nn.counts import gather_counts, record_run
from moetuner.nn.exchange import Exchange
from moetuner.nn.exchange_counts import ExchangeCounts
from moetuner.nn.exchange_options import ExchangeOptions, Levels, Residency
from moetuner.nn.experts import Activation, ExpertOptions, Experts, grouped_linear
from moetuner.nn.follow import Resident, return_home
from moetuner.nn.layer import MoELayer, TopKRouter
from moetuner.nn.move import apply_placement, contiguous_placement, logical_order
from moetuner.nn.recorder import Recorder

__all__ = [
    "Activation",
    "Exchange",
    "ExchangeCounts",
    "ExchangeOptions",
    "ExpertOptions",
    "Experts",
    "Levels",
    "MoELayer",
    "Recorder",
    "Residency",
    "Resident",
    "RoutingCounter",
    "TopKRouter",
    "apply_placement",
    "contiguous_placement",
    "gather_counts",
    "grouped_linear",
    "logical_order",
    "record_run",
    "return_home",
]
