"""A rank is killed or stopped at eight points of a layer: no other one hangs.

A process for each rank trains a layer. One of them strikes itself at the point, in its
second step. All others must end in an error by name within the timeout of the group.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from layers import HIDDEN, make_placement  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    GivenRouting,
    MoELayer,
    TopKRouter,
)
from moetuner.ops import set_transport  # noqa: E402
from ranks import TIMEOUT, start_method  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

RANKS, VICTIM, STEPS = 3, 1, 3
WAIT = timedelta(seconds=5)  # for another rank, on the device or in Gloo
MOST_WAITS = 6  # of steps, on a machine that has other work; ranks would wait TIMEOUT
POINTS = (
    "before the counts",
    "after the counts",
    "during dispatch",
    "before the experts",
    "during the experts",
    "before combine",
    "during combine",
    "in backward",
)
REFUSED = "its ids are beyond int32"
OPS = ("dispatch", "combine", "combine_backward", "dispatch_backward")
# What a rank has just come to, op by op: calls of the communicator are numbered. Over
# mapped memory sizes are read before the map of them is made, and kernels may still be
# at work when an op ends.
COLLECTIVES = {
    ("dispatch", "begin"): "before the counts",
    ("dispatch", "c10d 2"): "after the counts",
    ("dispatch", "c10d 3"): "during dispatch",
    ("dispatch", "end"): "before the experts",
    ("combine", "begin"): "before combine",
    ("combine", "c10d 1"): "during combine",
    ("dispatch_backward", "begin"): "in backward",
}
PEERS = {
    ("dispatch", "begin"): "before the counts",
    ("dispatch", "sizes"): "after the counts",
    ("dispatch", "end"): "during dispatch",
    ("dispatch", "complete"): "before the experts",
    ("combine", "begin"): "before combine",
    ("combine", "end"): "during combine",
    ("dispatch_backward", "begin"): "in backward",
}


class Watch(TorchDispatchMode):
    """Sees what our ops call, and strikes at the point."""

    def __init__(self, point, strike, device):
        super().__init__()
        self.point, self.strike, self.device = point, strike, device
        self.named = COLLECTIVES if device == "cpu" else PEERS
        self.op, self.calls = "", 0

    def reach(self, event):
        if self.named.get((self.op, event)) == self.point:
            self.strike()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        space, name = func.namespace, func._opname
        if space == "moetuner" and name in OPS and not self.op:
            return self._inside(func, name, args, kwargs)
        if space == "c10d" and self.op:
            self.calls += 1
            self.reach(f"c10d {self.calls}")
        out = func(*args, **kwargs)
        if name == "empty" and out.dtype == torch.int64 and not out.is_cuda:
            self.reach("sizes" if out.numel() else "no sizes yet")
        return out

    def _inside(self, func, name, args, kwargs):
        key = getattr(torch._C.DispatchKey, self.device.upper())
        self.op, self.calls = name, 0
        if name == "combine" and self.device == "cuda":
            torch.cuda.synchronize()
        self.reach("begin")
        with self:
            out = func._op_dk(key, *args, **kwargs)
        self.reach("end")
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.reach("complete")
        self.op = ""
        return out


class TwoMaps(torch.nn.Module):
    """Experts that are come to between their two maps."""

    def __init__(self, num_slots):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(num_slots, HIDDEN))
        self.between = lambda: None

    def forward(self, rows, _end_offsets):
        inner = rows * self.scale.mean()
        self.between()
        return inner.square()


def _step(layer, rank, device):
    x = torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(rank))
    layer(x.to(device).requires_grad_()).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _give_wide_ids(layer, device):
    ids = torch.tensor([[0, 1, 2**32 + 2]], device=device).expand(24, -1).contiguous()
    weights = torch.ones(24, 3, device=device)
    layer.given = GivenRouting(topk_ids=ids, topk_weights=weights)


def _rank(rank, device, folder, point, signal_number, overlap):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    options = {"store": store, "rank": rank, "world_size": RANKS, "timeout": TIMEOUT}
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", **options)
    group = dist.new_group(timeout=WAIT)
    if device == "cuda":
        set_transport(group.group_name, "peers", timeout=WAIT)
    placement = make_placement("contiguous", RANKS, num_layers=1, num_experts=6)
    layer = MoELayer(
        TopKRouter(HIDDEN, 6, 3),
        TwoMaps(placement.slots_per_rank),
        placement,
        group,
        options=ExchangeOptions(levels="one", overlap=overlap),
    ).to(device)
    _step(layer, rank, device)
    dist.barrier()
    if rank == VICTIM:
        watch = Watch(point, lambda: os.kill(os.getpid(), signal_number), device)
        if point == "during the experts":
            layer.experts.between = watch.strike
        if point == REFUSED:
            _give_wide_ids(layer, device)
            try:
                _step(layer, rank, device)
            except (ValueError, RuntimeError):
                watch.strike()
        with watch:
            _step(layer, rank, device)
        os._exit(1)  # it was not struck
    told, begin = Path(f"{folder}/{rank}"), time.monotonic()
    try:
        for _ in range(STEPS):
            _step(layer, rank, device)
        told.write_text("no error came")
    except dist.DistBackendError as error:
        waited = time.monotonic() - begin
        assert waited < MOST_WAITS * WAIT.total_seconds(), waited
        told.write_text(f"named: {error}")
    except BaseException:
        told.write_text(traceback.format_exc())
    os._exit(0)


def _end_of_ranks(device, point, signal_number, overlap=False):
    """What each rank that was not struck has to say; None: it hung."""
    context = multiprocessing.get_context(start_method(device))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank,
                args=(rank, device, folder, point, signal_number, overlap),
                daemon=True,
            )
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        said = {}
        for rank, process in enumerate(ranks):
            if rank != VICTIM:
                process.join(TIMEOUT.total_seconds())
                told = Path(f"{folder}/{rank}")
                said[rank] = told.read_text() if told.exists() else None
        victim = ranks[VICTIM]
        assert victim.exitcode in (None, -signal_number), "it was not struck"
        for process in ranks:
            process.kill()
            process.join()
    return said


def _assert_named(said, device):
    """By the op; over mapped memory also who waited for whom, unless it was Gloo."""
    for told in said.values():
        assert told is not None, said
        assert told.startswith("named: "), said
        assert told.split()[1].rstrip(":") in OPS, said
        assert "ended, stands still or calls other operations" in told, said
        if device == "cuda":
            assert f"of rank {VICTIM}," in told, said


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_rank_ends_all_others_by_name(point):
    _assert_named(_end_of_ranks("cpu", point, signal.SIGKILL), "cpu")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rank_whose_ids_are_refused_ends_all_others_by_name(device):
    _assert_named(_end_of_ranks(device, REFUSED, signal.SIGKILL), device)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_rank_ends_all_others_by_name(point):
    _assert_named(_end_of_ranks("cpu", point, signal.SIGSTOP), "cpu")


def test_ranks_that_stop_end_all_others_by_name():
    """At two points side by side: what takes long is to wait for them."""
    some = ("during dispatch", "in backward")
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(_end_of_ranks, "cpu", p, signal.SIGSTOP) for p in some]
        for end in ends:
            _assert_named(end.result(), "cpu")


def test_halves_of_a_layer_end_by_name_too():
    said = _end_of_ranks("cpu", "during combine", signal.SIGKILL, overlap=True)
    _assert_named(said, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("struck", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("point", POINTS)
def test_over_mapped_memory_the_rank_is_named(point, struck):
    _assert_named(_end_of_ranks("cuda", point, struck), "cuda")


@pytest.mark.gpu
def test_halves_over_mapped_memory_end_by_name_too():
    said = _end_of_ranks("cuda", "during dispatch", signal.SIGKILL, overlap=True)
    _assert_named(said, "cuda")
