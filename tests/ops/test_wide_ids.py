"""Ids beyond int32 are padding, as all outside the experts: none becomes another."""

import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from moetuner.nn import Recorder, RoutingCounter  # noqa: E402
from moetuner.ops import combine, count_routing, dispatch, permute, unpermute  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXPERTS, HIDDEN = 4, 8
TURN = 2**32  # the narrow type is as it was after that many
WIDE = torch.tensor(
    [
        [1, TURN + 2, 3],
        [TURN, -TURN + 1, 2**31],
        [2**63 - 1, 0, -(2**63)],
        [TURN // 2, 2**40 + 3, 1],
    ]
)
NARROW = WIDE.masked_fill((WIDE < 0) | (WIDE >= EXPERTS), -1)
WEIGHTS = torch.arange(1.0, 13).view(4, 3)
SLOTS = torch.tensor([[2], [0], [3], [1]], dtype=torch.int32)
ONE_EACH = torch.ones(EXPERTS, dtype=torch.int32)


@pytest.fixture(scope="module")
def group():
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def _tokens(device):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(len(WIDE), HIDDEN, generator=rng).to(device)


def _permuted(ids, group, **options):
    found = permute(_tokens(ids.device), ids, EXPERTS, **options)
    weights = WEIGHTS.to(ids.device)
    return [*found[:3], unpermute(found.rows, found.row_map, weights)]


def _mapped(ids, group):
    here = torch.tensor([-1, 1, 0, -1], dtype=torch.int32, device=ids.device)
    found = permute(_tokens(ids.device), ids, 2, expert_map=here)
    return list(found[:3])


def _counted(ids, group):
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.int64, device=ids.device)

    load = zeros(EXPERTS)
    pairs, after = zeros(EXPERTS, EXPERTS), zeros(EXPERTS, EXPERTS)
    count_routing(ids, load, pairs, ids.flip(0), after)
    return [load, pairs, after]


def _counter(ids, group):
    counter = RoutingCounter([3, 5], EXPERTS, max_tokens=9, device=ids.device)
    counter.add(3, ids)
    counter.add(5, ids.flip(1))
    found = counter.statistics()
    return [found.load, found.coactivation, found.transitions]


def _recorded(ids, group):
    recorder = Recorder(num_experts=EXPERTS)
    recorder.begin_step(
        sequence=np.zeros(len(ids), np.int32),
        position=np.arange(len(ids), dtype=np.int32),
        phase=np.zeros(len(ids), np.uint8),
        kept=np.ones(len(ids), bool),
    )
    recorder.add(0, ids, WEIGHTS.to(ids.device))
    return [recorder.trace().topk_ids]


def _noted(ids, group):
    keys = torch.arange(8).view(4, 2)
    given = (ids, *(t.to(ids.device) for t in (keys, SLOTS, ONE_EACH)))
    return [torch.ops.moetuner.follow_notes(*given, 2, 2, 0).view(torch.int32)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "run", [_permuted, _mapped, _counted, _counter, _recorded, _noted]
)
def test_ids_beyond_int32_are_padding(run, device):
    _same(run, device, None)


def _exchanged(ids, group, **sizes):
    counters = torch.zeros(1 + 1 + 1 + EXPERTS, dtype=torch.int64)
    given = (_tokens("cpu"), ids, WEIGHTS, SLOTS, ONE_EACH, EXPERTS, group)
    sent = dispatch(*given, counters=counters, **sizes)
    rows = sent.rows[: int(sent.end_offsets[-1])]
    filled = torch.zeros_like(sent.rows)
    filled[: len(rows)] = rows
    return [rows, sent.end_offsets, counters, combine(filled, sent.handle)]


def _exchanged_at_fixed_size(ids, group):
    return _exchanged(ids, group, capacity=len(ids), max_rows=ids.numel())


@pytest.mark.parametrize("run", [_exchanged, _exchanged_at_fixed_size])
def test_ids_beyond_int32_go_nowhere(run, group):
    _same(run, "cpu", group)


def _same(run, device, group):
    found, wanted = (run(ids.to(device), group) for ids in (WIDE, NARROW))
    for ours, padded in zip(found, wanted, strict=True):
        if isinstance(ours, torch.Tensor):
            ours, padded = ours.cpu().numpy(), padded.cpu().numpy()
        np.testing.assert_array_equal(ours, padded)
