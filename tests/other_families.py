"""Tiny models of families that do not mark their experts for the experts interface."""

import torch
import transformers

IDS = torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(3))
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
}


def _llama4():
    config = transformers.Llama4TextConfig(
        **COMMON,
        intermediate_size=24,
        intermediate_size_mlp=24,
        head_dim=8,
        num_local_experts=6,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


def _jetmoe():
    config = transformers.JetMoeConfig(
        **{k: v for k, v in COMMON.items() if k != "num_attention_heads"},
        intermediate_size=24,
        kv_channels=8,
        num_local_experts=6,
        num_experts_per_tok=2,
    )
    return transformers.JetMoeForCausalLM(config)


def _dbrx():
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    )
    return transformers.DbrxForCausalLM(config)


def _longcat_flash():
    config = transformers.LongcatFlashConfig(
        **COMMON | {"num_hidden_layers": 4},
        num_layers=2,
        ffn_hidden_size=24,
        expert_ffn_hidden_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=8,
        moe_topk=3,
        n_routed_experts=6,
        zero_expert_num=2,
    )
    return transformers.LongcatFlashForCausalLM(config)


def _step3p7():
    from transformers.models.step3p7 import modeling_step3p7 as library

    config = library.Step3p7TextModel.config_class(
        **COMMON,
        intermediate_size=24,
        moe_intermediate_size=24,
        head_dim=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse"],
        layer_types=["full_attention"] * 2,
        sliding_window=8,
    )
    return library.Step3p7TextModel(config)


def _doge():
    config = transformers.DogeConfig(
        **COMMON, intermediate_size=24, is_moe=True, num_experts=16
    )
    return transformers.DogeForCausalLM(config)


def _switch_transformers():
    config = transformers.SwitchTransformersConfig(**T5)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def _nllb_moe():
    config = transformers.NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def make_other(family):
    torch.manual_seed(0)
    model = globals()[f"_{family}"]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
