"""Tiny random models and what transformers says of them: the oracle of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from tests.converters import tiny
from trtx.builder.build import BuildSettings, build

GAP = 1e-4
"""A token counts as the greedy one when its logit is within this of the largest."""

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-some-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with logits far enough apart for greedy decoding to mean something."""
    family, settings = VARIANTS[name]
    return tiny.randomize(tiny.make(family, **settings), seed, gain=1.5)


def engine_of(checkpoint: Path, out: Path, **settings: Any) -> Path:
    """An engine with small limits, for the CPU unless asked otherwise."""
    sizes = {"gpu": "cpu", "max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128, "kv_block_size": 16}
    build(checkpoint, out, BuildSettings(**{**sizes, **settings}))
    return out


def assert_greedy(model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Every token of `output` is transformers' greedy choice after what stands before it, up to `GAP`."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(output)[:, None])[:, 0]
    behind = logits.amax(-1) - chosen
    assert behind.max() < GAP, f"token {int(behind.argmax())} is {behind.max():.2g} below the largest logit"
