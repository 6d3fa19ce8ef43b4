"""The trtx checkpoint: a folder with canonical tensor names and a spec, whatever the model came from.

    config.json                       spec, dtype, quantization, provenance
    model-00001-of-0000N.safetensors  tensors named as in `ModelSpec.modules()` + suffixes of their formats
    model.safetensors.index.json      tensor → shard
    tokenizer.json, …                 copied from the source (`TOKENIZER_FILES`)
    manifest.json                     what made it

With an fp8 KV cache each layer also has `layers.I.attn.k_scale` and `.v_scale` (f32, []).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trtx.converters.artifact import Draft, Manifest
from trtx.converters.errors import InputError
from trtx.converters.shards import INDEX, Shards
from trtx.converters.spec import ModelSpec, Module, from_json
from trtx.quantize.formats import DTYPES, Quantization, Stored

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
CONFIG = "config.json"

Dtype = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class CheckpointConfig:
    """The content of a checkpoint's `config.json`.

    Attributes:
        dtype: of everything that is not quantized.
        provenance: where the weights came from: source, revision, kind of source, seed of random weights, …
    """

    spec: ModelSpec
    dtype: Dtype
    quantization: Quantization = field(default_factory=Quantization)
    provenance: dict[str, Any] = field(default_factory=dict)
    format: int = 1

    def expected(self) -> dict[str, Stored]:
        """Every tensor of the checkpoint, by full name, in the order of the modules."""
        dtype = DTYPES[self.dtype]
        tensors = {
            f"{module.name}.{suffix}": stored
            for module in self.spec.modules()
            for suffix, stored in self.quantization.stored(module, dtype).items()
        }
        if self.quantization.kv_cache == "fp8":
            for layer in range(self.spec.num_layers):
                for which in ("k_scale", "v_scale"):
                    tensors[f"layers.{layer}.attn.{which}"] = Stored(torch.float32, ())
        return tensors

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(stored.bytes for stored in self.expected().values())

    def write(self, draft: Draft) -> None:
        """Write `config.json` and what `trtx inspect` shows."""
        draft.write_json(
            CONFIG,
            {
                "format": self.format,
                "dtype": self.dtype,
                "quantization": vars(self.quantization),
                "provenance": self.provenance,
                "spec": self.spec.to_json(),
            },
        )
        draft.describe(
            family=self.spec.family,
            parameters=self.spec.parameters,
            dtype=self.dtype,
            quantization=self.quantization.format,
            kv_cache=self.quantization.kv_cache,
            provenance=self.provenance,
        )

    def with_quantization(self, quantization: Quantization) -> CheckpointConfig:
        """The same model with other formats."""
        return replace(self, quantization=quantization)


class Checkpoint:
    """A checkpoint opened for reading. Tensors are mapped, so opening one of any size is cheap.

    Args:
        draft: it is still being written: tensors and config are there, the manifest is not.

    Raises:
        InputError: not a complete trtx checkpoint, or its tensors are not those its config promises.
    """

    def __init__(self, path: Path | str, *, draft: bool = False) -> None:
        self.path = Path(path)
        if not draft:
            Manifest.read(self.path, kind="checkpoint")
        where = self.path / CONFIG
        try:
            content = json.loads(where.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error}).", "Convert the model again.") from error
        self.config = from_json(CheckpointConfig, content, str(where))
        self._check()

    @property
    def spec(self) -> ModelSpec:
        return self.config.spec

    @property
    def quantization(self) -> Quantization:
        return self.config.quantization

    @cached_property
    def shards(self) -> Shards:
        """The checkpoint's tensors by full name ('layers.0.attn.q.weight')."""
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        return Shards(self.path / name for name in sorted(set(index["weight_map"].values())))

    def tensor(self, name: str) -> Tensor:
        """One tensor, by full name."""
        return self.shards.tensor(name)

    def module(self, module: Module) -> dict[str, Tensor]:
        """The stored tensors of a module by suffix, the bias included."""
        stored = self.quantization.stored(module, DTYPES[self.config.dtype])
        return {suffix: self.tensor(f"{module.name}.{suffix}") for suffix in stored}

    def _check(self) -> None:
        expected = self.config.expected()
        for name, stored in expected.items():
            header = self.shards.get(name)
            if header is None:
                raise InputError(f"{self.path}: tensor {name!r} is missing.", "Convert the model again.")
            if (header.dtype, header.shape) != (stored.dtype, stored.shape):
                raise InputError(
                    f"{header.file}: tensor {name!r} is {header.dtype} {list(header.shape)}; "
                    f"its config says {stored.dtype} {list(stored.shape)}.",
                    "Convert the model again.",
                )
        if extra := sorted(self.shards.keys() - expected.keys()):
            raise InputError(f"{self.path}: tensor {extra[0]!r} is not part of the model.", "Convert the model again.")
