"""Tiny random whole models of the families that read pictures, and inputs with one.

Inputs are those that a processor would make: patches, their grid, and the tokens that
they take the place of.
"""

import torch
import transformers

PICTURE = 60  # its token
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "n_routed_experts": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4}
DEEP = VISION | {"depth": 2, "num_heads": 4}
MARKS = {
    "image_start_token_id": 58,
    "image_end_token_id": 59,
    "video_start_token_id": 57,
    "video_end_token_id": 56,
}


def _rope(*sections):
    return {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": list(sections),
        "partial_rotary_factor": 1.0,
    }


def _deepseek_ocr2():
    types = ["dense", "sparse", "sparse"]
    sam = {
        "hidden_size": 32,
        "output_channels": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 4,
        "window_size": 4,
        "global_attn_indexes": [1],
        "downsample_channels": [16, 32],
    }
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = transformers.DeepseekOcr2Config(
        text_config=TEXT
        | {"n_routed_experts": 8, "n_shared_experts": 1, "mlp_layer_types": types},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=PICTURE,
    )
    return transformers.DeepseekOcr2ForConditionalGeneration(config)


def _dots3_note():
    """Its vision tower has experts too, other numbers of them in each layer."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sliding = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16}
    sliding |= {"kv_lora_rank": 16, "head_dim": 16, "qk_nope_head_dim": 8}
    config = transformers.Dots3NoteConfig(
        text_config=TEXT
        | LATENT
        | {"qk_rope_head_dim": 8, "head_dim": 16, "sliding_window": 4}
        | {"shared_experts_intermediate_size": 24, "swa_v_head_dim": 8}
        | {f"swa_{name}": value for name, value in sliding.items()},
        vision_config=small
        | {"num_hidden_layers": 3, "patch_size": 4, "moe_intermediate_size": 24}
        | {"adapter_in_dim": 32, "adapter_out_dim": 32}
        | {"pyramid_num_routed": [-1, 4, 6]},
        audio_config=small
        | {"num_hidden_layers": 1, "feature_size": 8, "downsample_hidden_size": 8}
        | {"adapter_input_size": 32, "adapter_out_dim": 32},
        image_token_id=PICTURE,
        video_token_id=61,
        audio_token_id=62,
    )
    return transformers.Dots3NoteForConditionalGeneration(config)


def _ernie4_5_vl_moe():
    """Text and pictures have experts of their own, of two sizes."""
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=TEXT
        | {"moe_intermediate_size": [24, 16], "moe_num_experts": 8, "moe_k": 2}
        | {"moe_num_shared_experts": 1, "rope_parameters": _rope(1, 1, 2)},
        vision_config=DEEP,
        image_token_id=PICTURE,
        video_token_id=61,
        **MARKS,
    )
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config)


def _glm4v_moe():
    config = transformers.Glm4vMoeConfig(
        text_config=TEXT
        | {"n_routed_experts": 8, "head_dim": 8, "rope_parameters": _rope(2, 1, 1)},
        vision_config=DEEP | {"image_size": 16, "out_hidden_size": 32},
        image_token_id=PICTURE,
        video_token_id=61,
        **MARKS,
    )
    return transformers.Glm4vMoeForConditionalGeneration(config)


def _glm5_next():
    config = transformers.Glm5NextConfig(
        text_config=TEXT
        | LATENT
        | {"index_kpool": 2, "linear_head_dim": 8, "linear_num_heads": 4, "hc_mult": 2}
        | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
        | {"layer_types": ["linear_attention", "indexed_attention"] * 2}
        | {"indexer_types": ["full"] * 4, "num_hidden_layers": 4}
        | {"mlp_layer_types": ["dense", *["sparse"] * 3]},
        vision_config=DEEP
        | {"image_size": 16, "out_hidden_size": 32, "projection_intermediate_size": 48},
        image_token_id=PICTURE,
        video_token_id=61,
        **MARKS,
    )
    return transformers.Glm5NextForConditionalGeneration(config)


def _hy_v4_vl():
    config = transformers.HYV4VLConfig(
        text_config=TEXT
        | LATENT
        | {"qk_rope_head_dim": 8, "hc_mult": 2, "rope_parameters": _rope(2, 1, 1)},
        vision_config=VISION
        | {"num_attention_heads": 4, "num_hidden_layers": 2, "out_hidden_size": 32}
        | {"max_image_size": 16},
        image_token_id=PICTURE,
        video_token_id=61,
    )
    return transformers.HYV4VLForConditionalGeneration(config)


def _qwen4_exp():
    linear = {"key_head_dim": 8, "value_head_dim": 8}
    linear |= {"num_key_heads": 2, "num_value_heads": 4}
    indexer = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 4}
    indexer |= {"compress_ratio": 2}
    words = {"ple_layer_ids": [1], "ple_embed_dim": 32, "heads_per_ngram": 2}
    words |= {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 8}
    config = transformers.Qwen4ExpConfig(
        text_config={k: v for k, v in TEXT.items() if k != "intermediate_size"}
        | {"num_experts": 8, "shared_expert_intermediate_size": 24, "head_dim": 8}
        | {"num_key_value_heads": 2, "hc_count": 2, "hc_lowrank": 8}
        | {"layer_types": ["linear_attention", "indexed_attention"] * 2}
        | {"num_hidden_layers": 4, "split_ngram_parts": 1}
        | {"rope_parameters": _rope(2, 1, 1)}
        | {f"linear_{name}": value for name, value in linear.items()}
        | {f"indexer_{name}": value for name, value in indexer.items()}
        | words,
        vision_config=DEEP | {"out_hidden_size": 32, "num_position_embeddings": 16},
        image_token_id=PICTURE,
        video_token_id=61,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    return transformers.Qwen4ExpForConditionalGeneration(config)


MAKE = {
    "deepseek_ocr2": _deepseek_ocr2,
    "dots3_note": _dots3_note,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "glm4v_moe": _glm4v_moe,
    "glm5_next": _glm5_next,
    "hy_v4_vl": _hy_v4_vl,
    "qwen4_exp": _qwen4_exp,
}
INSTALLED = [name for name in MAKE if hasattr(transformers.models, name)]
TOKENS_OF_A_PICTURE = {"deepseek_ocr2": 145, "hy_v4_vl": 6}  # others: 4
FRAMES = {"glm4v_moe": 2, "glm5_next": 2, "qwen4_exp": 2}  # in a patch; others: 1
TYPED = ("ernie4_5_vl_moe", "glm4v_moe", "hy_v4_vl", "qwen4_exp")


def make_picture_model(family):
    torch.manual_seed(0)
    model = MAKE[family]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def picture_inputs(family, seed=0, words=4):
    """Text around one picture, [1, S]."""
    made = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 50, (2 + words,), generator=made)
    picture = torch.full((TOKENS_OF_A_PICTURE.get(family, 4),), PICTURE)
    ids = torch.cat([text[:2], picture, text[2:]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "deepseek_ocr2":
        pixels = torch.randn(1, 3, 64, 64, generator=made)
        return inputs | {"pixel_values": pixels}
    patch = 3 * 4 * 4 * FRAMES.get(family, 1)
    inputs["pixel_values"] = torch.randn(16, patch, generator=made)
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    if family in TYPED:
        inputs["mm_token_type_ids"] = (ids == PICTURE).int()
    if family == "ernie4_5_vl_moe":
        inputs["moe_mm_token_type_ids"] = (ids == PICTURE).int()
    return inputs
