"""A checkpoint whose tensors are not those that its config promises is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters import tiny
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import convert
from trtx.converters.errors import InputError
from trtx.converters.shards import INDEX

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "out")
    return tmp_path / "out"


def edit_tensors(checkpoint: Path, edit: Callable[[Tensors], Any]) -> None:
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("layers.1.attn.k.weight"), "tensor 'layers.1.attn.k.weight' is missing"),
        (lambda t: t.update(stowaway=torch.ones(2)), "tensor 'stowaway' is not part of the model"),
        (
            lambda t: t.update({"final_norm.weight": torch.ones(31)}),
            r"'final_norm.weight' is torch.float32 \[31\]; its config says torch.float32 \[32\]",
        ),
        (
            lambda t: t.update({"final_norm.weight": torch.ones(32, dtype=torch.bfloat16)}),
            "'final_norm.weight' is torch.bfloat16",
        ),
    ],
)
def test_tensors_that_the_config_does_not_promise(checkpoint: Path, edit: Callable[[Tensors], Any], words: str) -> None:
    edit_tensors(checkpoint, edit)
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint(checkpoint, draft=True)  # without the manifest, which has the files' sizes
    assert caught.value.remedy


def test_unknown_config_key(checkpoint: Path) -> None:
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "frobnicate": 3}))
    with pytest.raises(InputError, match="unknown key 'frobnicate'"):
        Checkpoint(checkpoint, draft=True)
