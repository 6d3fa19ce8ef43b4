"""The family table: the one place that names model families.

A family is data. Its row says which `architectures` it covers, how each field of `ModelSpec` follows from config.json
(`fields`), and what its tensors are called (`tensors`). A new Llama-like family is a row; it changes what differs:

    LLAMA.but("nemo", "NemoForCausalLM", fields={"qkv_bias": constant(True)})

Tensor rows map a module's name in the checkpoint to its canonical name (see `trtx.converters.spec`); `*` stands for a
number and the suffix (`.weight`, `.bias`) is carried over. A checkpoint's module that holds several of ours, stacked
along its rows, maps to all of them in order:

    "model.layers.*.mlp.gate_up_proj": ("layers.*.mlp.gate", "layers.*.mlp.up")

Keys that a config leaves out mean what transformers' config class of the family takes for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.hf_config import Config
from trtx.converters.spec import ModelSpec, Rope

Rule = Callable[[Config], Any]
"""How a field of `ModelSpec` follows from a config."""

HARMLESS = {
    "identity of the checkpoint": (
        "architectures", "model_type", "_name_or_path", "_commit_hash", "transformers_version", "is_llama_config",
        "transformers.js_config", "unsloth_fixed", "unsloth_version",
    ),
    "training only": (
        "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
        "gradient_checkpointing", "pretraining_tp",
    ),
    "the stored tensors decide": ("torch_dtype", "dtype"),
    "the runtime decides": (
        "use_cache", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "output_attentions",
        "output_hidden_states", "return_dict", "torchscript", "max_sequence_length",
    ),
    "tokens: read from generation_config.json": (
        "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "do_sample", "temperature", "top_k", "top_p",
        "max_length", "repetition_penalty",
    ),
    "classification heads": ("id2label", "label2id", "problem_type", "finetuning_task"),
}  # fmt: skip
"""Keys that never change what the decoder computes, by the reason why."""

INERT: dict[str, Any] = {
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "pruned_heads": {}, "chunk_size_feed_forward": 0, "rope_interleaved": False,
    "partial_rotary_factor": 1.0, "quantization_config": None, "auto_map": None, "attention_bias": False,
    "mlp_bias": False, "use_sliding_window": False, "sliding_window": None, "use_mrope": False,
}  # fmt: skip
"""Keys that change nothing as long as they have this value."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rules


def constant(value: Any) -> Rule:
    """The family fixes it."""
    return lambda config: value


def integer(key: str, default: int | None = None) -> Rule:
    """A whole number that must be given unless it has a default."""
    return lambda config: config.integer(key) if default is None else config.integer(key, default)


def number(key: str, default: float) -> Rule:
    """A number."""
    return lambda config: config.number(key, default)


def flag(key: str, default: bool = False) -> Rule:
    """A boolean key."""
    return lambda config: config.boolean(key, default)


def kv_heads(config: Config) -> int:
    """`num_key_value_heads`; without it, every head has its own keys and values."""
    return config.integer("num_key_value_heads", config.integer("num_attention_heads"))


def head_dim(config: Config) -> int:
    """`head_dim`, or the hidden size shared out evenly among the heads."""
    given = config.integer("head_dim", None)
    if given is not None:
        return given
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}) where head_dim is not given")
    return hidden // heads


def activation(config: Config) -> str:
    """The gate's activation, by our name."""
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise config.unsupported("hidden_act", tuple(ACTIVATIONS))
    return ACTIVATIONS[name]


def no_windows(config: Config) -> tuple[None, ...]:
    """Every layer attends to everything."""
    return (None,) * config.integer("num_hidden_layers")


def sliding_window(config: Config) -> int | None:
    """`sliding_window`; null: none; absent: 4096, the default of Mistral's and Qwen's config classes."""
    return config.integer("sliding_window", None if config.given("sliding_window") else 4096)


def one_window(config: Config) -> tuple[int | None, ...]:
    """Every layer has the same `sliding_window`."""
    return (sliding_window(config),) * config.integer("num_hidden_layers")


