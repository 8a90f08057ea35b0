"""Measured times of experts become planes that the whole planner can price with."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moetuner.evaluation.compute_curve import MAX_PLANES, curve_for
from moetuner.evaluation.cost import CostModel
from moetuner.evaluation.curves import GemmPoint, GroupedGemm, Permutation
from moetuner.evaluation.hardware import HARDWARE
from moetuner.evaluation.models import ModelShape
from moetuner.placement.topology import Topology

LITE = ModelShape(hidden_size=2048, expert_hidden_size=1408)
WIDE = ModelShape(hidden_size=4096, expert_hidden_size=14336)
OTHER = ModelShape(hidden_size=2880, expert_hidden_size=2880)
GRID = [(each * active, active) for active in (1, 4, 16) for each in (1, 16, 256, 4096)]
ONE = Topology(num_ranks=1, ranks_per_node=1)


def took(shape, rows, active):
    """A machine that is as simple as it gets: a start, memory, arithmetic."""
    operations = rows * shape.flops_per_row
    return 2e-5 + max(active * shape.expert_bytes / 3e12, operations / 6e14)


def measured_curve(shape, seconds=took, dtype="bf16", grid=GRID):
    return GroupedGemm(
        dtype=dtype,
        hidden_size=shape.hidden_size,
        expert_hidden_size=shape.expert_hidden_size,
        weight_bytes=shape.weight_bytes,
        points=tuple(
            GemmPoint(rows=rows, active=active, seconds=seconds(shape, rows, active))
            for rows, active in grid
        ),
    )


@pytest.mark.parametrize("shape", [LITE, WIDE])
def test_a_start_and_two_slopes_are_found_again(shape):
    curve = curve_for(shape, [measured_curve(shape)])
    assert len(curve.planes) <= MAX_PLANES
    for rows, active in [*GRID, (100, 3), (5000, 8), (3, 2)]:
        assert curve.seconds(rows, active) == pytest.approx(
            took(shape, rows, active), rel=0.02
        )
    assert curve.seconds(0, 0) == 0.0


def test_shapes_that_were_not_measured_are_priced_by_their_work():
    curve = curve_for(OTHER, [measured_curve(LITE), measured_curve(WIDE)])
    for rows, active in GRID:
        assert curve.seconds(rows, active) == pytest.approx(
            took(OTHER, rows, active), rel=0.05
        )


NEAR, ROUND = (
    ModelShape(hidden_size=hidden, expert_hidden_size=inner)
    for hidden, inner in ((4096, 1536), (2048, 2048))
)
"""Alike in their operations for each value of a row."""


def tiled(shape, rows, active):
    """Tiles that are not full cost as much as full ones; a shape suits more or less."""
    each = np.arange(1, 2 * active, 2) / active**2 * rows
    tiles = 128 * np.ceil(each / 128).sum()
    suits = {NEAR: 0.95, ROUND: 1.05}.get(shape, 1.0)
    weights = active * shape.expert_bytes
    work = weights / 4.2e12 + suits * tiles * shape.flops_per_row / 6.6e14
    return 2e-5 + max(weights / 2.9e12, work)


@pytest.mark.parametrize("shape", [LITE, WIDE, OTHER])
def test_what_suits_one_shape_is_not_taken_for_bytes_of_rows(shape):
    # Else Mixtral's experts were predicted at two fifths of their time.
    grid = [(e * a, a) for a in (1, 4, 16, 32) for e in (1, 16, 64, 128, 256, 512)]
    curves = [measured_curve(s, tiled, grid=grid) for s in (NEAR, ROUND)]
    curve = curve_for(shape, curves)
    for each in (16, 128, 512, 2048, 4096):
        assert curve.seconds(8 * each, 8) == pytest.approx(
            tiled(shape, 8 * each, 8), rel=0.2
        )


def test_a_shape_that_was_measured_is_priced_by_its_own_times_alone():
    slow = measured_curve(WIDE, lambda *case: 7 * took(*case))
    curves = [measured_curve(LITE), slow]
    assert curve_for(LITE, curves) == curve_for(LITE, curves[:1])
    assert curve_for(WIDE, curves) == curve_for(WIDE, curves[1:])


@given(
    st.lists(
        st.builds(
            lambda each, active, seconds: GemmPoint(
                rows=each * active, active=active, seconds=seconds
            ),
            st.integers(1, 4096),
            st.integers(1, 64),
            st.floats(1e-6, 1e-1),
        ),
        min_size=3,
        max_size=9,
    )
)
def test_whatever_was_measured_the_price_never_falls(points):
    """Nor is any factor negative: so it is convex, and bounds hold."""
    curve = curve_for(LITE, [replace(measured_curve(LITE), points=tuple(points))])
    assert curve.start >= 0
    for plane in curve.planes:
        assert plane.row >= 0
        assert plane.expert >= 0
    for point in points:
        found = curve.seconds(point.rows, point.active)
        assert np.isfinite(found)
        assert found <= curve.seconds(point.rows + 1, point.active)
        assert found <= curve.seconds(point.rows, point.active + 1)


def test_noise_is_smoothed_not_followed():
    rng = np.random.default_rng(0)
    noisy = measured_curve(LITE, lambda *case: took(*case) * rng.uniform(0.95, 1.05))
    curve = curve_for(LITE, [noisy])
    for rows, active in GRID:
        assert curve.seconds(rows, active) == pytest.approx(
            took(LITE, rows, active), rel=0.1
        )


def test_the_price_is_the_curve_the_permutation_and_launches():
    machine = replace(
        HARDWARE["h100"],
        grouped_gemm=(measured_curve(LITE),),
        permutation=Permutation(per_row=1e-9, per_byte=1e-12),
        layer_overhead=4e-5,
    )
    price = CostModel(hardware=machine, shape=LITE).layer_price(ONE)
    curve = curve_for(LITE, machine.grouped_gemm)
    moved = 2 * 1e-9 + 1e-12 * 2048 * (2 + 2)  # out of the order of tokens, and back
    for rows, active in GRID:
        wanted = curve.seconds(rows, active) + rows * moved + 4e-5
        assert price.compute([rows], [active]) == pytest.approx(wanted, rel=1e-12)
        busy = price.busy(rows, active)
        assert busy == pytest.approx(wanted - curve.start - 4e-5, rel=1e-9)
        planes = [rows * p.row + active * p.expert for p in price.busy_planes]
        assert busy == pytest.approx(max(planes), rel=1e-12)
    assert price.compute([0], [0]) == 0.0


def test_without_measurements_the_price_is_the_larger_of_two_ratios():
    plain = CostModel(hardware=HARDWARE["h100"], shape=LITE).rates(ONE)
    assert plain.planes == []
    assert plain.layer == 0.0
    moved = replace(HARDWARE["h100"], permutation=Permutation(per_row=1e-9))
    rates = CostModel(hardware=moved, shape=LITE).rates(ONE)
    assert rates.compute.row == pytest.approx(plain.compute.row + 2e-9)
    assert rates.compute.expert == plain.compute.expert
    ((row, expert),) = [(plane.row, plane.expert) for plane in rates.planes]
    assert (row, expert) == (2e-9, plain.compute.expert)


def test_ranks_of_other_speeds_start_alike():
    machine = replace(HARDWARE["h100"], grouped_gemm=(measured_curve(LITE),))
    cost = CostModel(hardware=machine, shape=LITE, rank_speeds=(1, 0.5))
    price = cost.layer_price(Topology(num_ranks=2, ranks_per_node=2))
    curve = curve_for(LITE, machine.grouped_gemm)
    work = curve.seconds(4096, 4) - curve.start
    assert price.compute([4096, 0], [4, 0]) == pytest.approx(curve.start + work)
    assert price.compute([0, 4096], [0, 4]) == pytest.approx(curve.start + 2 * work)


@pytest.mark.parametrize(
    ("rows_out", "weights", "wanted"),
    [
        (2, 2, "bf16"),
        (2, 0.53125, "bf16"),  # MXFP4 weights are widened for bf16 rows
        (1.03125, 2, "bf16"),
        (1.03125, 1, "fp8"),
        (1.03125, 0.5625, "fp8"),
        (0.5625, 0.5625, "fp4"),
    ],
)
def test_experts_multiply_in_the_wider_of_rows_and_weights(rows_out, weights, wanted):
    shape = replace(LITE, dispatch_bytes=rows_out, weight_bytes=weights)
    rates = {"bf16": 1e15, "fp8": 2e15, "fp4": 4e15}
    machine = replace(
        HARDWARE["b200"],
        matmul_rate=rates["bf16"],
        fp8_matmul_rate=rates["fp8"],
        fp4_matmul_rate=rates["fp4"],
    )
    price = CostModel(hardware=machine, shape=shape).rates(ONE)
    assert price.compute.row == shape.flops_per_row / rates[wanted]
    # A curve of another type says nothing of this one.
    other = "fp8" if wanted == "bf16" else "bf16"
    measured = replace(machine, grouped_gemm=(measured_curve(shape, dtype=other),))
    assert CostModel(hardware=measured, shape=shape).rates(ONE).planes == []
    own = replace(machine, grouped_gemm=(measured_curve(shape, dtype=wanted),))
    assert CostModel(hardware=own, shape=shape).rates(ONE).layer > 0


def test_float32_has_curves_of_its_own_else_those_of_16_bits():
    wide = replace(LITE, dispatch_bytes=4, combine_bytes=4, weight_bytes=4)
    half = measured_curve(wide)
    slow = replace(measured_curve(wide, lambda *case: 3 * took(*case)), dtype="fp32")

    def seconds(shape, *curves):
        machine = replace(HARDWARE["h100"], grouped_gemm=curves)
        return CostModel(hardware=machine, shape=shape).layer_price(ONE)

    alone = seconds(wide, half).compute([512], [8])
    assert alone == pytest.approx(took(wide, 512, 8), rel=0.02)
    assert seconds(wide, half, slow).compute([512], [8]) == pytest.approx(
        3 * alone, rel=0.02
    )
    plain = seconds(LITE).compute([512], [8])
    assert seconds(LITE, slow).compute([512], [8]) == plain
