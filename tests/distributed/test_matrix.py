"""What may be put around layers, times form, ranks and dtype: trained like one process.

Each cell takes one step and compares outputs and all gradients with the same layers
on one process that has the tokens of all ranks. Undefined memory is full of NaN.
"""

import contextlib
import copy
import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    EXPERTS,
    TOKENS,
    TOP_K,
    make_placement,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.nn import (  # noqa: E402
    ExchangeOptions,
    ExpertOptions,
    average_gradients,
    expert_parameters,
    keep_routing,
    ready_for_ddp,
)
from poison import poisoned  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

FORMS = {
    "exact": ExchangeOptions(),
    "fixed": ExchangeOptions(capacity=max(TOKENS), max_rows=5 * max(TOKENS) * TOP_K),
}
CLOSE = {  # products are rounded to the dtype, and there are few of them
    torch.float32: {"rtol": 1e-3, "atol": 1e-4},
    torch.float16: {"rtol": 2e-2, "atol": 2e-2},
    torch.bfloat16: {"rtol": 1e-1, "atol": 1e-1},
}


class Stack(torch.nn.Module):
    """Layers with residuals, each called in some way."""

    def __init__(self, layers, call=lambda layer, x: layer(x)):
        super().__init__()
        self.layers, self.call = layers, call

    def forward(self, x):
        for layer in self.layers:
            x = x + self.call(layer, x)
        return x


def _checkpointed(**options):
    return lambda layers: Stack(layers, lambda la, x: checkpoint(la, x, **options))


def _compiled(backend, dynamic=None):
    def wrap(layers):
        torch._dynamo.reset()
        model = Stack(layers)
        model.forward = torch.compile(
            model.forward, backend=backend, fullgraph=True, dynamic=dynamic
        )
        return model

    return wrap


def _sharded(layers):
    model = Stack(layers)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh, ignored_params=set(expert_parameters(model).values()))
    return model


def _from_meta(layers):
    state = copy.deepcopy(layers.state_dict())
    empty = layers.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return Stack(empty)


SHORT = {
    "plain": Stack,
    "copied": lambda layers: Stack(copy.deepcopy(layers)),
    "meta": _from_meta,
    "ddp": lambda layers: DistributedDataParallel(ready_for_ddp(Stack(layers))),
    "fsdp2": _sharded,
    "reentrant": _checkpointed(use_reentrant=True),
    "checkpointed": _checkpointed(use_reentrant=False),
    "routing kept": _checkpointed(use_reentrant=False, context_fn=keep_routing),
    "aot_eager": _compiled("aot_eager"),
}
LONG = SHORT | {
    "inductor": _compiled("inductor"),
    "dynamic": _compiled("inductor", dynamic=True),
}
AVERAGES_BY_ITSELF = ("ddp", "fsdp2")


def _one_process(whole, num_ranks):
    """Outputs of each rank's tokens; gradients of the mean of the ranks' losses."""
    outputs = []
    for rank in range(num_ranks):
        x = given = tokens_of(rank, requires_grad=True, dtype=whole[0][1].up.dtype)
        for router, experts in whole:
            ids, weights = router(x)
            order = ids.flatten().argsort(stable=True)
            ends = torch.bincount(ids.flatten(), minlength=EXPERTS).cumsum(0).int()
            done = experts(x[order // TOP_K], ends).float()
            done = done * weights.flatten()[order, None]
            total = done.new_zeros(x.shape).index_add(0, order // TOP_K, done)
            x = x + total.to(x.dtype)
        (x.float().square().sum() / num_ranks).backward()
        grad = given.grad if given.grad is None else given.grad * num_ranks
        outputs.append((x, grad))
    return outputs


def _whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _cell(name, form, dtype, kind, rank, num_ranks):
    options = ExpertOptions(bias=True)
    whole = whole_layers(options, dtype=dtype)
    wanted, x_grad = _one_process(whole, num_ranks)[rank]
    placement = make_placement(kind, num_ranks)
    layers = placed_layers(
        whole_layers(options, dtype=dtype), placement, rank, options=FORMS[form]
    )
    compiles = name in ("aot_eager", "inductor", "dynamic")
    with contextlib.nullcontext() if compiles else poisoned():
        model = LONG[name](layers)
        x = tokens_of(rank, requires_grad=True, dtype=dtype)
        out = model(x)
        out.float().square().sum().backward()
        average_gradients(model, shared=name not in AVERAGES_BY_ITSELF)
    stack = getattr(model, "module", model)
    torch.testing.assert_close(out, wanted, **CLOSE[dtype])
    if len(x):
        _close(x.grad, x_grad, dtype)
    width = placement.slots_per_rank
    for row, layer in enumerate(stack.layers):
        layer.exchange.check_overflow()
        router, experts = whole[row]
        found = _whole(layer.router.linear.weight.grad)
        _close(found, router.linear.weight.grad, dtype)
        mine = placement.slot_experts[row, rank * width :][:width]
        for own, other in zip(
            layer.experts.parameters(), experts.parameters(), strict=True
        ):
            for slot, expert in enumerate(mine):
                if expert >= 0:
                    _close(own.grad[slot], other.grad[expert], dtype)
                else:
                    assert not own.grad[slot].any()


def _close(found, wanted, dtype):
    """Against the largest value of the gradient: what cancels is rounded too."""
    scale = wanted.abs().max().clamp(min=1e-3)
    torch.testing.assert_close(found / scale, wanted / scale, **CLOSE[dtype])


def _cells(rank, num_ranks, names, dtypes, kinds):
    for cell in itertools.product(names, FORMS, dtypes, kinds):
        try:
            _cell(*cell, rank, num_ranks)
        except Exception as error:
            raise AssertionError(f"{cell} on {num_ranks} ranks") from error


def test_every_way_trains_like_one_process():
    run_on_ranks(2, _cells, list(SHORT), [torch.float32], ["replicated"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [list(SHORT), ["inductor"], ["dynamic"]])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_way_in_every_dtype(num_ranks, dtype, names):
    run_on_ranks(num_ranks, _cells, names, [dtype], ["shuffled", "replicated"])
