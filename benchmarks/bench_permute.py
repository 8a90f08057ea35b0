"""From the router's ids to rows in expert order: ours beside its peers, on every shape.

The floor is the time a device copy needs for the bytes that must move: each row read
once, and written K times.
"""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import peers  # noqa: E402
import shapes  # noqa: E402
from moetuner.ops import permute, unpermute  # noqa: E402


@pytest.mark.parametrize("peer", peers.PERMUTING, ids=lambda peer: peer.name)
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def bench_permute(benchmark, shape, peer):
    peers.skip_unless_importable(peer)
    size = shape.num_experts
    pairs = shapes.inputs(shape)
    ours = permute(*pairs[0], size).rows
    pairs = [(x, peer.prepare_ids(ids, size)) for x, ids in pairs]
    assert torch.equal(peer.permute(*pairs[0], size)[0], ours)
    del ours
    calls = [lambda x=x, ids=ids: peer.permute(x, ids, size) for x, ids in pairs]
    shapes.record(benchmark, shape, f"permute: {peer.name}", shape.permute_bytes, calls)


COUNTED = [shape for shape in shapes.SHAPES if shape.num_experts == 256]


@pytest.mark.parametrize("pairs_too", [False, True], ids=["loads", "all"])
@pytest.mark.parametrize("shape", COUNTED, ids=str)
def bench_permute_counted(benchmark, shape, pairs_too):
    """The same with the routing counted on the way: loads, or pairs of experts too."""
    size = shape.num_experts
    load, coactivation, transitions = (
        torch.zeros(sizes, dtype=torch.int64, device=shapes.DEVICE)
        for sizes in ((size,), (size, size), (size, size))
    )
    pairs = shapes.inputs(shape)

    def call(x, ids, previous):
        if not pairs_too:
            return permute(x, ids, size, load=load)
        return permute(
            x,
            ids,
            size,
            load=load,
            coactivation=coactivation,
            previous_topk_ids=previous,
            transitions=transitions,
        )

    calls = [
        lambda x=x, ids=ids, previous=previous: call(x, ids, previous)
        for (x, ids), (_, previous) in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]
    name = f"permute, counting {'all' if pairs_too else 'loads'}: moetuner"
    shapes.record(benchmark, shape, name, shape.permute_bytes, calls)


@pytest.mark.parametrize("alignment", [16, 128])
@pytest.mark.parametrize("shape", COUNTED, ids=str)
def bench_permute_aligned(benchmark, shape, alignment):
    """Rows of padding are written too; the floor counts those of the first input."""
    pairs = shapes.inputs(shape)
    ends = permute(*pairs[0], shape.num_experts, alignment=alignment).end_offsets
    padding = int(ends[-1]) - shape.num_tokens * shape.top_k
    calls = [
        lambda x=x, ids=ids: permute(x, ids, shape.num_experts, alignment=alignment)
        for x, ids in pairs
    ]
    bytes_moved = shape.permute_bytes + 2 * shape.hidden * padding
    shapes.record(
        benchmark,
        shape,
        f"permute, aligned to {alignment}: moetuner",
        bytes_moved,
        calls,
    )


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def bench_permute_backward(benchmark, shape):
    """What autograd calls for the gradient of x: as many bytes as forward."""
    cases = []
    for x, ids in shapes.inputs(shape):
        rows, row_map, _, _ = permute(x, ids, shape.num_experts)
        cases.append((rows, row_map))
    calls = [lambda case=case: unpermute(*case) for case in cases]
    shapes.record(
        benchmark, shape, "permute, backward: moetuner", shape.permute_bytes, calls
    )
