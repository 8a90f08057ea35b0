"""A model that `parallelize` spread, copied or loaded later, runs its own experts."""

import copy
import io

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.nn import (  # noqa: E402
    apply_placement,
    contiguous_placement,
    expert_parameters,
)
from moetuner.nn.counts import exchanges_of  # noqa: E402
from moetuner.placement.model import Placement  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from tiny_models import inputs, make_model  # noqa: E402


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _tokens(model):
    return sum(exchange.counts().tokens for exchange in exchanges_of(model))


def _own_experts(rank, num_ranks, family, shared):
    model = make_model(family)
    placement = contiguous_placement(3, model.config.num_local_experts, num_ranks)
    ours.parallelize(model, placement, shared_batch=shared)
    backwards = Placement(
        slot_experts=placement.slot_experts[:, ::-1].copy(),
        layer_ids=placement.layer_ids,
        num_experts=placement.num_experts,
        topology=placement.topology,
    )
    wanted = model(**inputs()).logits.detach()
    tokens = _tokens(model)
    for made in (copy.deepcopy, _pickled):
        other = made(model)
        torch.testing.assert_close(other(**inputs()).logits, wanted)
        with torch.no_grad():
            for parameter in expert_parameters(other).values():
                parameter.mul_(2)
        out = other(**inputs()).logits
        assert not torch.allclose(out, wanted, rtol=1e-2, atol=1e-2)
        out.square().mean().backward()
        mine = expert_parameters(other)
        assert mine
        assert all(parameter.grad is not None for parameter in mine.values())
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(model(**inputs()).logits, wanted)

        other.zero_grad(set_to_none=True)  # and it moves by itself
        apply_placement(other, backwards)
        torch.testing.assert_close(other(**inputs()).logits, out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs()).logits, wanted)
    assert _tokens(model) == 5 * tokens  # calls of copies are theirs


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_copies_run_their_own_experts(num_ranks, shared):
    run_on_ranks(num_ranks, _own_experts, "GptOss", shared)


def _loaded_later(rank, num_ranks, shared):
    """Spread on the meta device; weights come by assignment, or into empty memory."""
    source = make_model("GptOss")
    placement = contiguous_placement(3, 6, num_ranks)
    wanted = source(**inputs()).logits
    ours.parallelize(source, placement, shared_batch=shared)
    state = source.state_dict()
    for assign in (True, False):
        with torch.device("meta"):
            model = type(source)(source.config).eval()
        ours.parallelize(model, placement, shared_batch=shared)
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(state, assign=assign)
        for name, buffer in source.named_buffers():  # no part of a state
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer)
        found = model(**inputs()).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_weights_may_come_after_parallelize(num_ranks, shared):
    run_on_ranks(num_ranks, _loaded_later, shared)
