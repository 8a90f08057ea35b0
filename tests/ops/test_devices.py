"""Tensors on several devices are refused, by fakes too: meta would send calls there."""

import tempfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from moetuner.ops import count_routing, dispatch, permute, unpermute  # noqa: E402

IDS = torch.tensor([[0, 1], [1, 0]])
X, WEIGHTS = torch.ones(2, 4), torch.ones(2, 2)
MAP = torch.zeros(2, dtype=torch.int32)
LOAD = torch.zeros(2, dtype=torch.int64)


def meta(tensor):
    return tensor.to("meta")


@pytest.fixture
def group():
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: permute(X, meta(IDS), 2), "permute: topk_ids is on meta"),
        (lambda: permute(meta(X), IDS, 2), "permute: topk_ids is on cpu"),
        (lambda: permute(X, IDS, 2, meta(MAP)), "permute: expert_map is on meta"),
        (lambda: permute(X, IDS, 2, load=meta(LOAD)), "permute: load is on meta"),
        (
            lambda: permute(X, IDS, 2, scales=meta(WEIGHTS)),
            "permute: scales is on meta",
        ),
        (
            lambda: unpermute(X, meta(IDS.int()), WEIGHTS),
            "unpermute: row_map is on meta",
        ),
        (
            lambda: unpermute(X, IDS.int(), meta(WEIGHTS)),
            "unpermute: weights is on meta",
        ),
        (lambda: count_routing(IDS, meta(LOAD)), "count_routing: load is on meta"),
    ],
)
def test_two_devices_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("sizes", [{}, {"capacity": 2, "max_rows": 4}])
def test_tables_without_memory_are_refused(group, sizes):
    """In the fixed form this returned memory that nobody wrote."""
    slots, one = torch.tensor([[0], [1]], dtype=torch.int32), torch.ones_like(MAP)
    for tables, name in (
        ((meta(slots), one), "candidates"),
        ((slots, meta(one)), "num_candidates"),
    ):
        with pytest.raises(ValueError, match=f"dispatch: {name} is on meta, other"):
            dispatch(X, IDS, WEIGHTS, *tables, 2, group, **sizes)
