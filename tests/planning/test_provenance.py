"""A placement file tells all that made it: it can be made again from itself."""

import dataclasses
import json

import numpy as np
import pytest
from moetuner._plain import from_plain, to_plain
from moetuner.errors import InvalidPlacementError
from moetuner.evaluation.cost import CostModel, Homes, Wire
from moetuner.evaluation.hardware import HARDWARE, Hardware
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.workload import BatchKind
from moetuner.placement.file import read_placement, write_placement
from moetuner.placement.model import Placement, Provenance, contiguous_rank_of
from moetuner.placement.topology import Topology
from moetuner.planning.options import PlanOptions
from moetuner.planning.plan import plan_trace
from moetuner.planning.provenance import options_of, part_of, pricing_of, slots_of
from moetuner.solver import SOLVERS, SolverOptions, get_solver
from moetuner.solver.joint.config import JointConfig
from moetuner.solver.joint.scenarios import SearchProfile
from moetuner.solver.programs.ilp1 import Ilp1Config
from strategies import make_trace, random_ids

MACHINE = Topology(num_ranks=4, ranks_per_node=2)
ODD = CostModel(
    hardware=Hardware(
        name="mine",
        memory_bandwidth=1e12,
        matmul_rate=5e14,
        rank_bandwidth=2e11,
        nic_bandwidth=1e10,
        rank_latency=1e-5,
        node_latency=3e-5,
    ),
    shape=ModelShape(hidden_size=512, expert_hidden_size=96, dispatch_bytes=1.0),
    homes=Homes.FOLLOW,
    rank_speeds=(1.0, 1.0, 0.5, 0.75),
)


