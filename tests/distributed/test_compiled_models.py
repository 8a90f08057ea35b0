"""Whole models that are spread over ranks, compiled: they train as they do eagerly.

Ranks have batches of other sizes, unless they share one; graphs are made for any size.
"""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.nn import ExchangeOptions, contiguous_placement  # noqa: E402
from other_families import IDS, make_other  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from tiny_models import make_model  # noqa: E402

FORMS = {
    "exact": ExchangeOptions(),
    "fixed": ExchangeOptions(capacity=16, max_rows=256),
}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def _olmoe():
    """3-D weights; one layer, for the compiler's sake."""
    model = make_model("Olmoe")
    model.model.layers = model.model.layers[:1]
    return model


def _switch():
    """Lists of MLPs, of which each stack has one layer."""
    return make_other("switch_transformers")


MAKE = {"olmoe": _olmoe, "switch": _switch}


def _spread(family, num_ranks, device, **options):
    model = MAKE[family]().to(device)
    for stack in [model.encoder, model.decoder] if family == "switch" else [model]:
        layers = sorted(ours.experts_of(stack))
        number = next(iter(ours.experts_of(stack).values())).num_experts
        plain = contiguous_placement(len(layers), number, num_ranks)
        placement = replace(plain, layer_ids=np.array(layers, np.int32))
        ours.parallelize(stack, placement, **options)
    return model


def _step(model, run, ids):
    model.zero_grad(set_to_none=True)
    other = {"decoder_input_ids": ids.flip(1)} if hasattr(model, "encoder") else {}
    logits = run(input_ids=ids, use_cache=False, **other).logits
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}


def _like_eager(rank, num_ranks, family, backend, form, shared, device):
    options = {"shared_batch": shared, "options": FORMS[form]}
    eager, model = (_spread(family, num_ranks, device, **options) for _ in range(2))
    # Transformers leaves the graph by itself around each of the two stacks.
    whole = family != "switch"
    run = torch.compile(model, backend=backend, fullgraph=whole, dynamic=True)
    for longest in (5, 4):
        ids = IDS[:, : longest if shared else longest - rank].to(device)
        wanted, gradients = _step(eager, eager, ids)
        found, ours_ = _step(model, run, ids)
        torch.testing.assert_close(found, wanted, **CLOSE)
        for name, gradient in gradients.items():
            if gradient is None:
                assert ours_[name] is None
                continue
            scale = gradient.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(
                ours_[name] / scale, gradient / scale, **CLOSE, msg=name
            )


CASES = [  # family, backend, ranks, form, whether they share a batch
    ("olmoe", "inductor", 4, "exact", False),
    ("olmoe", "aot_eager", 2, "fixed", True),
    ("switch", "inductor", 2, "fixed", True),
    ("switch", "aot_eager", 4, "exact", False),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("family", "backend", "num_ranks", "form", "shared"), CASES)
def test_compiled_models_train_as_eager_ones(family, backend, num_ranks, form, shared):
    run_on_ranks(num_ranks, _like_eager, family, backend, form, shared, "cpu")


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["olmoe", "switch"])
@pytest.mark.parametrize(("device", "num_ranks"), [("cuda", 1), ("cuda", 2)])
def test_compiled_models_train_as_eager_ones_on_gpus(device, num_ranks, family):
    given = (family, "inductor", "exact", True, device)
    run_on_ranks(num_ranks, _like_eager, *given, device=device)
