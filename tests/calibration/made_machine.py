"""Measurements of a machine whose figures are known: what a fit must find again."""

from dataclasses import replace

import numpy as np
from moetuner.calibration.exchange_fit import one_way
from moetuner.calibration.loads import case_counts, loads_of
from moetuner.calibration.machine import Machine
from moetuner.calibration.samples import (
    Case,
    ExchangeSample,
    ExpertsSample,
    Form,
    LayerSample,
    LayerShape,
    Load,
    Measurements,
    Timing,
    Way,
)
from moetuner.placement.topology import Topology

SHAPES = (
    LayerShape(hidden_size=512, inner_size=256, num_experts=32, top_k=4),
    LayerShape(hidden_size=1024, inner_size=512, num_experts=16, top_k=2),
)
TOKENS = (16, 64, 256, 1024)
SEED = 3


class Made:
    """A machine of round figures."""

    egress, ingress = 20e9, 10e9  # bytes/s of a rank
    node_egress, node_ingress = 8e9, 4e9  # of a node
    rank_base, rank_per_rank = 10e-6, 2e-6
    node_base, node_per_rank = 40e-6, 3e-6
    local = 5e-6
    per_row, per_byte = 2e-9, 1e-12
    overhead = 30e-6
    matmul, memory = 10e12, 0.5e12

    def __init__(
        self,
        topology,
        noise=0.0,
        form=Form.EXACT,
        seed=0,
        slow=(),
        host=0.0,
        skew=1.0,
    ):
        """Of the fixed form each rank sends a whole share to each other node."""
        self.topology, self.form, self.noise = topology, form, noise
        self.slow = slow or (1.0,) * topology.num_ranks  # experts of each rank
        self.rng = np.random.default_rng(seed)
        self.skew = skew  # of parts by their slowest ranks, beside what layers take
        self.host = host  # s: launches of experts, who wait for them if they are faster

    def timing(self, seconds):
        spread = self.noise * seconds
        seconds *= 1 + self.noise * self.rng.uniform(-1, 1)
        return Timing(seconds=seconds, spread=spread, repeats=9)

    def way(self, case, way):
        """Seconds of one way."""
        load = one_way(case, way, self.topology.ranks_per_node, SEED)
        if self.form is Form.FIXED and self.topology.num_nodes > 1:
            shares = self.topology.ranks_per_node * (self.topology.num_nodes - 1)
            sent = float(shares * case.num_tokens * load.row_bytes)
            load = replace(load, bytes_on=(*load.bytes_on[:2], sent, sent))
        rates = (self.egress, self.ingress, self.node_egress, self.node_ingress)
        seconds = [b / r for b, r in zip(load.bytes_on, rates, strict=True)]
        links = max(seconds[:2]) + max(seconds[2:])  # of ranks, then of nodes
        start = {
            "local": self.local,
            "rank": self.rank_base + self.rank_per_rank * self.in_node(case),
            "node": self.node_base + self.node_per_rank * case.num_ranks,
        }[load.level]
        return (
            start + links + load.rows * (self.per_row + self.per_byte * load.row_bytes)
        )

    def in_node(self, case):
        return min(self.topology.ranks_per_node, case.num_ranks)

    def experts(self, shape, rows, active):
        size = 3 * shape.hidden_size * shape.inner_size
        return max(2 * size * rows / self.matmul, 2 * size * active / self.memory)

    def cases(self):
        full = self.topology.num_ranks
        for num_ranks in {2, 4, full} if self.topology.num_nodes == 1 else {full}:
            for shape in SHAPES:
                for tokens in TOKENS if num_ranks == full else TOKENS[:1]:
                    for load in loads_of(self.topology):
                        if num_ranks == full or load is Load.UNIFORM:
                            yield Case(
                                shape=shape,
                                form=self.form,
                                load=load,
                                num_tokens=tokens,
                                num_ranks=num_ranks,
                            )

    def exchanges(self):
        for case in self.cases():
            for way in (Way.DISPATCH, Way.COMBINE):
                yield ExchangeSample(
                    case=case,
                    way=way,
                    replayed=False,
                    timing=self.timing(self.skew * self.way(case, way)),
                )

    def expert_samples(self):
        for shape in SHAPES:
            slots = shape.num_experts // self.topology.num_ranks
            for active in sorted({1, slots // 2, slots}):
                for each in (1, 16, 64, 256):
                    seconds = self.experts(shape, each * active, active)
                    of_ranks = [self.timing(slow * seconds) for slow in self.slow]
                    yield ExpertsSample(
                        shape=shape,
                        rows=each * active,
                        active=active,
                        replayed=False,
                        timing=max(of_ranks, key=lambda timing: timing.seconds),
                        of_ranks=tuple(of_ranks),
                    )

    def layers(self):
        """Whole layers: the slowest rank's experts between both ways, and launches."""
        for case in self.cases():
            if case.num_ranks == self.topology.num_ranks:
                counts = case_counts(case, self.topology.ranks_per_node, SEED)
                ranks = zip(
                    counts.rank_rows()[0, 0],
                    counts.active_experts()[0, 0],
                    self.slow,
                    strict=True,
                )
                seconds = self.overhead + sum(
                    self.way(case, way) for way in (Way.DISPATCH, Way.COMBINE)
                )
                busy = max(
                    slow * self.experts(case.shape, rows, active)
                    for rows, active, slow in ranks
                )
                seconds += max(busy, self.host)
                yield LayerSample(
                    case=case, replayed=False, timing=self.timing(seconds)
                )

    def measurements(self):
        return Measurements(
            machine=Machine(
                device="made up",
                num_devices=int(self.host > 0 or self.skew > 1),
                num_ranks=self.topology.num_ranks,
                cpu="made up",
                num_cores=1,
                backend="gloo",
                transport="gloo",
                torch="0",
            ),
            topology=self.topology,
            exchanges=tuple(self.exchanges()),
            layers=tuple(self.layers()),
            experts=tuple(self.expert_samples()),
        )


ONE_NODE = Topology(num_ranks=4, ranks_per_node=4)
TWO_NODES = Topology(num_ranks=4, ranks_per_node=2)
