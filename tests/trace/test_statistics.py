import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from moetuner import _core
from moetuner.errors import InvalidTraceError, MissingStatisticsError
from moetuner.evaluation import reference
from moetuner.trace import CountTrace, read_trace
from moetuner.trace.statistics import RoutingStatistics
from strategies import make_trace, random_ids, traces


@given(traces())
def test_core_counts_like_the_reference(trace):
    """Every count is exact, padding and empty traces included."""
    expected = reference.count_statistics(trace)
    for threads in (1, 3):
        counted = RoutingStatistics.from_trace(trace, num_threads=threads)
        for name, table in expected.items():
            np.testing.assert_array_equal(getattr(counted, name), table)


def test_a_trace_counted_by_hand():
    """Two tokens, two layers, top-2: [[0,1],[2,0]] and [[1,-1],[2,1]]."""
    ids = np.array([[[0, 1], [2, 0]], [[1, -1], [2, 1]]], np.int16)
    counted = RoutingStatistics.from_trace(make_trace(ids, 3))
    assert counted.load.tolist() == [[1, 2, 0], [1, 1, 2]]
    assert counted.coactivation[0].tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    # 0 -> {2, 0}; 1 -> {2, 0} by the first token and {2, 1} by the second.
    assert counted.transitions[0].tolist() == [[1, 0, 1], [1, 1, 2], [0, 0, 0]]


def test_counts_add_up(rng):
    """Loads sum to T * K, co-activation rows to K times the load."""
    trace = make_trace(random_ids(rng, 200, 3, 16, 4), 16)
    counted = RoutingStatistics.from_trace(trace)
    assert (counted.load.sum(axis=1) == 200 * 4).all()
    np.testing.assert_array_equal(counted.coactivation.sum(axis=2), 4 * counted.load)
    np.testing.assert_array_equal(
        counted.transitions.sum(axis=2), 4 * counted.load[:-1]
    )


def test_traces_add_up_by_what_their_mean_token_counts_for(rng):
    """The trace that counts least is taken once, so that no count of it is lost."""
    long, short = (
        RoutingStatistics.from_trace(make_trace(random_ids(rng, n, 3, 16, 4), 16))
        for n in (300, 100)
    )
    plain = RoutingStatistics.sum((long, short))
    np.testing.assert_array_equal(plain.load, long.load + short.load)
    alike = RoutingStatistics.sum((long, short), (0.5, 0.5))
    np.testing.assert_array_equal(
        alike.transitions, long.transitions + 3 * short.transitions
    )
    assert alike.num_tokens == 600
    mostly = RoutingStatistics.sum((long, short), (0.75, 0.25))
    np.testing.assert_array_equal(mostly.coactivation, plain.coactivation)
    extreme = RoutingStatistics.sum((long, short), (1e-18, 1.0))
    assert (extreme.load >= 0).all()
    np.testing.assert_array_equal(
        RoutingStatistics.sum((short,), (1.0,)).load, short.load
    )


def test_count_only_source_says_what_is_missing():
    """A solver that needs transitions is told so by name."""
    counts = CountTrace(
        counts=np.ones((2, 3, 4), np.int64),
        num_tokens=np.array([2, 2]),
        layer_ids=np.arange(3, dtype=np.int32),
    )
    statistics = RoutingStatistics.from_trace(counts)
    assert statistics.missing == ("coactivation", "transitions")
    with pytest.raises(
        MissingStatisticsError, match="solver chain needs layer-to-layer"
    ):
        statistics.require_transitions("solver chain")


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (np.zeros((2, 3, 1), np.int32), TypeError),  # not int16: nothing is converted
        (np.zeros((2, 3), np.int16), ValueError),
        (np.zeros((2, 3, 4), np.int16)[:, ::2], TypeError),  # not contiguous
    ],
)
def test_core_refuses_foreign_arrays(ids, error):
    with pytest.raises(error):
        _core.count_statistics(ids, 4, True, True)


def test_real_trace_counts_exactly(traces_dir):
    trace = read_trace(traces_dir / "deepseek-v2-lite-esft" / "intent.npz")
    expected = reference.count_statistics(trace)
    counted = RoutingStatistics.from_trace(trace)
    for name, table in expected.items():
        np.testing.assert_array_equal(getattr(counted, name), table)


def test_tables_that_would_fill_the_memory_are_refused():
    """One token is enough to name all the experts that ids can."""
    trace = make_trace(np.zeros((1, 2, 1), np.int16), 32767)
    with pytest.raises(InvalidTraceError, match=r"need tables of 32\.0 GiB, at most 4"):
        RoutingStatistics.from_trace(trace)
    alone = RoutingStatistics.from_trace(trace, coactivation=False, transitions=False)
    assert alone.load[:, 0].tolist() == [1, 1]


FEW_THREADS = """
import re, resource
import numpy as np
from moetuner import _core

ids = np.zeros((9, 64, 1), np.int16)
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), used + (30 << 20)))
counted = _core.count_statistics(ids, 2, False, False, 64)
assert counted["load"].tolist() == [[9, 0]] * 64
"""


def test_threads_that_the_system_refuses_are_done_without():
    result = subprocess.run(
        [sys.executable, "-c", FEW_THREADS], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
