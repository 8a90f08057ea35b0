"""MoE layers on the ops: what runs the model. Importing this needs torch."""

from moetuner.nn.clipping import clip_gradients
from moetuner.nn.counter import RoutingCounter
from moetuner.nn.counts import gather_counts, record_run
from moetuner.nn.data_parallel import (
    average_gradients,
    expert_parameters,
    ready_for_ddp,
)
from moetuner.nn.exchange import Exchange
from moetuner.nn.exchange_counts import ExchangeCounts
from moetuner.nn.exchange_options import ExchangeOptions, Levels, Residency
from moetuner.nn.experts import Activation, ExpertOptions, Experts, grouped_linear
from moetuner.nn.follow import Resident, return_home
from moetuner.nn.layer import MoELayer, TopKRouter
from moetuner.nn.move import apply_placement, contiguous_placement, logical_order
from moetuner.nn.recompute import keep_routing, recomputing
from moetuner.nn.recorder import Recorder
from moetuner.nn.replay import GivenRouting, replay_routing
from moetuner.nn.tail import defined_rows, expert_of_rows, per_expert

__all__ = [
    "Activation",
    "Exchange",
    "ExchangeCounts",
    "ExchangeOptions",
    "ExpertOptions",
    "Experts",
    "GivenRouting",
    "Levels",
    "MoELayer",
    "Recorder",
    "Residency",
    "Resident",
    "RoutingCounter",
    "TopKRouter",
    "apply_placement",
    "average_gradients",
    "clip_gradients",
    "contiguous_placement",
    "defined_rows",
    "expert_of_rows",
    "expert_parameters",
    "gather_counts",
    "grouped_linear",
    "keep_routing",
    "logical_order",
    "per_expert",
    "ready_for_ddp",
    "recomputing",
    "record_run",
    "replay_routing",
    "return_home",
]
