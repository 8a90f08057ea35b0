"""MoELayer between NCCL ranks against the same layer on one CPU."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from layers import (  # noqa: E402
    KINDS,
    TOKENS,
    TOP_K,
    make_placement,
    one_layer,
    placed_layers,
    tokens_of,
    whole_layers,
)
from moetuner.nn import ExchangeOptions, return_home  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

OPTIONS = [
    ExchangeOptions(),
    ExchangeOptions(capacity=max(TOKENS), max_rows=8 * max(TOKENS) * TOP_K),
    ExchangeOptions(residency="follow"),
]


def _equals_one_rank(rank, num_ranks, device):
    for kind in KINDS:
        placement = make_placement(kind, num_ranks)
        exact = wanted = tokens_of(rank, requires_grad=True)
        for router, experts in whole_layers():
            wanted = wanted + one_layer(router, experts, wanted)
        wanted.square().sum().backward()
        for options in OPTIONS:
            layers = placed_layers(whole_layers(), placement, rank, options=options)
            x = tokens_of(rank).to(device).requires_grad_()
            out = _run(layers.to(device), x)
            out.square().sum().backward()
            torch.testing.assert_close(out.cpu(), wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(x.grad.cpu(), exact.grad, rtol=1e-3, atol=1e-4)


def _run(layers, x):
    here, keys = x, None
    for layer in layers:
        if layer.exchange.options.residency.value == "follow":
            came = layer(here, keys)
            here, keys = came.tokens + came.sums, came.keys
        else:
            here = here + layer(here)
            layer.exchange.check_overflow()
    if keys is None:
        return here
    return return_home(here, keys, len(x), layers[0].exchange.group_name)


@pytest.mark.gpu
@pytest.mark.parametrize(("device", "num_ranks"), [("cuda", n) for n in (1, 2, 4, 8)])
def test_the_layer_equals_one_on_the_cpu(device, num_ranks):
    run_on_ranks(num_ranks, _equals_one_rank, device, device=device)
