"""config.json of every family's making: sizes, layers with experts, weights' types."""

import json

import pytest
from moetuner.errors import InvalidProblemError
from moetuner.evaluation.models import model_of, read_model

PLAIN = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
}


def model(**changes):
    told = {k: v for k, v in {**PLAIN, **changes}.items() if v is not None}
    return model_of(told, name="mine", source="mine/config.json")


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, [2, 4]),
        ({"moe_layer_freq": [0, 0, 1, 0, 1, 1]}, [2, 4, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, [0, 1, 2, 3, 4, 5]),
        ({"interleave_moe_layer_step": 2}, [1, 3, 5]),
        ({"moe_layers": [1, 4]}, [1, 4]),
        ({"moe_layers_enum": "2,3,5"}, [2, 3, 5]),
        ({"expert_layer_period": 3, "expert_layer_offset": 1}, [1, 4]),
        (
            {
                "moe_layer_start_index": 2,
                "moe_layer_end_index": 4,
                "moe_layer_interval": 1,
            },
            [2, 3, 4],
        ),
        (
            {
                "moe_layer_start_index": 1,
                "moe_layer_end_index": -1,
                "moe_layer_interval": 2,
            },
            [1, 3, 5],
        ),
        ({"num_dense_layers": 4}, [4, 5]),
        ({"moe_layer_num_skipped": 3}, [3, 4, 5]),
        ({"mlp_layer_types": ["dense", "dense", *["sparse"] * 4]}, [2, 3, 4, 5]),
        ({"mlp_layer_types": ["hash_moe", *["moe"] * 5]}, [0, 1, 2, 3, 4, 5]),
        ({"hybrid_override_pattern": "MEM*ME", "num_hidden_layers": None}, [1, 5]),
        ({"layers_block_type": ["mamba", "moe", "attention"]}, [1]),
        ({"layers_block_type": ["mamba", "attention"] * 3}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_layers_with_experts(rule, layers):
    assert list(model(**rule).moe_layers) == layers


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (64, 96)),
        ({"moe_intermediate_size": 24}, (64, 24)),
        ({"moe_intermediate_size": [24] * 6}, (64, 24)),
        ({"expert_ffn_hidden_size": 16, "ffn_hidden_size": 128}, (64, 16)),
        ({"moe_latent_size": 16, "moe_intermediate_size": 24}, (16, 24)),
        ({"routed_expert_hidden_size": 32}, (32, 96)),
        ({"moe_latent_size": None, "hidden_size": [64, 64]}, (64, 96)),
    ],
    ids=str,
)
def test_sizes_by_any_name(changes, sizes):
    shape = model(**changes).shape
    assert (shape.hidden_size, shape.expert_hidden_size) == sizes


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, 0),
        ({"n_shared_experts": 2, "moe_intermediate_size": 24}, 3 * 64 * 48),
        ({"num_shared_expert": [1] * 6}, 3 * 64 * 96),
        ({"shared_expert_intermediate_size": 40}, 3 * 64 * 40),
        ({"shared_intermediate_size": 0}, 0),
        ({"n_shared_experts": 1, "moe_latent_size": 16}, 3 * 64 * 96),  # full width
        ({"model_type": "llama4_text"}, 3 * 64 * 96),
        ({"model_type": "gemma4_text", "moe_intermediate_size": 24}, 3 * 64 * 96),
        (
            {
                "model_type": "nemotron_h",
                "moe_shared_expert_intermediate_size": 10,
                "n_shared_experts": 1,
            },
            2 * 64 * 10,
        ),
    ],
    ids=str,
)
def test_shared_experts(changes, shared):
    assert model(**changes).shape.shared_values == shared


def test_experts_without_a_gate_are_two_matrices():
    assert model(model_type="nemotron_h").shape.num_projections == 2


def test_text_is_found_inside_models_of_several_senses():
    vision = {"hidden_size": 1152, "num_hidden_layers": 27}
    for outer in ("text_config", "llm_config", "language_config"):
        told = {"model_type": "x", outer: PLAIN, "vision_config": vision}
        assert model_of(told, name="x", source="x").shape == model().shape
    talker = {"text_config": {**PLAIN, "num_local_experts": 4}}
    told = {"thinker_config": {"text_config": PLAIN}, "talker_config": talker}
    assert model_of(told, name="x", source="x").num_experts == 8


def test_dbrx_has_a_part_of_its_own():
    told = {
        "d_model": 64,
        "n_layers": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 16, "moe_top_k": 4},
    }
    found = model_of(told, name="dbrx", source="dbrx")
    assert (found.num_experts, found.top_k, found.num_layers) == (16, 4, 4)
    assert (found.shape.hidden_size, found.shape.expert_hidden_size) == (64, 96)


def test_layers_of_multi_token_prediction_are_told():
    assert model(num_nextn_predict_layers=1).num_mtp_layers == 1
    assert model().num_mtp_layers == 0


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUP = {"num_bits": 4, "type": "int", "group_size": 32, "symmetric": True}


def grouped(**weights):
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {**GROUP, **weights}}},
    }


