"""moetuner: which GPU should hold which expert.

Data moves right: trace -> statistics -> problem -> solver -> placement -> evaluation.
Names are imported when first used, so ``import moetuner`` is quick and needs neither
torch nor a solver.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetuner.bounds import Certificate as Certificate
    from moetuner.bounds import certify as certify
    from moetuner.errors import MoetunerError as MoetunerError
    from moetuner.evaluation.cost import CostModel as CostModel
    from moetuner.evaluation.cost import Homes as Homes
    from moetuner.evaluation.cost import Wire as Wire
    from moetuner.evaluation.evaluate import Evaluation as Evaluation
    from moetuner.evaluation.evaluate import evaluate as evaluate
    from moetuner.evaluation.hardware import HARDWARE as HARDWARE
    from moetuner.evaluation.hardware import NETWORKS as NETWORKS
    from moetuner.evaluation.hardware import Hardware as Hardware
    from moetuner.evaluation.hardware import Network as Network
    from moetuner.evaluation.hardware import with_network as with_network
    from moetuner.evaluation.hardware_file import read_hardware as read_hardware
    from moetuner.evaluation.hardware_file import read_network as read_network
    from moetuner.evaluation.hardware_file import write_hardware as write_hardware
    from moetuner.evaluation.models import Model as Model
    from moetuner.evaluation.models import ModelShape as ModelShape
    from moetuner.evaluation.models import ValueType as ValueType
    from moetuner.evaluation.models import find_model as find_model
    from moetuner.evaluation.models import read_model as read_model
    from moetuner.evaluation.models import shape_for_model as shape_for_model
    from moetuner.evaluation.other_ranks import OtherRanks as OtherRanks
    from moetuner.evaluation.rates import Bandwidth as Bandwidth
    from moetuner.evaluation.rates import Latency as Latency
    from moetuner.evaluation.replica_rule import ReplicaRule as ReplicaRule
    from moetuner.evaluation.workload import BatchKind as BatchKind
    from moetuner.evaluation.workload import Workload as Workload
    from moetuner.placement.file import read_placement as read_placement
    from moetuner.placement.file import write_placement as write_placement
    from moetuner.placement.model import Placement as Placement
    from moetuner.placement.tables import PlacementTables as PlacementTables
    from moetuner.placement.topology import Topology as Topology
    from moetuner.planning.comparison import compare_placements as compare_placements
    from moetuner.planning.options import PlanOptions as PlanOptions
    from moetuner.planning.plan import demo_trace as demo_trace
    from moetuner.planning.plan import plan_trace as plan_trace
    from moetuner.planning.provenance import options_of as options_of
    from moetuner.planning.scores import Comparison as Comparison
    from moetuner.planning.scores import Scored as Scored
    from moetuner.problem import Objective as Objective
    from moetuner.problem import PlacementProblem as PlacementProblem
    from moetuner.report.html import write_report as write_report
    from moetuner.solver import Solution as Solution
    from moetuner.solver import SolverOptions as SolverOptions
    from moetuner.solver import get_solver as get_solver
    from moetuner.trace import TOPIC_PRESETS as TOPIC_PRESETS
    from moetuner.trace import CountTrace as CountTrace
    from moetuner.trace import TopicRouting as TopicRouting
    from moetuner.trace import Trace as Trace
    from moetuner.trace import merge_traces as merge_traces
    from moetuner.trace import read_trace as read_trace
    from moetuner.trace import split_by_sequence as split_by_sequence
    from moetuner.trace import subsample as subsample
    from moetuner.trace import topic_trace as topic_trace
    from moetuner.trace import write_trace as write_trace
    from moetuner.trace.description import describe as describe
    from moetuner.trace.statistics import RoutingStatistics as RoutingStatistics

_MODULE_OF = {
    "Certificate": "bounds",
    "certify": "bounds",
    "Comparison": "planning.scores",
    "Scored": "planning.scores",
    "options_of": "planning.provenance",
    "compare_placements": "planning.comparison",
    "Bandwidth": "evaluation.rates",
    "Latency": "evaluation.rates",
    "HARDWARE": "evaluation.hardware",
    "NETWORKS": "evaluation.hardware",
    "Network": "evaluation.hardware",
    "with_network": "evaluation.hardware",
    "read_hardware": "evaluation.hardware_file",
    "read_network": "evaluation.hardware_file",
    "write_hardware": "evaluation.hardware_file",
    "CostModel": "evaluation.cost",
    "Hardware": "evaluation.hardware",
    "Homes": "evaluation.cost",
    "Model": "evaluation.models",
    "ModelShape": "evaluation.models",
    "ValueType": "evaluation.models",
    "find_model": "evaluation.models",
    "read_model": "evaluation.models",
    "Wire": "evaluation.cost",
    "ReplicaRule": "evaluation.replica_rule",
    "shape_for_model": "evaluation.models",
    "describe": "trace.description",
    "MoetunerError": "errors",
    "Evaluation": "evaluation.evaluate",
    "evaluate": "evaluation.evaluate",
    "OtherRanks": "evaluation.other_ranks",
    "PlanOptions": "planning.options",
    "demo_trace": "planning.plan",
    "plan_trace": "planning.plan",
    "Placement": "placement.model",
    "read_placement": "placement.file",
    "write_placement": "placement.file",
    "PlacementTables": "placement.tables",
    "Objective": "problem",
    "PlacementProblem": "problem",
    "write_report": "report.html",
    "Solution": "solver",
    "SolverOptions": "solver",
    "get_solver": "solver",
    "RoutingStatistics": "trace.statistics",
    "Topology": "placement.topology",
    "TOPIC_PRESETS": "trace",
    "CountTrace": "trace",
    "TopicRouting": "trace",
    "topic_trace": "trace",
    "Trace": "trace",
    "merge_traces": "trace",
    "read_trace": "trace",
    "split_by_sequence": "trace",
    "subsample": "trace",
    "write_trace": "trace",
    "BatchKind": "evaluation.workload",
    "Workload": "evaluation.workload",
}

__version__ = _version("moetuner")
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moetuner' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moetuner.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
