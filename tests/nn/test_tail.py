"""Rows behind the last end offset: whatever they hold, nothing is made of them."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from moetuner.nn import (  # noqa: E402
    defined_rows,
    expert_of_rows,
    grouped_linear,
    per_expert,
)
from moetuner.ops import permute, unpermute  # noqa: E402
from poison import poisoned  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EXPERTS, HIDDEN = 4, 16
IDS = torch.tensor([[0, 1], [1, -1], [-1, -1], [3, 99], [2, 0], [3, 1]])


def leaves(dtype, device):
    made = torch.Generator().manual_seed(0)
    shapes = [
        *[(EXPERTS, HIDDEN, HIDDEN), (EXPERTS, HIDDEN)] * 2,
        (len(IDS), HIDDEN),
        tuple(IDS.shape),
    ]
    drawn = [torch.randn(shape, generator=made) / 2 for shape in shapes]
    return [value.to(device, dtype).requires_grad_() for value in drawn]


def grouped(up, up_bias, down, down_bias, x, weights):
    rows, row_map, ends, _ = permute(x, IDS.to(x.device), EXPERTS)
    inner = torch.nn.functional.silu(grouped_linear(rows, up, ends, up_bias))
    done = grouped_linear(inner, down, ends, down_bias)
    return unpermute(done.contiguous(), row_map, weights.float())


def by_hand(up, up_bias, down, down_bias, x, weights):
    sums = []
    for token, choices in enumerate(IDS.tolist()):
        total = x.new_zeros(HIDDEN)
        for k, expert in enumerate(choices):
            if 0 <= expert < EXPERTS:
                inner = torch.nn.functional.silu(
                    up[expert] @ x[token] + up_bias[expert]
                )
                done = down[expert] @ inner + down_bias[expert]
                total = total + weights[token, k] * done
        sums.append(total)
    return torch.stack(sums)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_made_of_defined_rows_alone(dtype, device):
    """Padding ids leave rows free, and what lies there is NaN."""
    given = leaves(dtype, device)
    with poisoned():
        out = grouped(*given)
        found = torch.autograd.grad(out.float().square().sum(), given)
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in given]
    wanted_out = by_hand(*exact)
    wanted = torch.autograd.grad(wanted_out.square().sum(), exact)
    close = (
        {"rtol": 1e-3, "atol": 1e-3}
        if dtype is torch.float32
        else {
            "rtol": 0.05,
            "atol": 0.1,
        }
    )
    torch.testing.assert_close(out.double().cpu(), wanted_out, **close)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, **close)


@pytest.mark.parametrize("device", DEVICES)
def test_an_undefined_row_has_no_expert(device):
    ends = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    assert expert_of_rows(5, ends).tolist() == [1, 1, 2, 3, 3]
    scale = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
    taken = per_expert(scale, 5, ends)
    assert taken.tolist() == [2.0, 2.0, 3.0, 0.0, 0.0]
    taken.backward(torch.tensor([1.0, 2, 4, torch.nan, torch.nan], device=device))
    assert scale.grad.tolist() == [0.0, 3.0, 4.0]


@pytest.mark.parametrize("device", DEVICES)
def test_defined_rows_cut_the_tail_off_both_ways(device):
    ends = torch.tensor([1, 2], dtype=torch.int32, device=device)
    rows = torch.tensor([[1.0], [2.0], [torch.nan]], device=device, requires_grad=True)
    kept = defined_rows(rows, ends)
    assert kept.tolist() == [[1.0], [2.0], [0.0]]
    kept.backward(torch.tensor([[3.0], [4.0], [torch.nan]], device=device))
    assert rows.grad.tolist() == [[3.0], [4.0], [0.0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiles_in_every_dtype(dtype, is_transposed, device):
    """PyTorch's own op traces in bfloat16 alone."""
    made = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(shape, generator=made).to(device, dtype).requires_grad_()
        for shape in ((9, HIDDEN), (EXPERTS, HIDDEN, HIDDEN), (EXPERTS, HIDDEN))
    )
    ends = torch.tensor([0, 4, 4, 7], dtype=torch.int32, device=device)

    def run(rows, weight, bias):
        out = grouped_linear(rows, weight, ends, bias, is_transposed=is_transposed)
        return out[:7]

    def gradients(function):
        out = function(rows, weight, bias)
        loss = out.float().square().sum()
        return out, torch.autograd.grad(loss, (rows, weight, bias))

    out, wanted = gradients(run)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled_out, found = gradients(compiled)
    torch.testing.assert_close(compiled_out, out)
    torch.testing.assert_close(found[0][:7], wanted[0][:7])
    torch.testing.assert_close(found[1:], wanted[1:])


def test_the_op_for_compilers_is_well_made():
    rows = torch.randn(6, HIDDEN, requires_grad=True)
    weight = torch.randn(EXPERTS, HIDDEN, HIDDEN, requires_grad=True)
    ends = torch.tensor([1, 1, 4, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.moetuner.grouped_mm.default, (rows, weight, ends))
