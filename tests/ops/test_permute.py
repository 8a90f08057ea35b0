import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moetuner.ops import (  # noqa: E402
    choices_to_rows,
    count_routing,
    permute,
    reference,
    unpermute,
)
from routing import (  # noqa: E402
    DEVICES,
    IDS,
    distinct_ids,
    expert_maps,
    poisoned_memory,
    routings,
)

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
OPS = torch.ops.moetuner.permute


def same_bits(a, b):
    """Equal to the bit, whatever the type."""
    return torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def make_x(num_tokens, hidden, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, hidden, generator=generator)
    return values.to(dtype).to(device)


@given(
    routings(),
    st.data(),
    st.sampled_from([0, 1, 3, 16]),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_its_twin(routing, data, hidden, alignment, dtype):
    ids, num_ids = routing
    expert_map, num_experts = data.draw(expert_maps(num_ids))
    x = make_x(len(ids), hidden, dtype)
    with poisoned_memory():
        ours = permute(x, ids, num_experts, expert_map, alignment)
    twin = reference.permute(x, ids, num_experts, expert_map, alignment)
    for one, other in zip(ours, twin, strict=False):
        assert torch.equal(one, other)


@given(routings(), st.sampled_from([1, 8]))
def test_rows_of_an_expert_are_its_tokens_in_order(routing, alignment):
    """Said without the twin: counts, order, and zeroes everywhere else."""
    ids, num_experts = routing
    x = torch.arange(1.0, len(ids) + 1)[:, None]
    rows, row_map, end_offsets, _ = permute(x, ids, num_experts, alignment=alignment)
    start = 0
    for expert, end in enumerate(end_offsets.tolist()):
        tokens = (ids == expert).nonzero()[:, 0]
        found = rows[start:end, 0]
        assert found[: len(tokens)].tolist() == x[tokens, 0].tolist()
        assert not found[len(tokens) :].any()
        assert end % alignment == 0
        assert end - start - len(tokens) < alignment
        start = end
    assert not rows[start:].any()
    here = (ids >= 0) & (ids < num_experts)
    assert torch.equal(row_map >= 0, here)
    assert len(set(row_map[here].tolist())) == int(here.sum())


@given(routings(), st.sampled_from([1, 8]))
def test_there_and_back_gives_each_token_as_often_as_it_was_sent(routing, alignment):
    ids, num_experts = routing
    x = make_x(len(ids), 5).round()  # sums of small integers are exact
    rows, row_map, _, _ = permute(x, ids, num_experts, alignment=alignment)
    times = ((ids >= 0) & (ids < num_experts)).sum(dim=1, keepdim=True)
    assert torch.equal(unpermute(rows, row_map), x * times)


# Few and many choices, rows of all alignments, more experts than threads.
CASES = [  # tokens, top_k, experts, hidden, alignment
    (0, 2, 8, 64, 8),
    (1, 1, 1, 1, 1),
    (1, 8, 256, 7168, 128),
    (3, 2, 4, 7, 1),
    (32, 8, 256, 7168, 1),
    (20, 4, 4096, 7168, 8),
    (129, 6, 64, 2048, 16),
    (777, 4, 32, 2880, 8),
    (1024, 8, 64, 40, 1),
    (2500, 4, 1500, 24, 8),
    (4096, 8, 128, 512, 1),
    (5000, 2, 8, 4104, 128),
    (9000, 1, 3, 33, 1),
    (300, 100, 4000, 8, 1),
    (20_000, 8, 256, 136, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("id_type", IDS)
def test_cuda_equals_the_cpu(case, dtype, id_type):
    num_tokens, top_k, num_experts, hidden, alignment = case
    generator = torch.Generator().manual_seed(1)
    ids = distinct_ids(generator, num_tokens, top_k, num_experts, skew=1.0).to(id_type)
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = -1
    x = make_x(num_tokens, hidden, dtype)
    on_gpu = x.cuda(), ids.cuda()
    with poisoned_memory():
        ours = permute(*on_gpu, num_experts, alignment=alignment)
    twin = permute(x, ids, num_experts, alignment=alignment)
    for one, other in zip(ours[:3], twin[:3], strict=True):
        assert same_bits(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [64, 3000])
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_cuda_takes_rows_of_any_address(num_tokens, offset):
    """A view that starts in the middle of 16 bytes."""
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, 4, 16)
    memory = torch.randn(num_tokens * 64 + 8).bfloat16()
    x = memory[offset:][: num_tokens * 64].view(num_tokens, 64)
    on_gpu = memory.cuda()[offset:][: num_tokens * 64].view(num_tokens, 64)
    ours = permute(on_gpu, ids.cuda(), 16)
    for one, other in zip(ours[:3], permute(x, ids, 16)[:3], strict=True):
        assert same_bits(one.cpu(), other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [50, 3000])
def test_expert_map_takes_rows_of_this_rank_only(device, num_tokens):
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, 4, 16).to(device)
    x = make_x(num_tokens, 32, device=device)
    table = torch.full((16,), -1, dtype=torch.int32, device=device)
    table[torch.tensor([9, 2, 11])] = torch.arange(3, dtype=torch.int32, device=device)
    ours = permute(x, ids, 3, table, 8)
    twin = reference.permute(x, ids, 3, table, 8)
    for one, other in zip(ours, twin, strict=False):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_scales", [1, 3, 56])
@pytest.mark.parametrize("num_tokens", [20, 5000])
def test_scales_ride_along(device, dtype, num_scales, num_tokens):
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, 2, 8).to(device)
    x = make_x(num_tokens, 48, dtype, device=device)
    for scales in (
        torch.rand(num_tokens, num_scales, device=device),
        torch.randint(255, (num_tokens, num_scales), device=device).to(torch.uint8),
    ):
        with poisoned_memory():
            found = permute(x, ids, 8, alignment=16, scales=scales)
        plain = permute(x, ids, 8, alignment=16)
        as_rows = reference.permute(scales, ids, 8, alignment=16)[0]
        assert same_bits(found.rows, plain.rows)
        assert torch.equal(found.row_scales, as_rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [0, 30, 5000])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_counts_in_the_same_pass(device, num_tokens, scaled, mapped):
    generator = torch.Generator().manual_seed(0)
    here, before = (
        distinct_ids(generator, num_tokens, 4, 16, skew=1.0).to(device) for _ in "ab"
    )
    here[: num_tokens // 10] = -1
    x = make_x(num_tokens, 32, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device) // 2 if mapped else None

    def counters():
        return {
            "load": torch.ones(16, dtype=torch.int64, device=device),
            "coactivation": torch.ones(16, 16, dtype=torch.int64, device=device),
            "previous_topk_ids": before,
            "transitions": torch.ones(16, 16, dtype=torch.int64, device=device),
        }

    ours, alone = counters(), counters()
    scales = torch.rand(num_tokens, 3, device=device) if scaled else None
    permute(x, here, 16, table, scales=scales, **ours)
    count_routing(here, **alone)
    for name, table_counted in ours.items():
        assert torch.equal(table_counted, alone[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counted", [False, True])
def test_gradient_is_the_sum_over_a_tokens_rows(device, dtype, counted):
    ids = distinct_ids(torch.Generator().manual_seed(0), 30, 3, 8).to(device)
    ids[4] = -1
    x = make_x(30, 16, dtype, device=device).requires_grad_()
    load = torch.zeros(8, dtype=torch.int64, device=device) if counted else None
    rows, row_map, _, _ = permute(x, ids, 8, alignment=8, load=load)
    upstream = make_x(*rows.shape, dtype, seed=1, device=device)
    (gradient,) = torch.autograd.grad(rows, x, upstream)
    assert torch.equal(gradient, unpermute(upstream, row_map))
    assert not gradient[4].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("device", DEVICES)
def test_derivatives_that_there_are_not_are_refused(device):
    """Never taken for zero: of rows with scales, and forward-mode ones."""
    ids = torch.tensor([[0, 1], [1, 2]], device=device)
    x = make_x(2, 4, device=device).requires_grad_()
    rows = permute(x, ids, 3, scales=torch.ones(2, 1, device=device)).rows
    with pytest.raises(RuntimeError, match="moetuner::permute is not implemented"):
        rows.sum().backward()
    load = torch.zeros(3, dtype=torch.int64, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        for counter in (None, load):
            with pytest.raises(RuntimeError, match="jvp is not implemented"):
                permute(dual, ids, 3, load=counter)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(device, gradient):
    ids = distinct_ids(torch.Generator().manual_seed(0), 9, 3, 5).to(device)
    x = make_x(9, 4, device=device).requires_grad_(gradient)
    table = torch.tensor([1, -1, 0, 2, -1], dtype=torch.int32, device=device)
    load = torch.zeros(5, dtype=torch.int64, device=device)
    torch.library.opcheck(OPS.default, (x, ids, 5))
    torch.library.opcheck(OPS.default, (x, ids, 3, table, 8))
    torch.library.opcheck(OPS.counted, (x, ids, 5), {"load": load})
    scales = torch.rand(9, 2, device=device)
    torch.library.opcheck(OPS.scaled, (x.detach(), ids, 5, None, 8), {"scales": scales})


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(backend, dynamic):
    device = "cuda" if backend == "inductor" else "cpu"

    def layer(x, ids, weights, load):
        rows, row_map, _, _ = permute(x, ids, 5, alignment=8, load=load)
        return unpermute(rows * 2, row_map, weights)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for num_tokens in (9, 12):
        generator = torch.Generator().manual_seed(num_tokens)
        ids = distinct_ids(generator, num_tokens, 3, 5).to(device)
        results = []
        for function in (layer, compiled):
            x = make_x(num_tokens, 16, device=device).requires_grad_()
            weights = torch.rand(ids.shape, generator=generator).to(device) * 0 + 0.5
            weights.requires_grad_()
            load = torch.zeros(5, dtype=torch.int64, device=device)
            out = function(x, ids, weights, load)
            out.square().sum().backward()
            results.append((out, x.grad, weights.grad, load))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 4096])
def test_replays_from_a_cuda_graph(num_tokens):
    """New ids in the same memory: map, offsets, rows and counters follow."""
    static = distinct_ids(torch.Generator().manual_seed(0), num_tokens, 4, 16).cuda()
    x = make_x(num_tokens, 64, torch.bfloat16, device="cuda")
    load = torch.zeros(16, dtype=torch.int64, device="cuda")
    permute(x, static, 16, alignment=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = permute(x, static, 16, alignment=8, load=load)
    expected = torch.zeros(16, dtype=torch.int64)
    for seed in range(1, 4):
        generator = torch.Generator().manual_seed(seed)
        ids = distinct_ids(generator, num_tokens, 4, 16, skew=2.0)
        static.copy_(ids)
        graph.replay()
        twin = permute(x.cpu(), ids, 16, alignment=8, load=expected)
        for one, other in zip(found[:3], twin[:3], strict=True):
            assert torch.equal(one.cpu(), other)
    assert torch.equal(load.cpu(), expected)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    ids = distinct_ids(torch.Generator().manual_seed(0), 4096, 4, 16)
    x = make_x(4096, 1024)
    with torch.cuda.stream(stream):
        late = torch.zeros(4096, 1024, device="cuda")
        torch.cuda._sleep(50_000_000)
        late.copy_(x, non_blocking=True)
        rows = permute(late, ids.cuda(), 16).rows
    stream.synchronize()
    assert torch.equal(rows.cpu(), permute(x, ids, 16).rows)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_input():
    ids = distinct_ids(torch.Generator().manual_seed(0), 4096, 4, 16)
    x = make_x(4096, 64)
    found = permute(x.to("cuda:1"), ids.to("cuda:1"), 16)
    twin = permute(x, ids, 16)
    assert found.rows.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(found.rows.cpu(), twin.rows)
    back = unpermute(found.rows, found.row_map)
    assert torch.equal(back.cpu(), unpermute(twin.rows, twin.row_map))


@pytest.mark.gpu
def test_inputs_of_two_devices_are_named():
    ids = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
    on_cpu = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="permute: topk_ids is on cuda:0, x on cpu"):
        permute(on_cpu, ids, 4)
    with pytest.raises(ValueError, match="unpermute: row_map is on cuda:0, rows on"):
        unpermute(on_cpu, ids)
    with pytest.raises(ValueError, match="count_routing: topk_ids is on cuda:0, load"):
        count_routing(ids, torch.zeros(4, dtype=torch.int64))


@pytest.mark.gpu
def test_padding_up_to_the_last_rows_that_a_map_can_name():
    """Every expert but the last has one token; what it wastes ends near 2^31."""
    num_tokens, alignment = 4095, 524_416
    x = torch.full((num_tokens, 1), 3, dtype=torch.uint8).view(torch.float8_e5m2)
    ids = torch.arange(num_tokens, dtype=torch.int32)[:, None]
    found = permute(x.cuda(), ids.cuda(), num_tokens + 1, alignment=alignment)
    rows = found.rows.view(torch.uint8)[:, 0]
    assert 2**31 - alignment < len(rows) == int(found.end_offsets[-1]) < 2**31
    assert bool((rows[::alignment] == 3).all())
    assert int((rows != 0).sum()) == num_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [4096, 4097])
def test_more_than_two_to_the_31_elements(hidden):
    num_tokens, top_k = 70_000, 8
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, top_k, 16).cuda()
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    rows, row_map, _, _ = permute(x, ids, 16)
    assert rows.numel() > 2**31
    for k in range(top_k):
        for part in torch.arange(num_tokens, device="cuda").split(10_000):
            assert torch.equal(rows[row_map[part, k]], x[part])
    back = unpermute(rows, row_map, torch.full(ids.shape, 0.125, device="cuda"))
    assert torch.equal(back, x)
    (gradient,) = torch.autograd.grad(
        unpermute(rows.requires_grad_(), row_map), rows, back
    )
    assert torch.equal(gradient[row_map[:, 3]], x)


