"""Tiny models to quantize, and text for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from tests.converters import tiny
from trtx.quantize.pipeline import QuantizeSettings

SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
LENGTH = 32
ANYTHING = 1e9
"""A gate that lets everything pass: tiny random models lose much."""


def make(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A tiny model in fp32 whose activations have channels of very different size, as real ones do."""
    model = tiny.randomize(tiny.make(family, **{**SIZES, **settings}), seed=3, gain=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[::16] *= 4
    return model


def tokens(seed: int, windows: int = 4) -> torch.Tensor:
    """Token ids [windows, LENGTH]."""
    return torch.randint(SIZES["vocab_size"], (windows, LENGTH), generator=torch.Generator().manual_seed(seed))


def write_tokens(file: Path, seed: int) -> Path:
    """A JSONL file of `tokens(seed)`, a window a line."""
    file.write_text("".join(json.dumps({"input_ids": window.tolist()}) + "\n" for window in tokens(seed)))
    return file


def settings(folder: Path, format: str, **changes: Any) -> QuantizeSettings:
    """Calibrate on tokens(1), judge on tokens(2)."""
    fields: dict[str, Any] = {
        "calib_data": write_tokens(folder / "calib.jsonl", 1),
        "eval_data": write_tokens(folder / "eval.jsonl", 2),
        "calib_length": LENGTH,
        "eval_length": LENGTH,
        "batch_size": 2,
        "max_ppl_increase": ANYTHING,
        "device": "cpu",
    }
    return QuantizeSettings(format, **{**fields, **changes})
