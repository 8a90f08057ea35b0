"""Measuring on several ranks: what it finds, and that ranks agree on what is wrong."""

from datetime import date

import pytest
import torch
from moetuner.calibration.budget import Allowance
from moetuner.calibration.fit import Origin, fit_hardware
from moetuner.calibration.measure import links, measure, memory, ranks_of
from moetuner.calibration.measure.clock import Clock
from moetuner.calibration.options import SIZES, CalibrationOptions
from moetuner.calibration.samples import Form, LayerShape, Level, Load
from moetuner.errors import CalibrationError, InvalidProblemError
from moetuner.evaluation.hardware import HARDWARE, LinkOf
from ranks import run_on_ranks

SHAPE = LayerShape(hidden_size=128, inner_size=64, num_experts=8, top_k=2)
ORIGIN = Origin(name="x", date=str(date(2026, 11, 30)), command="a test")


def _options(**fields):
    return CalibrationOptions(shapes=(SHAPE,), seconds=0.2, **fields)


def _ranks(device, in_node, options=None):
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    return ranks_of(options or _options(), where, in_node)


def _two_nodes(rank, num_ranks, device):
    said = []
    found = measure(_ranks(device, 2), _options(), said.append)
    assert [line.split(":")[0] for line in said] == [
        *("links", "collectives", "exchange", "experts", "permute"),
    ]
    assert {sample.level for sample in found.links} == set(Level)
    told = [(pair.source, pair.target) for pair in found.pairs]
    assert told == [(a, b) for a in range(4) for b in range(4) if a != b][: len(told)]
    assert len(told) >= 2  # all of them where time is left
    loads = {s.case.load for s in found.exchanges if s.case.form is Form.EXACT}
    assert loads == set(Load)
    assert {s.case.num_ranks for s in found.exchanges} == {num_ranks}
    machine = fit_hardware(found, ORIGIN, HARDWARE["h100"], Form.EXACT, 0).hardware
    assert machine.nic_of is LinkOf.NODE
    assert machine.ranks_per_node == 2
    # Every rank could write the same file: what is measured is the slowest rank's.
    every = _ranks(device, 2).every(found.exchanges)
    assert all(one == every[0] for one in every)


def test_two_nodes_are_measured_and_all_ranks_have_the_same_times():
    run_on_ranks(4, _two_nodes, "cpu")


def _on_gpus(rank, num_ranks, backend):
    ranks = _ranks("cuda", num_ranks)
    found = measure(ranks, _options(), lambda _: None)
    fixed = [s for s in found.layers if s.case.form is Form.FIXED]
    assert fixed
    assert all(s.replayed for s in fixed)  # over mapped memory a graph holds them
    assert any(s.replayed for s in found.experts)
    assert bool(found.links) is (backend == "nccl" and num_ranks > 1)
    if num_ranks > 1:
        assert "mapped memory" in found.machine.transport
    for form in Form:
        fit_hardware(found, ORIGIN, HARDWARE["h100"], form, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_ranks", "backend"), [(1, "nccl"), (2, "gloo"), (2, "nccl")]
)
def test_gpus_replay_the_fixed_form(num_ranks, backend):
    run_on_ranks(num_ranks, _on_gpus, backend, device="cuda", backend=backend)


def _other_options(rank, num_ranks):
    with pytest.raises(InvalidProblemError, match="all ranks must agree, but options"):
        _ranks("cpu", 2, _options(seed=rank))
    with pytest.raises(InvalidProblemError, match="ranks_per_node is 1 on rank 0"):
        _ranks("cpu", 1 + rank)


def test_ranks_that_were_started_differently_are_refused_on_all():
    run_on_ranks(2, _other_options)


def _little_memory(rank, num_ranks):
    ranks = _ranks("cpu", 2)
    memory.free_bytes = lambda ranks: 1e12 if ranks.rank == 0 else 1000
    with pytest.raises(CalibrationError) as caught:
        measure(ranks, _options(), lambda _: None)
    said = str(caught.value)
    assert said.startswith("calibrate: rank 1: too little memory on cpu for messages")
    assert "rank 0" not in said


def _memory_for_small_sizes(rank, num_ranks):
    """What is too large is left out, on all ranks, and said."""
    ranks = _ranks("cpu", 2)
    memory.free_bytes = lambda ranks: 1e12 if ranks.rank == 0 else 2e6
    clock, own = Clock(ranks), Allowance(seconds=30, num_cases=99, clock=lambda: 0.0)
    sizes = SIZES["cpu"].messages
    found = list(links.measure_links(ranks, clock, own, sizes))
    assert max(sample.num_bytes for sample in found) == max(
        size for size in sizes if 2 * size < 0.8 * 2e6
    )
    assert own.left_out["messages"].endswith("for want of memory")


def test_sizes_that_no_memory_holds_are_left_out():
    run_on_ranks(2, _memory_for_small_sizes)


def test_too_little_memory_on_one_rank_is_an_error_on_all():
    run_on_ranks(2, _little_memory)