def valid():
    return {
        "x": torch.zeros(2, 6),
        "topk_ids": torch.zeros(2, 2, dtype=torch.int32),
        "num_experts": 4,
    }


INT64, INT32 = torch.int64, torch.int32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2)}, ValueError, "x must be [tokens, hidden], got [2]"),
        ({"x": torch.zeros(2, 6, dtype=INT32)}, TypeError, "x must be float32, bfloat"),
        ({"x": torch.zeros(6, 2).T}, ValueError, "x must be contiguous, got strides"),
        (
            {"topk_ids": torch.zeros(4, dtype=INT32)},
            ValueError,
            "topk_ids must be [tokens, top_k], got [4]",
        ),
        ({"topk_ids": torch.zeros(2, 2)}, TypeError, "topk_ids must be int32 or int64"),
        (
            {"topk_ids": torch.zeros(2, 4, dtype=INT32)[:, ::2]},
            ValueError,
            "topk_ids must be contiguous",
        ),
        (
            {"topk_ids": torch.zeros(2, 0, dtype=INT32)},
            ValueError,
            "topk_ids has no experts per token",
        ),
        (
            {"topk_ids": torch.zeros(3, 2, dtype=INT32)},
            ValueError,
            "topk_ids must have 2 tokens like x, got 3",
        ),
        ({"num_experts": 0}, ValueError, "num_experts must be positive, got 0"),
        ({"alignment": 0}, ValueError, "alignment must be positive, got 0"),
        ({"alignment": 2**30}, ValueError, "rows do not fit into the int32 row_map"),
        ({"alignment": 2**31}, ValueError, "alignment must be at most 2147483647"),
        ({"alignment": 2**62 + 1}, ValueError, "alignment must be at most 2147483647"),
        (
            {"expert_map": torch.zeros(4)},
            TypeError,
            "expert_map must be int32, got Float",
        ),
        (
            {"expert_map": torch.zeros(2, 2, dtype=INT32)},
            ValueError,
            "expert_map must be [experts], got [2, 2]",
        ),
        ({"scales": torch.zeros(3, 1)}, ValueError, "scales must be [2, scales per"),
        (
            {"coactivation": torch.zeros(4, 4, dtype=INT64)},
            ValueError,
            "coactivation and transitions are counted beside load, got no load",
        ),
        ({"load": torch.zeros(4)}, TypeError, "load must be int64"),
        (
            {"load": torch.zeros(3, dtype=INT64)},
            ValueError,
            "load must be [4], one for each id, got [3]",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"^permute: .*{re.escape(message)}"):
        permute(**(valid() | change))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [0, 3, 5, 99])
