"""Tiny variants of the newer families: latent attention, experts, soft caps, local layers, and text parts of wrappers.

Windows and chunks are 20, scaled ropes stretch 32 positions, so 90 tokens reach past them. Expert widths differ from
dense widths, head sizes from hidden / heads. Buffers are state too: deepseek_v3's `e_score_correction_bias` is one.
The eps of latent norms is fixed at 1e-6 and not `rms_norm_eps`, which is larger here.
"""

from __future__ import annotations

from typing import Any

from tests.converters.families.variant import SIZES, Variant

NO_IDS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
BASE = {**SIZES, **NO_IDS}
FOUR = {**BASE, "num_hidden_layers": 4}

# the base is small so that YaRN's ramp has steps between its ends at these head sizes
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

MLA = {
    **BASE, "num_key_value_heads": 4, "kv_lora_rank": 20, "q_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "rms_norm_eps": 1e-3,
}  # fmt: skip
LLAMA4 = {
    **FOUR, "intermediate_size": 20, "intermediate_size_mlp": 48, "head_dim": 12, "num_local_experts": 4,
    "attention_chunk_size": 20, "floor_scale": 16, "attn_scale": 0.5,
}  # fmt: skip
MIXTRAL = {**BASE, "num_local_experts": 4}
QWEN_MOE = {**BASE, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}
GEMMA2 = {**FOUR, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 20}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA3 = {**GEMMA2, "rope_parameters": GEMMA3_ROPES}

V3 = ("deepseek_v3", "deepseek_v3:DeepseekV3Config", "deepseek_v3:DeepseekV3ForCausalLM")

