"""How llama.cpp's GGUF files store a family: what a `Gguf` row says, and the rows.

llama.cpp has names of its own for architectures, tensors and metadata, lays some tensors out anew, and leaves out what
its own code for an architecture takes for granted. A row undoes this, so that the rest of the family table applies.
The layouts are those of `conversion/*.py` in ggml-org/llama.cpp, the defaults those of its `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Layout = Literal["same", "pairs", "grouped", "transposed", "plus_one", "row"]
"""How a stored tensor differs from Hugging Face's.

'pairs': the rows of each head stand in pairs (2i, 2i+1), as llama.cpp rotates them, not in halves (i, i + head_dim/2).
'grouped': all queries, then all keys, then all values; Hugging Face: so for each key/value head in turn.
'transposed': [out, in]; Hugging Face: [in, out].
'plus_one': holds 1 + w.
'row': a vector; Hugging Face: a matrix of one row.
"""


@dataclass(frozen=True)
class Module:
    """Hugging Face's name of a module, with `*` for the layer and `#` for the expert, and how it is stored.

    With `#`, the stored tensor holds every expert, counted by its first dimension.
    """

    name: str
    layout: Layout = "same"


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp stores a family.

    Attributes:
        architecture: `general.architecture`.
        modules: llama.cpp's name of a module → Hugging Face's. `*` stands for a number.
        keys: key of the architecture's section → key of config.json; dots there lead into sections. None: it repeats
            what the tensors' shapes say.
        config: entries of config.json that llama.cpp takes for granted, or for the default of a key that is absent.
        flags: boolean of config.json → the tensor that is stored where it is true.
        derived: further entries of config.json, given those so far.
        partial_rope: `rope.dimension_count` may be less than the head's size.
        allowed: keys that may have these values only, with which they say nothing more.
        when: where families share an architecture: a key (not 0) or tensor that files of this one have.
    """

    architecture: str
    modules: Mapping[str, Module]
    keys: Mapping[str, str | None]
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    partial_rope: bool = False
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    when: str | None = None

    def but(
        self,
        architecture: str,
        *,
        modules: Mapping[str, str | Module] | None = None,
        without: tuple[str, ...] = (),
        keys: Mapping[str, str | None] | None = None,
        config: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Gguf:
        """A row like this one but for what is given; modules, keys and config are added, less those of `without`."""
        return replace(
            self,
            architecture=architecture,
            modules={**_without(self.modules, without), **_modules(modules or {})},
            keys={**_without(self.keys, without), **(keys or {})},
            config={**self.config, **(config or {})},
            **{"when": None, **changes},
        )

    def with_norms_plus_one(self) -> Gguf:
        """Where Hugging Face's norms multiply by 1 + w, llama.cpp stores that sum."""
        return replace(
            self,
            modules={
                ours: replace(module, layout="plus_one") if ours.endswith("norm") else module
                for ours, module in self.modules.items()
            },
        )


def _modules(given: Mapping[str, str | Module]) -> dict[str, Module]:
    return {ours: Module(theirs) if isinstance(theirs, str) else theirs for ours, theirs in given.items()}


def _without(mapping: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name not in names}


# ---------------------------------------------------------------------------------------------------------------------
# Names of modules

_LAYER = "model.layers.*"
_DENSE_MLP = ("blk.*.ffn_gate", "blk.*.ffn_up", "blk.*.ffn_down")
_GATE = ("blk.*.ffn_gate",)
_QKV = ("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v")
_QK_NORMS = {
    "blk.*.attn_q_norm": f"{_LAYER}.self_attn.q_norm",
    "blk.*.attn_k_norm": f"{_LAYER}.self_attn.k_norm",
}


def _experts(owner: str, gate: str, up: str, down: str) -> dict[str, str | Module]:
    """The router, and each expert's matrices: stacked, or apart in files from before April 2024."""
    names = {"gate": gate, "up": up, "down": down}
    return {
        "blk.*.ffn_gate_inp": f"{_LAYER}.{owner}.gate",
        **{f"blk.*.ffn_{part}_exps": f"{_LAYER}.{owner}.experts.#.{name}" for part, name in names.items()},
        **{f"blk.*.ffn_{part}.*": f"{_LAYER}.{owner}.experts.*.{name}" for part, name in names.items()},
    }


_MLP_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")

# ---------------------------------------------------------------------------------------------------------------------
# Keys

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_RMS_EPS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_ROPE = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_scaling.rope_type",
    "rope.scaling.factor": "rope_scaling.factor",
    "rope.scaling.original_context_length": "rope_scaling.original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "rope_scaling.beta_fast",
    "rope.scaling.yarn_beta_slow": "rope_scaling.beta_slow",
}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
_Q_BIAS, _OUT_BIAS, _UP_BIAS = "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias"

