"""DDP and FSDP2 around layers whose experts belong to one rank each."""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.distributed as dist  # noqa: E402
from layers import (  # noqa: E402
    HIDDEN,
    LAYERS,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.errors import InvalidProblemError  # noqa: E402
from moetuner.evaluation.verify import verify  # noqa: E402
from moetuner.nn import (  # noqa: E402
    ExpertOptions,
    apply_placement,
    average_gradients,
    clip_gradients,
    contiguous_placement,
    expert_parameters,
    gather_counts,
    ready_for_ddp,
    record_run,
)
from ranks import run_on_ranks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402


class Model(torch.nn.Module):
    """A linear map that every rank has, then the layers."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(HIDDEN, HIDDEN)
        self.layers = layers

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def _model(placement, rank, num_layers=LAYERS):
    whole = whole_layers(ExpertOptions(bias=True), num_layers=num_layers)
    return Model(placed_layers(whole, placement, rank))


def _step(model, rank):
    """Outputs and gradients, those of the mean loss of all ranks."""
    out = model(tokens_of(rank))
    out.square().sum().backward()
    return out.detach()


def _reference(placement, rank, num_layers=LAYERS):
    model = _model(placement, rank, num_layers)
    out = _step(model, rank)
    average_gradients(model)
    return out, {name: p.grad for name, p in model.named_parameters()}


def _whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _check(model, out, reference):
    wanted_out, wanted = reference
    torch.testing.assert_close(out, wanted_out)
    found = {n: _whole(p.grad) for n, p in model.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _ddp(rank, num_ranks):
    for kind in ("shuffled", "replicated"):
        placement = make_placement(kind, num_ranks)
        reference = _reference(placement, rank)
        model = _model(placement, rank)
        wrapped = DistributedDataParallel(ready_for_ddp(model))
        with record_run(model) as run:
            out = _step(wrapped, rank)
        average_gradients(model, shared=False)
        _check(model, out, reference)
        assert verify(run.trace(), placement, gather_counts(model)) == []


def _ddp_needs_to_know(rank, num_ranks):
    placement = make_placement("shuffled", num_ranks)
    model = DistributedDataParallel(_model(placement, rank))
    with pytest.raises(InvalidProblemError, match=r"moetuner\.nn\.ready_for_ddp"):
        model(tokens_of(rank))
    alone = _model(placement, rank).layers[0]  # a layer by itself is ready
    x = tokens_of(rank)
    wanted = alone(x)
    torch.testing.assert_close(DistributedDataParallel(alone)(x), wanted)


def _fsdp(rank, num_ranks):
    mesh = init_device_mesh("cpu", (num_ranks,))
    placement = make_placement("replicated", num_ranks)
    reference = _reference(placement, rank)
    model = _model(placement, rank)
    owned = set(expert_parameters(model).values())
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=owned)
    fully_shard(model, mesh=mesh, ignored_params=owned)
    out = _step(model, rank)
    average_gradients(model, shared=False)
    _check(model, out, reference)
    model.zero_grad(set_to_none=True)
    former = make_placement("contiguous", num_ranks)
    apply_placement(model, former)
    torch.testing.assert_close(model(tokens_of(rank)).detach(), reference[0])

    taken = _model(placement, rank)
    fully_shard(taken, mesh=mesh)
    with pytest.raises(InvalidProblemError, match=r"set\(moetuner\.nn\.expert_par"):
        taken(tokens_of(rank))


def _fsdp_of_routers(rank, num_ranks):
    """What FSDP2 shards it averages; the rest is averaged for it."""
    placement = make_placement("shuffled", num_ranks)
    reference = _reference(placement, rank)
    model = _model(placement, rank)
    for layer in model.layers:
        fully_shard(layer.router, mesh=init_device_mesh("cpu", (num_ranks,)))
    out = _step(model, rank)
    average_gradients(model)
    _check(model, out, reference)


def _clipped(rank, num_ranks):
    """By the norm that one process has, where replicas count once."""
    kinds = ("shuffled", "replicated")
    for sharded, kind in itertools.product((False, True), kinds):
        placement = make_placement(kind, num_ranks)
        model = _model(placement, rank)
        owned = expert_parameters(model)
        if sharded:
            mesh = init_device_mesh("cpu", (num_ranks,))
            fully_shard(model, mesh=mesh, ignored_params=set(owned.values()))
        _step(model, rank)
        average_gradients(model, shared=not sharded)
        before = {n: _whole(p.grad).clone() for n, p in model.named_parameters()}
        width, squares = placement.slots_per_rank, 0.0
        for name, gradient in before.items():
            if name not in owned:
                squares += float(gradient.square().sum())
                continue
            every = [torch.empty_like(gradient) for _ in range(num_ranks)]
            dist.all_gather(every, gradient)
            row = int(name.split(".")[1])
            slots = placement.slot_experts[row].tolist()
            for expert in range(placement.num_experts):
                slot = slots.index(expert)  # the first of its replicas
                squares += float(every[slot // width][slot % width].square().sum())
        norm = squares**0.5
        for limit in (norm / 3, 2 * norm):
            found = clip_gradients(model, limit)
            torch.testing.assert_close(float(found), norm, rtol=1e-4, atol=0)
            scale = min(limit / norm, 1)
            after = {n: _whole(p.grad) for n, p in model.named_parameters()}
            wanted = {name: value * scale for name, value in before.items()}
            torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-6)
            for parameter in model.parameters():
                parameter.grad.mul_(1 / scale)


def _clipped_whatever_experts_hold(rank, num_ranks):
    """A number for each slot, a submodule, and weights that Transformers spread."""
    model = _model(make_placement("shuffled", num_ranks), rank)
    for layer in model.layers:
        scale = torch.ones(layer.exchange.slots_per_rank)
        layer.experts.scale = torch.nn.Parameter(scale)
        layer.experts.deep = torch.nn.Linear(3, 5)
    owned = set(expert_parameters(model).values())
    squares = torch.zeros(2)  # of this rank's parameters, and of what every rank has
    for number, parameter in enumerate(model.parameters()):
        mine = parameter in owned
        rng = torch.Generator().manual_seed(100 * number + (rank if mine else 99))
        parameter.grad = torch.randn(parameter.shape, generator=rng)
        squares[0 if mine else 1] += parameter.grad.square().sum()
    dist.all_reduce(squares[:1])
    wanted = squares.sum().sqrt()
    torch.testing.assert_close(clip_gradients(model, 1e9), wanted, rtol=1e-4, atol=0)

    spread = init_device_mesh("cpu", (num_ranks,)), [Shard(0)]
    for layer in model.layers:
        for name, own in list(layer.experts.named_parameters(recurse=False)):
            whole = torch.nn.Parameter(DTensor.from_local(own.detach(), *spread))
            whole.grad = DTensor.from_local(own.grad, *spread)
            setattr(layer.experts, name, whole)
    torch.testing.assert_close(clip_gradients(model, 1e9), wanted, rtol=1e-4, atol=0)

    for parameter in model.parameters():  # of the experts of one rank, and no others
        parameter.grad = None
    deep = model.layers[0].experts.deep.weight
    if rank == 0:
        deep.grad = torch.ones_like(deep)
    wanted = torch.tensor(15.0).sqrt()
    torch.testing.assert_close(clip_gradients(model, 1e9), wanted, rtol=1e-4, atol=0)


def _fsdp_over_twins(rank, num_ranks):
    """Experts on rank pairs (0, 1) and (2, 3), each sharded over its twins."""
    mesh = init_device_mesh("cpu", (2, num_ranks // 2), mesh_dim_names=("dp", "ep"))
    group = mesh.get_group("ep")
    placement = make_placement("shuffled", num_ranks // 2)
    whole = whole_layers()
    layers = placed_layers(whole, placement, group.rank(), group=group)
    x = tokens_of(rank, requires_grad=True)
    wanted = layers[0](x)
    wanted.square().sum().backward()
    gradient = layers[0].experts.up.grad.clone()
    dist.all_reduce(gradient, group=mesh.get_group("dp"))
    layers.zero_grad(set_to_none=True)
    fully_shard(layers[0].experts, mesh=mesh["dp"])
    out = layers[0](x)
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    found = layers[0].experts.up.grad.full_tensor()
    torch.testing.assert_close(found, gradient / 2, rtol=1e-4, atol=1e-5)


def _nothing_placed(rank, num_ranks):
    with pytest.raises(InvalidProblemError, match="Linear has no layer whose experts"):
        average_gradients(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidProblemError, match="Linear has no layer whose experts"):
        clip_gradients(torch.nn.Linear(2, 2), 1.0)
    assert expert_parameters(torch.nn.Linear(2, 2)) == {}
    layers = _model(contiguous_placement(5, 8, num_ranks), rank)
    names = expert_parameters(layers)
    wanted = {
        f"layers.{layer}.experts.{name}"
        for layer in range(LAYERS)
        for name in ("up", "down", "up_bias", "down_bias")
    }
    assert set(names) == wanted
    assert names["layers.0.experts.up"] is layers.layers[0].experts.up


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ddp_averages_what_every_rank_has_and_leaves_experts(num_ranks):
    run_on_ranks(num_ranks, _ddp)


def _ddp_over_compiled(rank, num_ranks):
    placement = make_placement("contiguous", num_ranks)
    reference = _reference(placement, rank, num_layers=1)
    for told_first in (True, False):
        torch._dynamo.reset()
        model = _model(placement, rank, num_layers=1)
        if told_first:
            ready_for_ddp(model)
        compiled = torch.compile(model, backend="aot_eager")
        if not told_first:
            ready_for_ddp(compiled)
        out = _step(DistributedDataParallel(compiled), rank)
        average_gradients(model, shared=False)
        _check(model, out, reference)


def test_ddp_leaves_the_experts_of_a_compiled_model_too():
    run_on_ranks(2, _ddp_over_compiled)


def test_ddp_over_experts_is_refused():
    run_on_ranks(2, _ddp_needs_to_know)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fsdp_shards_what_every_rank_has_and_leaves_experts(num_ranks):
    run_on_ranks(num_ranks, _fsdp)


def test_fsdp_of_routers_alone():
    run_on_ranks(2, _fsdp_of_routers)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_gradients_are_clipped_by_the_norm_of_all_ranks(num_ranks):
    run_on_ranks(num_ranks, _clipped)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_are_clipped_whatever_experts_hold(num_ranks):
    run_on_ranks(num_ranks, _clipped_whatever_experts_hold)


def test_fsdp_may_shard_experts_over_ranks_that_hold_the_same():
    run_on_ranks(4, _fsdp_over_twins)


def test_names_of_what_a_rank_has_alone():
    run_on_ranks(1, _nothing_placed)
