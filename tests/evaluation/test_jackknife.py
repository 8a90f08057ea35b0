"""Intervals of batches that share sequences hold the truth as often as they say."""

from dataclasses import replace

import numpy as np
import pytest
from moetuner.evaluation.evaluate import draw_batches, evaluate, paired_gain
from moetuner.evaluation.jackknife import MAX_GROUPS, jackknife_seconds
from moetuner.evaluation.workload import BatchKind
from moetuner.placement.topology import Topology
from strategies import TOY_COST as COST
from strategies import make_trace, random_placement

EXPERTS, LENGTH = 16, 24


def drawn(seed, num_sequences, phase):
    """Sequences with tastes of their own: tokens of one are alike."""
    rng = np.random.default_rng(seed)
    tastes = rng.dirichlet(np.full(EXPERTS, 0.5), num_sequences)
    scores = np.log(tastes)[:, None, None] + rng.gumbel(
        size=(num_sequences, LENGTH, 2, EXPERTS)
    )
    ids = np.argsort(-scores, axis=-1)[..., :2].reshape(-1, 2, 2).astype(np.int16)
    sequence = np.repeat(np.arange(num_sequences), LENGTH).astype(np.int32)
    return make_trace(
        np.ascontiguousarray(ids),
        EXPERTS,
        sequence=sequence,
        phase=np.full(len(ids), phase, np.uint8),
    )


DECODE = (1, 12, BatchKind.MIXED)
CHUNKS = (0, 10, BatchKind.SEQUENCES)


@pytest.fixture(scope="module")
def placements():
    trace = drawn(0, 4, 0)
    return [
        random_placement(
            np.random.default_rng(seed), trace, Topology(num_ranks=4, ranks_per_node=4)
        )
        for seed in (1, 2)
    ]


def gain_of(trace, placements, batch_tokens, kind):
    draws = []
    for placement in placements:
        scores = evaluate(
            trace, placement, COST, batch_tokens=batch_tokens, batch_kind=kind
        )
        draws.append(draw_batches(trace, placement, COST, scores, kind))
    return paired_gain(*draws), draws


@pytest.mark.parametrize("tries", [30, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("phase", "batch_tokens", "kind"), [DECODE, CHUNKS])
def test_at_least_95_of_100_intervals_hold_the_true_gain(
    placements, phase, batch_tokens, kind, tries
):
    truth, _ = gain_of(drawn(10_000, 1500, phase), placements, batch_tokens, kind)
    held, gains, widths = 0, [], []
    for seed in range(tries):
        trace = drawn(seed, 36, phase)
        found, draws = gain_of(trace, placements, batch_tokens, kind)
        assert draws[0].units == MAX_GROUPS
        held += found.low <= truth.gain <= found.high
        gains.append(found.gain)
        widths.append(found.high - found.low)
    assert held >= 0.9 * tries
    needed = 2 * 1.96 * np.std(gains)  # of 95 of 100, had one known their spread
    assert 0.8 * needed < np.mean(widths) < 2.5 * needed


@pytest.mark.parametrize(("phase", "batch_tokens", "kind"), [DECODE, CHUNKS])
def test_a_placement_gains_nothing_over_itself(placements, phase, batch_tokens, kind):
    trace = drawn(1, 36, phase)
    found, _ = gain_of(trace, placements[:1] * 2, batch_tokens, kind)
    assert (found.gain, found.low, found.high) == (0, 0, 0)


def test_equal_sequences_leave_no_doubt(placements):
    one = drawn(1, 1, 1).topk_ids
    ids = np.ascontiguousarray(np.tile(one, (40, 1, 1)))
    trace = replace(drawn(1, 40, 1), topk_ids=ids)
    off = jackknife_seconds(
        trace, placements[0], COST, batch_tokens=10, kind=BatchKind.MIXED
    )
    assert off == pytest.approx(np.zeros(MAX_GROUPS), abs=1e-15)
