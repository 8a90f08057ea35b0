"""Random traces, topologies and placements for property tests."""

from dataclasses import replace

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.curves import GemmPoint, GroupedGemm, Permutation
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.other_ranks import OtherRanks
from moetuner.evaluation.rates import Bandwidth
from moetuner.evaluation.workload import Workload
from moetuner.placement.model import Placement
from moetuner.placement.topology import Topology
from moetuner.problem import Objective, PlacementProblem
from moetuner.trace import CountTrace, Trace, TraceMetadata
from moetuner.trace.statistics import RoutingStatistics


def examples(number):
    """Settings of costly tests: four times as many in `make test-examples`."""
    return settings(max_examples=number * settings.default.max_examples // 50)


def random_ids(rng, num_tokens, num_layers, num_experts, top_k, padding=0.0, skew=1.0):
    """int16 [T, L, K] distinct experts per row, some of them padding."""
    noise = rng.gumbel(size=(num_tokens, num_layers, num_experts))
    liking = skew * rng.normal(size=(num_layers, num_experts))
    ids = np.argsort(-(noise + liking), axis=2)[..., :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < padding] = -1
    return np.ascontiguousarray(ids)


def make_trace(ids, num_experts, **fields):
    return Trace(
        topk_ids=ids,
        num_experts=num_experts,
        layer_ids=np.arange(ids.shape[1], dtype=np.int32),
        **fields,
    )


@st.composite
def traces(draw, max_tokens=12, max_experts=9):
    """A small trace; the strongest expert is first, homes are recorded for 4 ranks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.integers(4, max_experts))
    top_k = draw(st.integers(1, min(4, num_experts)))
    num_tokens = draw(st.integers(0, max_tokens))
    num_layers = draw(st.integers(1, 4))
    padding = draw(st.sampled_from([0.0, 0.3]))
    ids = random_ids(rng, num_tokens, num_layers, num_experts, top_k, padding)
    return make_trace(
        ids,
        num_experts,
        ranked=True,
        sequence=rng.integers(0, 3, num_tokens).astype(np.int32),
        home_rank=rng.integers(0, 4, num_tokens).astype(np.int16),
    )


def random_placement(rng, trace, topology, extra_slots=0):
    """Every expert once, at random; further slots hold replicas or nothing."""
    num_ranks = topology.num_ranks
    slots_per_rank = -(-trace.num_experts // num_ranks) + extra_slots
    slots = np.full((trace.num_layers, num_ranks, slots_per_rank), -1, np.int32)
    for layer in slots:
        free = [(g, s) for g in range(num_ranks) for s in range(slots_per_rank)]
        rng.shuffle(free)
        for expert in range(trace.num_experts):
            rank, slot = free.pop()
            layer[rank, slot] = expert
        for rank, slot in free:
            expert = rng.integers(-1, trace.num_experts)
            if expert not in layer[rank]:
                layer[rank, slot] = expert
    return Placement(
        slot_experts=slots.reshape(trace.num_layers, -1),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        topology=topology,
    )


topologies = st.sampled_from(
    [
        Topology(num_ranks=g, ranks_per_node=m)
        for g, m in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    ]
)


@st.composite
def full_traces(draw, max_tokens=8):
    """A small trace in which every optional field may be there or not."""
    bare = draw(traces(max_tokens=max_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    text = st.text(st.characters(codec="utf-8"), max_size=5)

    def maybe(array):
        return array if draw(st.booleans()) else None

    def per_token(high, dtype):
        return maybe(rng.integers(0, high, bare.num_tokens).astype(dtype))

    ranked = draw(st.booleans())
    weights = rng.random(bare.topk_ids.shape)
    if ranked:
        weights = -np.sort(-weights, axis=2)
    layers = np.sort(rng.choice(100, bare.num_layers, replace=False))
    return Trace(
        topk_ids=bare.topk_ids,
        num_experts=bare.num_experts + draw(st.sampled_from([0, 247, 32000])),
        layer_ids=layers.astype(np.int32),
        topk_weights=maybe(weights.astype(draw(st.sampled_from(["f2", "f4"])))),
        sequence=per_token(2**31, np.int32),
        position=per_token(2**31, np.int32),
        home_rank=per_token(2**15, np.int16),
        phase=per_token(2, np.uint8),
        ranked=ranked,
        metadata=TraceMetadata(
            model=draw(text),
            source=draw(text),
            dataset=draw(text),
            extra=draw(st.dictionaries(text, text, max_size=2)),
        ),
    )


@st.composite
def placement_problems(
    draw, max_experts=6, max_layers=3, shapes=((2, 1), (2, 2), (3, 1)), **options
):
    """A tiny problem on (ranks, ranks per node) of `shapes`, and a generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_ranks, ranks_per_node = draw(st.sampled_from(shapes))
    num_experts = draw(st.integers(num_ranks, max_experts))
    num_layers = draw(st.integers(1, max_layers))
    top_k = draw(st.integers(1, min(3, num_experts)))
    num_tokens = draw(st.sampled_from([0, 5, 60]))
    ids = random_ids(rng, num_tokens, num_layers, num_experts, top_k)
    topology = Topology(num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    return _problem(ids, num_experts, topology, options), rng


def random_problem(rng, num_layers, num_experts, topology, **options):
    """A problem from 400 skewed tokens, top-2."""
    ids = random_ids(rng, 400, num_layers, num_experts, 2)
    return _problem(ids, num_experts, topology, options)


# Loads, links between ranks and links between nodes weigh about alike.
TOY_COST = CostModel(
    hardware=replace(HARDWARE["h100"], rank_latency=1e-9, node_latency=2e-9),
    shape=ModelShape(hidden_size=64, expert_hidden_size=8),
)


def measured(hardware, start=3e-9):
    """`hardware` with times of experts as measured on it: two slopes, and launches.

    They are about as long as those of `hardware` for toy shapes.
    """
    hidden, inner = 64, 8
    operations, weights = 6.0 * hidden * inner, 6.0 * hidden * inner  # bytes, bf16
    read, compute = weights / hardware.memory_bandwidth, operations / 4e14
    points = tuple(
        GemmPoint(
            rows=each * active,
            active=active,
            seconds=start
            + max(
                active * read,
                0.7 * active * read + 0.5 * each * active * compute,
                each * active * compute,
            ),
        )
        for active in (1, 2, 5)
        for each in (1, 30, 150, 800, 4000)
    )
    curve = GroupedGemm(
        dtype="bf16", hidden_size=hidden, expert_hidden_size=inner, points=points
    )
    return replace(
        hardware,
        grouped_gemm=(curve,),
        permutation=Permutation(per_row=1e-12, per_byte=1e-14),
        layer_overhead=1e-9,
    )


@st.composite
def machines(draw, hardware, topology):
    """`hardware` as it is or measured, with links as they are or that differ."""
    if draw(st.booleans()):
        hardware = measured(hardware)
    if draw(st.integers(0, 2)) == 0:
        hardware = with_others(hardware, draw(st.floats(0.3, 3.0)))
    # Below what toy layers take, among it, and above.
    floor = draw(st.sampled_from([0.0, 0.0, 1e-9, 4e-9, 1e-6]))
    return draw(links_of(replace(hardware, compute_floor=floor), topology))


def with_others(hardware, slow):
    """`hardware` whose rank 0 takes other times: by rates, or by its own curve."""
    if not hardware.grouped_gemm:
        rates = {"matmul_rate": hardware.matmul_rate / slow}
        others = OtherRanks(name="other", ranks=(0,), **rates)
        return replace(hardware, other_ranks=(others,))
    (curve,) = hardware.grouped_gemm
    # More than a factor: other things are slow here, and the start may be later.
    least = min(p.seconds for p in curve.points)
    points = tuple(
        replace(p, seconds=(slow - 0.2) * least + p.seconds**1.05 * least**-0.05)
        for p in curve.points
    )
    own = (replace(curve, points=points),)
    others = OtherRanks(name="other", ranks=(0,), grouped_gemm=own)
    return replace(hardware, other_ranks=(others,))


@st.composite
def links_of(draw, hardware, topology):
    """`hardware` as it is, or slower one way, or with links that all differ."""
    kind = draw(st.sampled_from(["alike", "ways", "places", "node places"]))
    if kind == "alike":
        return hardware
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    places = {
        "ways": (1, 1),
        "places": (topology.num_ranks, topology.num_nodes),
        "node places": (topology.ranks_per_node, 1),
    }[kind]

    def bandwidth(fastest, count):
        egress, ingress = fastest * rng.uniform(0.3, 1.0, (2, count))
        return Bandwidth(egress=egress.tolist(), ingress=ingress.tolist())

    return replace(
        hardware,
        rank_bandwidth=bandwidth(hardware.rank_bandwidth, places[0]),
        nic_bandwidth=bandwidth(hardware.nic_bandwidth, places[1]),
    )


def _problem(ids, num_experts, topology, options):
    trace = make_trace(ids, num_experts, ranked=True)
    return PlacementProblem(
        **{
            "statistics": RoutingStatistics.from_trace(trace),
            "topology": topology,
            "objective": Objective.MAX_LOAD,
            "workload": Workload(traces=(trace,), cost=TOY_COST, batch_tokens=100),
            **options,
        }
    )


def problem_of_counts(load, topology, *, transitions=None, cost=TOY_COST, **options):
    """The problem of `load` [L, E] and `transitions`, counted in one go."""
    load = np.array(load, np.int64)
    layer_ids = np.arange(len(load), dtype=np.int32)
    counted = CountTrace(
        counts=load[None],
        num_tokens=load.sum(axis=1).max(keepdims=True),
        layer_ids=layer_ids,
    )
    return PlacementProblem(
        workload=Workload(traces=(counted,), cost=cost),
        statistics=RoutingStatistics(
            num_tokens=int(counted.num_tokens.sum()),
            layer_ids=layer_ids,
            load=load,
            transitions=None
            if transitions is None
            else np.array(transitions, np.int64),
        ),
        topology=topology,
        **{"objective": Objective.MAX_LOAD, **options},
    )


def rename_experts(problem, order):
    """The same problem with expert ``order[i]`` called i."""
    old, workload = problem.statistics, problem.workload
    new_name = np.argsort(order).astype(np.int16)
    traces = []
    for trace in workload.traces:
        ids = np.where(trace.topk_ids < 0, -1, new_name[trace.topk_ids])
        traces.append(replace(trace, topk_ids=ids.astype(np.int16)))
    return replace(
        problem,
        statistics=replace(
            old,
            load=old.load[:, order],
            transitions=old.transitions[:, order][:, :, order],
        ),
        workload=replace(workload, traces=tuple(traces)),
    )
