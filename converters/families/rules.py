"""Rules: how fields of `ModelSpec` follow from keys of config.json.

Keys that a config leaves out mean what transformers' config class of the family takes for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trtx.converters.families.family import Rule
from trtx.converters.hf_config import Config
from trtx.converters.spec import Activation, Norm, Rope

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# One key


def constant(value: Any) -> Rule:
    """The family fixes it."""
    return lambda config: value


def integer(key: str, default: int | None = None) -> Rule:
    """A whole number that must be given unless it has a default."""
    return lambda config: config.integer(key) if default is None else config.integer(key, default)


def number(key: str, default: float) -> Rule:
    """A number."""
    return lambda config: config.number(key, default)


def nullable(key: str, default: float | None = None) -> Rule:
    """A number; None where the key is null; where it is absent, the default."""
    return lambda config: config.number(key, None if config.given(key) else default)


def inverse(key: str, default: float = 1.0) -> Rule:
    """One divided by a number."""
    return lambda config: 1 / config.number(key, default)


def flag(key: str, default: bool = False) -> Rule:
    """A boolean key."""
    return lambda config: config.boolean(key, default)


def if_flag(key: str, yes: Any, no: Any, default: bool = False) -> Rule:
    """One of two values, by a boolean key."""
    return lambda config: yes if config.boolean(key, default) else no


def times(factor: int, key: str) -> Rule:
    """A multiple of a whole number."""
    return lambda config: factor * config.integer(key)


def made(kind: Callable[..., Any], **rules: Rule) -> Rule:
    """A nested part of the spec, of whose fields each has a rule."""
    return lambda config: kind(**{name: rule(config) for name, rule in rules.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def kv_heads(config: Config) -> int:
    """`num_key_value_heads`; without it, every head has its own keys and values."""
    return config.integer("num_key_value_heads", config.integer("num_attention_heads"))


def head_dim(config: Config) -> int:
    """`head_dim`, or the hidden size shared out evenly among the heads."""
    given = config.integer("head_dim", None)
    if given is not None:
        return given
    return even_head_dim("hidden_size", "num_attention_heads")(config)


def even_head_dim(hidden_key: str, heads_key: str) -> Callable[[Config], int]:
    """The hidden size shared out evenly among the heads."""

    def rule(config: Config) -> int:
        hidden, heads = config.integer(hidden_key), config.integer(heads_key)
        if hidden % heads:
            raise config.wrong(hidden_key, f"a multiple of {heads_key} ({heads}) where head_dim is not given")
        return hidden // heads

    return rule


# ---------------------------------------------------------------------------------------------------------------------
# Norms and activations


def rms_norm(default: float = 1e-6, offset: float = 0.0) -> Rule:
    """RMSNorm with `rms_norm_eps`."""
    return lambda config: Norm(config.number("rms_norm_eps", default), offset=offset)


def layer_norm(key: str, default: float = 1e-5, bias: bool = True, offset: float = 0.0) -> Rule:
    """LayerNorm with the eps that stands under `key`."""
    return lambda config: Norm(config.number(key, default), "layer", bias, offset)


def _activation_kind(config: Config, key: str, default: str) -> Any:
    name = config.text(key, default)
    if name not in ACTIVATIONS:
        raise config.unsupported(key, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]


def gated(key: str = "hidden_act", default: str = "silu") -> Rule:
    """An MLP with a gate, and the gate's activation."""
    return lambda config: Activation(_activation_kind(config, key, default))


def plain(key: str, default: str) -> Rule:
    """An MLP without a gate."""
    return lambda config: Activation(_activation_kind(config, key, default), gated=False)


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def no_windows(config: Config) -> tuple[None, ...]:
    """Every layer attends to everything."""
    return (None,) * config.integer("num_hidden_layers")


def window(default: int | None) -> Callable[[Config], int | None]:
    """`sliding_window`; null: none; absent: what the family's config class takes."""
    return lambda config: config.integer("sliding_window", None if config.given("sliding_window") else default)


def one_window(default: int | None) -> Rule:
    """Every layer has the same `sliding_window`."""
    return lambda config: (window(default)(config),) * config.integer("num_hidden_layers")


