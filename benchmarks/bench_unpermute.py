"""Back to token order, weighted and summed: ours beside its peers, on every shape."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import peers  # noqa: E402
import shapes  # noqa: E402
from moetuner.ops import permute, unpermute  # noqa: E402


@pytest.mark.parametrize("peer", peers.ALL, ids=lambda peer: peer.name)
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def bench_unpermute(benchmark, shape, peer):
    peers.skip_unless_importable(peer)
    cases = []
    for x, ids in shapes.inputs(shape):
        weights = torch.rand(ids.shape, device=x.device)
        ready = peer.prepare_ids(ids, shape.num_experts)
        rows, back = peer.permute(x, ready, shape.num_experts)
        if not cases:
            mine = permute(x, ids, shape.num_experts)
            exact = unpermute(mine.rows.float(), mine.row_map, weights)
            del mine
        weights = peer.prepare_weights(weights, ids, shape.num_experts)
        cases.append((rows, back, weights))
    found = peer.unpermute(*cases[0]).float()
    assert float((found - exact).norm() / exact.norm()) < 1e-2
    del found, exact
    calls = [lambda case=case: peer.unpermute(*case) for case in cases]
    shapes.record(
        benchmark, shape, f"unpermute: {peer.name}", shape.permute_bytes, calls
    )


@pytest.mark.parametrize("of_weights", [False, True], ids=["rows", "rows and weights"])
@pytest.mark.parametrize("shape", shapes.SHAPES, ids=str)
def bench_unpermute_backward(benchmark, shape, of_weights):
    """What autograd calls; the gradient of the weights reads all rows once more."""
    backward = torch.ops.moetuner.unpermute_backward.default
    cases = []
    for x, ids in shapes.inputs(shape):
        rows, row_map, _, _ = permute(x, ids, shape.num_experts)
        weights = torch.rand(ids.shape, device=x.device)
        cases.append((x, row_map, len(rows), weights, rows if of_weights else None))
    calls = [lambda case=case: backward(*case) for case in cases]
    what = "rows and weights" if of_weights else "rows"
    bytes_moved = shape.permute_bytes
    if of_weights:
        bytes_moved += 2 * shape.hidden * shape.num_tokens * shape.top_k
    name = f"unpermute, backward of {what}: moetuner"
    shapes.record(benchmark, shape, name, bytes_moved, calls)
