"""The table of families: sizes as published, and a model is never taken for another."""

import json
from importlib import resources
from pathlib import Path

import pytest
from moetuner.evaluation.models import find_model, known_names, shape_for_model
from moetuner.evaluation.models.families import similar_names

# Hidden size, inner width, experts, top-k, layers, of them with experts.
PUBLISHED = {
    "deepseek-v2-lite": (2048, 1408, 64, 6, 27, 26),
    "deepseek-v3": (7168, 2048, 256, 8, 61, 58),
    "deepseek-v4-pro": (7168, 3072, 384, 6, 61, 61),
    "kimi-k2": (7168, 2048, 384, 8, 61, 60),
    "qwen1.5-moe-a2.7b": (2048, 1408, 60, 4, 24, 24),
    "qwen3-235b-a22b": (4096, 1536, 128, 8, 94, 94),
    "qwen3-next-80b-a3b": (2048, 512, 512, 10, 48, 48),
    "glm-4.5": (5120, 1536, 160, 8, 92, 89),
    "glm-4.5-air": (4096, 1408, 128, 8, 46, 45),
    "gpt-oss-20b": (2880, 2880, 32, 4, 24, 24),
    "gpt-oss-120b": (2880, 2880, 128, 4, 36, 36),
    "llama-4-scout": (5120, 8192, 16, 1, 48, 48),
    "llama-4-maverick": (5120, 8192, 128, 1, 48, 24),
    "gemma-4-26b-a4b": (2816, 704, 128, 8, 30, 30),
    "minimax-m2.5": (3072, 1536, 256, 8, 62, 62),
    "ernie-4.5-300b-a47b": (8192, 3584, 64, 8, 54, 51),
    "hunyuan-a13b": (4096, 3072, 64, 8, 32, 32),
    "mixtral-8x7b": (4096, 14336, 8, 2, 32, 32),
    "olmoe-1b-7b": (2048, 1024, 64, 8, 16, 16),
    "phi-3.5-moe": (4096, 6400, 16, 2, 32, 32),
    "jamba-v0.1": (4096, 14336, 16, 2, 32, 16),
    "dbrx": (6144, 10752, 16, 4, 40, 40),
    "granite-4.0-h-small": (4096, 768, 72, 10, 40, 40),
    "nemotron-3-super-120b-a12b": (1024, 2688, 512, 22, 88, 40),
}
# Shapes that plans of earlier versions were priced with.
BEFORE = {
    "gpt-oss": (2880, 2880),
    "deepseek-v2-lite": (2048, 1408),
    "deepseek-v3": (7168, 2048),
    "deepseek-r1": (7168, 2048),
    "mixtral-8x7b": (4096, 14336),
    "mixtral-8x22b": (6144, 16384),
    "olmoe-1b-7b": (2048, 1024),
    "qwen1.5-moe-a2.7b": (2048, 1408),
    "qwen3-30b-a3b": (2048, 768),
    "qwen3-235b-a22b": (4096, 1536),
    "moetuner-demo-moe": (512, 256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_as_published(name):
    model = find_model(name)
    shape = model.shape
    assert (
        shape.hidden_size,
        shape.expert_hidden_size,
        model.num_experts,
        model.top_k,
        model.num_layers,
        len(model.moe_layers),
    ) == PUBLISHED[name]


@pytest.mark.parametrize("name", BEFORE)
def test_what_was_known_before_costs_the_same(name):
    shape = shape_for_model(name)
    assert (shape.hidden_size, shape.expert_hidden_size) == BEFORE[name]
    assert shape.num_projections == 3
    assert shape.weight_bytes == shape.dispatch_bytes == shape.combine_bytes == 2


@pytest.mark.parametrize(
    ("name", "total"),  # billions of weights, as the makers say
    [
        ("deepseek-v3", 671),
        ("kimi-k2", 1026),
        ("qwen3-235b-a22b", 235),
        ("qwen3-coder-480b-a35b", 480),
        ("qwen3-next-80b-a3b", 80),
        ("glm-4.5", 355),
        ("glm-4.5-air", 106),
        ("gpt-oss-120b", 117),
        ("llama-4-maverick", 400),
        ("llama-4-scout", 109),
        ("minimax-m2", 230),
        ("ernie-4.5-300b-a47b", 300),
        ("mixtral-8x22b", 141),
        ("dbrx", 132),
        ("nemotron-3-super", 120),
        ("mimo-v2-flash", 309),
    ],
)
def test_experts_make_up_most_of_the_model(name, total):
    model = find_model(name)
    routed = model.num_experts * model.shape.expert_values
    weights = len(model.moe_layers) * (routed + model.shape.shared_values)
    assert 0.88 * total < weights / 1e9 < total


def test_every_entry_has_its_own_name_and_says_whose_it_is():
    for name in known_names():
        model = find_model(name)
        assert model.name == name
        assert "/" in model.source
        assert model.shape.weight_type is not None
        assert not model.shape.guessed


def test_every_entry_says_where_its_numbers_were_read():
    file = resources.files("moetuner") / "data" / "models.json"
    families = json.loads(file.read_text("utf-8"))["families"]
    assert len(families) > 50
    for family in families:
        told = {"published", "read_in", "config"} if "config" in family else {"either"}
        assert set(family) == {"names", *told}


def test_the_page_has_the_same_table():
    file = resources.files("moetuner") / "data" / "models.json"
    families = json.loads(file.read_text("utf-8"))["families"]
    rows = []
    for family in (each for each in families if "config" in each):
        model = find_model(family["names"][0])
        shape, layers = model.shape, f"{model.num_layers}"
        if len(model.moe_layers) < model.num_layers:
            layers = f"{len(model.moe_layers)} of {layers}"
        rows.append(
            f"| `{model.name}` | {model.num_experts}, top-{model.top_k} | {layers} | "
            f"{shape.hidden_size} x {shape.expert_hidden_size} | "
            f"{shape.weight_type.value} | {model.source} |"
        )
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    assert page.endswith("\n".join(["|---|---|---|---|---|---|", *rows, ""]))


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("GPT_OSS 120b", "gpt-oss-120b"),
        ("gpt-oss", "gpt-oss"),
        ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-v2-lite"),
        ("DeepSeek-V2-Lite (ESFT vanilla-lite)", "deepseek-v2-lite"),
        ("deepseek_v2  lite", "deepseek-v2-lite"),
        ("deepseek-ai/DeepSeek-V2", "deepseek-v2"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3.2-Exp", "deepseek-v3.2"),
        ("Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("mixtral 8X22b", "mixtral-8x22b"),
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen1.5-moe-a2.7b"),
        ("Qwen3-235B-A22B-FP8", "qwen3-235b-a22b"),
        ("Kimi-K2-Thinking", "kimi-k2"),
        ("moonshotai/Kimi-K2.5", "kimi-k2.5"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron-3-nano-30b-a3b"),
    ],
)
def test_a_model_is_found_by_any_common_spelling(model, key):
    assert find_model(model).name == key


@pytest.mark.parametrize(
    "model",
    [
        *("", "gpt", "deepseek", "mixtral", "llama-3-8b", "qwen3"),
        "DeepSeek-V2.5",  # other versions
        "deepseek-v3.7",
        "GLM-4.5V",
        "glm-5.3-flash",
        "GPT-OSSX",
        "my-deepseek-v30",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",  # dense
    ],
)
def test_an_unknown_model_has_no_shape(model):
    """Never that of a relative."""
    assert find_model(model) is None
    assert shape_for_model(model) is None


def test_what_sizes_of_one_name_differ_in_is_not_told():
    """Both sizes of gpt-oss have the same experts, but not as many."""
    model = find_model("gpt-oss")
    assert model.shape == find_model("gpt-oss-20b").shape
    assert (model.num_experts, model.num_layers, model.moe_layers) == (None, None, ())
    assert model.top_k == 4


def test_names_that_look_alike_are_offered():
    assert similar_names("Qwen/Qwen3-235B-A22")[0] == "qwen3-235b-a22b"
    assert similar_names("xyz") == ()
