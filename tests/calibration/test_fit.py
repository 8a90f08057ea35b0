"""What a fit finds where the figures are known."""

import numpy as np
import pytest
from made_machine import ONE_NODE, SEED, TWO_NODES, Made
from moetuner.calibration.exchange_fit import fit_exchange, nonnegative_fit
from moetuner.calibration.experts_fit import pool, rising, smooth_experts
from moetuner.placement.topology import Topology


def fitted(made):
    return fit_exchange(list(made.exchanges()), made.topology.ranks_per_node, SEED)


def test_figures_of_one_node_are_found_again():
    made = Made(ONE_NODE)
    found = fitted(made)
    assert 1 / found.rank_egress == pytest.approx(made.egress, rel=1e-3)
    assert 1 / found.rank_ingress == pytest.approx(made.ingress, rel=1e-3)
    assert found.rank_base == pytest.approx(made.rank_base, rel=1e-2)
    assert found.rank_per_rank == pytest.approx(made.rank_per_rank, rel=1e-2)
    assert found.local == pytest.approx(made.local, rel=1e-2)
    assert found.per_row == pytest.approx(made.per_row, rel=1e-2)
    assert found.per_byte == pytest.approx(made.per_byte, rel=1e-2)
    assert found.node_egress is found.node_ingress is found.node_base is None


def test_figures_of_two_nodes_are_found_again():
    """What leaves the one enters the other: the narrower is all that can be seen."""
    made = Made(TWO_NODES)
    found = fitted(made)
    assert 1 / found.rank_ingress == pytest.approx(made.ingress, rel=1e-2)
    assert found.node_egress == found.node_ingress
    assert 1 / found.node_ingress == pytest.approx(made.node_ingress, rel=1e-2)
    total = found.node_base + 4 * found.node_per_rank
    assert total == pytest.approx(made.node_base + 4 * made.node_per_rank, rel=1e-2)


def test_two_ranks_tell_one_bandwidth_for_both_directions():
    found = fitted(Made(Topology(num_ranks=2, ranks_per_node=2)))
    assert found.rank_egress == found.rank_ingress > 0


def test_one_rank_has_no_links():
    found = fitted(Made(Topology(num_ranks=1, ranks_per_node=1)))
    assert found.rank_egress is None
    assert found.rank_base is None
    assert found.local == pytest.approx(Made.local, rel=1e-2)


def test_a_few_times_that_are_far_off_move_little():
    """One in ten was disturbed: it took five times as long."""
    made = Made(ONE_NODE, noise=0.03)
    samples = list(made.exchanges())
    for i in range(0, len(samples), 10):
        object.__setattr__(samples[i].timing, "seconds", 5 * samples[i].timing.seconds)
    found = fit_exchange(samples, 4, SEED)
    assert 1 / found.rank_ingress == pytest.approx(made.ingress, rel=0.1)
    assert found.per_byte == pytest.approx(made.per_byte, rel=0.25)


def test_no_coefficient_is_negative_and_small_times_count():
    columns = np.array([[1.0, 1], [1, 1000], [1, 2000]])
    falling = np.array([3.0, 2, 1])
    found = nonnegative_fit(columns, falling, np.ones(3))
    assert found[1] == 0
    assert 1 <= found[0] <= 3
    exact = np.array([1e-6 + 1e-9, 2e-6, 3e-6])
    found = nonnegative_fit(columns, exact, np.ones(3))
    assert found == pytest.approx([1e-6, 1e-9])


def test_a_link_that_costs_nothing_measurable_has_a_finite_bandwidth():
    made = Made(ONE_NODE)
    made.egress = made.ingress = 1e30
    found = fitted(made)
    assert 0 < found.rank_egress < 1e-9


def test_pooled_values_rise_and_keep_their_mean():
    values = np.array([1.0, 3, 2, 2, 5, 4])
    found = pool(values)
    assert (np.diff(found) >= 0).all()
    assert found.mean() == pytest.approx(values.mean())
    assert pool(np.array([1.0, 2, 3])).tolist() == [1, 2, 3]


def test_a_grid_rises_along_both_axes_and_keeps_its_holes(rng):
    grid = rng.normal(size=(6, 5))
    grid[5, 4] = np.nan
    before = grid.copy()
    found = rising(grid)
    assert np.array_equal(grid, before, equal_nan=True)
    assert np.isnan(found[5, 4])
    assert np.isnan(found).sum() == 1
    for axis in (0, 1):
        steps = np.diff(found, axis=axis)
        assert (steps[~np.isnan(steps)] >= -1e-12).all()


def test_a_curve_that_rises_already_stays_as_it_is():
    samples = list(Made(ONE_NODE).expert_samples())
    found = smooth_experts(samples)
    told = {(s.shape, s.rows, s.active): s.timing.seconds for s in samples}
    seen = {
        (shape, rows, active): seconds
        for shape, points in found.items()
        for rows, active, seconds in points
    }
    assert seen == pytest.approx(told)