# ---------------------------------------------------------------------------------------------------------------------
# Rows

QWEN2 = Gguf(
    "qwen2",
    modules=_modules({
        "token_embd": "model.embed_tokens",
        "blk.*.attn_norm": f"{_LAYER}.input_layernorm",
        "blk.*.attn_q": f"{_LAYER}.self_attn.q_proj",
        "blk.*.attn_k": f"{_LAYER}.self_attn.k_proj",
        "blk.*.attn_v": f"{_LAYER}.self_attn.v_proj",
        "blk.*.attn_output": f"{_LAYER}.self_attn.o_proj",
        "blk.*.ffn_norm": f"{_LAYER}.post_attention_layernorm",
        "blk.*.ffn_gate": f"{_LAYER}.mlp.gate_proj",
        "blk.*.ffn_up": f"{_LAYER}.mlp.up_proj",
        "blk.*.ffn_down": f"{_LAYER}.mlp.down_proj",
        "output_norm": "model.norm",
        "output": "lm_head",
    }),
    keys={
        **_SIZES, **_RMS_EPS, **_ROPE,
        "context_length": "max_position_embeddings",
        "feed_forward_length": "intermediate_size",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
    },
    config={"rope_theta": 10000.0},
)  # fmt: skip

LLAMA = QWEN2.but(
    "llama",
    modules={
        "blk.*.attn_q": Module(f"{_LAYER}.self_attn.q_proj", "pairs"),
        "blk.*.attn_k": Module(f"{_LAYER}.self_attn.k_proj", "pairs"),
    },
    flags={"attention_bias": _OUT_BIAS, "mlp_bias": _UP_BIAS},
    allowed={"tensor_data_layout": ("Meta AI original pth",)},
)

MISTRAL = LLAMA.but(
    "llama",
    keys={"attention.sliding_window": "sliding_window"},
    when="attention.sliding_window",
)

MIXTRAL = MISTRAL.but(
    "llama",
    modules=_experts("block_sparse_moe", "w1", "w3", "w2"),
    without=_DENSE_MLP,
    keys={**_EXPERTS, "expert_count": "num_local_experts"},
    when="expert_count",
)

QWEN3 = QWEN2.but("qwen3", modules=_QK_NORMS, flags={"attention_bias": _OUT_BIAS})

QWEN2_MOE = QWEN2.but(
    "qwen2moe",
    modules={
        **_MLP_EXPERTS,
        "blk.*.ffn_gate_inp_shexp": Module(f"{_LAYER}.mlp.shared_expert_gate", "row"),
        **{
            f"blk.*.ffn_{part}_shexp": f"{_LAYER}.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")
        },
    },
    without=_DENSE_MLP,
    keys={
        **_EXPERTS, **_EXPERT_WIDTH, "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    flags={"qkv_bias": _Q_BIAS},
)  # fmt: skip

QWEN3_MOE = QWEN3.but(
    "qwen3moe",
    modules=_MLP_EXPERTS,
    without=_DENSE_MLP,
    keys={**_EXPERTS, **_EXPERT_WIDTH},
    config={"norm_topk_prob": True},
)

PHI3 = QWEN2.but(
    "phi3",
    modules={"blk.*.attn_qkv": f"{_LAYER}.self_attn.qkv_proj", "blk.*.ffn_up": f"{_LAYER}.mlp.gate_up_proj"},
    without=(*_QKV, *_GATE),
    keys={
        "attention.sliding_window": "sliding_window",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.attn_factor": "rope_scaling.attention_factor",
    },
    partial_rope=True,
)

STARCODER2 = QWEN2.but(
    "starcoder2",
    modules={"blk.*.ffn_up": f"{_LAYER}.mlp.c_fc", "blk.*.ffn_down": f"{_LAYER}.mlp.c_proj"},
    without=(*_GATE, *_RMS_EPS),
    keys={"attention.layer_norm_epsilon": "norm_epsilon"},
    flags={"use_bias": _OUT_BIAS},
)

