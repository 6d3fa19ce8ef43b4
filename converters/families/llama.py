"""Llama and what is close to it: dense, gated, with RMSNorm and rotary embedding."""

from __future__ import annotations

from trtx.converters.families import gguf
from trtx.converters.families.family import Family
from trtx.converters.families.rules import (
    constant,
    flag,
    from_max_window_layers,
    gated,
    head_dim,
    integer,
    inverse,
    kv_heads,
    no_windows,
    nope_layers,
    number,
    one_window,
    qwen_windows,
    rms_norm,
    rotary,
    window,
    windows_by_layer,
)
from trtx.converters.hf_config import Config

LLAMA = Family(
    name="llama",
    models="Llama 1, 2, 3, 3.1, 3.2, 3.3; Yi, SmolLM2, DeepSeek-R1-Distill-Llama",
    features="linear, llama3 and YaRN RoPE",
    real="SmolLM2-135M",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    fields={
        "vocab_size": integer("vocab_size"),
        "hidden_size": integer("hidden_size"),
        "intermediate_size": integer("intermediate_size"),
        "num_layers": integer("num_hidden_layers"),
        "num_heads": integer("num_attention_heads"),
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rope": rotary(),
        "norm": rms_norm(),
        "max_positions": integer("max_position_embeddings"),
        "windows": no_windows,
        "activation": gated(),
        "qkv_bias": flag("attention_bias"),
        "o_bias": flag("attention_bias"),
        "mlp_bias": flag("mlp_bias"),
        "tied_embeddings": flag("tie_word_embeddings"),
    },
    tensors={
        "model.embed_tokens": "embed",
        "model.layers.*.input_layernorm": "layers.*.attn_norm",
        "model.layers.*.self_attn.q_proj": "layers.*.attn.q",
        "model.layers.*.self_attn.k_proj": "layers.*.attn.k",
        "model.layers.*.self_attn.v_proj": "layers.*.attn.v",
        "model.layers.*.self_attn.o_proj": "layers.*.attn.o",
        "model.layers.*.post_attention_layernorm": "layers.*.mlp_norm",
        "model.layers.*.mlp.gate_proj": "layers.*.mlp.gate",
        "model.layers.*.mlp.up_proj": "layers.*.mlp.up",
        "model.layers.*.mlp.down_proj": "layers.*.mlp.down",
        "model.norm": "final_norm",
        "lm_head": "lm_head",
    },
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    gguf=(gguf.LLAMA,),
)

NO_BIAS = {"qkv_bias": constant(False), "o_bias": constant(False), "mlp_bias": constant(False)}

QKV_PROJECTIONS = tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv")
GATE_UP_PROJECTIONS = tuple(f"model.layers.*.mlp.{name}_proj" for name in ("gate", "up"))

TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""How the language model's tensors are called in a multimodal checkpoint: by older files, and by newer ones."""

VISION = ("**vision_tower.**", "**multi_modal_projector.**")

QK_NORMS = {
    "model.layers.*.self_attn.q_norm": "layers.*.attn.q_norm",
    "model.layers.*.self_attn.k_norm": "layers.*.attn.k_norm",
}

MISTRAL = LLAMA.but(
    "mistral",
    "MistralForCausalLM",
    models="Mistral 7B, Nemo, Small, Codestral",
    features="sliding window",
    fields={"windows": one_window(4096), **NO_BIAS},
    gguf=(gguf.MISTRAL,),
)

QWEN2 = LLAMA.but(
    "qwen2",
    "Qwen2ForCausalLM",
    models="Qwen 2, 2.5; QwQ, DeepSeek-R1-Distill-Qwen",
    features="biases on queries, keys and values",
    fields={**NO_BIAS, "windows": qwen_windows(from_max_window_layers), "qkv_bias": constant(True)},
    gguf=(gguf.QWEN2,),
)

QWEN3 = LLAMA.but(
    "qwen3",
    "Qwen3ForCausalLM",
    models="Qwen 3",
    features="norms on queries and keys",
    fields={
        "head_dim": integer("head_dim", 128),
        "rope": rotary(integer("head_dim", 128)),
        "windows": qwen_windows(from_max_window_layers),
        "mlp_bias": constant(False),
        "qk_norm": constant("head"),
    },
    tensors=QK_NORMS,
    gguf=(gguf.QWEN3,),
)

PHI3 = LLAMA.but(
    "phi3",
    "Phi3ForCausalLM",
    models="Phi 3, 3.5, 4, 4-mini",
    features="fused projections, LongRoPE, partial RoPE",
    fields={
        "norm": rms_norm(1e-5),
        "windows": one_window(None),
        "rope": rotary(original=4096),
        "max_positions": integer("max_position_embeddings", 4096),
        **NO_BIAS,
    },
    tensors={
        "model.layers.*.self_attn.qkv_proj": ("layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v"),
        "model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up"),
    },
    without=(*QKV_PROJECTIONS, *GATE_UP_PROJECTIONS),
    inert={"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
    gguf=(gguf.PHI3,),
)

