import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.nn import grouped_linear  # noqa: E402
from moetuner.ops import permute  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_a_loop_over_experts(device, dtype, is_transposed, with_bias):
    """With an expert without rows, and rows behind the last expert's."""
    torch.manual_seed(0)
    ids = torch.tensor([[0, 3], [3, 2], [0, -1]], device=device)
    rows, _, ends, _ = permute(
        torch.randn(3, 16, device=device).to(dtype), ids, 4, alignment=8
    )
    size = (4, 16, 8) if is_transposed else (4, 8, 16)
    weight = torch.randn(size, device=device).to(dtype).requires_grad_()
    bias = torch.randn(4, 8, device=device).to(dtype) if with_bias else None
    out = grouped_linear(rows, weight, ends, bias, is_transposed=is_transposed)
    loop = []
    starts = [0, *ends.tolist()]
    for e, (begin, end) in enumerate(itertools.pairwise(starts)):
        matrix = weight[e] if is_transposed else weight[e].T
        loop.append(rows[begin:end] @ matrix + (bias[e] if with_bias else 0))
    wanted = torch.cat(loop)
    torch.testing.assert_close(out[: len(wanted)], wanted)
    ours, twin = (
        torch.autograd.grad(y[: len(wanted)].float().square().sum(), weight)[0]
        for y in (out, wanted)
    )
    torch.testing.assert_close(ours, twin, rtol=2e-2, atol=2e-2)
