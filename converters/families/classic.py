"""Decoders from before Llama, and later ones that keep something of theirs: LayerNorm, ALiBi, an MLP without a gate."""

from __future__ import annotations

from typing import Any

from trtx.converters.errors import UnsupportedError
from trtx.converters.families import gguf
from trtx.converters.families.family import Family, Packed
from trtx.converters.families.llama import GATE_UP_PROJECTIONS, LLAMA, NO_BIAS, QK_NORMS
from trtx.converters.families.rules import (
    constant,
    even_head_dim,
    flag,
    head_dim,
    if_flag,
    integer,
    layer_norm,
    no_windows,
    number,
    one_window,
    only,
    plain,
    rotary,
    times,
    windows_by_layer,
)
from trtx.converters.hf_config import Config
from trtx.converters.spec import Activation, Alibi, Norm, Rope

BIASES = {"qkv_bias": constant(True), "o_bias": constant(True), "mlp_bias": constant(True)}
_even_head_dim = even_head_dim("hidden_size", "num_attention_heads")
_heads = integer("num_attention_heads")


def _qkv(name: str, **more: Any) -> Packed:
    """Queries, keys and values in one tensor."""
    return Packed((f"{name}.q", f"{name}.k", f"{name}.v"), **more)


def _shape(**fields: Any) -> dict[str, Any]:
    """The fields that every decoder has, with the heads of multi-head attention, and what differs."""
    return {
        "vocab_size": integer("vocab_size"),
        "hidden_size": integer("hidden_size"),
        "num_layers": integer("num_hidden_layers"),
        "num_heads": _heads,
        "num_kv_heads": _heads,
        "head_dim": _even_head_dim,
        "rope": constant(None),
        "windows": no_windows,
        **fields,
    }


def _inner(config: Config) -> int:
    """`n_inner`, or four times the hidden size."""
    return config.integer("intermediate_size", 4 * config.integer("hidden_size"))


# ---------------------------------------------------------------------------------------------------------------------
# GPT

_GPT_ALIASES = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size",
}  # fmt: skip
_GPT_HARMLESS = (
    "n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj",
)  # fmt: skip

GPT2 = Family(
    name="gpt2",
    models="GPT-2, DistilGPT-2, Cerebras-GPT",
    features="learned positions, LayerNorm, MLP without a gate, transposed storage",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    fields=_shape(
        intermediate_size=_inner,
        norm=layer_norm("layer_norm_epsilon"),
        max_positions=integer("max_position_embeddings", 1024),
        activation=plain("activation_function", "gelu_new"),
        attention_scale=if_flag("scale_attn_weights", None, 1.0, default=True),
        layer_scaled=flag("scale_attn_by_inverse_layer_idx"),
        learned_positions=constant(True),
        tied_embeddings=flag("tie_word_embeddings", True),
        **BIASES,
    ),
    tensors={
        "wte": "embed",
        "wpe": "positions",
        "h.*.ln_1": "layers.*.attn_norm",
        "h.*.attn.c_attn": _qkv("layers.*.attn", transposed=True),
        "h.*.attn.c_proj": Packed(("layers.*.attn.o",), transposed=True),
        "h.*.ln_2": "layers.*.mlp_norm",
        "h.*.mlp.c_fc": Packed(("layers.*.mlp.up",), transposed=True),
        "h.*.mlp.c_proj": Packed(("layers.*.mlp.down",), transposed=True),
        "ln_f": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("transformer.", ""),),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    aliases=_GPT_ALIASES,
    harmless=_GPT_HARMLESS,
    gguf=(gguf.GPT2,),
)