def windows_by_layer(config: Config) -> tuple[int | None, ...]:
    """Qwen: `layer_types` says which layers slide; without it, those from `max_window_layers` on do."""
    layers = config.integer("num_hidden_layers")
    window = sliding_window(config)
    first_sliding = config.integer("max_window_layers", 28, least=0)
    kinds = config.texts("layer_types", None)
    if not config.boolean("use_sliding_window", False):
        window = None
    if kinds is None:
        return tuple(window if layer >= first_sliding else None for layer in range(layers))
    if len(kinds) != layers:
        raise config.wrong("layer_types", f"one entry for each of the {layers} layers")
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise config.unsupported("layer_types", ("full_attention", "sliding_attention"))
    if window is None and "sliding_attention" in kinds:
        raise config.wrong("layer_types", "no 'sliding_attention', as use_sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def rope(config: Config) -> Rope:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Defaults follow transformers' `modeling_rope_utils`, so that nothing about the frequencies is left implicit.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    section = old or new  # a config with both: transformers lets the old one win
    theta = section.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = section.text("rope_type", section.text("type", "default"))
    base = Rope(dim=head_dim(config), theta=theta)
    if kind == "default":
        result = base
    elif kind == "linear":
        result = replace(base, scaling="linear", factor=section.number("factor"))
    elif kind == "llama3":
        result = replace(
            base,
            scaling="llama3",
            factor=section.number("factor"),
            low_freq_factor=section.number("low_freq_factor"),
            high_freq_factor=section.number("high_freq_factor"),
            original_max_position=_original_max_position(section, config),
        )
    elif kind == "yarn":
        result = _yarn(base, section, config)
    else:
        raise section.unsupported("rope_type" if "rope_type" in section else "type", ("linear", "llama3", "yarn"))
    section.finish(inert=INERT)
    return result


def _yarn(base: Rope, section: Config, config: Config) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071).

    The attention factor, unless given, is 0.1 ln(factor) + 1 (section 3.4, equation 22); with `mscale` and
    `mscale_all_dim` (DeepSeek) it is the ratio of 0.1 m ln(factor) + 1 for the two.
    """
    factor = section.number("factor")
    mscale, mscale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1.0)
    return replace(
        base,
        scaling="yarn",
        factor=factor,
        original_max_position=_original_max_position(section, config),
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=section.number("attention_factor", inferred),
        truncate=section.boolean("truncate", True),
    )


def _original_max_position(section: Config, config: Config) -> int:
    default = config.integer("max_position_embeddings")
    return section.integer("original_max_position_embeddings", default)


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: for reports.
        architectures: transformers' class names (`architectures` of config.json).
        model_types: `model_type` of config.json.
        fields: field of `ModelSpec` → rule.
        tensors: module name in the checkpoint → canonical module name, or names, stacked along the rows.
        ignored: tensor names (patterns) that are stored and not needed.
        harmless: keys that, in this family, never change what is computed; `HARMLESS` are those of every family.
        gguf: llama.cpp's name of the architecture, if it is this family alone.
        gguf_pairs_rows: llama.cpp stores its query and key rows in pairs.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    fields: Mapping[str, Rule]
    tensors: Mapping[str, str | tuple[str, ...]]
    ignored: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    gguf: str | None = None
    gguf_pairs_rows: bool = False

    def but(
        self,
        name: str,
        architecture: str,
        *,
        fields: Mapping[str, Rule],
        tensors: Mapping[str, str | tuple[str, ...]] | None = None,
        harmless: tuple[str, ...] = (),
        gguf: str | None = None,
        gguf_pairs_rows: bool = False,
    ) -> Family:
        """A family like this one but for what is given; its `model_type` is its name."""
        return replace(
            self,
            name=name,
            architectures=(architecture,),
            model_types=(name,),
            fields={**self.fields, **fields},
            tensors={**self.tensors, **(tensors or {})},
            harmless=harmless,
            gguf=gguf,
            gguf_pairs_rows=gguf_pairs_rows,
        )

    def spec(self, content: Mapping[str, Any], where: str) -> ModelSpec:
        """The `ModelSpec` of a config of this family.

        Args:
            content: a config.json, parsed.
            where: what to call it in errors.

        Raises:
            InputError: a key is missing or has an impossible value.
            UnsupportedError: a key or value is not modelled.
        """
        config = Config(content, where, self.name)
        fields = {field: rule(config) for field, rule in self.fields.items()}
        harmless = {key for keys in HARMLESS.values() for key in keys}
        config.finish(harmless.union(self.harmless), INERT)
        return ModelSpec(family=self.name, **fields)


LLAMA = Family(
    name="llama",
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
        "rope": rope,
        "norm_eps": number("rms_norm_eps", 1e-6),
        "max_positions": integer("max_position_embeddings"),
        "windows": no_windows,
        "activation": activation,
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
    gguf="llama",
    gguf_pairs_rows=True,
)

MISTRAL = LLAMA.but(
    "mistral",
    "MistralForCausalLM",
    fields={
        "windows": one_window,
        "qkv_bias": constant(False),
        "o_bias": constant(False),
        "mlp_bias": constant(False),
    },
    gguf_pairs_rows=True,
)

QWEN2 = LLAMA.but(
    "qwen2",
    "Qwen2ForCausalLM",
    fields={
        "windows": windows_by_layer,
        "qkv_bias": constant(True),
        "o_bias": constant(False),
        "mlp_bias": constant(False),
    },
    gguf="qwen2",
)

QWEN3 = LLAMA.but(
    "qwen3",
    "Qwen3ForCausalLM",
    fields={
        "head_dim": integer("head_dim", 128),
        "windows": windows_by_layer,
        "mlp_bias": constant(False),
        "qk_norm": constant(True),
    },
    tensors={
        "model.layers.*.self_attn.q_norm": "layers.*.attn.q_norm",
        "model.layers.*.self_attn.k_norm": "layers.*.attn.k_norm",
    },
    gguf="qwen3",
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)


def find_family(content: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json: by its `architectures`, or by its `model_type` where that is absent.

    Raises:
        InputError: it has neither, or the two disagree.
        UnsupportedError: no row of the table covers it, or the checkpoint is quantized already.
    """
    config = Config(content, where, "a language model")
    architectures, model_type = config.texts("architectures", []), config.text("model_type", None)
    if not architectures and model_type is None:
        raise InputError(
            f"{where}: neither 'architectures' nor 'model_type' says what model this is.",
            "Give a folder with the config.json of a language model.",
        )
    if "quantization_config" in config:
        method = config.section("quantization_config").text("quant_method", "of an unnamed kind")
        raise UnsupportedError(
            f"{where}: 'quantization_config' is there ({method}): the checkpoint is quantized already.",
            "Convert the unquantized model, then use `trtx quantize`.",
        )
    for family in FAMILIES:
        if architectures and not set(architectures) & set(family.architectures):
            continue
        if model_type is None or model_type in family.model_types:
            return family
        if architectures:
            raise InputError(
                f"{where}: 'architectures' is {architectures} but 'model_type' is {model_type!r}.",
                "Correct the one that is wrong.",
            )
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedError(
        f"{where}: architecture {architectures[0] if architectures else model_type!r} is not supported.",
        f"Use one of: {known}.",
    )


def find_gguf_family(architecture: str, where: str, sliding_window: bool) -> Family:
    """The family of a GGUF file: llama.cpp calls Mistral 'llama' too, and only its sliding window tells them apart.

    Raises:
        UnsupportedError: no row of the table covers it.
    """
    for family in FAMILIES:
        if family.gguf == architecture:
            return MISTRAL if family is LLAMA and sliding_window else family
    known = ", ".join(family.gguf for family in FAMILIES if family.gguf)
    raise UnsupportedError(f"{where}: GGUF architecture {architecture!r} is not supported.", f"Use one of: {known}.")
