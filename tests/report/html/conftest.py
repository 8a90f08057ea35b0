import csv
import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.models import shape_for_model
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import demo_trace, plan_trace
from moetuner.solver import SolverOptions
from strategies import make_trace, random_ids

VOID = frozenset(["meta", "link", "img", "br", "input"])


class Page(HTMLParser):
    """A page taken apart; every tag must be closed in the order it was opened."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables = [], [], {}
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"attribute twice: {tag} {attrs}"
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "style" in inside or "script" in inside:
            return
        self.text += data
        if "pre" in inside:
            name = self.open[-1][1]["id"].removeprefix("csv-")
            self.tables[name] = self.tables.get(name, "") + data

    def table(self, name):
        """Head, and rows as texts."""
        head, *rows = csv.reader(io.StringIO(self.tables[name]))
        return head, rows

    def column(self, table, name):
        head, rows = self.table(table)
        cells = [row[head.index(name)] for row in rows]
        return np.array([float(cell) if cell else np.nan for cell in cells])

    def attributes(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def make_comparison():
    """A plan of a small random trace, compared with its baselines."""

    def make(
        *,
        ranks=4,
        per_node=2,
        experts=16,
        layers=3,
        solver="lpt",
        metadata=None,
        **fields,
    ):
        rng = np.random.default_rng(7)
        ids = random_ids(rng, 1000, layers, experts, 2)
        sequence = (np.arange(1000) // 20).astype(np.int32)
        trace = make_trace(ids, experts, sequence=sequence)
        if metadata is not None:
            trace = dataclasses.replace(trace, metadata=metadata)
        return plan_trace(
            trace,
            Topology(num_ranks=ranks, ranks_per_node=per_node),
            PlanOptions(
                solver=solver,
                solver_options=SolverOptions(time_limit=1, threads=1),
                **fields,
            ),
        )

    return make


@pytest.fixture(scope="session")
def demo():
    """The shipped trace of a real model, planned by a solver that tells its course."""
    trace = demo_trace()
    options = PlanOptions(
        solver="ilp2",
        cost=CostModel(shape=shape_for_model(trace.metadata.model)),
        solver_options=SolverOptions(time_limit=4, threads=2),
    )
    machine = Topology(num_ranks=8, ranks_per_node=4)
    return plan_trace(trace, machine, options)


@pytest.fixture(scope="session")
def parse():
    return Page
