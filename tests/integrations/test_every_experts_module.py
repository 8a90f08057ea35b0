"""The experts of every family that Transformers marks, alone: ours against its own."""

import importlib
import inspect
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="Transformers is not there")

from moetuner.integrations.transformers import experts_forward  # noqa: E402
from poison import poisoned  # noqa: E402

MODELS = Path(transformers.__file__).parent / "models"
FAMILIES = sorted(
    file.parent.name
    for file in MODELS.glob("*/modeling_*.py")
    if "@use_experts_implementation" in file.read_text()
)
EXPERTS, HIDDEN, INNER, TOKENS = 6, 32, 24, 9


class Config:
    """A small number, or a plain choice, for whatever an experts module asks for."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if "expert" in name and "size" not in name and "dim" not in name:
            return EXPERTS
        if "inter" in name or "ffn" in name or "expert" in name:
            return INNER
        if "hidden" in name or "latent" in name or name == "d_model":
            return HIDDEN
        if "eps" in name:
            return 1e-5
        if any(word in name for word in ("limit", "alpha", "beta", "softcap")):
            return 7.0
        if "bias" in name:
            return False
        raise AttributeError(name)


def classes_of(family):
    library = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return [
        value
        for _, value in inspect.getmembers(library, inspect.isclass)
        if value.__module__ == library.__name__
        and hasattr(value, "_apply_gate")
        and value.__name__.endswith("Experts")
    ]


def run(experts, function):
    """Output and gradients with ids elsewhere, undefined memory being NaN."""
    made = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, HIDDEN, generator=made, requires_grad=True)
    ids = torch.randint(0, EXPERTS, (TOKENS, 2), generator=made)
    ids[3, 1] = ids[5, 0] = EXPERTS  # elsewhere
    weights = torch.rand(TOKENS, 2, generator=made, requires_grad=True)
    experts.zero_grad()
    elsewhere = ids == EXPERTS
    if function is experts:  # not all of them know such ids
        ids = ids.masked_fill(elsewhere, 0)
    out = function(x, ids, weights.masked_fill(elsewhere, 0))
    out.square().sum().backward()
    named = {name: p.grad for name, p in experts.named_parameters()}
    return {"out": out, "x": x.grad, "weights": weights.grad, **named}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_what_the_family_computes(family):
    classes = classes_of(family)
    assert classes
    for kind in classes:
        torch.manual_seed(0)
        experts = kind(Config())
        for name, parameter in experts.named_parameters():
            low, high = (0.5, 1.5) if "norm" in name or "scale" in name else (-0.3, 0.3)
            torch.nn.init.uniform_(parameter, low, high)
        wanted = run(experts, experts)
        with poisoned():
            found = run(experts, lambda *given, e=experts: experts_forward(e, *given))
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-3, atol=1e-4, msg=f"{kind.__name__} {name}"
            )