def trace_of(seed, experts=16):
    ids = random_ids(np.random.default_rng(seed), 800, 3, experts, 2)
    sequence = (np.arange(800) // 20).astype(np.int32)
    return make_trace(ids, experts, sequence=sequence, ranked=True)


def quick(solver, seed=0, **fields):
    limits = SolverOptions(time_limit=1e4, threads=1, seed=seed)
    return PlanOptions(solver=solver, solver_options=limits, **fields)


ASKED = {
    "lpt": quick("lpt", seed=3, plan_fraction=0.3),
    "random": quick("random", seed=5),
    "eplb": quick("eplb", slots_per_rank=5, batch_kind=BatchKind.MIXED),
    "joint": quick(
        "joint",
        seed=7,
        cost=ODD,
        batch_tokens=100,
        config=JointConfig(rounds=1, profile=SearchProfile(peak=0.5)),
    ),
    "joint with replicas": quick(
        "joint", slots_per_rank=5, config=JointConfig(rounds=1, favour="few-ranks")
    ),
    "joint under an engine's replica rule": quick(
        "joint",
        slots_per_rank=5,
        cost=CostModel(replica_rule="vllm"),
        config=JointConfig(rounds=1),
    ),
    "free sizes": quick("ilp1", config=Ilp1Config(free_sizes=True, memory_slack=4)),
    "several traces": quick(
        "joint", weights=(3, 1), worst_case=True, config=JointConfig(rounds=1)
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_placement_file_can_be_made_again_from_itself(tmp_path, name):
    experts = 6 if name == "free sizes" else 16  # CBC has to prove it
    traces = [trace_of(1, experts)]
    if name == "several traces":
        traces.append(trace_of(2))
    asked = dataclasses.replace(ASKED[name], baselines="none")
    first = plan_trace(traces[0], MACHINE, asked, others=traces[1:]).result.placement
    write_placement(first, tmp_path / "first.json")
    read = read_placement(tmp_path / "first.json")

    options = options_of(read)
    again = plan_trace(traces[0], read.topology, options, others=traces[1:])
    write_placement(again.result.placement, tmp_path / "again.json")

    contents = [
        json.loads((tmp_path / f"{n}.json").read_text()) for n in ("first", "again")
    ]
    for content in contents:
        del content["provenance"]["seconds"]
        content.pop("progress", None)
    assert contents[0] == contents[1]


def test_a_plan_from_a_placement_in_use_needs_that_one_again(tmp_path):
    trace = trace_of(1)
    old = plan_trace(trace, MACHINE, quick("random", baselines="none")).result.placement
    config = JointConfig(rounds=1, stay=old, move_seconds=1e-7)
    asked = quick("joint", config=config, baselines="none")
    first = plan_trace(trace, MACHINE, asked).result.placement
    write_placement(first, tmp_path / "first.json")
    read = read_placement(tmp_path / "first.json")
    for wrong in (None, first):
        with pytest.raises(InvalidPlacementError, match="give that one as stay"):
            options_of(read, stay=wrong)
    again = plan_trace(trace, MACHINE, options_of(read, stay=old)).result.placement
    np.testing.assert_array_equal(first.slot_experts, again.slot_experts)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_tells_its_own_options(solver):
    config = get_solver(solver).config
    plain = json.loads(json.dumps(to_plain(config)))
    assert from_plain(type(config), plain, "config") == config


def placement_of(**options):
    return Placement.from_rank_of(
        contiguous_rank_of(3, 16, 4),
        layer_ids=np.arange(3, dtype=np.int32),
        topology=MACHINE,
        provenance=Provenance(solver="lpt", trace_sha256="ab", options=options),
    )


# As files of 0.1 told them, all in one level.
FLAT = {
    "solver": "lpt",
    "time_limit": 2.0,
    "seed": 3,
    "threads": 2,
    "plan_fraction": 0.25,
    "slots_per_rank": 4,
    "equal_slots": True,
    "memory_slack": None,
    "batch_tokens": 512,
    "batch_kind": "mixed",
    "other_traces": ["cd"],
    "wire": "per_expert",
    "homes": "follow",
    "hardware": "h200",
    "hidden_size": 256,
    "expert_hidden_size": 128,
}


def test_files_of_older_versions_tell_prices_part_and_slots():
    old = placement_of(**FLAT)
    pricing = pricing_of(old)
    shape = ModelShape(hidden_size=256, expert_hidden_size=128)
    wanted = CostModel(
        hardware=HARDWARE["h200"], shape=shape, wire=Wire.PER_EXPERT, homes="follow"
    )
    assert pricing.cost == wanted
    assert (pricing.batch_tokens, pricing.batch_kind) == (512, BatchKind.MIXED)
    assert part_of(old, "ab") == part_of(old, "cd") == (0.25, 3)
    assert part_of(old, "ef") is None
    assert slots_of(old) == 4
    assert slots_of(placement_of(**{**FLAT, "equal_slots": False})) == 0
    with pytest.raises(InvalidPlacementError, match="of a version before"):
        options_of(old)


def test_a_file_that_is_silent_prices_nothing():
    assert pricing_of(placement_of()) is None
    assert pricing_of(placement_of(origin="elsewhere")) is None
    assert slots_of(placement_of()) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"cost": {"wire": "string"}},
        {"cost": {"rank_speeds": "1,1"}},
        {"cost": {"hardware": {"name": "mine"}}},
        {"cost": [], "batch_tokens": 1},
        {"cost": {}, "batch_tokens": "many"},
        {**FLAT, "homes": "away"},
        {**FLAT, "hidden_size": None},
        {**FLAT, "hidden_size": -4},
    ],
    ids=str,
)
def test_prices_that_make_no_sense_are_refused(options):
    with pytest.raises(InvalidPlacementError):
        pricing_of(placement_of(**options))


def test_the_fingerprint_is_of_what_sits_where():
    one = placement_of()
    assert one.sha256() == placement_of(other="options").sha256()
    moved = one.slot_experts.copy()
    moved[0, [0, 4]] = moved[0, [4, 0]]
    assert dataclasses.replace(one, slot_experts=moved).sha256() != one.sha256()
    alone = Topology(num_ranks=4, ranks_per_node=4)
    assert dataclasses.replace(one, topology=alone).sha256() != one.sha256()