NEMOTRON = QWEN2.but(
    "nemotron",
    without=(*_GATE, *_RMS_EPS),
    # the value stands under either name, or under both
    keys={"attention.layer_norm_rms_epsilon": "norm_eps", "attention.layer_norm_epsilon": "norm_eps"},
    flags={"attention_bias": _OUT_BIAS, "mlp_bias": _UP_BIAS},
    partial_rope=True,
).with_norms_plus_one()

GEMMA = QWEN2.but("gemma").with_norms_plus_one()


def _gemma_scale(layers_of_27b: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """llama.cpp knows the largest model by its number of layers; only that one's scale is not that of `head_dim`."""

    def derived(config: Mapping[str, Any]) -> Mapping[str, Any]:
        if config.get("num_hidden_layers") == layers_of_27b:
            return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
        return {"query_pre_attn_scalar": config["head_dim"]}

    return derived


GEMMA2 = GEMMA.but(
    "gemma2",
    modules={
        "blk.*.post_attention_norm": f"{_LAYER}.post_attention_layernorm",
        "blk.*.ffn_norm": f"{_LAYER}.pre_feedforward_layernorm",
        "blk.*.post_ffw_norm": f"{_LAYER}.post_feedforward_layernorm",
    },
    keys={
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    derived=_gemma_scale(46),
    allowed={"attention.sliding_window_pattern": (2,)},
).with_norms_plus_one()

GEMMA3 = GEMMA2.but(
    "gemma3",
    modules=_QK_NORMS,
    without=("attn_logit_softcapping",),
    keys={
        "attention.sliding_window_pattern": "sliding_window_pattern",
        "rope.freq_base_swa": "rope_local_base_freq",
    },
    # the window is left out where no layer has one
    config={"rope_theta": 1000000.0, "sliding_window": None},
    derived=_gemma_scale(62),
    allowed={},
).with_norms_plus_one()

GPT2 = Gguf(
    "gpt2",
    modules=_modules({
        "token_embd": "wte",
        "position_embd": "wpe",
        "blk.*.attn_norm": "h.*.ln_1",
        "blk.*.attn_qkv": Module("h.*.attn.c_attn", "transposed"),
        "blk.*.attn_output": Module("h.*.attn.c_proj", "transposed"),
        "blk.*.ffn_norm": "h.*.ln_2",
        "blk.*.ffn_up": Module("h.*.mlp.c_fc", "transposed"),
        "blk.*.ffn_down": Module("h.*.mlp.c_proj", "transposed"),
        "output_norm": "ln_f",
        "output": "lm_head",
    }),
    keys={
        **_SIZES,
        "context_length": "n_positions",
        "feed_forward_length": "n_inner",
        "attention.head_count_kv": None,
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
)  # fmt: skip

BLOOM = Gguf(
    "bloom",
    modules=_modules({
        "token_embd": "word_embeddings",
        "token_embd_norm": "word_embeddings_layernorm",
        "blk.*.attn_norm": "h.*.input_layernorm",
        "blk.*.attn_qkv": Module("h.*.self_attention.query_key_value", "grouped"),
        "blk.*.attn_output": "h.*.self_attention.dense",
        "blk.*.ffn_norm": "h.*.post_attention_layernorm",
        "blk.*.ffn_up": "h.*.mlp.dense_h_to_4h",
        "blk.*.ffn_down": "h.*.mlp.dense_4h_to_h",
        "output_norm": "ln_f",
        "output": "lm_head",
    }),
    keys={
        **_SIZES,
        "context_length": "seq_length",
        "feed_forward_length": None,
        "attention.head_count_kv": None,
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
)  # fmt: skip

FALCON = BLOOM.but(
    "falcon",
    without=("token_embd_norm", "blk.*.ffn_norm"),
    keys={
        **_ROPE,
        "context_length": "max_position_embeddings",
        "feed_forward_length": "ffn_hidden_size",
        "attention.head_count_kv": "num_kv_heads",
    },
    config={"rope_theta": 10000.0, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    flags={"bias": "blk.0.attn_qkv.bias"},
    allowed={"tensor_data_layout": ("jploski",)},
)

FALCON_40B = FALCON.but(
    "falcon",
    modules={"blk.*.attn_norm": "h.*.ln_mlp", "blk.*.attn_norm_2": "h.*.ln_attn"},
    config={"num_ln_in_parallel_attn": 2},
    when="blk.0.attn_norm_2.weight",
)
