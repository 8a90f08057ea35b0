import re

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moetuner.ops import permute, reference, unpermute  # noqa: E402
from routing import (  # noqa: E402
    DEVICES,
    assert_close,
    distinct_ids,
    poisoned_memory,
    routings,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INT32 = torch.int32


def make_case(ids, num_experts, hidden, dtype, weight_dtype, device="cpu", alignment=8):
    """rows [R, H], row_map and weights of a routing; rows of no token are NaN."""
    generator = torch.Generator().manual_seed(0)
    empty = torch.zeros(len(ids), 1, device=device)
    owned, row_map, _, _ = permute(
        empty + 1, ids.to(device), num_experts, None, alignment
    )
    rows = torch.randn(len(owned), hidden, generator=generator).to(dtype).to(device)
    rows[owned[:, 0] == 0] = float("nan")
    weights = None
    if weight_dtype is not None:
        weights = torch.rand(ids.shape, generator=generator).to(weight_dtype).to(device)
    return rows, row_map, weights


def exactly(rows, row_map, weights):
    """The twin in float64."""
    wide = None if weights is None else weights.double()
    return reference.unpermute(rows.double(), row_map, wide)


@given(
    routings(),
    st.sampled_from([0, 1, 5, 16]),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "float32", "rows"]),
)
def test_equals_float64_within_the_table(routing, hidden, dtype, weights):
    weight_dtype = {"none": None, "float32": torch.float32, "rows": dtype}[weights]
    case = make_case(*routing, hidden, dtype, weight_dtype)
    with poisoned_memory():
        ours = unpermute(*case)
    assert_close(ours, exactly(*case), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_is_rounded_once_as_torch_does(device, dtype):
    """All 65536 bit patterns; ties, subnormals, infinities."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    rows = patterns.view(dtype).view(256, 256).to(device)
    row_map = torch.arange(256, dtype=INT32, device=device)[:, None]
    for weight in (1.0, 1 / 3, 1 + 2**-8, 1 + 2**-11, 2**-9, 3 * 2**-10, 1000.0):
        weights = torch.full((256, 1), weight, device=device)
        torch.testing.assert_close(
            unpermute(rows, row_map, weights),
            (rows.float() * weights).to(dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )


# One stretch and several, of wide and of single columns; more experts than one batch.
CASES = [  # tokens, top_k, experts, hidden
    (0, 2, 8, 64),
    (1, 1, 1, 1),
    (1, 8, 64, 7168),
    (32, 8, 256, 7168),
    (129, 6, 64, 2047),
    (777, 4, 32, 2880),
    (1000, 20, 64, 40),
    (3000, 8, 128, 4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, "rows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda_equals_float64_and_itself(case, dtype, weight_dtype):
    num_tokens, top_k, num_experts, hidden = case
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, top_k, num_experts)
    ids[::7] = -1
    weight_dtype = dtype if weight_dtype == "rows" else weight_dtype
    case = make_case(ids, num_experts, hidden, dtype, weight_dtype, "cuda")
    with poisoned_memory():
        ours = unpermute(*case)
    assert_close(ours, exactly(*case), dtype)
    for _ in range(3):
        assert torch.equal(unpermute(*case), ours)


@pytest.mark.parametrize("device", DEVICES)
def test_entries_outside_the_rows_are_left_out(device):
    rows = torch.tensor([[1.0], [10.0]], device=device)
    row_map = torch.tensor([[0, 2], [-1, 1], [-5, 99]], dtype=INT32, device=device)
    assert unpermute(rows, row_map).tolist() == [[1.0], [10.0], [0.0]]
    none = rows[:0]
    assert unpermute(none, row_map).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, "rows"])
@pytest.mark.parametrize("shape", [(40, 3, 8, 16), (33, 10, 16, 7), (300, 8, 32, 1160)])
def test_gradients_equal_those_of_float64(device, dtype, weight_dtype, shape):
    num_tokens, top_k, num_experts, hidden = shape
    ids = distinct_ids(torch.Generator().manual_seed(0), num_tokens, top_k, num_experts)
    ids[3] = -1
    weight_dtype = dtype if weight_dtype == "rows" else weight_dtype
    rows, row_map, weights = make_case(
        ids, num_experts, hidden, dtype, weight_dtype, device
    )
    rows = rows.nan_to_num(0.0)  # the twin multiplies rows of no token by zero
    seed = torch.Generator().manual_seed(1)
    upstream = torch.randn(num_tokens, hidden, generator=seed).to(dtype).to(device)

    def gradients(function, wide):
        inputs = [
            tensor.to(torch.float64 if wide else tensor.dtype).detach().requires_grad_()
            for tensor in (rows, weights)
            if tensor is not None
        ]
        out = function(inputs[0], row_map, *inputs[1:])
        return torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    with poisoned_memory():
        ours = gradients(unpermute, wide=False)
    for found, exact in zip(
        ours, gradients(reference.unpermute, wide=True), strict=True
    ):
        # A weight's is a dot of up to 1160 products, one float32 rounding after another.
        assert_close(found, exact, found.dtype, slack=4.0)
    again = gradients(unpermute, wide=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_rows_of_no_token_is_zero(device):
    """Whatever stands in those rows, NaN too: a grouped GEMM sums over them."""
    ids = distinct_ids(torch.Generator().manual_seed(0), 20, 2, 4)
    rows, row_map, weights = make_case(ids, 4, 8, torch.float32, torch.float32, device)
    unowned = rows.isnan().all(dim=1)
    assert unowned.any()
    for inputs in ([rows], [rows, weights]):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = unpermute(leaves[0], row_map, *leaves[1:])
        upstream = torch.ones_like(out)
        with poisoned_memory():
            grads = torch.autograd.grad(out, leaves, upstream)
        assert not grads[0][unowned].any()
        assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_have_zero_gradients(device):
    rows = torch.ones(3, 4, device=device, requires_grad=True)
    row_map = torch.zeros(0, 2, dtype=INT32, device=device)
    weights = torch.zeros(0, 2, device=device, requires_grad=True)
    out = unpermute(rows, row_map, weights)
    assert out.shape == (0, 4)
    gradient, of_weights = torch.autograd.grad(out.sum(), [rows, weights])
    assert torch.equal(gradient, torch.zeros(3, 4, device=device))
    assert of_weights.shape == (0, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("top_k", "hidden"), [(0, 4), (2, 0)])
def test_nothing_to_sum_has_zero_gradients(device, top_k, hidden):
    rows = torch.ones(6, hidden, device=device, requires_grad=True)
    row_map = torch.arange(3 * top_k, dtype=INT32, device=device).view(3, top_k)
    weights = torch.ones(3, top_k, device=device, requires_grad=True)
    out = unpermute(rows, row_map, weights)
    assert torch.equal(out, torch.zeros(3, hidden, device=device))
    with poisoned_memory():
        of_rows, of_weights = torch.autograd.grad(out.sum(), [rows, weights])
    assert torch.equal(of_rows, torch.zeros_like(rows))
    assert torch.equal(of_weights, torch.zeros_like(weights))


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_refused(device):
    """Never taken for zero."""
    rows = torch.ones(2, 4, device=device, requires_grad=True)
    row_map = torch.tensor([[1, 0]], dtype=INT32, device=device)
    weights = torch.ones(1, 2, device=device, requires_grad=True)
    out = unpermute(rows, row_map, weights)
    (gradient,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="unpermute_backward is not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(device, gradient):
    ids = distinct_ids(torch.Generator().manual_seed(0), 9, 3, 5)
    rows, row_map, weights = make_case(
        ids, 5, 4, torch.float32, torch.float32, device, alignment=1
    )
    ops = torch.ops.moetuner
    rows.requires_grad_(gradient)
    weights.requires_grad_(gradient)
    torch.library.opcheck(ops.unpermute.default, (rows, row_map, weights))
    torch.library.opcheck(ops.unpermute.default, (rows, row_map, None, 9))
    grad = torch.randn(9, 4, device=device)
    rows, weights = rows.detach(), weights.detach()
    for optional in ((), (weights,), (weights, rows)):
        torch.library.opcheck(
            ops.unpermute_backward.default, (grad, row_map, len(rows), *optional)
        )


@pytest.mark.gpu
def test_replays_from_a_cuda_graph():
    ids = distinct_ids(torch.Generator().manual_seed(0), 64, 4, 16)
    rows, row_map, weights = make_case(
        ids, 16, 128, torch.bfloat16, torch.float32, "cuda"
    )
    unpermute(rows, row_map, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = unpermute(rows, row_map, weights)
    for factor in (2.0, 3.0):
        weights.mul_(factor)
        graph.replay()
        assert torch.equal(out, unpermute(rows, row_map, weights))


@pytest.mark.gpu
def test_gradients_replay_from_a_cuda_graph():
    ids = distinct_ids(torch.Generator().manual_seed(0), 64, 4, 16)
    rows, row_map, weights = make_case(
        ids, 16, 128, torch.bfloat16, torch.float32, "cuda"
    )
    grad = torch.ones(64, 128, dtype=torch.bfloat16, device="cuda")
    arguments = (grad, row_map, len(rows), weights, rows)
    backward = torch.ops.moetuner.unpermute_backward.default
    backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = backward(*arguments)
    for token in range(3):
        grad.normal_()
        row_map[token] = -1  # whose rows are zeroed from here on
        graph.replay()
        for replayed, eager in zip(found, backward(*arguments), strict=True):
            assert torch.equal(replayed, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 48, 1500, 6000])
def test_kernels_that_overlap_change_nothing(num_tokens):
    """Layer upon layer in reused memory, and again with each op waited for."""
    generator = torch.Generator().manual_seed(0)
    layers = [distinct_ids(generator, num_tokens, 4, 32).cuda() for _ in range(20)]
    start = torch.randn(num_tokens, 1024, generator=generator).bfloat16().cuda()
    weights = torch.rand(num_tokens, 4, generator=generator).cuda()

    def run(wait):
        x, found = start.clone().requires_grad_(), []
        y = x
        for ids in layers:
            rows, row_map, end_offsets, _ = permute(y, ids, 32, alignment=8)
            wait()
            y = unpermute(rows, row_map, weights)
            wait()
            found += [row_map, end_offsets, y]
        return [*found, *torch.autograd.grad(y, x, torch.ones_like(y))]

    expected = run(torch.cuda.synchronize)
    for _ in range(10):
        for ours, alone in zip(run(lambda: None), expected, strict=True):
            assert torch.equal(ours, alone)


def valid():
    return {"rows": torch.zeros(4, 6), "row_map": torch.zeros(2, 2, dtype=INT32)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.zeros(4)}, ValueError, "rows must be 2-D, got [4]"),
        (
            {"rows": torch.zeros(4, 6).to(torch.float8_e5m2)},
            TypeError,
            "rows must be float32, bfloat16 or float16, got Float8_e5m2",
        ),
        ({"rows": torch.zeros(6, 4).T}, ValueError, "rows must be contiguous"),
        (
            {"row_map": torch.zeros(4, dtype=INT32)},
            ValueError,
            "row_map must be [tokens, top_k], got [4]",
        ),
        (
            {"row_map": torch.zeros(2, 2, dtype=torch.int64)},
            TypeError,
            "row_map must be int32, got Long",
        ),
        (
            {"weights": torch.zeros(2, 3)},
            ValueError,
            "weights must be [2, 2] like row_map, got [2, 3]",
        ),
        (
            {"weights": torch.zeros(2, 2, dtype=torch.float16)},
            TypeError,
            "weights must be float32 or Float like rows, got Half",
        ),
        ({"num_tokens": 3}, ValueError, "num_tokens is 3, row_map has 2 tokens"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=re.escape(f"unpermute: {message}")):
        unpermute(**(valid() | change))
