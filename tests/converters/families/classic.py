"""Tiny configurations of the families before Llama, and of later ones with LayerNorms, fused or parallel blocks."""

from __future__ import annotations

from typing import Any

from tests.converters.families.variant import SIZES, Variant

NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, **NO_TOKENS}
GPT2: dict[str, Any] = {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

NEOX: dict[str, Any] = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | NO_TOKENS

# six heads: ALiBi takes its slopes from two series when their number is no power of two
BLOOM: dict[str, Any] = {"vocab_size": 96, "hidden_size": 48, "n_layer": 3, "n_head": 6, **NO_TOKENS}
MPT: dict[str, Any] = {"vocab_size": 96, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 128, **NO_TOKENS}

OPT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "dropout": 0.0, **NO_TOKENS,
}  # fmt: skip

FALCON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, **NO_TOKENS,
}  # fmt: skip
FALCON_40B: dict[str, Any] = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48}

GQA: dict[str, Any] = {**SIZES, **NO_TOKENS}
MHA: dict[str, Any] = {**GQA, "num_key_value_heads": 4}

LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0}


def _longrope(pairs: int) -> dict[str, Any]:
    """Phi's scaling, trained to 32 positions: `pairs` factors for texts up to them, and as many for longer ones."""
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.25 * i for i in range(pairs)], "long_factor": [1.5 + 1.25 * i for i in range(pairs)],
    }  # fmt: skip


