import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moetuner.ops import count_routing, reference  # noqa: E402
from routing import DEVICES, IDS  # noqa: E402


def counters(num_experts, device="cpu"):
    """Zeroed load [E], coactivation and transitions [E, E]."""
    square = (num_experts, num_experts)
    return [
        torch.zeros(shape, dtype=torch.int64, device=device)
        for shape in ((num_experts,), square, square)
    ]


def count_both(topk_ids, previous, num_experts):
    """Counts of the op and of its readable twin."""
    counted = []
    for function in (count_routing, reference.count_routing):
        load, pairs, steps = counters(num_experts, topk_ids.device)
        function(topk_ids, load, pairs, previous, steps)
        counted.append((load, pairs, steps))
    return counted


def assert_same(counted):
    for ours, twin in zip(*counted, strict=True):
        assert torch.equal(ours, twin)


def random_case(seed, num_tokens, top_k, num_experts, padding, dtype):
    """Ids with repeats, padding (-1) and sentinels (>= E): all must count alike."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (2, num_tokens, top_k), generator=generator)
    hide = torch.rand(ids.shape, generator=generator)
    ids[hide < padding] = -1
    ids[hide > 1 - padding] = num_experts + 3
    here, before = ids.to(dtype)
    return here.contiguous(), before.contiguous()


@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(0, 40),
    top_k=st.integers(1, 8),
    num_experts=st.integers(1, 12),
    padding=st.sampled_from([0.0, 0.2, 0.5]),
    dtype=st.sampled_from(IDS),
)
def test_equals_its_twin(seed, num_tokens, top_k, num_experts, padding, dtype):
    here, before = random_case(seed, num_tokens, top_k, num_experts, padding, dtype)
    assert_same(count_both(here, before, num_experts))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", IDS)
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"),
    [
        (0, 2, 8),
        (1, 1, 1),
        (7, 8, 9),
        (4097, 6, 64),
        (50_000, 8, 256),
        (300, 4, 10_000),
    ],
)
def test_cuda_equals_its_twin(num_tokens, top_k, num_experts, dtype):
    here, before = random_case(1, num_tokens, top_k, num_experts, 0.1, dtype)
    load, pairs, steps = counters(num_experts, "cuda")
    count_routing(here.cuda(), load, pairs, before.cuda(), steps)
    expected = counters(num_experts)
    count_routing(here, expected[0], expected[1], before, expected[2])
    assert_same(((load.cpu(), pairs.cpu(), steps.cpu()), expected))


@pytest.mark.parametrize("device", DEVICES)
def test_everything_on_one_expert(device):
    ids = torch.full((1000, 1), 2, dtype=torch.int32, device=device)
    load, pairs, _ = counters(4, device)
    count_routing(ids, load, pairs)
    assert load.tolist() == [0, 0, 1000, 0]
    assert int(pairs.sum()) == int(pairs[2, 2]) == 1000


@pytest.mark.parametrize("device", DEVICES)
def test_counts_are_added_to_a_layer_of_a_larger_table(device):
    """`load[layer]` is a view; other layers stay as they were."""
    load = torch.zeros(3, 4, dtype=torch.int64, device=device)
    ids = torch.tensor([[0, 1]], device=device)
    for _ in range(2):
        count_routing(ids, load[1])
    assert load.tolist() == [[0] * 4, [2, 2, 0, 0], [0] * 4]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    here, before = random_case(0, 9, 3, 5, 0.1, torch.int64)
    load, pairs, steps = counters(5, device)
    arguments = (here.to(device), load, pairs, before.to(device), steps)
    torch.library.opcheck(torch.ops.moetuner.count_routing.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph(device):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(ids, load):
        count_routing(ids, load)
        return load * 2

    load = torch.zeros(4, dtype=torch.int64, device=device)
    doubled = step(torch.tensor([[0, 3]], device=device), load)
    assert load.tolist() == [1, 0, 0, 1]
    assert doubled.tolist() == [2, 0, 0, 2]


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    ids = torch.tensor([[0, 1], [1, 2]], device="cuda")
    load, pairs, steps = counters(4, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count_routing(ids, load, pairs, ids, steps)
    for _ in range(5):
        graph.replay()
    assert load.tolist() == [5, 10, 5, 0]
    assert int(steps.sum()) == 5 * 8


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    load = torch.zeros(4, dtype=torch.int64, device="cuda")
    ids = torch.zeros(1 << 20, 1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ids += 3
        count_routing(ids, load)
    stream.synchronize()
    assert load.tolist() == [0, 0, 0, 1 << 20]


@pytest.mark.gpu
def test_more_than_two_billion_ids():
    """Index arithmetic is 64-bit: the last token lies beyond 2^31 elements."""
    num_tokens = (1 << 31) // 8 + 5
    if torch.cuda.mem_get_info()[0] < 10 * num_tokens * 4:
        pytest.fail("needs 11 GB of free GPU memory")
    ids = torch.full((num_tokens, 8), -1, dtype=torch.int32, device="cuda")
    ids[-1] = torch.arange(8, device="cuda")
    load = torch.zeros(8, dtype=torch.int64, device="cuda")
    count_routing(ids, load)
    assert load.tolist() == [1] * 8


def valid():
    load, pairs, steps = counters(4)
    ids = torch.tensor([[0, 1], [2, 3]])
    return {
        "topk_ids": ids,
        "load": load,
        "coactivation": pairs,
        "previous_topk_ids": ids,
        "transitions": steps,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": torch.zeros(3)}, ValueError, "topk_ids must be [tokens, top_k]"),
        ({"topk_ids": torch.zeros(2, 2)}, TypeError, "topk_ids must be int32 or int64"),
        (
            {"topk_ids": torch.zeros(2, 4, dtype=torch.int64)[:, ::2]},
            ValueError,
            "topk_ids must be contiguous",
        ),
        (
            {"topk_ids": torch.zeros(2, 32769, dtype=torch.int64)},
            ValueError,
            "topk_ids may have at most 32768 experts per token, got 32769",
        ),
        ({"load": torch.zeros(4)}, TypeError, "load must be int64"),
        (
            {"load": torch.zeros(2, 2, dtype=torch.int64)},
            ValueError,
            "load must be [experts]",
        ),
        (
            {"coactivation": torch.zeros(4, 5, dtype=torch.int64)},
            ValueError,
            "coactivation must be [4, 4], got [4, 5]",
        ),
        ({"transitions": None}, ValueError, "go together, got only previous_topk_ids"),
        (
            {"previous_topk_ids": torch.zeros(3, 2, dtype=torch.int64)},
            ValueError,
            "must have 2 tokens like topk_ids, got 3",
        ),
        (
            {"previous_topk_ids": torch.zeros(2, 2, dtype=torch.int32)},
            TypeError,
            "previous_topk_ids must be Long like topk_ids",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        count_routing(**(valid() | change))
