import numpy as np
import pytest
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.solver import SolverOptions
from strategies import make_trace, random_ids


@pytest.fixture
def make_report():
    """A plan of a small random trace."""

    def make(*, ranks=4, per_node=2, experts=16, skew=1.0, solver="lpt", **fields):
        rng = np.random.default_rng(7)
        ids = random_ids(rng, 1000, 3, experts, 2, skew=skew)
        sequence = (np.arange(1000) // 20).astype(np.int32)
        return plan_trace(
            make_trace(ids, experts, sequence=sequence),
            Topology(num_ranks=ranks, ranks_per_node=per_node),
            PlanOptions(
                solver=solver,
                solver_options=SolverOptions(time_limit=1, threads=1),
                **fields,
            ),
        )

    return make
