"""Mixtures of experts, some with latent attention."""

from __future__ import annotations

from trtx.converters.families import gguf
from trtx.converters.families.family import Family, Packed, Rule
from trtx.converters.families.llama import GATE_UP_PROJECTIONS, LLAMA, MISTRAL, QWEN2, QWEN3, TEXT_PREFIXES
from trtx.converters.families.rules import (
    all_layers,
    constant,
    flag,
    head_dim,
    if_flag,
    integer,
    layer_kinds,
    layer_norm,
    made,
    nope_layers,
    number,
    one_window,
    only,
    qwen_windows,
    rms_norm,
    rotary,
    sparse_layers,
    windows_by_layer,
    yarn_temperature,
)
from trtx.converters.hf_config import Config
from trtx.converters.spec import Activation, Latent, MoE, QueryScaling

DENSE_MLP = (*GATE_UP_PROJECTIONS, "model.layers.*.mlp.down_proj")

EXPERTS: dict[str, str | Packed] = {
    "model.layers.*.mlp.gate": "layers.*.mlp.router",
    "model.layers.*.mlp.experts.*.gate_proj": "layers.*.mlp.experts.*.gate",
    "model.layers.*.mlp.experts.*.up_proj": "layers.*.mlp.experts.*.up",
    "model.layers.*.mlp.experts.*.down_proj": "layers.*.mlp.experts.*.down",
    # As transformers 5 holds them in memory; most files do not.
    "model.layers.*.mlp.experts.gate_up_proj": Packed(
        ("layers.*.mlp.experts.#.gate.weight", "layers.*.mlp.experts.#.up.weight"), experts=True
    ),
    "model.layers.*.mlp.experts.down_proj": Packed(("layers.*.mlp.experts.#.down.weight",), experts=True),
}


def _shared(name: str) -> dict[str, str]:
    """The MLP that every token passes, under its name in a family."""
    return {f"model.layers.*.mlp.{name}.{part}_proj": f"layers.*.mlp.shared.{part}" for part in ("gate", "up", "down")}


BLOCK_SPARSE = {
    "model.layers.*.block_sparse_moe.gate": "layers.*.mlp.router",
    "model.layers.*.block_sparse_moe.experts.*.w1": "layers.*.mlp.experts.*.gate",
    "model.layers.*.block_sparse_moe.experts.*.w3": "layers.*.mlp.experts.*.up",
    "model.layers.*.block_sparse_moe.experts.*.w2": "layers.*.mlp.experts.*.down",
}

MIXTRAL = MISTRAL.but(
    "mixtral",
    "MixtralForCausalLM",
    models="Mixtral 8x7B, 8x22B",
    features="experts",
    fields={
        "norm": rms_norm(1e-5),
        "rope": rotary(theta=1e6),
        "windows": one_window(None),
        "moe": made(
            MoE,
            layers=all_layers,
            experts=integer("num_local_experts", 8),
            top_k=integer("num_experts_per_tok", 2),
            intermediate_size=integer("intermediate_size"),
            normalize=constant(True),
        ),
    },
    tensors={**BLOCK_SPARSE, **EXPERTS},
    without=DENSE_MLP,
    harmless=("router_jitter_noise",),
    gguf=(gguf.MIXTRAL,),
)


def _qwen2_moe_slides(config: Config, layer: int) -> bool:
    return layer % 2 == 0 and layer < config.integer("max_window_layers", 28, least=0)


QWEN2_MOE = QWEN2.but(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    models="Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
    features="experts, a gated shared expert",
    fields={
        "intermediate_size": integer("intermediate_size", 5632),
        "windows": qwen_windows(_qwen2_moe_slides),
        "qkv_bias": flag("qkv_bias", True),
        "moe": made(
            MoE,
            layers=sparse_layers,
            experts=integer("num_experts", 60),
            top_k=integer("num_experts_per_tok", 4),
            intermediate_size=integer("moe_intermediate_size", 1408),
            normalize=flag("norm_topk_prob"),
            shared_size=integer("shared_expert_intermediate_size", 5632),
            shared_gate=constant(True),
        ),
    },
    tensors={
        **EXPERTS,
        **_shared("shared_expert"),
        "model.layers.*.mlp.shared_expert_gate": "layers.*.mlp.shared_gate",
    },
    gguf=(gguf.QWEN2_MOE,),
)

