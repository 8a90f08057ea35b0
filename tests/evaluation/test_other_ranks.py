"""Ranks that compute otherwise than the rest: read, refused, priced, bounded."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner._plain import from_plain, to_plain
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.compute_curve import ComputeCurve, Plane, least_ratio
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.hardware_file import read_hardware, write_hardware
from moetuner.evaluation.models import ModelShape
from moetuner.evaluation.other_ranks import OtherRanks
from moetuner.placement.topology import Topology
from moetuner.planning.options import Pricing
from moetuner.problem import Objective
from moetuner.solver import SolverOptions, get_solver
from strategies import measured, random_problem

SHAPE = ModelShape(hidden_size=64, expert_hidden_size=8)
FOUR = Topology(num_ranks=4, ranks_per_node=2)
PLAIN = HARDWARE["h100"]
SLOW = OtherRanks(
    name="old", ranks=(1, 3), matmul_rate=PLAIN.matmul_rate / 4, memory_bandwidth=1e12
)


def mixed(start=1e-8):
    """A measured machine of which rank 2 has its own times."""
    machine = measured(PLAIN)
    (curve,) = machine.grouped_gemm

    def seconds(p):
        return start + p.active * 7e-10 + 3 * p.rows * SHAPE.flops_per_row / 4e14

    points = tuple(replace(p, seconds=seconds(p)) for p in curve.points)
    own = (replace(curve, points=points),)
    others = OtherRanks(name="old", ranks=(2,), grouped_gemm=own)
    return replace(machine, other_ranks=(others,))


@pytest.mark.parametrize(
    "machine", [replace(PLAIN, other_ranks=(SLOW,)), mixed()], ids=["rates", "curve"]
)
def test_they_are_written_and_read_again(tmp_path, machine):
    path = tmp_path / "mixed.toml"
    write_hardware(machine, path)
    assert read_hardware(path) == machine
    cost = CostModel(hardware=machine)
    assert from_plain(CostModel, to_plain(cost), "file") == cost


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ranks = [1, 3]", "", r"other_ranks\[0\]\.ranks: is missing"),
        ("ranks = [1, 3]", "ranks = 3", r"ranks: wanted a list of ranks, got 3"),
        ("ranks = [1, 3]", "ranks = []", "whole numbers >= 0, at least one"),
        ("ranks = [1, 3]", "ranks = [-1]", "whole numbers >= 0"),
        ("ranks = [1, 3]", "ranks = [1, 1]", "ranks must differ"),
        (
            "[other_ranks.matmul_rate]\nbf16",
            "[other_ranks.rate]\nbf16",
            "rate: unknown",
        ),
        ("[other_ranks.matmul_rate]\nbf16", "[other_ranks.matmul_rate]\nfp8", "bf16"),
    ],
)
def test_what_a_file_must_not_say_of_them(tmp_path, old, new, message):
    path = tmp_path / "odd.toml"
    write_hardware(replace(PLAIN, other_ranks=(SLOW,)), path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InvalidProblemError, match=message):
        read_hardware(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OtherRanks(name="x", ranks=(0,)), "a rate or measured times of x"),
        (lambda: OtherRanks(name=3, ranks=(0,)), "name must be printable"),
        (lambda: replace(SLOW, ranks=3), "ranks must be whole numbers .* got 3"),
        (lambda: replace(SLOW, matmul_rate=0.0), "matmul_rate must be positive"),
        (
            lambda: OtherRanks(name="x", ranks=(0,), fp8_matmul_rate=1e15),
            "wanted matmul_rate beside",
        ),
        (
            lambda: replace(PLAIN, other_ranks=(SLOW, replace(SLOW, name="older"))),
            "has rank 1 twice, in old and in older",
        ),
        (
            lambda: CostModel(
                hardware=replace(PLAIN, other_ranks=(replace(SLOW, ranks=(4,)),))
            ).rates(FOUR),
            "has rank 4 in old, the topology has ranks 0 to 3",
        ),
    ],
)
def test_impossible_ranks_are_refused(make, message):
    with pytest.raises(InvalidProblemError, match=message):
        make()


def test_each_rank_is_priced_by_its_own_rates():
    machine = replace(PLAIN, other_ranks=(SLOW,))
    cost = CostModel(hardware=machine, shape=SHAPE, rank_speeds=(1, 1, 1, 0.5))
    price = cost.layer_price(FOUR)
    row = SHAPE.flops_per_row / PLAIN.matmul_rate
    for rank, times in enumerate((1, 4, 1, 8)):
        rows = np.eye(4)[rank] * 1e6
        assert price.compute(rows, rows > 0) == pytest.approx(times * 1e6 * row)
    one = price.compute([0, 1, 0, 0], [0, 1, 0, 0])  # of an expert's weights
    assert one == pytest.approx(SHAPE.expert_bytes / 1e12)
    assert not cost.alike(FOUR)
    fp8 = replace(SHAPE, dispatch_bytes=1.0, weight_bytes=1.0)
    narrow = CostModel(hardware=machine, shape=fp8).rates(FOUR)
    assert narrow.rank_compute[0].rates.row == fp8.flops_per_row / 1979e12
    assert narrow.rank_compute[1].rates.row == fp8.flops_per_row / SLOW.matmul_rate


@pytest.mark.parametrize("start", [0.0, 1e-8])
def test_each_rank_is_priced_by_its_own_curve_and_starts_by_its_own(start):
    machine = replace(mixed(start), permutation=None)
    (usual,), (own,) = machine.grouped_gemm, machine.other_ranks[0].grouped_gemm
    price = CostModel(hardware=machine, shape=SHAPE).layer_price(FOUR)
    for rank, points in ((0, usual.points), (2, own.points)):
        for p in points:
            rows, active = np.zeros((2, 4))
            rows[rank], active[rank] = p.rows, p.active
            found = price.compute(rows, active) - machine.layer_overhead
            assert found == pytest.approx(p.seconds, rel=0.02)
    assert price.compute(np.zeros(4), np.zeros(4)) == 0.0


def test_what_is_priced_says_that_ranks_differ():
    pricing = Pricing(cost=CostModel(hardware=replace(PLAIN, other_ranks=(SLOW,))))
    assert "rank speeds of the hardware" in pricing.words()
    assert "rank speeds alike" in Pricing().words()


def test_a_type_that_was_not_measured_on_them_is_as_on_the_others():
    machine = mixed()
    fp8 = replace(SHAPE, dispatch_bytes=1.0, weight_bytes=1.0)
    cost = CostModel(hardware=machine, shape=fp8)
    usual, own = cost.compute_curves()
    assert usual == own
    assert cost.bound_speeds(4) == pytest.approx(np.ones(4))


planes = st.builds(Plane, row=st.floats(0.1, 9), expert=st.floats(0.1, 9))
curves = st.builds(
    ComputeCurve, start=st.just(0.0), planes=st.lists(planes, min_size=1, max_size=4)
)


@given(curves, curves)
def test_a_curve_is_never_less_than_its_least_ratio_to_another(one, other):
    ratio = least_ratio(one, other)
    parts = np.linspace(0, 1, 2001)
    found = [
        one.seconds(1 - part + 1e-12, part) / other.seconds(1 - part + 1e-12, part)
        for part in parts
    ]
    assert ratio * (1 - 1e-9) <= min(found) <= ratio * 1.05


def test_least_ratios_are_found_at_an_end_and_at_a_bend():
    line = ComputeCurve(start=0.0, planes=(Plane(row=1.0, expert=1.0),))
    bent = ComputeCurve(
        start=0.0, planes=(Plane(row=1.0, expert=0.0), Plane(row=0.0, expert=1.0))
    )
    assert least_ratio(bent, line) == 0.5
    assert least_ratio(line, bent) == 1.0


def test_a_rank_with_a_slow_curve_is_given_less(rng):
    problem = random_problem(rng, 2, 16, FOUR, objective=Objective.MODELLED_TIME)
    machine = replace(PLAIN, matmul_rate=1e9, memory_bandwidth=1e15)
    slow = OtherRanks(name="old", ranks=(1,), matmul_rate=1e9 / 6)
    cost = CostModel(hardware=replace(machine, other_ranks=(slow,)), shape=SHAPE)
    problem = replace(problem, workload=replace(problem.workload, cost=cost))
    found = get_solver("joint").solve(problem, SolverOptions(time_limit=3, threads=1))
    load = problem.rank_loads(found.placement.rank_of())
    assert (load[:, 1] < 0.8 * load[:, [0, 2, 3]].min(axis=1)).all()
    assert found.lower_bound is None or found.lower_bound <= found.value
