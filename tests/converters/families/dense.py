"""Tiny variants of Llama and its nearest kin."""

from __future__ import annotations

from typing import Any

from tests.converters.families.variant import SIZES, Variant

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def _variant(family: str, module: str, name: str, **settings: Any) -> Variant:
    return Variant(family, f"{module}:{name}Config", f"{module}:{name}ForCausalLM", {**SIZES, **settings})


def llama(**settings: Any) -> Variant:
    """A tiny Llama."""
    return _variant("llama", "llama", "Llama", **settings)


def mistral(**settings: Any) -> Variant:
    """A tiny Mistral."""
    return _variant("mistral", "mistral", "Mistral", **settings)


def qwen2(**settings: Any) -> Variant:
    """A tiny Qwen 2."""
    return _variant("qwen2", "qwen2", "Qwen2", **settings)


def qwen3(**settings: Any) -> Variant:
    """A tiny Qwen 3."""
    return _variant("qwen3", "qwen3", "Qwen3", **settings)


VARIANTS: dict[str, Variant] = {
    "llama": llama(),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-llama3": llama(rope_parameters=LLAMA3),
    "llama-linear": llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "llama-yarn": llama(rope_parameters=YARN),
    "llama-head-dim": llama(head_dim=16),
    "llama-one-kv-head": llama(num_key_value_heads=1),
    "mistral": mistral(sliding_window=None),
    "mistral-window": mistral(sliding_window=20),
    "qwen2": qwen2(),
    "qwen2-tied": qwen2(tie_word_embeddings=True),
    "qwen2-some-windows": qwen2(use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen2-yarn": qwen2(rope_parameters=YARN),
    "qwen3": qwen3(head_dim=16),
    "seed_oss": _variant("seed_oss", "seed_oss", "SeedOss", head_dim=16, pad_token_id=0, bos_token_id=1),
    "seed_oss-out-bias": _variant(
        "seed_oss",
        "seed_oss",
        "SeedOss",
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    "qwen3-bias": qwen3(head_dim=16, attention_bias=True),
}