GLM = LLAMA.but(
    "glm",
    "GlmForCausalLM",
    models="GLM-4 9B (2024)",
    features="partial interleaved RoPE",
    fields={
        "num_kv_heads": integer("num_key_value_heads", 2),
        "head_dim": integer("head_dim", 128),
        "rope": rotary(integer("head_dim", 128), partial=0.5),
        "norm": rms_norm(1.5625e-7),
        "qkv_bias": flag("attention_bias", True),
        "o_bias": constant(False),
        "mlp_bias": constant(False),
    },
    tensors={"model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up")},
    without=GATE_UP_PROJECTIONS,
    interleaved_rope=constant(True),
)

GLM4 = GLM.but(
    "glm4",
    "Glm4ForCausalLM",
    models="GLM-4-0414, GLM-Z1",
    features="norms before and behind each block",
    fields={"norm_placement": constant("sandwich")},
    tensors={
        "model.layers.*.post_self_attn_layernorm": "layers.*.attn_out_norm",
        "model.layers.*.post_mlp_layernorm": "layers.*.mlp_out_norm",
    },
)

POST_NORMS = {
    "model.layers.*.post_attention_layernorm": "layers.*.attn_out_norm",
    "model.layers.*.post_feedforward_layernorm": "layers.*.mlp_out_norm",
}

OLMO2 = LLAMA.but(
    "olmo2",
    "Olmo2ForCausalLM",
    models="OLMo 2",
    features="norms behind each block, norms over all queries and keys",
    fields={
        "norm": rms_norm(1e-5),
        "norm_placement": constant("post"),
        "qk_norm": constant("width"),
        "mlp_bias": constant(False),
    },
    tensors={**POST_NORMS, **QK_NORMS},
    without=("model.layers.*.input_layernorm",),
)


def _exaone_slides(config: Config, layer: int) -> bool:
    """`sliding_window_pattern` is a period, whose last layer is global, or a word of L(ocal) and G(lobal)."""
    pattern = config.raw("sliding_window_pattern", 4)
    return pattern[layer % len(pattern)] == "L" if isinstance(pattern, str) else (layer + 1) % pattern != 0


def _exaone_nope_layers(config: Config) -> tuple[int, ...]:
    """Where some layers have a window, the global ones do not rotate."""
    windows = EXAONE_WINDOWS(config)
    return tuple(i for i, size in enumerate(windows) if size is None) if window(4096)(config) else ()


EXAONE_WINDOWS = windows_by_layer(4096, _exaone_slides)

EXAONE4 = OLMO2.but(
    "exaone4",
    "Exaone4ForCausalLM",
    models="EXAONE 4",
    features="norms behind each block, local layers with RoPE and global ones without",
    fields={
        "windows": EXAONE_WINDOWS,
        "nope_layers": _exaone_nope_layers,
        "qk_norm": constant("head"),
        "qkv_bias": constant(False),
        "o_bias": constant(False),
    },
    harmless=("sliding_window_pattern",),
)

GRANITE = LLAMA.but(
    "granite",
    "GraniteForCausalLM",
    models="Granite 3.x",
    features="scales on embedding, attention, residual and logits",
    fields={
        "embedding_scale": number("embedding_multiplier", 1.0),
        "attention_scale": number("attention_multiplier", 1.0),
        "residual_scale": number("residual_multiplier", 1.0),
        "logit_scale": inverse("logits_scaling"),
    },
)


_smollm3_nope_layers = nope_layers()


def _smollm3_slides(config: Config, layer: int) -> bool:
    return config.boolean("use_sliding_window", False) and layer in _smollm3_nope_layers(config)


SMOLLM3 = LLAMA.but(
    "smollm3",
    "SmolLM3ForCausalLM",
    models="SmolLM 3",
    features="layers without RoPE",
    fields={
        "rope": rotary(theta=2e6),
        "nope_layers": _smollm3_nope_layers,
        "windows": windows_by_layer(None, _smollm3_slides),
        "tied_embeddings": flag("tie_word_embeddings", True),
    },
    harmless=("max_window_layers",),
)

SEED_OSS = LLAMA.but(
    "seed_oss",
    "SeedOssForCausalLM",
    models="Seed-OSS 36B",
    features="biases on queries, keys and values",
    fields={
        "head_dim": integer("head_dim", 128),
        "rope": rotary(integer("head_dim", 128)),
        "qkv_bias": flag("attention_bias", True),
        "o_bias": flag("attention_out_bias"),
    },
)

MISTRAL3 = MISTRAL.part_of(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    models="Mistral Small 3.1, 3.2 (text)",
    features="text part of a multimodal model",
    beside=("vision_config", "image_token_index", "multimodal_projector_bias", "projector_hidden_act",
            "spatial_merge_size", "vision_feature_layer"),
    renames=TEXT_PREFIXES,
    ignored=VISION,
    tied_outside=True,
)  # fmt: skip

LLAMAS: tuple[Family, ...] = (
    LLAMA, MISTRAL, MISTRAL3, QWEN2, QWEN3, PHI3, GLM, GLM4, OLMO2, EXAONE4, GRANITE, SMOLLM3, SEED_OSS,
)  # fmt: skip