VARIANTS: dict[str, Variant] = {
    "gpt2": Variant("gpt2", "gpt2:GPT2Config", "gpt2:GPT2LMHeadModel", GPT2),
    "gpt2-inverse-layer-scale": Variant(
        "gpt2",
        "gpt2:GPT2Config",
        "gpt2:GPT2LMHeadModel",
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 48},
    ),
    "gpt2-unscaled": Variant(
        "gpt2",
        "gpt2:GPT2Config",
        "gpt2:GPT2LMHeadModel",
        {**GPT2, "scale_attn_weights": False, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "gptj": Variant("gptj", "gptj:GPTJConfig", "gptj:GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "gptj-full-rotary": Variant(
        "gptj",
        "gptj:GPTJConfig",
        "gptj:GPTJForCausalLM",
        {**GPT, "rotary_dim": 8, "n_inner": 48, "activation_function": "gelu"},
    ),
    "gpt_neox": Variant(
        "gpt_neox",
        "gpt_neox:GPTNeoXConfig",
        "gpt_neox:GPTNeoXForCausalLM",
        {**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 20000},
    ),
    "gpt_neox-default-rotary": Variant(
        "gpt_neox", "gpt_neox:GPTNeoXConfig", "gpt_neox:GPTNeoXForCausalLM", {**NEOX, "hidden_size": 64}
    ),
    "gpt_neox-sequential": Variant(
        "gpt_neox",
        "gpt_neox:GPTNeoXConfig",
        "gpt_neox:GPTNeoXForCausalLM",
        {
            **NEOX,
            "use_parallel_residual": False,
            "rotary_pct": 1.0,
            "rope_scaling": {**LINEAR},
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
        },
    ),
    "bloom": Variant("bloom", "bloom:BloomConfig", "bloom:BloomForCausalLM", BLOOM),
    "bloom-post-norm-residual": Variant(
        "bloom",
        "bloom:BloomConfig",
        "bloom:BloomForCausalLM",
        {**BLOOM, "n_head": 4, "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False},
    ),
    "opt": Variant("opt", "opt:OPTConfig", "opt:OPTForCausalLM", OPT),
    "opt-350m": Variant(
        "opt",
        "opt:OPTConfig",
        "opt:OPTForCausalLM",
        {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "opt-no-bias": Variant(
        "opt",
        "opt:OPTConfig",
        "opt:OPTForCausalLM",
        {**OPT, "enable_bias": False, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "opt-narrow-no-final-norm": Variant(
        "opt",
        "opt:OPTConfig",
        "opt:OPTForCausalLM",
        {**OPT, "_remove_final_layer_norm": True, "word_embed_proj_dim": 24},
    ),
    "mpt": Variant("mpt", "mpt:MptConfig", "mpt:MptForCausalLM", MPT),
    "mpt-clip": Variant(
        "mpt",
        "mpt:MptConfig",
        "mpt:MptForCausalLM",
        {
            **MPT,
            "n_heads": 4,
            "attn_config": {"clip_qkv": 0.75, "softmax_scale": 0.25},
            "layer_norm_epsilon": 1e-3,
            "tie_word_embeddings": False,
        },
    ),
    "falcon": Variant(
        "falcon",
        "falcon:FalconConfig",
        "falcon:FalconForCausalLM",
        {**FALCON, "hidden_size": 40, "num_attention_heads": 5},
    ),
    "falcon-40b": Variant(
        "falcon", "falcon:FalconConfig", "falcon:FalconForCausalLM", {**FALCON_40B, "tie_word_embeddings": False}
    ),
    "falcon-11b": Variant(
        "falcon",
        "falcon:FalconConfig",
        "falcon:FalconForCausalLM",
        {**FALCON_40B, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "rope_theta": 500042.0},
    ),
    "falcon-rw": Variant(
        "falcon",
        "falcon:FalconConfig",
        "falcon:FalconForCausalLM",
        {
            **FALCON,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    # twelve heads: slopes which bfloat16, in which this family computes its biases, does not hold exactly
    "falcon-rw-rounded-slopes": Variant(
        "falcon",
        "falcon:FalconConfig",
        "falcon:FalconForCausalLM",
        {**FALCON, "hidden_size": 96, "num_attention_heads": 12, "alibi": True, "multi_query": False},
    ),
    "falcon-sequential": Variant(
        "falcon",
        "falcon:FalconConfig",
        "falcon:FalconForCausalLM",
        {**FALCON, "parallel_attn": False, "bias": True, "rope_scaling": {**LINEAR}, "activation": "gelu_new"},
    ),
    "phi": Variant("phi", "phi:PhiConfig", "phi:PhiForCausalLM", MHA),
    "phi-qk-norm": Variant(
        "phi",
        "phi:PhiConfig",
        "phi:PhiForCausalLM",
        {
            **GQA,
            "hidden_size": 40,
            "partial_rotary_factor": 0.4,
            "rope_theta": 20000.0,
            "qk_layernorm": True,
            "hidden_act": "gelu",
        },
    ),
    "phi3": Variant("phi3", "phi3:Phi3Config", "phi3:Phi3ForCausalLM", MHA),
    "phi3-window": Variant("phi3", "phi3:Phi3Config", "phi3:Phi3ForCausalLM", {**GQA, "sliding_window": 20}),
    "phi3-longrope": Variant(
        "phi3",
        "phi3:Phi3Config",
        "phi3:Phi3ForCausalLM",
        {**GQA, "original_max_position_embeddings": 32, "rope_scaling": _longrope(4)},
    ),
    "phi3-partial-rotary": Variant(
        "phi3",
        "phi3:Phi3Config",
        "phi3:Phi3ForCausalLM",
        {
            **GQA,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_scaling": _longrope(3),
            "sliding_window": 60,
            "tie_word_embeddings": True,
        },
    ),
    "starcoder2": Variant(
        "starcoder2", "starcoder2:Starcoder2Config", "starcoder2:Starcoder2ForCausalLM", {**GQA, "rope_theta": 100000.0}
    ),
    "starcoder2-window": Variant(
        "starcoder2",
        "starcoder2:Starcoder2Config",
        "starcoder2:Starcoder2ForCausalLM",
        {**GQA, "sliding_window": 20, "tie_word_embeddings": False},
    ),
    "starcoder2-no-bias": Variant(
        "starcoder2",
        "starcoder2:Starcoder2Config",
        "starcoder2:Starcoder2ForCausalLM",
        {**GQA, "use_bias": False, "hidden_act": "gelu", "rope_scaling": {**LINEAR}},
    ),
    "nemotron": Variant("nemotron", "nemotron:NemotronConfig", "nemotron:NemotronForCausalLM", {**GQA, "head_dim": 12}),
    "nemotron-bias": Variant(
        "nemotron",
        "nemotron:NemotronConfig",
        "nemotron:NemotronForCausalLM",
        {
            **GQA,
            "attention_bias": True,
            "mlp_bias": True,
            "partial_rotary_factor": 1.0,
            "hidden_act": "gelu",
            "norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": Variant("cohere", "cohere:CohereConfig", "cohere:CohereForCausalLM", GQA),
    "cohere-qk-norm": Variant(
        "cohere",
        "cohere:CohereConfig",
        "cohere:CohereForCausalLM",
        {
            **GQA,
            "use_qk_norm": True,
            "attention_bias": True,
            "logit_scale": 0.8333,
            "rope_theta": 8000000.0,
            "tie_word_embeddings": False,
        },
    ),
    "cohere2": Variant(
        "cohere2",
        "cohere2:Cohere2Config",
        "cohere2:Cohere2ForCausalLM",
        {**GQA, "num_hidden_layers": 5, "sliding_window": 20, "rope_theta": 50000.0, "logit_scale": 0.25},
    ),
    "cohere2-pattern": Variant(
        "cohere2",
        "cohere2:Cohere2Config",
        "cohere2:Cohere2ForCausalLM",
        {
            **GQA,
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "sliding_window_pattern": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
}
