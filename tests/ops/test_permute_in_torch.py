"""permute as torch sees it: gradients, its schema, graphs of the compiler."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.ops import permute, unpermute  # noqa: E402
from routing import DEVICES, distinct_ids, make_x  # noqa: E402

OPS = torch.ops.moetuner.permute


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
