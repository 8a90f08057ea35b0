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
    from moetuner.comparison import Comparison as Comparison
    from moetuner.comparison import compare_placements as compare_placements
    from moetuner.comparison import comparison_of_plan as comparison_of_plan
    from moetuner.cost import HARDWARE as HARDWARE
    from moetuner.cost import CostModel as CostModel
    from moetuner.cost import Hardware as Hardware
    from moetuner.cost import Homes as Homes
    from moetuner.cost import ModelShape as ModelShape
    from moetuner.cost import Wire as Wire
    from moetuner.cost import shape_for_model as shape_for_model
    from moetuner.description import describe as describe
    from moetuner.errors import MoetunerError as MoetunerError
    from moetuner.evaluation import Evaluation as Evaluation
    from moetuner.evaluation import evaluate as evaluate
    from moetuner.pipeline import PlanReport as PlanReport
    from moetuner.pipeline import demo_trace as demo_trace
    from moetuner.pipeline import plan_trace as plan_trace
    from moetuner.placement import Placement as Placement
    from moetuner.placement_file import read_placement as read_placement
    from moetuner.placement_file import write_placement as write_placement
    from moetuner.plan import PlacementTables as PlacementTables
    from moetuner.plan_options import PlanOptions as PlanOptions
    from moetuner.problem import Objective as Objective
    from moetuner.problem import PlacementProblem as PlacementProblem
    from moetuner.report.html import write_report as write_report
    from moetuner.solver import Solution as Solution
    from moetuner.solver import SolverOptions as SolverOptions
    from moetuner.solver import get_solver as get_solver
    from moetuner.statistics import RoutingStatistics as RoutingStatistics
    from moetuner.topology import Topology as Topology
    from moetuner.trace import TOPIC_PRESETS as TOPIC_PRESETS
    from moetuner.trace import CountTrace as CountTrace
    from moetuner.trace import TopicRouting as TopicRouting
    from moetuner.trace import Trace as Trace
    from moetuner.trace import merge_traces as merge_traces
    from moetuner.trace import read_trace as read_trace
    from moetuner.trace import split_by_sequence as split_by_sequence
    from moetuner.trace import subsample as subsample
    from moetuner.trace import synthetic_trace as synthetic_trace
    from moetuner.trace import topic_trace as topic_trace
    from moetuner.trace import write_trace as write_trace
    from moetuner.workload import BatchKind as BatchKind
    from moetuner.workload import Workload as Workload

_MODULE_OF = {
    "Certificate": "bounds",
    "certify": "bounds",
    "Comparison": "comparison",
    "compare_placements": "comparison",
    "comparison_of_plan": "comparison",
    "HARDWARE": "cost",
    "CostModel": "cost",
    "Hardware": "cost",
    "Homes": "cost",
    "ModelShape": "cost",
    "Wire": "cost",
    "shape_for_model": "cost",
    "describe": "description",
    "MoetunerError": "errors",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "PlanOptions": "plan_options",
    "PlanReport": "pipeline",
    "demo_trace": "pipeline",
    "plan_trace": "pipeline",
    "Placement": "placement",
    "read_placement": "placement_file",
    "write_placement": "placement_file",
    "PlacementTables": "plan",
    "Objective": "problem",
    "PlacementProblem": "problem",
    "write_report": "report.html",
    "Solution": "solver",
    "SolverOptions": "solver",
    "get_solver": "solver",
    "RoutingStatistics": "statistics",
    "Topology": "topology",
    "TOPIC_PRESETS": "trace",
    "CountTrace": "trace",
    "TopicRouting": "trace",
    "topic_trace": "trace",
    "Trace": "trace",
    "merge_traces": "trace",
    "read_trace": "trace",
    "split_by_sequence": "trace",
    "subsample": "trace",
    "synthetic_trace": "trace",
    "write_trace": "trace",
    "BatchKind": "workload",
    "Workload": "workload",
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