def layer_kinds(config: Config, kinds: Sequence[str], default: Callable[[int], str]) -> list[str]:
    """`layer_types`, one of `kinds` for each layer; where it is absent, what `default` says of a layer's index."""
    layers = config.integer("num_hidden_layers")
    found = config.texts("layer_types", [default(layer) for layer in range(layers)])
    if len(found) != layers:
        raise config.wrong("layer_types", f"one entry for each of the {layers} layers")
    if set(found) - set(kinds):
        raise config.unsupported("layer_types", kinds)
    return found


def windows_by_layer(default: int | None, slides: Callable[[Config, int], bool]) -> Rule:
    """`layer_types` says which layers have the `sliding_window`; where it is absent, `slides` does, given an index."""

    def rule(config: Config) -> tuple[int | None, ...]:
        size = window(default)(config)

        def kind(layer: int) -> str:
            return "sliding_attention" if size is not None and slides(config, layer) else "full_attention"

        found = layer_kinds(config, ("full_attention", "sliding_attention"), kind)
        if size is None and "sliding_attention" in found:
            raise config.wrong("layer_types", "no 'sliding_attention', as there is no sliding_window")
        return tuple(size if kind == "sliding_attention" else None for kind in found)

    return rule


def qwen_windows(slides: Callable[[Config, int], bool]) -> Rule:
    """As `windows_by_layer`, but only with `use_sliding_window`."""

    def rule(config: Config) -> tuple[int | None, ...]:
        config.integer("max_window_layers", None, least=0)
        if config.boolean("use_sliding_window", False):
            return windows_by_layer(4096, slides)(config)
        config.integer("sliding_window", None, least=0)
        if set(layer_kinds(config, ("full_attention", "sliding_attention"), lambda layer: "full_attention")) != {
            "full_attention"
        }:
            raise config.wrong("layer_types", "no 'sliding_attention', as use_sliding_window is off")
        return no_windows(config)

    return rule


def from_max_window_layers(config: Config, layer: int) -> bool:
    """Qwen: the layers from `max_window_layers` on slide."""
    return layer >= config.integer("max_window_layers", 28, least=0)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding


def nope_layers(empty_is_absent: bool = False) -> Callable[[Config], tuple[int, ...]]:
    """`no_rope_layers` holds a 0 for each layer that does not rotate; without it, every fourth does not."""

    def rule(config: Config) -> tuple[int, ...]:
        interval = config.integer("no_rope_layer_interval", 4)
        layers = range(config.integer("num_hidden_layers"))
        rotates = config.integers("no_rope_layers", None)
        if rotates is None or (empty_is_absent and not rotates):
            rotates = [int((layer + 1) % interval != 0) for layer in layers]
        if len(rotates) != len(layers):
            raise config.wrong("no_rope_layers", f"one entry for each of the {len(layers)} layers")
        return tuple(layer for layer in layers if not rotates[layer])

    return rule


SCALINGS = ("linear", "llama3", "yarn", "longrope")


def rotary(
    dim: Callable[[Config], int] = head_dim,
    theta: float = 10000.0,
    partial: float = 1.0,
    scaling: Mapping[str, Any] | None = None,
    original: int | None = None,
) -> Callable[[Config], Rope]:
    """Rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).

    Defaults follow transformers' `modeling_rope_utils`, so that nothing about the frequencies is left implicit.

    Args:
        dim: features of a head.
        theta: where the config gives no base.
        partial: the rotated part of them, where the config gives no `partial_rotary_factor`.
        scaling: what the family takes where the config has neither section.
        original: `original_max_position_embeddings`, where the config itself gives none.
    """

    def rule(config: Config) -> Rope:
        new, old = config.section("rope_parameters"), config.section("rope_scaling")
        section = old or new  # a config with both: transformers lets the old one win
        if scaling is not None and not section:
            section = Config(scaling, f"{config.where}: default RoPE", config.family)
        base = section.number("rope_theta", config.number("rope_theta", theta))
        part = section.number("partial_rotary_factor", config.number("partial_rotary_factor", partial))
        return scaled(Rope(int(dim(config) * part), base), section, config, original)

    return rule