QWEN3_MOE = QWEN3.but(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    models="Qwen 3 30B-A3B, 235B-A22B",
    features="experts, norms on queries and keys",
    fields={
        "intermediate_size": integer("intermediate_size", 6144),
        "head_dim": head_dim,
        "rope": rotary(),
        "windows": qwen_windows(lambda config, layer: True),
        "moe": made(
            MoE,
            layers=sparse_layers,
            experts=integer("num_experts", 128),
            top_k=integer("num_experts_per_tok", 8),
            intermediate_size=integer("moe_intermediate_size", 768),
            normalize=flag("norm_topk_prob"),
        ),
    },
    tensors=EXPERTS,
    aliases={"num_local_experts": "num_experts"},
    gguf=(gguf.QWEN3_MOE,),
)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSeek


def _first_dense(default: int) -> Rule:
    def rule(config: Config) -> tuple[int, ...]:
        only(config, "moe_layer_freq", (1,), 1)
        first = config.integer("first_k_dense_replace", default, least=0)
        return tuple(range(first, config.integer("num_hidden_layers")))

    return rule


def _mla_heads(config: Config) -> int:
    heads = config.integer("num_attention_heads")
    if config.integer("num_key_value_heads", heads) != heads:
        raise config.wrong("num_key_value_heads", f"num_attention_heads ({heads})")
    return heads


def _mla_head_dim(config: Config) -> int:
    return config.integer("qk_nope_head_dim", 128) + config.integer("qk_rope_head_dim", 64)


def _mla_scale(config: Config) -> float:
    """head_dim**-0.5, times the square of YaRN's temperature for `mscale_all_dim`."""
    scale = _mla_head_dim(config) ** -0.5
    section = config.section("rope_scaling") or config.section("rope_parameters")
    everywhere = section.number("mscale_all_dim", 0.0)
    return scale * yarn_temperature(section.number("factor"), everywhere) ** 2 if everywhere else scale


