import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner import demo_trace  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.nn import RoutingCounter  # noqa: E402
from moetuner.trace import select  # noqa: E402
from moetuner.trace.statistics import RoutingStatistics  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def trace():
    whole = demo_trace()
    return select(whole, np.arange(whole.num_tokens) < 3000)


def counter_of(trace, device, **options):
    return RoutingCounter(
        trace.layer_ids.tolist(),
        trace.num_experts,
        max_tokens=1024,
        top_k=trace.top_k,
        device=device,
        **options,
    )


def feed(counter, ids, begin, end):
    for layer in range(ids.shape[1]):
        counter.add(layer, ids[begin:end, layer])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_what_the_trace_counts(trace, device, dtype):
    """Steps of uneven length; equal to the statistics of the recorded trace."""
    counter = counter_of(trace, device)
    ids = torch.from_numpy(np.array(trace.topk_ids)).to(device, dtype)
    for begin, end in ((0, 1000), (1000, 1000), (1000, 1017), (1017, 2041)):
        feed(counter, ids, begin, end)
    told = counter.statistics()
    wanted = RoutingStatistics.from_trace(
        select(trace, np.arange(trace.num_tokens) < 2041)
    )
    assert told.num_tokens == wanted.num_tokens == 2041
    for name in ("layer_ids", "load", "coactivation", "transitions"):
        assert np.array_equal(getattr(told, name), getattr(wanted, name)), name
    counter.reset()
    assert counter.statistics().num_tokens == counter.statistics().load.sum() == 0


def test_loads_alone(trace):
    counter = counter_of(trace, "cpu", pairs=False)
    feed(counter, torch.from_numpy(np.array(trace.topk_ids)), 0, 500)
    told = counter.statistics()
    assert told.missing == ("coactivation", "transitions")
    assert told.load.sum() == 500 * trace.num_layers * trace.top_k


@pytest.mark.gpu
def test_a_captured_graph_counts_with_every_replay(trace):
    counter = counter_of(trace, "cuda")
    ids = torch.from_numpy(np.array(trace.topk_ids)).to("cuda", torch.int64)
    steps = ids[:512].clone()
    feed(counter, steps, 0, 512)
    counter.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        feed(counter, steps, 0, 512)
    for begin in (0, 512, 1024):
        steps.copy_(ids[begin : begin + 512])
        graph.replay()
    told = counter.statistics()
    wanted = RoutingStatistics.from_trace(
        select(trace, np.arange(trace.num_tokens) < 1536)
    )
    for name in ("num_tokens", "load", "coactivation", "transitions"):
        assert np.array_equal(getattr(told, name), getattr(wanted, name)), name


def test_what_does_not_fit_is_refused():
    counter = RoutingCounter([2, 5], 4, max_tokens=3, top_k=2)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for layer, wrong in ((3, ids), (2, ids[:, :1]), (2, torch.cat([ids, ids]))):
        with pytest.raises(InvalidTraceError, match=r"at most \[3, 2\] ids of layers"):
            counter.add(layer, wrong)
    counter.add(2, ids)
    with pytest.raises(InvalidTraceError, match=r"layers saw \[3, 0\] tokens"):
        counter.statistics()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pairs", [False, True])
def test_a_step_that_did_not_end_is_taken_back(trace, device, pairs):
    """Wherever it ended, as if it had never begun."""
    ids = torch.as_tensor(trace.topk_ids.astype(np.int64), device=device)
    layers = ids.shape[1]
    wanted = counter_of(trace, device, pairs=pairs)
    feed(wanted, ids, 0, 500)
    feed(wanted, ids, 500, 700)
    for ended in range(layers + 1):
        counter = counter_of(trace, device, pairs=pairs)
        counter.begin_step()
        feed(counter, ids, 0, 500)
        counter.end_step()
        counter.begin_step()
        for layer in range(ended):
            counter.add(layer, ids[700:1200, layer].int())
        counter.drop_step()
        counter.drop_step()  # none is open
        counter.begin_step()
        feed(counter, ids, 500, 700)
        counter.end_step()
        counter.drop_step()
        assert_same(counter.statistics(), wanted.statistics())


def assert_same(found, wanted):
    assert found.num_tokens == wanted.num_tokens
    for name in ("load", "coactivation", "transitions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
