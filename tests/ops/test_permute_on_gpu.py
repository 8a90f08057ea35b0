"""CUDA's permute against the CPU's: any size and address, streams, devices, graphs."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.ops import count_routing, permute, unpermute  # noqa: E402
from routing import IDS, distinct_ids, make_x, poisoned_memory, same_bits  # noqa: E402

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
