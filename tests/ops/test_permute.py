"""permute against its readable twin, and what it refuses."""

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
    distinct_ids,
    expert_maps,
    make_x,
    poisoned_memory,
    routings,
    same_bits,
)

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


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
