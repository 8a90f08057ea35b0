"""dispatch and combine in a group of one: registration, compilation, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from moetuner.ops import ExchangeHandle, buffer_nbytes, combine, dispatch

T, K, E, H = 9, 3, 6, 16


@pytest.fixture
def group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.fixture
def given(group):
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=generator).topk(K, dim=1).indices
    return {
        "x": torch.randn(T, H, generator=generator),
        "topk_ids": ids,
        "topk_weights": torch.rand(T, K, generator=generator),
        "candidates": torch.randperm(E, generator=generator).int()[:, None],
        "num_candidates": torch.ones(E, dtype=torch.int32),
        "slots_per_rank": E,
        "group_name": group,
    }


# Inductor scripts functions of its own, which torch itself warns of.
OLD_WORDS_OF_TORCH = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)
FORMS = [{}, {"capacity": T, "max_rows": T * K}]


@pytest.mark.parametrize("sizes", FORMS, ids=["exact", "fixed"])
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck_of_dispatch(given, sizes, counted):
    op = torch.ops.moetuner.dispatch
    given["x"].requires_grad_()
    *tensors, group = given.values()
    torch.library.opcheck(op.default, (*tensors, [group]), {**sizes, "counts": counted})


@pytest.mark.parametrize("sizes", FORMS, ids=["exact", "fixed"])
def test_opcheck_of_combine_and_what_its_gradients_call(given, sizes):
    sent = dispatch(**given, **sizes)
    handle, rows = sent.handle, sent.rows.requires_grad_()
    back = (handle.send_maps, handle.all_splits, handle.groups)
    received, weights = handle.recv_map, handle.recv_weights
    ops = torch.ops.moetuner
    torch.library.opcheck(ops.combine.default, (rows, received, weights, *back))
    wanted = (torch.ones(T, H), received, weights, *back, len(rows), rows.detach())
    torch.library.opcheck(ops.combine_backward.default, wanted)
    for grads in ((rows.detach(), weights.detach()), (None, weights.detach())):
        torch.library.opcheck(ops.dispatch_backward.default, (*grads, received, *back))


@OLD_WORDS_OF_TORCH
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sizes", FORMS, ids=["exact", "fixed"])
def test_compiles_whole_with_gradients(given, sizes, backend):
    counters = torch.zeros(1 + 1 + 1 + E, dtype=torch.int64)

    def layer(x, weights):
        own = given | {"x": x, "topk_weights": weights}
        sent = dispatch(**own, **sizes, counters=counters)
        return combine(2 * sent.rows, sent.handle)

    x, weights = given["x"].requires_grad_(), given["topk_weights"].requires_grad_()
    eager = layer(x, weights)
    counted = counters.clone()
    grads = torch.autograd.grad(eager.square().sum(), (x, weights))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)(x, weights)
    assert torch.equal(compiled, eager)
    assert torch.equal(counters, 2 * counted)
    for ours, other in zip(
        torch.autograd.grad(compiled.square().sum(), (x, weights)), grads, strict=True
    ):
        assert torch.equal(ours, other)


@OLD_WORDS_OF_TORCH
@pytest.mark.parametrize("sizes", FORMS, ids=["exact", "fixed"])
def test_fp8_rows_compile_whole(given, sizes):
    quantised = given | {"x": given["x"].to(torch.float8_e4m3fn)}
    scales = torch.rand(T, H // 8)

    def rows_of(scales):
        sent = dispatch(**quantised, **sizes, scales=scales)
        return sent.rows.float(), sent.row_scales, sent.end_offsets

    compiled = torch.compile(rows_of, fullgraph=True)(scales)
    eager = rows_of(scales)
    filled = int(eager[2][-1])
    for ours, other in zip(compiled[:2], eager[:2], strict=True):
        assert torch.equal(ours[:filled], other[:filled])


def test_long_fp8_rows_begin_at_whole_lines(given):
    hidden = 2048
    x = torch.randn(T, hidden).to(torch.float8_e4m3fn)
    scales = torch.rand(T, hidden // 128)
    sent = dispatch(**given | {"x": x}, scales=scales)
    assert sent.rows.stride(0) == hidden + 128
    plain = dispatch(**given | {"x": x.float()})
    assert torch.equal(sent.rows.float(), plain.rows)
    assert torch.equal(sent.row_scales, dispatch(**given | {"x": scales}).rows)


@pytest.mark.parametrize("first", [0, 1, 4, 16])
@pytest.mark.parametrize("step", [1, 2])
def test_fp8_rows_may_lie_anywhere(given, first, step):
    wide = torch.randn(T, 4 * H).to(torch.float8_e4m3fn)
    x = wide[:, first : first + step * H : step]
    scales = torch.rand(T, H // 8)
    sent = dispatch(**given | {"x": x}, scales=scales)
    apart = dispatch(**given | {"x": x.contiguous()}, scales=scales)
    assert torch.equal(sent.rows.float(), apart.rows.float())
    assert torch.equal(sent.row_scales, apart.row_scales)


@OLD_WORDS_OF_TORCH
def test_a_handle_leaves_compiled_code(given):
    compiled = torch.compile(lambda x: dispatch(**given | {"x": x}), fullgraph=True)
    sent = compiled(given["x"])
    eager = dispatch(**given)
    assert isinstance(sent.handle, ExchangeHandle)
    assert torch.equal(sent.handle.recv_map, eager.handle.recv_map)
    assert torch.equal(combine(sent.rows, sent.handle), combine(*eager[::2]))


FP8 = {"x": torch.ones(T, H).to(torch.float8_e4m3fn)}
WRONG = [
    ({"x": torch.ones(T)}, ValueError, "x must be"),
    ({"x": torch.ones(T, H, dtype=torch.int32)}, TypeError, "x must be float32"),
    ({"x": torch.ones(H, T).T}, ValueError, "x must be contiguous"),
    ({"topk_ids": torch.zeros(T, K)}, TypeError, "topk_ids must be int32"),
    ({"topk_ids": torch.zeros(T - 1, K).int()}, ValueError, "must have 9 tokens"),
    ({"topk_weights": torch.ones(T, K - 1)}, ValueError, "topk_weights must be"),
    ({"candidates": torch.zeros(E, 1)}, TypeError, "candidates must be int32"),
    ({"candidates": torch.zeros(E).int()}, ValueError, "candidates must be"),
    ({"num_candidates": torch.ones(E + 1).int()}, ValueError, "candidates must be"),
    ({"slots_per_rank": 0}, ValueError, "slots_per_rank must be positive"),
    ({"group_name": "nobody"}, ValueError, "no process group named 'nobody'"),
    ({"ranks_per_node": 2}, ValueError, "ranks_per_node must divide"),
    ({"counters": torch.zeros(3, dtype=torch.int64)}, ValueError, "counters must be"),
    ({"capacity": 4}, ValueError, "capacity and max_rows go together"),
    ({"capacity": 0, "max_rows": 4}, ValueError, "capacity must be positive"),
    ({"capacity": 4, "max_rows": 0}, ValueError, "max_rows must be positive"),
    ({"scales": torch.ones(T, 1)}, TypeError, "scales are for rows of FP8"),
    (FP8 | {"scales": torch.ones(T)}, ValueError, "scales must be .9, scales per"),
    (FP8 | {"scales": torch.ones(T - 1, 1)}, ValueError, "scales must be .9, scales"),
    (
        FP8 | {"scales": torch.ones(T, 1, device="meta")},
        ValueError,
        "scales is on meta",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_dispatch_refuses_by_name(given, change, error, message):
    with pytest.raises(error, match=message):
        dispatch(**given | change)


def test_more_choices_than_kernels_count_are_refused(given, tmp_path):
    """Their counts would wrap around. A file with a hole takes no memory."""
    most = 2**31 - 1
    with pytest.raises(ValueError, match=f"capacity {most // K + 1} of 1 ranks with 3"):
        dispatch(**given, capacity=most // K + 1, max_rows=1)
    with pytest.raises(ValueError, match="capacity 4611686018427387904 of 1 ranks"):
        dispatch(**given, capacity=2**62, max_rows=1)
    with pytest.raises(ValueError, match="2147483648 rows do not fit"):
        dispatch(**given, capacity=1, max_rows=2**31)
    size = {"size": 2**31, "dtype": torch.int32}
    ids = torch.from_file(str(tmp_path / "ids"), shared=True, **size).view(-1, 2**15)
    with pytest.raises(ValueError, match="2147483648 rows do not fit"):
        dispatch(
            **given
            | {
                "x": torch.ones(len(ids), 1),
                "topk_ids": ids,
                "topk_weights": ids.view(torch.float32),
            }
        )


def test_table_entries_out_of_range_are_padding(given):
    """They cannot be checked on the host without waiting, and must not be followed."""
    given["candidates"][2] = E + 5
    given["num_candidates"][3] = 7
    given["counters"] = torch.zeros(1 + 1 + 1 + E, dtype=torch.int64)
    sent = dispatch(**given)
    kept = int(((given["topk_ids"] != 2) & (given["topk_ids"] != 3)).sum())
    assert int(sent.end_offsets[-1]) == len(sent.rows) == kept
    assert int(given["counters"][3:].sum()) == kept


def test_combine_refuses_what_another_dispatch_made(given):
    sent = dispatch(**given)
    with pytest.raises(ValueError, match="splits say that 9 rows were received, got 8"):
        few = replace(sent.handle, recv_map=sent.handle.recv_map[:8])
        combine(sent.rows, few, weighted=False)
    with pytest.raises(ValueError, match=r"splits must be \[2, 1\]"):
        splits = torch.zeros(2, 3, dtype=torch.int64)
        combine(sent.rows, replace(sent.handle, splits=splits))


def test_expected_memory_is_what_the_fixed_form_allocates(given):
    """Counted by the profiler; small sizes are rounded up there."""
    sizes = {"capacity": 64, "max_rows": 512}
    given["x"] = torch.randn(T, 4096)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        dispatch(**given, **sizes)
    allocated = sum(e.self_device_memory_usage or 0 for e in profile.key_averages())
    allocated += sum(
        e.self_cpu_memory_usage
        for e in profile.key_averages()
        if e.self_cpu_memory_usage > 0
    )
    told = buffer_nbytes(T, K, 4096, 1, torch.float32, **sizes)
    assert told == pytest.approx(allocated, rel=0.01)