VARIANTS: dict[str, Variant] = {
    # V2: latent queries, groups scored by their best expert, scores scaled
    "deepseek_v2": Variant("deepseek_v2", "deepseek_v2:DeepseekV2Config", "deepseek_v2:DeepseekV2ForCausalLM", {
        **MLA, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    # V2-Lite: plain queries, no groups; the two mscales differ, so cos and sin are scaled
    "deepseek_v2-lite": Variant("deepseek_v2", "deepseek_v2:DeepseekV2Config", "deepseek_v2:DeepseekV2ForCausalLM", {
        **MLA, "q_lora_rank": None, "n_shared_experts": 1, "n_group": None, "topk_group": None,
        "topk_method": "greedy", "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
    }),
    "deepseek_v2-bias": Variant("deepseek_v2", "deepseek_v2:DeepseekV2Config", "deepseek_v2:DeepseekV2ForCausalLM", {
        **MLA, "n_shared_experts": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    }),
    "deepseek_v3": Variant(*V3, {
        **MLA, "n_shared_experts": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    }),
    # Moonlight: plain queries, one group, no rope scaling, two shared experts
    "deepseek_v3-one-group": Variant(*V3, {
        **MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
        "routed_scaling_factor": 2.446,
    }),
    "deepseek_v3-half-rope": Variant(*V3, {
        **MLA, "n_shared_experts": 1, "rope_interleave": False, "norm_topk_prob": False, "attention_bias": True,
        "first_k_dense_replace": 2, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    }),
    "gpt_oss": Variant("gpt_oss", "gpt_oss:GptOssConfig", "gpt_oss:GptOssForCausalLM", {
        **FOUR, "intermediate_size": 20, "head_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 2,
        "sliding_window": 20, "rope_parameters": {**YARN, "beta_fast": 2.0, "beta_slow": 1.0, "truncate": False},
    }),
    # widths divisible by 32: storable as MXFP4
    "gpt_oss-wide": Variant("gpt_oss", "gpt_oss:GptOssConfig", "gpt_oss:GptOssForCausalLM", {
        **BASE, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 20, "attention_bias": False, "tie_word_embeddings": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    }),
    # Scout: experts in every layer, normed queries and keys, scaled rope
    "llama4_text": Variant("llama4_text", "llama4:Llama4TextConfig", "llama4:Llama4ForCausalLM", {
        **LLAMA4, "rope_parameters": LLAMA3,
    }),
    # Maverick: experts in every second layer, no norm of queries and keys
    "llama4_text-interleaved": Variant("llama4_text", "llama4:Llama4TextConfig", "llama4:Llama4ForCausalLM", {
        **LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "no_rope_layers": [],
    }),
    "llama4_text-explicit": Variant("llama4_text", "llama4:Llama4TextConfig", "llama4:Llama4ForCausalLM", {
        **LLAMA4, "num_experts_per_tok": 2, "moe_layers": [0, 2], "no_rope_layers": [0, 1, 1, 0],
        "attn_temperature_tuning": False, "attention_bias": True, "tie_word_embeddings": True,
    }),
    "mixtral": Variant("mixtral", "mixtral:MixtralConfig", "mixtral:MixtralForCausalLM", MIXTRAL),
    "mixtral-window": Variant("mixtral", "mixtral:MixtralConfig", "mixtral:MixtralForCausalLM", {
        **MIXTRAL, "sliding_window": 20, "head_dim": 12, "num_experts_per_tok": 3, "tie_word_embeddings": True,
    }),
    "qwen2_moe": Variant("qwen2_moe", "qwen2_moe:Qwen2MoeConfig", "qwen2_moe:Qwen2MoeForCausalLM", {
        **QWEN_MOE, "shared_expert_intermediate_size": 28,
    }),
    "qwen2_moe-sparse-window": Variant("qwen2_moe", "qwen2_moe:Qwen2MoeConfig", "qwen2_moe:Qwen2MoeForCausalLM", {
        **QWEN_MOE, "num_hidden_layers": 6, "shared_expert_intermediate_size": 28, "decoder_sparse_step": 2,
        "mlp_only_layers": [3], "norm_topk_prob": True, "qkv_bias": False, "use_sliding_window": True,
        "sliding_window": 20, "max_window_layers": 4, "rope_parameters": YARN, "tie_word_embeddings": True,
    }),
    "qwen3_moe": Variant("qwen3_moe", "qwen3_moe:Qwen3MoeConfig", "qwen3_moe:Qwen3MoeForCausalLM", {
        **QWEN_MOE, "head_dim": 12, "norm_topk_prob": True,
    }),
    "qwen3_moe-sparse-window": Variant("qwen3_moe", "qwen3_moe:Qwen3MoeConfig", "qwen3_moe:Qwen3MoeForCausalLM", {
        **QWEN_MOE, "num_hidden_layers": 4, "head_dim": 12, "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "attention_bias": True, "use_sliding_window": True, "sliding_window": 20, "rope_parameters": YARN,
        "tie_word_embeddings": True,
    }),
    "phimoe": Variant("phimoe", "phimoe:PhimoeConfig", "phimoe:PhimoeForCausalLM", {
        **BASE, "intermediate_size": 20, "num_local_experts": 6, "attention_bias": True, "lm_head_bias": True,
        "router_jitter_noise": 0.3,
    }),
    # transformers 5.17 never uses Phi-3.5-MoE's long factors, only its long scale: equal factors tell no difference
    "phimoe-longrope": Variant("phimoe", "phimoe:PhimoeConfig", "phimoe:PhimoeForCausalLM", {
        **BASE, "intermediate_size": 20, "num_local_experts": 4, "sliding_window": 20,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.1, 1.3, 1.6],
            "short_mscale": 1.2, "long_mscale": 1.4,
        },
    }),
    "gemma": Variant("gemma", "gemma:GemmaConfig", "gemma:GemmaForCausalLM", {
        **BASE, "head_dim": 12, "num_key_value_heads": 1,
    }),
    "gemma-exact-gelu": Variant("gemma", "gemma:GemmaConfig", "gemma:GemmaForCausalLM", {
        **BASE, "head_dim": 12, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False,
    }),
    "gemma2": Variant("gemma2", "gemma2:Gemma2Config", "gemma2:Gemma2ForCausalLM", {
        **GEMMA2, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma2-uncapped": Variant("gemma2", "gemma2:Gemma2Config", "gemma2:Gemma2ForCausalLM", {
        **GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    }),
    "gemma3_text": Variant("gemma3_text", "gemma3:Gemma3TextConfig", "gemma3:Gemma3ForCausalLM", {
        **GEMMA3, "sliding_window_pattern": 3,
    }),
    # transformers reads attn_logit_softcapping of this family and never applies it
    "gemma3_text-capped": Variant("gemma3_text", "gemma3:Gemma3TextConfig", "gemma3:Gemma3ForCausalLM", {
        **GEMMA3, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    }),
    "glm": Variant("glm", "glm:GlmConfig", "glm:GlmForCausalLM", {**BASE, "head_dim": 12}),
    "glm-full-rope": Variant("glm", "glm:GlmConfig", "glm:GlmForCausalLM", {
        **BASE, "head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True,
    }),
    "glm4": Variant("glm4", "glm4:Glm4Config", "glm4:Glm4ForCausalLM", {**BASE, "head_dim": 12}),
    "glm4-full-rope": Variant("glm4", "glm4:Glm4Config", "glm4:Glm4ForCausalLM", {
        **BASE, "head_dim": 12, "attention_bias": False, "partial_rotary_factor": 1.0, "tie_word_embeddings": True,
    }),
    # 32B: local layers with rope, every fourth global without
    "exaone4": Variant("exaone4", "exaone4:Exaone4Config", "exaone4:Exaone4ForCausalLM", {
        **BASE, "num_hidden_layers": 5, "head_dim": 12, "sliding_window": 20, "sliding_window_pattern": 4,
        "rope_parameters": LLAMA3,
    }),
    # 1.2B: no local layers, rope everywhere
    "exaone4-global": Variant("exaone4", "exaone4:Exaone4Config", "exaone4:Exaone4ForCausalLM", {
        **BASE, "sliding_window": None, "layer_types": ["full_attention"] * 3, "tie_word_embeddings": True,
    }),
    "olmo2": Variant("olmo2", "olmo2:Olmo2Config", "olmo2:Olmo2ForCausalLM", {**BASE, "num_key_value_heads": 4}),
    "olmo2-grouped": Variant("olmo2", "olmo2:Olmo2Config", "olmo2:Olmo2ForCausalLM", {
        **BASE, "head_dim": 12, "attention_bias": True, "rope_parameters": YARN, "tie_word_embeddings": True,
    }),
    "granite": Variant("granite", "granite:GraniteConfig", "granite:GraniteForCausalLM", {
        **BASE, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.5, "tie_word_embeddings": True,
    }),
    "granite-bias": Variant("granite", "granite:GraniteConfig", "granite:GraniteForCausalLM", {
        **BASE, "head_dim": 12, "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.2,
    }),
    "smollm3": Variant("smollm3", "smollm3:SmolLM3Config", "smollm3:SmolLM3ForCausalLM", FOUR),
    "smollm3-window": Variant("smollm3", "smollm3:SmolLM3Config", "smollm3:SmolLM3ForCausalLM", {
        **FOUR, "head_dim": 12, "no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 20,
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": YARN,
    }),
    # wrappers: the text part is a row of its own, the rest is a vision part that text never reads
    "gemma3": Variant("gemma3", "gemma3:Gemma3Config", "gemma3:Gemma3ForConditionalGeneration", {
        "text_config": {**GEMMA3, "sliding_window_pattern": 3},
        "vision_config": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "image_size": 8, "patch_size": 2,
        },
        "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    }),
    "llama4": Variant("llama4", "llama4:Llama4Config", "llama4:Llama4ForConditionalGeneration", {
        "text_config": {**LLAMA4, "interleave_moe_layer_step": 2, "rope_parameters": LLAMA3},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 2, "vision_output_dim": 16, "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    }),
    "mistral3": Variant("mistral3", "mistral3:Mistral3Config", "mistral3:Mistral3ForConditionalGeneration", {
        "text_config": {**BASE, "model_type": "mistral", "head_dim": 12, "sliding_window": None},
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "head_dim": 8, "image_size": 8, "patch_size": 2,
        },
        "image_token_index": 90, "tie_word_embeddings": False,
    }),
}  # fmt: skip
