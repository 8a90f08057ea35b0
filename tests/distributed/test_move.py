"""Expert weights between ranks: moved, undone, saved in logical order, at what peak."""

import io
import itertools
import os
import signal
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from layers import EXPERTS, KINDS, make_placement, tokens_of, whole_layers  # noqa: E402
from layers import placed_layers as spread  # noqa: E402
from moetuner.errors import InvalidPlacementError  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExpertOptions,
    Experts,
    MoELayer,
    TopKRouter,
    apply_placement,
    contiguous_placement,
    logical_order,
)
from moetuner.nn.move import placed_layers  # noqa: E402
from moetuner.placement.model import Placement  # noqa: E402
from moetuner.placement.tables import fingerprint  # noqa: E402
from moetuner.placement.topology import Topology  # noqa: E402
from ranks import TIMEOUT, one_rank, run_on_ranks, start_method  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


def _run(layers, rank):
    x = tokens_of(rank, dtype=next(layers.parameters()).dtype)
    with torch.no_grad():
        for layer in layers:
            x = x + layer(x)
    return x


def _as_placed(layers, whole, placement, rank):
    """Whether each slot holds exactly the weights of its expert."""
    width = placement.slots_per_rank
    for row, layer in enumerate(layers):
        mine = placement.slot_experts[row, rank * width :][:width]
        wanted = whole[row][1].take(mine)
        for own, other in zip(
            layer.experts.parameters(), wanted.parameters(), strict=True
        ):
            assert torch.equal(own, other)


def _moves(rank, num_ranks):
    for dtype in (torch.float32, torch.bfloat16):
        whole = whole_layers(ExpertOptions(bias=True), dtype=dtype)
        placements = [make_placement(kind, num_ranks) for kind in KINDS]
        for before, after in itertools.permutations(placements, 2):
            layers = spread(whole, before, rank)
            told = _run(layers, rank)
            memory = {n: p.data_ptr() for n, p in layers.named_parameters()}
            former = apply_placement(layers, after)
            assert fingerprint(former) == fingerprint(before)
            _as_placed(layers, whole, after, rank)
            tolerance = {"rtol": 1e-5, "atol": 1e-5}
            if dtype is torch.bfloat16:  # sums are rounded at other ranks
                tolerance = {"rtol": 3 * 2**-8, "atol": 3 * 2**-8}
            torch.testing.assert_close(_run(layers, rank), told, **tolerance)
            if before.num_slots == after.num_slots:
                for name, parameter in layers.named_parameters():
                    assert parameter.data_ptr() == memory[name]
            apply_placement(layers, former)
            _as_placed(layers, whole, before, rank)
            assert torch.equal(_run(layers, rank), told)  # bitwise as it was


def _saves_logical_order(rank, num_ranks):
    whole = whole_layers()
    for kind in KINDS:
        placement = make_placement(kind, num_ranks)
        layers = spread(whole, placement, rank)
        told = _run(layers, rank)
        plain = make_placement("contiguous", num_ranks)
        with logical_order(layers):
            _as_placed(layers, whole, plain, rank)
            saved = {k: v.clone() for k, v in layers.state_dict().items()}
        assert torch.equal(_run(layers, rank), told)
        share = EXPERTS // num_ranks
        block = slice(rank * share, (rank + 1) * share)
        for row, (_, experts) in enumerate(whole):
            assert torch.equal(saved[f"{row}.experts.up"], experts.up[block])
        with logical_order(layers, whole=True):
            for row, (_, experts) in enumerate(whole):
                held = layers.state_dict()[f"{row}.experts.down"]
                assert torch.equal(held, experts.down)
        assert torch.equal(_run(layers, rank), told)

        # What was saved loads where experts lie in that order, and nowhere else.
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        fresh = spread(whole, plain, rank)
        for parameter in fresh.parameters():
            torch.nn.init.zeros_(parameter)
        fresh.load_state_dict(torch.load(buffer))
        torch.testing.assert_close(_run(fresh, rank), told, rtol=1e-5, atol=1e-5)
        if kind == "shuffled" and num_ranks > 1:
            with pytest.raises(InvalidPlacementError, match="apply that placement"):
                layers.load_state_dict(saved)