def test_no_more_rows_than_are_asked_for(limit, device):
    """Rows behind are dropped, told, left out of sums, and get no gradient."""
    x = torch.arange(1.0, 5.0, device=device)[:, None].requires_grad_()
    ids = torch.tensor([[0, 2], [2, 1], [2, -1], [1, 0]], device=device)
    whole = permute(x, ids, 3)
    found = permute(x, ids, 3, num_out_tokens=limit)
    kept = min(limit, len(whole.rows))
    assert torch.equal(found.rows, whole.rows[:kept])
    assert found.end_offsets.tolist() == whole.end_offsets.clamp(max=kept).tolist()
    assert int(found.num_dropped()) == max(7 - kept, 0)
    weights = torch.rand(4, 2, device=device)
    there = (whole.row_map >= 0) & (whole.row_map < kept)
    out = unpermute(found.rows, found.row_map, weights)
    torch.testing.assert_close(out, x * (weights * there).sum(dim=1, keepdim=True))
    out.sum().backward()
    wanted = (weights * there).sum(dim=1, keepdim=True)
    torch.testing.assert_close(x.grad, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_what_belongs_to_a_choice_stands_beside_its_row(device):
    ids = torch.tensor([[0, 2], [2, 1], [2, -1]], device=device)
    found = permute(
        torch.ones(3, 1, device=device), ids, 3, alignment=2, num_out_tokens=5
    )
    weights = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=device).requires_grad_()
    rows = choices_to_rows(weights, found.row_map, len(found.rows))
    assert rows.tolist() == [1.0, 0, 4, 0, 2]
    rows.backward(torch.arange(1.0, 6, device=device))
    assert weights.grad.tolist() == [[1.0, 5], [0, 3], [0, 0]]
    with pytest.raises(ValueError, match=r"values must be \[3, 2\] like row_map"):
        choices_to_rows(weights[:2], found.row_map, 5)
    with pytest.raises(ValueError, match="num_out_tokens must not be negative"):
        permute(torch.ones(3, 1, device=device), ids, 3, num_out_tokens=-1)