@pytest.mark.parametrize(
    ("told", "kind", "size"),
    [
        ({}, "bf16", 2),
        ({"torch_dtype": "float32"}, "fp32", 4),
        ({"dtype": "float16"}, "fp16", 2),
        ({"quantization_config": FP8}, "fp8", 1 + 4 / 16384),
        ({"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, "fp8", 1 + 1 / 16384),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8", 1),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4", 0.53125),
        (
            {
                "expert_dtype": "fp4",
                "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
            },
            "mxfp4",
            0.53125,
        ),
        (
            {"quantization_config": {"quant_algo": "NVFP4", "group_size": 16}},
            "nvfp4",
            0.5625,
        ),
        ({"quantization_config": {"quant_algo": "FP8"}}, "fp8", 1),
        (
            {
                "quantization_config": {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        "layers.0.attn.q_proj": {"quant_algo": "FP8"},
                        "layers.0.mlp.experts": {"quant_algo": "W4A16_NVFP4"},
                    },
                }
            },
            "nvfp4",
            0.5625,
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "awq",
                    "bits": 4,
                    "group_size": 128,
                    "zero_point": True,
                }
            },
            "int4",
            0.5 + 2.5 / 128,
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "gptq",
                    "bits": 4,
                    "group_size": 64,
                    "sym": True,
                }
            },
            "int4",
            0.5 + 2 / 64,
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "int8", 1),
        ({"quantization_config": grouped()}, "int4", 0.5 + 2 / 32),
        ({"quantization_config": grouped(type="float")}, "mxfp4", 0.53125),
        (
            {"quantization_config": grouped(type="float", group_size=16)},
            "nvfp4",
            0.5625,
        ),
        ({"quantization_config": grouped(num_bits=8, type="float")}, "fp8", 1),
        ({"quantization_config": grouped(num_bits=8)}, "int8", 1),
        (
            {
                "quantization_config": {
                    "quant_method": "quark",
                    "global_quant_config": {
                        "weight": {"dtype": "fp4", "group_size": 32}
                    },
                }
            },
            "mxfp4",
            0.53125,
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_8bit": True,
                }
            },
            "int8",
            1,
        ),
    ],
    ids=str,
)
def test_weights_are_as_the_checkpoint_stores_them(told, kind, size):
    shape = model(**told).shape
    assert (shape.weight_type.value, shape.weight_bytes) == (kind, size)


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("re:.*self_attn.*", "int4"),
        (r"re:.*mlp\.(gate|up|down)_proj.*", "int4"),  # the dense layers' MLP
        ("re:.*shared_experts.*", "int4"),
        ("gate", "int4"),  # the router's, not gate_proj
        ("model.layers.0*", "int4"),
        ("re:(", "int4"),
        ("re:.*experts.*", "bf16"),
        ("model.layers.5*", "bf16"),
        ("mlp.experts", "bf16"),
    ],
)
def test_experts_that_were_left_as_they_were(pattern, kind):
    told = {**grouped(), "ignore": [pattern]}
    assert model(quantization_config=told).shape.weight_type.value == kind


def test_gemma_has_its_experts_apart_from_the_mlp():
    told = {**grouped(), "ignore": ["model.language_model.layers.5.mlp*"]}
    apart = model(quantization_config=told, model_type="gemma4_text")
    assert apart.shape.weight_type.value == "int4"
    assert model(quantization_config=told).shape.weight_type.value == "bf16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None}, "no Mixture-of-Experts model: wanted one of n_r"),
        ({"num_local_experts": 1}, "no Mixture-of-Experts model"),
        ({"enable_moe_block": False}, "no Mixture-of-Experts model"),
        ({"intermediate_size": None}, "does not say the inner width of an expert: wan"),
        ({"hidden_size": None}, "does not say the hidden size"),
        ({"hidden_size": "64"}, "does not say the hidden size"),
        ({"hidden_size": 10**23}, "the hidden size is 1000.*, wanted at most 16777216"),
        ({"num_experts_per_tok": None}, "does not say the experts of a token"),
        ({"num_hidden_layers": None}, "does not say the number of layers"),
        ({"first_k_dense_replace": 6}, "none of its 6 layers is MoE"),
        (
            {"moe_intermediate_size": [24, 12, 24, 24, 24, 24]},
            "moe_intermediate_size holds several sizes: .* say `hidden_size`",
        ),
        (
            {"quantization_config": {"quant_method": "squeeze"}},
            "tells no type of the experts' weights that is known: .*squeeze.*`weights`",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(changes, message):
    with pytest.raises(InvalidProblemError, match=message):
        model(**changes)


def test_a_file_or_the_folder_of_a_checkpoint_is_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PLAIN))
    assert read_model(file).shape == read_model(tmp_path).shape == model().shape
    assert read_model(tmp_path).source == str(file)


def test_what_the_model_optimizer_wrote_beside_it_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN))
    beside = {"quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert read_model(tmp_path).shape.weight_bytes == 0.5625


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "wanted an object, as config.json is, got list"),
        ('"' + "x" * (1 << 24) + '"', "too long for a config.json"),
        (b"\xff\xfe{}", "not JSON"),
    ],
    ids=["missing", "cut", "deep", "list", "long", "bytes"],
)
def test_other_files_are_refused(tmp_path, content, message):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidProblemError, match=message):
        read_model(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ["x"]},
        {"moe_layers": [1, "2", None, [3]]},
        {"moe_layers_enum": "1,x," + "9" * 40},
        {"decoder_sparse_step": 1, "mlp_only_layers": 3},
        {"quantization_config": {"quant_method": "fp8", "ignore": 7}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": ["a"]}},
    ],
    ids=str,
)
def test_values_that_no_family_has_are_passed_over(changes):
    assert model(**changes).moe_layers[:2] in ((0, 1), (1,))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**12},
        {"hidden_size": float("nan")},
        {"quantization_config": {"config_groups": {"group_0": []}}},
        {"quantization_config": {"quantized_layers": {"a.experts": 1}}},
    ],
    ids=str,
)
def test_values_that_would_be_needed_are_refused(changes):
    with pytest.raises(InvalidProblemError, match=r"model mine/config\.json: "):
        model(**changes)
