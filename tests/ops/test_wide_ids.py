"""Ids beyond int32 are refused by name wherever ids are read; others are padding.

On a GPU a device assertion refuses them, which ends all CUDA work of a process: those
tests run this file as a program, one case a process.
"""

import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from moetuner.errors import InvalidTraceError  # noqa: E402
from moetuner.nn import Recorder, RoutingCounter  # noqa: E402
from moetuner.ops import (  # noqa: E402
    combine,
    count_routing,
    dispatch,
    permute,
    set_transport,
    unpermute,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXPERTS, HIDDEN = 4, 8
TURN = 2**32  # the narrow type is as it was after that many
WIDE = [TURN, TURN + 2, -TURN + 1, 2**31, -(2**31) - 1, 2**40 + 3, 2**63 - 1, -(2**63)]
OUTSIDE = torch.tensor(
    [
        [1, EXPERTS, 3],
        [2**31 - 1, -(2**31), -2],
        [-1, 0, 2**16],
        [2**16 + 1, -(2**16) + 2, 2],
    ]
)
PADDED = OUTSIDE.masked_fill((OUTSIDE < 0) | (OUTSIDE >= EXPERTS), -1)
WEIGHTS = torch.arange(1.0, 13).view(4, 3)
SLOTS = torch.tensor([[2], [0], [3], [1]], dtype=torch.int32)
ONE_EACH = torch.ones(EXPERTS, dtype=torch.int32)


@pytest.fixture(scope="module")
def group():
    _begin("gloo")
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def _begin(backend):
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _tokens(ids):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(len(ids), HIDDEN, generator=rng).to(ids.device)


def _weights(ids):
    return WEIGHTS.repeat(len(ids) // len(WEIGHTS), 1).to(ids.device)


def _zeros(ids, *shape):
    return torch.zeros(shape, dtype=torch.int64, device=ids.device)


def _permuted(ids):
    found = permute(_tokens(ids), ids, EXPERTS)
    return [*found[:3], unpermute(found.rows, found.row_map, _weights(ids))]


def _many_permuted(ids):
    """More choices than one kernel takes."""
    return _permuted(ids.repeat(4000, 1))


def _mapped(ids):
    here = torch.tensor([-1, 1, 0, -1], dtype=torch.int32, device=ids.device)
    return list(permute(_tokens(ids), ids, 2, expert_map=here)[:3])


def _counted_beside_rows(ids):
    load = _zeros(ids, EXPERTS)
    pairs, after = _zeros(ids, EXPERTS, EXPERTS), _zeros(ids, EXPERTS, EXPERTS)
    given = {
        "load": load,
        "coactivation": pairs,
        "previous_topk_ids": ids,
        "transitions": after,
    }
    inside = torch.zeros_like(ids)
    return [*permute(_tokens(ids), inside, EXPERTS, **given)[:3], load, pairs, after]


def _counted(ids):
    load = _zeros(ids, EXPERTS)
    count_routing(ids, load)
    return [load]


def _counted_after(ids):
    load, pairs = _zeros(ids, EXPERTS), _zeros(ids, EXPERTS, EXPERTS)
    after = _zeros(ids, EXPERTS, EXPERTS)
    count_routing(torch.zeros_like(ids), load, pairs, ids, after)
    return [load, pairs, after]


def _counter(ids):
    counter = RoutingCounter([3, 5], EXPERTS, max_tokens=9, device=ids.device)
    counter.add(3, ids)
    counter.add(5, ids.flip(1))
    found = counter.statistics()
    return [found.load, found.coactivation, found.transitions]


def _recorded(ids):
    recorder = Recorder(num_experts=EXPERTS)
    recorder.begin_step(
        sequence=np.zeros(len(ids), np.int32),
        position=np.arange(len(ids), dtype=np.int32),
        phase=np.zeros(len(ids), np.uint8),
        kept=np.ones(len(ids), bool),
    )
    recorder.add(3, torch.arange(3).expand_as(ids).to(ids.device), _weights(ids))
    recorder.add(5, ids, _weights(ids))
    return [recorder.trace().topk_ids]


def _noted(ids):
    keys = torch.arange(8).view(4, 2)
    given = (ids, *(t.to(ids.device) for t in (keys, SLOTS, ONE_EACH)))
    return [torch.ops.moetuner.follow_notes(*given, 2, 2, 0).view(torch.int32)]


def _exchanged(ids, **sizes):
    group = dist.group.WORLD.group_name
    counters = _zeros(ids, 1 + 1 + 1 + EXPERTS)
    tables = (t.to(ids.device) for t in (SLOTS, ONE_EACH))
    given = (_tokens(ids), ids, _weights(ids), *tables, EXPERTS, group)
    sent = dispatch(*given, counters=counters, **sizes)
    rows = sent.rows[: int(sent.end_offsets[-1])]
    filled = torch.zeros_like(sent.rows)
    filled[: len(rows)] = rows
    return [rows, sent.end_offsets, counters, combine(filled, sent.handle)]


def _exchanged_at_fixed_size(ids):
    return _exchanged(ids, capacity=len(ids), max_rows=ids.numel())


OPS = {
    _permuted: "permute: topk_ids",
    _many_permuted: "permute: topk_ids",
    _mapped: "permute: topk_ids",
    _counted_beside_rows: "permute: previous_topk_ids",
    _counted: "count_routing: topk_ids",
    _counted_after: "count_routing: previous_topk_ids",
    _counter: "count_routing: topk_ids",
    _noted: "follow_notes: topk_ids",
}
EXCHANGES = {
    _exchanged: "dispatch: topk_ids",
    _exchanged_at_fixed_size: "dispatch: topk_ids",
}


def _with(wide):
    ids = PADDED.clone()
    ids[2, 1] = wide
    return ids


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("run", [*OPS, *EXCHANGES])
def test_ids_beyond_int32_are_refused(run, wide, group):
    whose = (OPS | EXCHANGES)[run]
    said = f"{whose} must be within int32, got {wide} for token 2: -1 is padding"
    with pytest.raises(ValueError, match=f"^{said}$"):
        run(_with(wide))


def test_nothing_is_counted_of_ids_that_are_refused(group):
    for ids in (_with(TURN + 1), PADDED):
        load, counters = _zeros(ids, EXPERTS), _zeros(ids, 1 + 1 + 1 + EXPERTS)
        counter = RoutingCounter([0], EXPERTS, max_tokens=4)
        tables = (SLOTS, ONE_EACH, EXPERTS, dist.group.WORLD.group_name)
        for run in (
            lambda: count_routing(ids, load),  # noqa: B023
            lambda: permute(_tokens(ids), ids, EXPERTS, load=load),  # noqa: B023
            lambda: dispatch(_tokens(ids), ids, WEIGHTS, *tables, counters=counters),  # noqa: B023
            lambda: counter.add(0, ids),  # noqa: B023
        ):
            if ids is PADDED:
                run()
                continue
            with pytest.raises(ValueError, match="must be within int32"):
                run()
        counted = counter.statistics()
        every = (int(load.sum()), int(counters[0]), counted.num_tokens)
        assert every == ((2 * 4, 4, 4) if ids is PADDED else (0, 0, 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", WIDE)
def test_a_recording_refuses_them_where_they_come_to_the_host(wide, device):
    """Nobody waits for the device while a model runs."""
    said = r"^Recorder: layers \[5\] chose ids beyond int32: -1 is padding$"
    with pytest.raises(InvalidTraceError, match=said):
        _recorded(_with(wide).to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", [*OPS, _recorded])
def test_ids_within_int32_that_are_no_expert_are_padding(run, device):
    _same(run, device)


@pytest.mark.parametrize("run", EXCHANGES)
def test_ids_within_int32_that_are_no_expert_go_nowhere(run, group):
    _same(run, "cpu")


def _same(run, device):
    found, wanted = (run(ids.to(device)) for ids in (OUTSIDE, PADDED))
    for ours, padded in zip(found, wanted, strict=True):
        if isinstance(ours, torch.Tensor):
            ours, padded = ours.cpu().numpy(), padded.cpu().numpy()
        np.testing.assert_array_equal(ours, padded)


def _replayed(ids):
    """A CUDA graph that was captured with other ids."""
    x, kept = _tokens(ids), torch.zeros_like(ids)
    permute(x, kept, EXPERTS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = permute(x, kept, EXPERTS)
    kept.copy_(ids)
    graph.replay()
    return list(found[:3])


WAYS = ("peers", "collectives")
ON_GPU = [
    *((run.__name__, "", whose) for run, whose in OPS.items()),
    (_replayed.__name__, "", "permute: topk_ids"),
    *((run.__name__, way, whose) for run, whose in EXCHANGES.items() for way in WAYS),
]
MOST_SECONDS = 300  # a process that hangs is ended, and fails


@pytest.mark.gpu
@pytest.mark.parametrize(("run", "way", "whose"), ON_GPU)
def test_a_device_assertion_refuses_them(run, way, whose):
    done = subprocess.run(
        [sys.executable, __file__, run, way],
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    told = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 3, told
    assert f"{whose}: block:" in told, told
    assert "Assertion `ids are within int32, and -1 is padding` failed" in told, told
    assert "device-side assert triggered" in told, told


def _on_gpu(name, way):
    """Runs a case on ids that are right, then on a wide one; 3: that was refused."""
    run = globals()[name]
    if way:
        _begin("gloo" if way == "peers" else "nccl")
        set_transport(dist.group.WORLD.group_name, way)
    run(PADDED.cuda())
    torch.cuda.synchronize()
    wide = _with(TURN + 1).cuda()
    try:
        run(wide)
        torch.cuda.synchronize()
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    return 0


if __name__ == "__main__":
    code = _on_gpu(sys.argv[1], sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of CUDA can be given back
