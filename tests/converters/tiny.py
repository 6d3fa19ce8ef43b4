"""Tiny random models of every family, made by transformers: the oracle of conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from trtx.converters.convert import convert

CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def make(family: str, **settings: Any) -> PreTrainedModel:
    """A model of `family` whose every parameter is random, norms and biases included."""
    config_class, model_class = CLASSES[family]
    model = model_class(config_class(**{**SIZES, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.5, generator=generator)
    return model


def randomize(model: PreTrainedModel, seed: int, gain: float) -> PreTrainedModel:
    """Draw every parameter again: norms near 1, matrices such that each multiplies its input's size by about `gain`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1, 0.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.normal_(0, gain / parameter.shape[1] ** 0.5, generator=generator)
    return model.eval()


def checkpoint_of(model: PreTrainedModel, folder: Path) -> Path:
    """The model, saved by transformers and converted."""
    model.save_pretrained(folder / "hf")
    convert(str(folder / "hf"), folder / "checkpoint")
    return folder / "checkpoint"


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Make a model and save it as a Hugging Face folder."""
    model = make(family, **settings).to(dtype)
    model.save_pretrained(folder)
    return model


_MODULES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
}  # fmt: skip


def canonical(name: str) -> str:
    """The canonical name of a parameter of these models, written out apart from the family table."""
    module, suffix = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        layer, rest = module.removeprefix("model.layers.").split(".", 1)
        return f"layers.{layer}.{_MODULES[rest]}.{suffix}"
    return {"model.embed_tokens": "embed", "model.norm": "final_norm", "lm_head": "lm_head"}[module] + f".{suffix}"


def canonical_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's parameters under canonical names; a tied output projection is left out."""
    tied = model.config.tie_word_embeddings
    return {canonical(n): t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
