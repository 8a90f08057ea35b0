"""LoRA on experts of a spread model: in one order; in the other refused by name."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")
peft = pytest.importorskip("peft", reason="peft is not there")

import moetuner.integrations.transformers as ours  # noqa: E402
from moetuner.errors import InvalidPlacementError  # noqa: E402
from moetuner.nn import (  # noqa: E402
    apply_placement,
    average_gradients,
    contiguous_placement,
    expert_parameters,
)
from ranks import run_on_ranks  # noqa: E402
from tiny_models import inputs, make_model  # noqa: E402

ON_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def _config(targets=("q_proj",), parameters=ON_EXPERTS):
    return peft.LoraConfig(
        r=2, target_modules=list(targets), target_parameters=parameters
    )


def _fill(model, rank):
    """Adapters that do something: of each rank's experts, other than the first's."""
    own = expert_parameters(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            seed = rank if name in own else 99
            made = torch.Generator().manual_seed(seed)
            drawn = torch.randn(parameter.shape, generator=made)
            parameter.data.copy_(0.1 * drawn)


def _adapted(rank, num_ranks):
    placement = contiguous_placement(3, 8, num_ranks)
    plain = make_model("Olmoe")
    wanted = plain(**inputs()).logits
    model = make_model("Olmoe")
    ours.parallelize(model, placement, shared_batch=True)
    adapted = peft.get_peft_model(model, _config())
    torch.testing.assert_close(adapted(**inputs()).logits, wanted)  # nothing learnt

    _fill(adapted, rank)
    own = [name for name in expert_parameters(adapted) if "lora_" in name]
    assert len(own) == 3 * 4  # A and B of both weights
    out = adapted(**inputs()).logits
    assert not torch.allclose(out, wanted, rtol=1e-3, atol=1e-3)
    merged = _merged(rank, num_ranks)
    torch.testing.assert_close(out, merged, rtol=1e-4, atol=1e-5)

    out.square().mean().backward()
    parameters = dict(adapted.named_parameters())
    before = {name: parameters[name].grad.clone() for name in own}
    assert all(gradient.any() for gradient in before.values())
    average_gradients(adapted)  # of experts: divided, and of no other rank's
    for name in own:
        torch.testing.assert_close(parameters[name].grad, before[name] / num_ranks)

    adapted.zero_grad(set_to_none=True)
    with pytest.raises(InvalidPlacementError, match=r"mlp\.experts adapts the experts"):
        apply_placement(adapted, placement)


def _merged(rank, num_ranks):
    """The same adapters, added to the weights before the run."""
    model = make_model("Olmoe")
    placement = contiguous_placement(3, 8, num_ranks)
    ours.parallelize(model, placement, shared_batch=True)
    adapted = peft.get_peft_model(model, _config())
    _fill(adapted, rank)
    merged = adapted.merge_and_unload()
    out = merged(**inputs()).logits.detach()
    apply_placement(merged, placement)  # nothing is in its way any more
    torch.testing.assert_close(merged(**inputs()).logits, out)
    return out


def _the_other_order(rank, num_ranks):
    placement = contiguous_placement(3, 8, num_ranks)
    adapted = peft.get_peft_model(make_model("Olmoe"), _config())
    with pytest.raises(InvalidPlacementError, match="add adapters after parallelize"):
        ours.parallelize(adapted, placement, shared_batch=True)
    elsewhere = peft.get_peft_model(make_model("Olmoe"), _config(parameters=None))
    wanted = elsewhere(**inputs()).logits
    ours.parallelize(elsewhere, placement, shared_batch=True)
    torch.testing.assert_close(elsewhere(**inputs()).logits, wanted)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_of_experts_come_after_parallelize(num_ranks):
    run_on_ranks(num_ranks, _adapted)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_of_experts_before_parallelize_are_refused(num_ranks):
    run_on_ranks(num_ranks, _the_other_order)