class _Peak(TorchDispatchMode):
    """Bytes of storages that were made and still live, at most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)
        }
        if isinstance(out, torch.Tensor) and out.numel():
            storage = out.untyped_storage()
            if storage.data_ptr() not in given:
                self.live[storage.data_ptr()] = (
                    StorageWeakRef(storage),
                    storage.nbytes(),
                )
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def _peak(rank, num_ranks):
    """One more copy of the largest weight, and little else."""
    whole = whole_layers(num_layers=3)
    placement = make_placement("shuffled", num_ranks, num_layers=3)
    layers = spread(whole, make_placement("contiguous", num_ranks, num_layers=3), rank)
    largest = max(p.nbytes for layer in layers for p in layer.experts.parameters())
    mode = _Peak()
    with mode:
        apply_placement(layers, placement)
    tables = sum(b.nbytes for b in layers.buffers())
    assert largest <= mode.peak <= largest + tables + 4096, (mode.peak, largest)


def _refuses(rank, num_ranks):
    whole = whole_layers()
    placement = make_placement("contiguous", num_ranks)
    layers = spread(whole, placement, rank)
    with pytest.raises(InvalidPlacementError, match="for 4 ranks, the group has 2"):
        apply_placement(layers, make_placement("contiguous", 4))
    with pytest.raises(InvalidPlacementError, match="rank 1 has another placement"):
        apply_placement(layers, make_placement("shuffled", num_ranks, seed=rank))
    with pytest.raises(InvalidPlacementError, match="another model: it has layers"):
        apply_placement(layers, contiguous_placement(2, EXPERTS, num_ranks))
    with pytest.raises(InvalidPlacementError, match="has no layer whose experts"):
        apply_placement(torch.nn.Linear(2, 2), placement)
    mixed = torch.nn.ModuleList([layers[0]])
    mixed.append(spread(whole, make_placement("shuffled", num_ranks), rank)[1])
    with pytest.raises(InvalidPlacementError, match="have different placements"):
        placed_layers(mixed)
    # A gradient on one rank alone: every rank says so.
    if rank == 1:
        layers[1].experts.up.grad = torch.ones_like(layers[1].experts.up)
    shuffled = make_placement("shuffled", num_ranks)
    with pytest.raises(InvalidPlacementError, match="rank 1: up of layer 4 has a grad"):
        apply_placement(layers, shuffled)
    _as_placed(layers, whole, placement, rank)  # nothing moved
    layers.zero_grad(set_to_none=True)
    apply_placement(layers, shuffled)
    _as_placed(layers, whole, shuffled, rank)


def _saves_fewer_experts_than_ranks(rank, num_ranks):
    """Two experts, each on every second rank."""
    placement = Placement(
        slot_experts=np.tile(np.array([1, 0], np.int32), num_ranks // 2)[None],
        layer_ids=np.zeros(1, np.int32),
        num_experts=2,
        topology=Topology(num_ranks=num_ranks, ranks_per_node=num_ranks),
    )
    torch.manual_seed(0)
    whole = Experts(2, 16, 24)
    experts = whole.take(placement.slot_experts[0, rank : rank + 1])
    layer = MoELayer(TopKRouter(16, 2, 2), experts, placement)
    with logical_order(layer):
        here = [rank] if rank < 2 else [-1]
        assert torch.equal(layer.experts.up, whole.take(np.array(here)).up)
    with logical_order(layer, whole=True):
        assert torch.equal(layer.experts.up, whole.up)
    assert torch.equal(layer.experts.up, experts.up)


class _Nested(torch.nn.Module):
    """Experts whose weights are in modules of their own."""

    def __init__(self, experts):
        super().__init__()
        self.inner = experts

    def forward(self, rows, end_offsets):
        return self.inner(rows, end_offsets)


def _refuses_what_it_cannot_move(rank, num_ranks):
    """Silently wrong otherwise: tokens would go to slots whose weights stayed."""
    before, after = (make_placement(kind, num_ranks) for kind in KINDS[:2])
    layers = spread(whole_layers(), before, rank)
    layers[1].experts = _Nested(layers[1].experts)
    with pytest.raises(InvalidPlacementError, match=r"inner\.up of the experts of lay"):
        apply_placement(layers, after)
    layers[1].experts = layers[1].experts.inner
    layers[1].experts.register_buffer("scale", torch.ones(4))
    with pytest.raises(InvalidPlacementError, match="scale of the experts of layer 4"):
        apply_placement(layers, after)


def _everything(rank, num_ranks):
    _moves(rank, num_ranks)
    _saves_logical_order(rank, num_ranks)
    if num_ranks == 4:
        _saves_fewer_experts_than_ranks(rank, num_ranks)
    if num_ranks == 2:
        _peak(rank, num_ranks)
        _refuses(rank, num_ranks)
        _refuses_what_it_cannot_move(rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_weights_move_and_come_back_and_are_saved_in_order(num_ranks):
    run_on_ranks(num_ranks, _everything)


def _survives(rank, num_ranks, folder):
    layers = spread(whole_layers(), make_placement("shuffled", num_ranks), rank)
    _run(layers, rank)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        for _ in range(1000):
            _run(layers, rank)
    except RuntimeError as error:
        said = f"{time.monotonic() - began} {error}"
        (folder / f"rank-{rank}").write_text(said)
    os._exit(0)  # a group with a dead rank cannot be taken down in order


def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path):
    """Long before the group's timeout."""
    context = torch.multiprocessing.get_context(start_method())
    (tmp_path / "store").mkdir()
    processes = [
        context.Process(
            target=one_rank,
            args=(
                *(rank, 3, "cpu", "gloo", str(tmp_path / "store")),
                *(_survives, (tmp_path,)),
            ),
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=TIMEOUT.total_seconds())
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive
    assert processes[1].exitcode == -signal.SIGKILL
    for rank in (0, 2):
        seconds, said = (tmp_path / f"rank-{rank}").read_text().split(" ", 1)
        assert float(seconds) < TIMEOUT.total_seconds() / 3
        assert "Connection" in said or "closed" in said, said