def _groups(config: Config) -> tuple[int, int]:
    """V2 chooses from all experts ('greedy') or from the best groups."""
    only(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups, best = config.integer("n_group", 1), config.integer("topk_group", 1)
    return (groups, best) if config.text("topk_method", "greedy") == "group_limited_greedy" else (1, 1)


def _shared_size(config: Config) -> int:
    return config.integer("moe_intermediate_size") * config.integer("n_shared_experts")


def _always_scored_by(kind: str) -> Rule:
    def rule(config: Config) -> str:
        only(config, "scoring_func", (kind,), kind)
        return kind

    return rule


def _not_normalized(config: Config) -> bool:
    only(config, "norm_topk_prob", (False,), False)
    return False


def _corrected(config: Config) -> bool:
    only(config, "topk_method", ("noaux_tc",), "noaux_tc")
    return True


DEEPSEEK_V2 = LLAMA.but(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    models="DeepSeek V2, V2-Lite, Coder-V2",
    features="latent attention (MLA), experts chosen by group, shared experts",
    fields={
        "num_kv_heads": _mla_heads,
        "head_dim": _mla_head_dim,
        "rope": rotary(integer("qk_rope_head_dim", 64)),
        "attention_scale": _mla_scale,
        "qkv_bias": constant(False),
        "latent": made(
            Latent,
            query_rank=lambda config: config.integer("q_lora_rank", None if config.given("q_lora_rank") else 1536),
            rank=integer("kv_lora_rank", 512),
            value_dim=integer("v_head_dim", 128),
            norm_eps=constant(1e-6),
            bias=flag("attention_bias"),
        ),
        "moe": made(
            MoE,
            layers=_first_dense(0),
            experts=integer("n_routed_experts", 64),
            top_k=integer("num_experts_per_tok"),
            intermediate_size=integer("moe_intermediate_size", 1407),
            scores=_always_scored_by("softmax"),
            normalize=_not_normalized,
            scale=number("routed_scaling_factor", 1.0),
            groups=lambda config: _groups(config)[0],
            top_groups=lambda config: _groups(config)[1],
            shared_size=_shared_size,
        ),
    },
    tensors={
        "model.layers.*.self_attn.q_a_proj": "layers.*.attn.q_a",
        "model.layers.*.self_attn.q_a_layernorm": "layers.*.attn.q_a_norm",
        "model.layers.*.self_attn.q_b_proj": "layers.*.attn.q_b",
        "model.layers.*.self_attn.kv_a_proj_with_mqa": ("layers.*.attn.latent", "layers.*.attn.k_rope"),
        "model.layers.*.self_attn.kv_a_layernorm": "layers.*.attn.latent_norm",
        "model.layers.*.self_attn.kv_b_proj": Packed(
            ("layers.*.attn.k_up", "layers.*.attn.v_up"), interleave="heads"
        ),
        **EXPERTS,
        **_shared("shared_experts"),
    },
    without=("model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.v_proj"),
    interleaved_rope=constant(True),
    extra_layers=True,
    harmless=("ep_size", "seq_aux", "num_nextn_predict_layers", "head_dim", "qk_head_dim"),
)  # fmt: skip

DEEPSEEK_V3 = DEEPSEEK_V2.but(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    models="DeepSeek V3, V3.1, R1; Moonlight",
    features="latent attention (MLA), experts chosen by group with a correction, shared experts",
    fields={
        "mlp_bias": constant(False),
        "moe": made(
            MoE,
            layers=_first_dense(3),
            experts=integer("n_routed_experts", 256),
            top_k=integer("num_experts_per_tok", 8),
            intermediate_size=integer("moe_intermediate_size", 2048),
            scores=_always_scored_by("sigmoid"),
            normalize=flag("norm_topk_prob", True),
            scale=number("routed_scaling_factor", 2.5),
            groups=integer("n_group", 8),
            top_groups=integer("topk_group", 4),
            group_score=constant("top2"),
            correction=_corrected,
            shared_size=_shared_size,
        ),
    },
    tensors={"model.layers.*.mlp.gate.e_score_correction_bias": "layers.*.mlp.router_correction.weight"},
    interleaved_rope=flag("rope_interleave", True),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    harmless=("ep_size", "seq_aux", "num_nextn_predict_layers", "head_dim", "qk_head_dim"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Others


def _two_experts(config: Config) -> int:
    only(config, "num_experts_per_tok", (2,), 2)
    return 2


PHIMOE = MIXTRAL.but(
    "phimoe",
    "PhimoeForCausalLM",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    models="Phi 3.5 MoE",
    features="experts chosen by SparseMixer, LayerNorm, LongRoPE",
    fields={
        "norm": layer_norm("rms_norm_eps"),
        "qkv_bias": flag("attention_bias"),
        "o_bias": flag("attention_bias"),
        "head_bias": flag("lm_head_bias"),
        "moe": made(
            MoE,
            layers=all_layers,
            experts=integer("num_local_experts", 16),
            top_k=_two_experts,
            intermediate_size=integer("intermediate_size", 6400),
            scores=constant("sparsemixer"),
            jitter=number("router_jitter_noise", 0.01),
        ),
    },
    harmless=("input_jitter_noise",),
)


def _limit(config: Config) -> Activation:
    only(config, "swiglu_limit", (7.0,), 7.0)
    only(config, "hidden_act", ("silu",), "silu")
    return Activation("quick_gelu", limit=7.0, offset=1.0)


GPT_OSS = LLAMA.but(
    "gpt_oss",
    "GptOssForCausalLM",
    models="gpt-oss 20b, 120b",
    features="experts with a clamped SwiGLU, attention sinks, alternating windows, MXFP4 files",
    fields={
        "head_dim": integer("head_dim", 64),
        "rope": rotary(
            integer("head_dim", 64),
            theta=150000.0,
            scaling={"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
        ),
        "norm": rms_norm(1e-5),
        "windows": windows_by_layer(128, lambda config, layer: layer % 2 == 0),
        "activation": _limit,
        "sinks": constant(True),
        "qkv_bias": flag("attention_bias", True),
        "o_bias": flag("attention_bias", True),
        "mlp_bias": constant(False),
        "moe": made(
            MoE,
            layers=all_layers,
            experts=integer("num_local_experts", 128),
            top_k=integer("num_experts_per_tok", 4),
            intermediate_size=integer("intermediate_size", 2880),
            scores=constant("top_softmax"),
            router_bias=constant(True),
            expert_bias=constant(True),
        ),
    },
    tensors={
        "model.layers.*.self_attn.sinks": "layers.*.attn.sinks.weight",
        "model.layers.*.mlp.router": "layers.*.mlp.router",
        **{
            f"model.layers.*.mlp.experts.{stored}": Packed(
                tuple(f"layers.*.mlp.experts.#.{part}.{suffix}" for part in parts),
                transposed=True, interleave="rows", experts=True,
            )
            for stored, parts, suffix in (
                ("gate_up_proj", ("gate", "up"), "weight"),
                ("gate_up_proj_bias", ("gate", "up"), "bias"),
                ("down_proj", ("down",), "weight"),
                ("down_proj_bias", ("down",), "bias"),
            )
        },
    },
    without=DENSE_MLP,
    aliases={"num_experts": "num_local_experts"},
    harmless=("experts_per_token", "initial_context_length"),
)  # fmt: skip


_llama4_nope_layers = nope_layers(empty_is_absent=True)


def _chunks(config: Config) -> tuple[int | None, ...]:
    """Layers that rotate attend within chunks, unless `layer_types` says otherwise."""
    nope = _llama4_nope_layers(config)
    kinds = layer_kinds(
        config,
        ("full_attention", "chunked_attention"),
        lambda layer: "full_attention" if layer in nope else "chunked_attention",
    )
    size = config.integer("attention_chunk_size", 8192)
    return tuple(size if kind == "chunked_attention" else None for kind in kinds)


def _query_scaling(config: Config) -> QueryScaling | None:
    scaling = QueryScaling(config.number("floor_scale", 8192.0), config.number("attn_scale", 0.1))
    return scaling if config.raw("attn_temperature_tuning", True) else None


def _llama4_moe_layers(config: Config) -> tuple[int, ...]:
    """`moe_layers`, or every `interleave_moe_layer_step`-th layer."""
    step = config.integer("interleave_moe_layer_step", 1)
    return tuple(config.integers("moe_layers", list(range(step - 1, config.integer("num_hidden_layers"), step))))


LLAMA4 = LLAMA.but(
    "llama4_text",
    "Llama4ForCausalLM",
    models="Llama 4 (text)",
    features="experts that weigh their input, chunked attention, layers without RoPE, query scaling",
    fields={
        "intermediate_size": integer("intermediate_size_mlp", 16384),
        "head_dim": integer("head_dim", 128),
        "rope": rotary(integer("head_dim", 128), theta=500000.0),
        "norm": rms_norm(1e-5),
        "nope_layers": _llama4_nope_layers,
        "windows": _chunks,
        "chunked": constant(True),
        "query_scaling": _query_scaling,
        "qk_norm": if_flag("use_qk_norm", "unit", "none", default=True),
        "mlp_bias": constant(False),
        "moe": made(
            MoE,
            layers=_llama4_moe_layers,
            experts=integer("num_local_experts", 16),
            top_k=integer("num_experts_per_tok", 1),
            intermediate_size=integer("intermediate_size", 8192),
            scores=constant("sigmoid"),
            weighs_input=constant(True),
            shared_size=integer("intermediate_size", 8192),
        ),
    },
    tensors={
        **{f"model.layers.*.feed_forward.{part}_proj": f"layers.*.mlp.{part}" for part in ("gate", "up", "down")},
        "model.layers.*.feed_forward.router": "layers.*.mlp.router",
        **{
            f"model.layers.*.feed_forward.shared_expert.{part}_proj": f"layers.*.mlp.shared.{part}"
            for part in ("gate", "up", "down")
        },
        "model.layers.*.feed_forward.experts.gate_up_proj": Packed(
            ("layers.*.mlp.experts.#.gate.weight", "layers.*.mlp.experts.#.up.weight"), transposed=True, experts=True
        ),
        "model.layers.*.feed_forward.experts.down_proj": Packed(
            ("layers.*.mlp.experts.#.down.weight",), transposed=True, experts=True
        ),
    },
    without=DENSE_MLP,
    interleaved_rope=constant(True),
    harmless=("router_jitter_noise", "for_llm_compressor"),
)

LLAMA4_MULTIMODAL = LLAMA4.part_of(
    "llama4",
    "Llama4ForConditionalGeneration",
    models="Llama 4 Scout, Maverick (text)",
    features="text part of a multimodal model",
    beside=("vision_config", "image_token_index", "image_token_id", "boi_token_index", "eoi_token_index"),
    renames=TEXT_PREFIXES,
    ignored=("**vision_model.**", "**multi_modal_projector.**"),
)

MOES: tuple[Family, ...] = (
    MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, PHIMOE, GPT_OSS, LLAMA4, LLAMA4_MULTIMODAL,
)  # fmt: skip
