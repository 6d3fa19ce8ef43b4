"""Gemma: norms that store weight - 1, scaled embeddings, soft caps, local and global layers."""

from __future__ import annotations

from trtx.converters.families import gguf
from trtx.converters.families.family import Family, Rule
from trtx.converters.families.llama import LLAMA, QK_NORMS, TEXT_PREFIXES, VISION
from trtx.converters.families.rules import (
    constant,
    flag,
    gated,
    integer,
    nullable,
    rms_norm,
    rotary,
    scaled,
    windows_by_layer,
)
from trtx.converters.hf_config import Config
from trtx.converters.spec import Rope

_head_dim = integer("head_dim", 256)


def _embedding_scale(config: Config) -> float:
    return config.integer("hidden_size") ** 0.5


def _query_scale(config: Config) -> float:
    return config.number("query_pre_attn_scalar", 256.0) ** -0.5


GEMMA = LLAMA.but(
    "gemma",
    "GemmaForCausalLM",
    models="Gemma 1, CodeGemma",
    features="1 + w norms, scaled embedding",
    fields={
        "head_dim": _head_dim,
        "rope": rotary(_head_dim),
        "norm": rms_norm(offset=1.0),
        "activation": gated("hidden_act", "gelu_pytorch_tanh"),
        "mlp_bias": constant(False),
        "embedding_scale": _embedding_scale,
        "tied_embeddings": flag("tie_word_embeddings", True),
    },
    harmless=("hidden_activation",),
    inert={"use_bidirectional_attention": False},
    gguf=(gguf.GEMMA,),
)

GEMMA2 = GEMMA.but(
    "gemma2",
    "Gemma2ForCausalLM",
    models="Gemma 2",
    features="norms before and behind each block, soft caps, local and global layers",
    fields={
        "activation": gated("hidden_activation", "gelu_pytorch_tanh"),
        "norm_placement": constant("sandwich"),
        "windows": windows_by_layer(4096, lambda config, layer: layer % 2 == 0),
        "attention_scale": _query_scale,
        "attention_softcap": nullable("attn_logit_softcapping", 50.0),
        "logit_softcap": nullable("final_logit_softcapping", 30.0),
    },
    tensors={
        "model.layers.*.post_attention_layernorm": "layers.*.attn_out_norm",
        "model.layers.*.pre_feedforward_layernorm": "layers.*.mlp_norm",
        "model.layers.*.post_feedforward_layernorm": "layers.*.mlp_out_norm",
    },
    harmless=("hidden_act",),
    inert={"use_bidirectional_attention": False},
    gguf=(gguf.GEMMA2,),
)


def _gemma3_rope(kind: str, old_key: str, theta: float) -> Rule:
    """`rope_parameters` has a section for each kind of layer; older configs have a key for each base."""

    def rule(config: Config) -> Rope:
        dim, sections = _head_dim(config), config.section("rope_parameters")
        if sections:
            both = {name: sections.section(name) for name in ("full_attention", "sliding_attention")}
            sections.finish()
            section = both[kind]
            return scaled(Rope(dim, section.number("rope_theta", theta)), section, config)
        base = Rope(dim, config.number(old_key, theta))
        scaling = config.section("rope_scaling")
        return scaled(base, scaling, config) if kind == "full_attention" else base

    return rule


def _gemma3_slides(config: Config, layer: int) -> bool:
    return (layer + 1) % config.integer("sliding_window_pattern", 6) != 0


GEMMA3 = GEMMA2.but(
    "gemma3_text",
    "Gemma3ForCausalLM",
    models="Gemma 3 270M, 1B",
    features="norms on queries and keys, local and global layers with RoPE of their own",
    fields={
        "vocab_size": integer("vocab_size", 262208),
        "num_heads": integer("num_attention_heads", 8),
        "num_kv_heads": integer("num_key_value_heads", 4),
        "max_positions": integer("max_position_embeddings", 131072),
        "rope": _gemma3_rope("full_attention", "rope_theta", 1e6),
        "local_rope": _gemma3_rope("sliding_attention", "rope_local_base_freq", 1e4),
        "windows": windows_by_layer(4096, _gemma3_slides),
        "qk_norm": constant("head"),
        "attention_softcap": constant(None),
        "logit_softcap": nullable("final_logit_softcapping"),
    },
    tensors=QK_NORMS,
    harmless=("hidden_act", "attn_logit_softcapping", "sliding_window_pattern", "_sliding_window_pattern"),
    inert={"use_bidirectional_attention": False},
    gguf=(gguf.GEMMA3,),
)

GEMMA3_MULTIMODAL = GEMMA3.part_of(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    models="Gemma 3 4B, 12B, 27B (text)",
    features="text part of a multimodal model",
    beside=("vision_config", "image_token_index", "image_token_id", "boi_token_index", "eoi_token_index",
            "boi_token_id", "eoi_token_id", "mm_tokens_per_image"),
    renames=TEXT_PREFIXES,
    ignored=VISION,
    tied_outside=True,
)  # fmt: skip

GEMMAS: tuple[Family, ...] = (GEMMA, GEMMA2, GEMMA3, GEMMA3_MULTIMODAL)