GPTJ = Family(
    name="gptj",
    models="GPT-J 6B",
    features="partial interleaved RoPE, attention and MLP in parallel",
    architectures=("GPTJForCausalLM",),
    model_types=("gptj",),
    fields=_shape(
        intermediate_size=_inner,
        rope=lambda config: Rope(config.integer("rotary_dim")),
        norm=layer_norm("layer_norm_epsilon"),
        max_positions=integer("max_position_embeddings", 2048),
        activation=plain("activation_function", "gelu_new"),
        parallel=constant("shared_norm"),
        mlp_bias=constant(True),
        head_bias=constant(True),
        tied_embeddings=flag("tie_word_embeddings"),
    ),
    tensors={
        "wte": "embed",
        "h.*.ln_1": "layers.*.attn_norm",
        "h.*.attn.q_proj": "layers.*.attn.q",
        "h.*.attn.k_proj": "layers.*.attn.k",
        "h.*.attn.v_proj": "layers.*.attn.v",
        "h.*.attn.out_proj": "layers.*.attn.o",
        "h.*.mlp.fc_in": "layers.*.mlp.up",
        "h.*.mlp.fc_out": "layers.*.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("transformer.", ""),),
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    interleaved_rope=constant(True),
    aliases=_GPT_ALIASES,
    harmless=(*_GPT_HARMLESS, "scale_attn_weights", "rotary", "tokenizer_class", "gradient_checkpointing"),
)


def _neox_rope(config: Config) -> Rope:
    """`rotary_emb_base` and `rotary_pct`, unless the scaling's section says otherwise."""
    theta, part = config.number("rotary_emb_base", 10000.0), config.number("rotary_pct", 0.25)
    return rotary(_even_head_dim, theta, part)(config)


GPT_NEOX = Family(
    name="gpt_neox",
    models="GPT-NeoX 20B, Pythia, RedPajama-INCITE",
    features="partial RoPE, attention and MLP in parallel",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    fields=_shape(
        intermediate_size=integer("intermediate_size"),
        rope=_neox_rope,
        norm=layer_norm("layer_norm_eps"),
        max_positions=integer("max_position_embeddings", 2048),
        activation=plain("hidden_act", "gelu"),
        parallel=if_flag("use_parallel_residual", "own_norms", "no", default=True),
        qkv_bias=flag("attention_bias", True),
        o_bias=flag("attention_bias", True),
        mlp_bias=constant(True),
        tied_embeddings=flag("tie_word_embeddings"),
    ),
    tensors={
        "gpt_neox.embed_in": "embed",
        "gpt_neox.layers.*.input_layernorm": "layers.*.attn_norm",
        "gpt_neox.layers.*.attention.query_key_value": _qkv("layers.*.attn", interleave="heads"),
        "gpt_neox.layers.*.attention.dense": "layers.*.attn.o",
        "gpt_neox.layers.*.post_attention_layernorm": "layers.*.mlp_norm",
        "gpt_neox.layers.*.mlp.dense_h_to_4h": "layers.*.mlp.up",
        "gpt_neox.layers.*.mlp.dense_4h_to_h": "layers.*.mlp.down",
        "gpt_neox.final_layer_norm": "final_norm",
        "embed_out": "lm_head",
        "lm_head": "lm_head",
    },
    ignored=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    harmless=("is_decoder", "bos_token", "eos_token"),
)

# ---------------------------------------------------------------------------------------------------------------------
# ALiBi


def _all_biases(config: Config) -> bool:
    if config.boolean("slow_but_exact", False) and config.integer("pretraining_tp", 1) > 1:
        raise config.unsupported("slow_but_exact")
    return True


BLOOM = Family(
    name="bloom",
    models="BLOOM, BLOOMZ",
    features="ALiBi, norm of the embedding",
    architectures=("BloomForCausalLM",),
    model_types=("bloom",),
    fields=_shape(
        intermediate_size=times(4, "hidden_size"),
        norm=layer_norm("layer_norm_epsilon"),
        max_positions=integer("seq_length", 2048),
        activation=constant(Activation("gelu_tanh", gated=False)),
        alibi=constant(Alibi()),
        embedding_norm=constant(True),
        normed_residual=flag("apply_residual_connection_post_layernorm"),
        tied_embeddings=flag("tie_word_embeddings", True),
        qkv_bias=constant(True),
        o_bias=_all_biases,
        mlp_bias=constant(True),
    ),
    tensors={
        "word_embeddings": "embed",
        "word_embeddings_layernorm": "embed_norm",
        "h.*.input_layernorm": "layers.*.attn_norm",
        "h.*.self_attention.query_key_value": _qkv("layers.*.attn", interleave="heads"),
        "h.*.self_attention.dense": "layers.*.attn.o",
        "h.*.post_attention_layernorm": "layers.*.mlp_norm",
        "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up",
        "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("transformer.", ""),),
    aliases={"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
    inert={"n_inner": None},
    harmless=(
        "offset_alibi", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add",
        "skip_bias_add_qkv",
    ),
    gguf=(gguf.BLOOM,),
)  # fmt: skip


def _mpt_attention(config: Config) -> Config:
    """`attn_config`, without what would make another model of it."""
    section = config.section("attn_config")
    only(section, "alibi", (True,), True)
    only(section, "qk_ln", (False,), False)
    only(section, "prefix_lm", (False,), False)
    only(section, "attn_type", ("multihead_attention",), "multihead_attention")
    return section


def _mpt_alibi(config: Config) -> Alibi:
    return Alibi(_mpt_attention(config).number("alibi_bias_max", 8.0))


def _mpt_inner(config: Config) -> int:
    return config.integer("expansion_ratio", 4) * config.integer("hidden_size")


MPT = Family(
    name="mpt",
    models="MPT 7B, 30B",
    features="ALiBi, no biases",
    architectures=("MptForCausalLM", "MPTForCausalLM"),
    model_types=("mpt",),
    fields=_shape(
        intermediate_size=_mpt_inner,
        norm=layer_norm("layer_norm_epsilon", bias=False),
        max_positions=integer("max_position_embeddings", 2048),
        activation=constant(Activation("gelu", gated=False)),
        alibi=_mpt_alibi,
        attention_scale=lambda config: _mpt_attention(config).number("softmax_scale", None),
        qkv_clip=lambda config: _mpt_attention(config).number("clip_qkv", None) or None,
        tied_embeddings=flag("tie_word_embeddings", True),
    ),
    tensors={
        "wte": "embed",
        "blocks.*.norm_1": "layers.*.attn_norm",
        "blocks.*.attn.Wqkv": _qkv("layers.*.attn"),
        "blocks.*.attn.out_proj": "layers.*.attn.o",
        "blocks.*.norm_2": "layers.*.mlp_norm",
        "blocks.*.ffn.up_proj": "layers.*.mlp.up",
        "blocks.*.ffn.down_proj": "layers.*.mlp.down",
        "norm_f": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("transformer.", ""),),
    aliases={
        "d_model": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
    },
    harmless=(
        "emb_pdrop", "init_config", "init_device", "verbose", "embedding_fraction", "tokenizer_name",
        "learned_pos_emb", "use_pad_tok_in_ffn", "fc_type", "ffn_config",
    ),
    inert={"logit_scale": None, "no_bias": True, "norm_type": "low_precision_layernorm"},
)  # fmt: skip


def _falcon_kv_heads(config: Config) -> int:
    heads, multi_query = config.integer("num_attention_heads"), config.boolean("multi_query", True)
    given = config.integer("num_kv_heads", heads)
    if config.boolean("new_decoder_architecture", False):
        return given
    return 1 if multi_query else heads


def _falcon_parallel(config: Config) -> str:
    new, parallel = config.boolean("new_decoder_architecture", False), config.boolean("parallel_attn", True)
    norms = config.integer("num_ln_in_parallel_attn", 2 if new else 1)
    if norms == 2 and not (new and parallel):
        raise UnsupportedError(
            f"{config.where}: 'num_ln_in_parallel_attn' is 2 without the parallel form of 'new_decoder_architecture'.",
            "Correct config.json, or download the checkpoint again.",
        )
    if not parallel:
        return "no"
    return "own_norms" if norms == 2 else "shared_norm"


def _falcon_rope(config: Config) -> Rope | None:
    rope = rotary(_even_head_dim)(config)
    return None if config.boolean("alibi", False) else rope


def _falcon_alibi(config: Config) -> Alibi | None:
    """Computed in bf16 and scaled like the scores."""
    scale = _even_head_dim(config) ** -0.5
    return Alibi(scale=scale, rounded=True) if config.boolean("alibi", False) else None


def _falcon_inner(config: Config) -> int:
    return config.integer("ffn_hidden_size", 4 * config.integer("hidden_size"))


FALCON = Family(
    name="falcon",
    models="Falcon 7B, 40B, 180B, RW, Falcon 2 11B",
    features="multi-query and grouped attention, attention and MLP in parallel, ALiBi",
    architectures=("FalconForCausalLM",),
    model_types=("falcon",),
    fields=_shape(
        num_kv_heads=_falcon_kv_heads,
        intermediate_size=_falcon_inner,
        rope=_falcon_rope,
        norm=layer_norm("layer_norm_epsilon"),
        max_positions=integer("max_position_embeddings", 2048),
        activation=plain("activation", "gelu"),
        alibi=_falcon_alibi,
        parallel=_falcon_parallel,
        qkv_bias=flag("bias"),
        o_bias=flag("bias"),
        mlp_bias=flag("bias"),
        tied_embeddings=flag("tie_word_embeddings", True),
    ),
    tensors={
        "word_embeddings": "embed",
        "h.*.input_layernorm": "layers.*.attn_norm",
        "h.*.ln_attn": "layers.*.attn_norm",
        "h.*.self_attention.query_key_value": _qkv("layers.*.attn", interleave="heads"),
        "h.*.self_attention.dense": "layers.*.attn.o",
        "h.*.post_attention_layernorm": "layers.*.mlp_norm",
        "h.*.ln_mlp": "layers.*.mlp_norm",
        "h.*.mlp.dense_h_to_4h": "layers.*.mlp.up",
        "h.*.mlp.dense_4h_to_h": "layers.*.mlp.down",
        "ln_f": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("transformer.", ""),),
    aliases={"n_embed": "hidden_size"},
    inert={"apply_residual_connection_post_layernorm": False},
    gguf=(gguf.FALCON, gguf.FALCON_40B),
)

# ---------------------------------------------------------------------------------------------------------------------
# OPT


def _opt_final_norm(config: Config) -> bool:
    removed = config.boolean("_remove_final_layer_norm", False)
    return config.boolean("do_layer_norm_before", True) and not removed


OPT = Family(
    name="opt",
    models="OPT, Galactica",
    features="learned positions, norms of the residual stream, narrow embedding",
    architectures=("OPTForCausalLM",),
    model_types=("opt",),
    fields=_shape(
        intermediate_size=integer("ffn_dim"),
        norm=constant(Norm(1e-5, "layer", bias=True)),
        norm_placement=if_flag("do_layer_norm_before", "pre", "residual", default=True),
        final_norm=_opt_final_norm,
        max_positions=integer("max_position_embeddings", 2048),
        activation=plain("activation_function", "relu"),
        embedding_size=lambda config: config.integer("word_embed_proj_dim", None),
        learned_positions=constant(True),
        qkv_bias=flag("enable_bias", True),
        o_bias=flag("enable_bias", True),
        mlp_bias=flag("enable_bias", True),
        tied_embeddings=flag("tie_word_embeddings", True),
    ),
    tensors={
        "model.decoder.embed_tokens": "embed",
        "model.decoder.embed_positions": Packed(("positions",), skip=2),
        "model.decoder.project_in": "embed_in",
        "model.decoder.project_out": "embed_out",
        "model.decoder.layers.*.self_attn_layer_norm": "layers.*.attn_norm",
        "model.decoder.layers.*.self_attn.q_proj": "layers.*.attn.q",
        "model.decoder.layers.*.self_attn.k_proj": "layers.*.attn.k",
        "model.decoder.layers.*.self_attn.v_proj": "layers.*.attn.v",
        "model.decoder.layers.*.self_attn.out_proj": "layers.*.attn.o",
        "model.decoder.layers.*.final_layer_norm": "layers.*.mlp_norm",
        "model.decoder.layers.*.fc1": "layers.*.mlp.up",
        "model.decoder.layers.*.fc2": "layers.*.mlp.down",
        "model.decoder.final_layer_norm": "final_norm",
        "lm_head": "lm_head",
    },
    renames=(("decoder.", "model.decoder."),),
    harmless=("dropout", "activation_dropout", "prefix", "init_std"),
    inert={"layer_norm_elementwise_affine": True},
)

# ---------------------------------------------------------------------------------------------------------------------
# Llama's attention with LayerNorm

PHI = LLAMA.but(
    "phi",
    "PhiForCausalLM",
    models="Phi 1, 1.5, 2",
    features="LayerNorm, partial RoPE, attention and MLP in parallel",
    fields={
        "rope": rotary(partial=0.5),
        "norm": layer_norm("layer_norm_eps"),
        "max_positions": integer("max_position_embeddings", 2048),
        "activation": plain("hidden_act", "gelu_new"),
        "parallel": constant("shared_norm"),
        "qk_norm": if_flag("qk_layernorm", "head", "none"),
        "head_bias": constant(True),
        **BIASES,
    },
    tensors={
        "model.layers.*.self_attn.dense": "layers.*.attn.o",
        "model.layers.*.self_attn.q_layernorm": "layers.*.attn.q_norm",
        "model.layers.*.self_attn.k_layernorm": "layers.*.attn.k_norm",
        "model.layers.*.mlp.fc1": "layers.*.mlp.up",
        "model.layers.*.mlp.fc2": "layers.*.mlp.down",
        "model.final_layernorm": "final_norm",
    },
    without=(
        "model.layers.*.self_attn.o_proj", "model.layers.*.post_attention_layernorm", "model.norm",
        *GATE_UP_PROJECTIONS, "model.layers.*.mlp.down_proj",
    ),
)  # fmt: skip

STARCODER2 = LLAMA.but(
    "starcoder2",
    "Starcoder2ForCausalLM",
    models="StarCoder 2",
    features="LayerNorm, MLP without a gate, sliding window",
    fields={
        "num_kv_heads": integer("num_key_value_heads", 2),
        "norm": layer_norm("norm_epsilon"),
        "max_positions": integer("max_position_embeddings", 4096),
        "windows": one_window(None),
        "activation": plain("hidden_act", "gelu_pytorch_tanh"),
        "qkv_bias": flag("use_bias", True),
        "o_bias": flag("use_bias", True),
        "mlp_bias": flag("use_bias", True),
        "tied_embeddings": flag("tie_word_embeddings", True),
    },
    tensors={"model.layers.*.mlp.c_fc": "layers.*.mlp.up", "model.layers.*.mlp.c_proj": "layers.*.mlp.down"},
    without=(*GATE_UP_PROJECTIONS, "model.layers.*.mlp.down_proj"),
    harmless=(
        "norm_type",
        "mlp_type",
        "activation_function",
        "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "scale_attn_weights",
    ),
    gguf=(gguf.STARCODER2,),
)

NEMOTRON = LLAMA.but(
    "nemotron",
    "NemotronForCausalLM",
    models="Nemotron 3, 4, Minitron",
    features="1 + w LayerNorm, squared ReLU, partial RoPE",
    fields={
        "num_kv_heads": integer("num_key_value_heads"),
        "rope": rotary(partial=0.5),
        "norm": layer_norm("norm_eps", offset=1.0),
        "max_positions": integer("max_position_embeddings", 4096),
        "activation": plain("hidden_act", "relu2"),
    },
    without=("model.layers.*.mlp.gate_proj",),
    harmless=("rope_percent",),
    gguf=(gguf.NEMOTRON,),
)

COHERE = LLAMA.but(
    "cohere",
    "CohereForCausalLM",
    models="Command R, R+, Aya 23",
    features="LayerNorm, attention and MLP in parallel, interleaved RoPE, scaled logits",
    fields={
        **NO_BIAS,
        "qkv_bias": flag("attention_bias"),
        "o_bias": flag("attention_bias"),
        "rope": rotary(theta=500000.0),
        "norm": layer_norm("layer_norm_eps", bias=False),
        "max_positions": integer("max_position_embeddings", 8192),
        "parallel": constant("shared_norm"),
        "qk_norm": if_flag("use_qk_norm", "heads", "none"),
        "logit_scale": number("logit_scale", 0.0625),
        "tied_embeddings": flag("tie_word_embeddings", True),
    },
    tensors=QK_NORMS,
    without=("model.layers.*.post_attention_layernorm",),
    interleaved_rope=constant(True),
    harmless=("model_max_length",),
)


def _cohere2_slides(config: Config, layer: int) -> bool:
    return (layer + 1) % config.integer("sliding_window_pattern", 4) != 0


_cohere2_windows = windows_by_layer(4096, _cohere2_slides)

COHERE2 = COHERE.but(
    "cohere2",
    "Cohere2ForCausalLM",
    models="Command R7B, Command A",
    features="local layers with RoPE and global ones without, attention and MLP in parallel",
    fields={
        "head_dim": head_dim,
        "rope": rotary(),
        "windows": _cohere2_windows,
        "nope_layers": lambda config: tuple(i for i, size in enumerate(_cohere2_windows(config)) if size is None),
        "qk_norm": constant("none"),
    },
    harmless=(
        "layer_switch", "order_of_interleaved_layers", "use_parallel_embedding", "sliding_window_pattern",
        "_sliding_window_pattern",
    ),
    inert={
        "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_parallel_block": True, "use_qk_norm": False,
        "use_embedding_sharing": True, "use_gated_activation": True,
    },
)  # fmt: skip

CLASSICS: tuple[Family, ...] = (
    GPT2, GPTJ, GPT_NEOX, BLOOM, MPT, FALCON, OPT, PHI, STARCODER2, NEMOTRON, COHERE, COHERE2,
)  # fmt: skip
