"""Tiny random models of every family, made by transformers: the oracle of conversion and of the decoder."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from tests.converters.families import classic, dense, modern
from tests.converters.families.variant import SIZES, Variant
from trtx.converters.convert import convert

VARIANTS: dict[str, Variant] = {**dense.VARIANTS, **modern.VARIANTS, **classic.VARIANTS}

FIRST = {variant.family: name for name, variant in reversed(VARIANTS.items())}
"""A variant of each family."""

SDPA_ONLY = ("falcon",)
"""Families that transformers' eager attention computes wrongly: with ALiBi it adds the bias twice."""


def of(variant: Variant) -> PreTrainedModel:
    """transformers' model of a variant, with exact attention and every expert computed apart."""
    config = config_of(variant)
    config._attn_implementation = "sdpa" if variant.family in SDPA_ONLY else "eager"
    model = _class(variant.model)(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def config_of(variant: Variant) -> Any:
    """transformers' config of a variant. The config class writes into what it is given."""
    return _class(variant.config)(**copy.deepcopy(variant.settings))


def config_json(variant: Variant) -> dict[str, Any]:
    """The config.json of a variant, as transformers saves it."""
    return {**config_of(variant).to_diff_dict(), "architectures": [variant.model.split(":")[1]]}


def make(family: str, **settings: Any) -> PreTrainedModel:
    """A model of `family` whose every parameter is random, norms and biases included."""
    model = of(replace(VARIANTS[family], settings={**SIZES, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.5, generator=generator)
    return model


def randomize(model: PreTrainedModel, seed: int, gain: float) -> PreTrainedModel:
    """Draw every parameter again: norms near 1, matrices such that each multiplies its input's size by about `gain`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _draw(module, name, parameter, gain, generator)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "e_score_correction_bias":
                    buffer.normal_(0, 0.2, generator=generator)
    return model.eval()


def _draw(module: nn.Module, name: str, parameter: nn.Parameter, gain: float, generator: torch.Generator) -> None:
    kind = type(module).__name__
    if name.endswith("bias"):
        parameter.normal_(0, 0.3, generator=generator)
    elif "Norm" in kind:
        stores_offset = "Gemma" in kind or kind == "NemotronLayerNorm1P"
        parameter.normal_(0 if stores_offset else 1, 0.2, generator=generator)
    elif parameter.dim() == 1:
        parameter.normal_(0, 1, generator=generator)  # sinks
    else:
        inputs = parameter.shape[0] if kind == "Conv1D" else parameter.shape[-1]
        parameter.normal_(0, gain / inputs**0.5, generator=generator)


def _class(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


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
