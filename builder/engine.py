"""The engine: a directory for one GPU kind and one parallel layout.

    engine.json                             `EngineConfig`: model, limits, layout, ledger, fingerprint
    rank0/weights-00001-of-0000N.safetensors  weights in kernel layout (fused groups where formats allow), or
    rank0/model.plan                        a TensorRT engine, which holds them
    rank0/kernels/                          compiled kernels of the `cuda` backend; see `runtime.cuda.cubins`
    tokenizer.json, …                       for prompts in text
    manifest.json                           what made it

An engine built from `random:CONFIG.json` holds no weights, only their seed; they are generated when it is loaded.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trtx.converters.artifact import Draft, Manifest
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.errors import InputError, MismatchError
from trtx.converters.shards import INDEX, Shards
from trtx.converters.spec import from_json

ENGINE = "engine.json"
PLAN = "model.plan"
KERNELS = "kernels"
ENGINE_FORMAT = 1


@dataclass(frozen=True)
class Limits:
    """What an engine was dimensioned for.

    Attributes:
        max_batch_size: sequences that run at once.
        max_num_tokens: tokens (prefill and decode) of one step.
        max_seq_len: prompt and output of one sequence.
        kv_block_size: tokens a KV block.
        kv_blocks: blocks of the pool.
        kv_dtype: what keys and values are stored in.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    kv_block_size: int
    kv_blocks: int
    kv_dtype: Literal["fp32", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class ParallelMapping:
    """How ranks share the model: tp × pp ranks."""

    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True)
class Fingerprint:
    """What the engine was made for and with.

    Attributes:
        device: 'cpu' or 'cuda'; has to match.
        gpu: name in the GPU table ('h100-sxm'), or 'cpu'; recorded, a difference is warned about.
        sm: compute capability ('9.0'); has to match where the engine holds compiled kernels. Empty on a CPU.
        versions: of the libraries that made it; recorded.
    """

    device: Literal["cpu", "cuda"]
    gpu: str
    sm: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineConfig:
    """The content of `engine.json`.

    Attributes:
        model: spec, stored dtype, quantization and provenance, as in the checkpoint.
        compute_dtype: of activations and of weights that are dequantized.
        random_seed: weights are generated from it instead of being stored.
        ledger: bytes by purpose, as `builder.ledger` planned them.
    """

    backend: Literal["torch", "cuda", "tensorrt", "tensorrt-rtx"]
    model: CheckpointConfig
    compute_dtype: Literal["fp32", "fp16", "bf16"]
    limits: Limits
    mapping: ParallelMapping
    fingerprint: Fingerprint
    ledger: dict[str, int]
    random_seed: int | None = None
    format: int = ENGINE_FORMAT

    @property
    def has_random_weights(self) -> bool:
        """Whether what the engine says is meaningless: its weights, stored or not, are random."""
        return self.random_seed is not None or self.model.provenance.get("kind") == "random"

    def write(self, draft: Draft) -> None:
        """Write `engine.json` and what `trtx inspect` shows."""
        draft.write_json(ENGINE, asdict(self))
        draft.describe(
            family=self.model.spec.family,
            parameters=self.model.spec.parameters,
            backend=self.backend,
            gpu=self.fingerprint.gpu,
            quantization=self.model.quantization.format,
            compute_dtype=self.compute_dtype,
            random_weights=self.has_random_weights,
        )


class Engine:
    """An engine directory opened for reading.

    Raises:
        InputError: not a complete engine.
        MismatchError: an engine format that this trtx does not read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = Manifest.read(self.path, kind="engine")
        where = self.path / ENGINE
        try:
            content: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{where}: not readable ({error}).", "Build the engine again.") from error
        if content.get("format") != ENGINE_FORMAT:
            raise MismatchError(
                f"{where}: engine format {content.get('format')}; this trtx runs format {ENGINE_FORMAT}.",
                "Build the engine again with this version.",
            )
        self.config = from_json(EngineConfig, content, str(where))

    def rank(self, index: int) -> Path:
        """The folder of one rank's weights."""
        return self.path / f"rank{index}"

    @property
    def plan(self) -> Path:
        """The TensorRT engine of rank 0."""
        return self.rank(0) / PLAN

    @property
    def kernels(self) -> Path:
        """The compiled kernels of rank 0."""
        return self.rank(0) / KERNELS

    @cached_property
    def shards(self) -> Shards:
        """The weights of rank 0, by full name; fused groups under the fused name."""
        folder = self.rank(0)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return Shards(folder / name for name in sorted(set(index["weight_map"].values())))