def scaled(base: Rope, section: Config, config: Config, original: int | None = None) -> Rope:
    """`base` with the scaling that a section of the config describes; the section is read to its end."""
    kind = section.text("rope_type", section.text("type", "default"))
    if "short_factor" in section and kind in ("su", "yarn"):  # Phi-3's first names of it
        kind = "longrope"
    if kind not in ("default", *SCALINGS):
        raise section.unsupported("rope_type" if "rope_type" in section else "type", SCALINGS)
    own = config.integer("original_max_position_embeddings", original)
    if kind in ("llama3", "yarn", "longrope"):
        base = replace(base, original_max_position=_original_max_position(section, config, own))
    result = {
        "default": lambda *_: base,
        "linear": lambda *_: replace(base, scaling="linear", factor=section.number("factor")),
        "llama3": _bands,
        "yarn": _yarn,
        "longrope": _longrope,
    }[kind](base, section, config)
    section.finish(inert={"partial_rotary_factor": 1.0, "finetuned": True})
    return result


def _bands(base: Rope, section: Config, config: Config) -> Rope:
    return replace(
        base,
        scaling="bands",
        factor=section.number("factor"),
        low_freq_factor=section.number("low_freq_factor"),
        high_freq_factor=section.number("high_freq_factor"),
    )


def _yarn(base: Rope, section: Config, config: Config) -> Rope:
    """YaRN (Peng et al. 2023, arXiv:2309.00071).

    The attention factor, unless given, is 0.1 ln(factor) + 1 (section 3.4, equation 22); with `mscale` and
    `mscale_all_dim` (DeepSeek) it is the ratio of 0.1 m ln(factor) + 1 for the two.
    """
    factor = section.number("factor")
    mscale, mscale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    if mscale and mscale_all:
        inferred = yarn_temperature(factor, mscale) / yarn_temperature(factor, mscale_all)
    else:
        inferred = yarn_temperature(factor, 1.0)
    return replace(
        base,
        scaling="yarn",
        factor=factor,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        attention_factor=section.number("attention_factor", inferred),
        truncate=section.boolean("truncate", True),
    )


def yarn_temperature(factor: float, scale: float) -> float:
    """0.1 * scale * ln(factor) + 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(base: Rope, section: Config, config: Config) -> Rope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for each frequency, for short and for long contexts.

    The attention factor, unless given, is sqrt(1 + ln(factor) / ln(original)), where factor is the ratio of the
    context lengths; Phi-3.5-MoE gives one for each as `short_mscale` and `long_mscale`.
    """
    original = base.original_max_position
    factor = section.number("factor", config.integer("max_position_embeddings") / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    inferred = section.number("attention_factor", inferred)
    return replace(
        base,
        scaling="longrope",
        factor=factor,
        attention_factor=section.number("short_mscale", inferred),
        long_attention_factor=section.number("long_mscale", None),
        short_factors=_divisors(section, "short_factor", base.dim),
        long_factors=_divisors(section, "long_factor", base.dim),
    )


def _divisors(section: Config, key: str, dim: int) -> tuple[float, ...]:
    values = section.numbers(key)
    if len(values) != dim // 2:
        raise section.wrong(key, f"{dim // 2} numbers, one for each frequency")
    return tuple(values)


def _original_max_position(section: Config, config: Config, own: int | None) -> int:
    """The config's own entry wins over the section's, and so does the family's default of it, as in transformers."""
    given = section.integer("original_max_position_embeddings", None)
    found = given if own is None else own
    return config.integer("max_position_embeddings") if found is None else found


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def sparse_layers(config: Config) -> tuple[int, ...]:
    """Qwen: every `decoder_sparse_step`-th layer has experts, but for those of `mlp_only_layers`."""
    step, dense = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers", [])
    return tuple(i for i in range(config.integer("num_hidden_layers")) if i not in dense and (i + 1) % step == 0)


def all_layers(config: Config) -> tuple[int, ...]:
    """Every layer."""
    return tuple(range(config.integer("num_hidden_layers")))


def only(config: Config, key: str, values: Collection[Any], default: Any) -> None:
    """Refuse a key whose value has a meaning that is not modelled.

    Raises:
        UnsupportedError: it is there and has another value.
    """
    if config.raw(key, default) not in values:
        raise config.unsupported(key, tuple(map(str, values)))
