"""Sizes that are read from config.json against the modules that Transformers builds."""

import importlib

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="Transformers is not there")

from moetuner.errors import InvalidProblemError  # noqa: E402
from moetuner.evaluation.models import model_of  # noqa: E402
from test_every_experts_module import FAMILIES, classes_of  # noqa: E402
from tiny_models import FAMILIES as TINY  # noqa: E402
from tiny_models import make_model  # noqa: E402

FEW = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
# What a configuration class leaves to the checkpoint.
GIVEN = {
    "deepseek_ocr2": {"num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma": {"enable_moe_block": True, **FEW},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "gemma4": {"enable_moe_block": True, **FEW},
    "hunyuan_v1_moe": {"num_experts": 8},
}
TWO_SIZES = "ernie4_5_vl_moe"  # experts for text and for pictures


def config_of(family, kind):
    """The family's configuration with its defaults, of the class its experts take."""
    library = importlib.import_module(
        f"transformers.models.{family}.configuration_{family}"
    )
    stem = kind.__name__.removesuffix("Experts")
    names = [stem, stem.removesuffix("Moe"), stem.removesuffix("Text")]
    known = [name for name in names if hasattr(library, f"{name}Config")]
    return getattr(library, f"{known[0]}Config")(**GIVEN.get(family, {}))


def build(kind, config):
    with torch.device("meta"):
        try:
            return kind(config)
        except AttributeError:  # a model of several senses
            return kind(config.get_text_config())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_has_as_many_weights_as_is_read(family):
    for kind in classes_of(family):
        config = config_of(family, kind)
        if family == TWO_SIZES:
            with pytest.raises(InvalidProblemError, match="holds several sizes"):
                model_of(config.to_dict(), name=family, source=family)
            continue
        experts = build(kind, config)
        matrices = [p for p in experts.parameters() if p.ndim == 3]
        found = model_of(config.to_dict(), name=family, source=family)
        assert found.num_experts == matrices[0].shape[0], kind.__name__
        each = sum(matrix[0].numel() for matrix in matrices)
        assert found.shape.expert_values == each, kind.__name__
        assert all(found.shape.hidden_size in m.shape for m in matrices), kind.__name__


@pytest.mark.parametrize("family", TINY)
def test_layers_with_experts_are_those_that_have_them(family):
    model = make_model(family)
    found = model_of(model.config.to_dict(), name=family, source=family)
    layers = [
        number
        for number, layer in enumerate(model.model.layers)
        if any(name.endswith("experts") for name, _ in layer.named_modules())
    ]
    assert list(found.moe_layers) == layers
    assert found.num_layers == len(model.model.layers)
    assert found.top_k == model.config.num_experts_per_tok
