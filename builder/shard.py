"""Which part of a model one rank holds, and how tensors are cut for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trtx.builder.engine import ParallelMapping
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.spec import Kind, ModelSpec, Module, Split
from trtx.quantize.formats import DTYPES, Stored
from trtx.runtime.kv_layout import KVLayout, kv_groups

_FIRST_STAGE = ("positions", "embed_in", "embed_norm")


@dataclass(frozen=True)
class Rank:
    """One of `tp` tensor-parallel ranks, which hold equal parts of a model that `obstacle` has nothing against.

    A linear cut along its outputs gives a part of them. One cut along its inputs gives a part of a sum: its bias is on
    rank 0, and zeros on the others, and a format with a scale for each token scales the part that a rank has of it. The
    vocabulary is padded with copies of its last row.

    Attributes:
        spec: of the whole model.
    """

    spec: ModelSpec
    tp: int = 1
    index: int = 0

    @cached_property
    def part(self) -> ModelSpec:
        """What this rank computes, as a model of its own."""
        spec, tp = self.spec, self.tp
        if tp == 1:
            return spec
        moe = spec.moe and replace(
            spec.moe, intermediate_size=spec.moe.intermediate_size // tp, shared_size=spec.moe.shared_size // tp
        )
        return replace(
            spec,
            vocab_size=-(-spec.vocab_size // tp),
            intermediate_size=spec.intermediate_size // tp,
            num_heads=spec.num_heads // tp,
            num_kv_heads=spec.num_kv_heads // tp,
            moe=moe,
        )

    @property
    def heads(self) -> slice:
        """Its attention heads among all."""
        count = self.part.num_heads
        return slice(self.index * count, (self.index + 1) * count)

    @property
    def first_token(self) -> int:
        """The first token id whose rows of the embedding and of lm_head it holds."""
        return self.index * self.part.vocab_size

    def cut(self, module: Module, suffix: str, stored: Stored, tensor: Tensor) -> Tensor:
        """This rank's part of a stored tensor.

        Args:
            module, stored: as they are in the whole model.
        """
        if self.tp == 1 or module.split is Split.NONE:
            return tensor
        if module.split is Split.COLUMNS:
            if suffix == "bias":
                return tensor if self.index == 0 else torch.zeros_like(tensor)
            return self._piece(tensor, tensor.dim() - 1) if stored.columns else tensor
        along_outputs = stored.rows or module.kind in (Kind.NORM, Kind.VECTOR)
        return self._piece(tensor, 0) if along_outputs else tensor

    def _piece(self, tensor: Tensor, dim: int) -> Tensor:
        """One of `tp` equal parts of a dimension, which is padded with its last row where it does not divide."""
        whole = tensor.shape[dim]
        size = -(-whole // self.tp)
        start = min(self.index * size, whole)
        piece = tensor.narrow(dim, start, min(size, whole - start))
        if missing := size - piece.shape[dim]:
            last = tensor.narrow(dim, whole - 1, 1)
            piece = torch.cat([piece, *[last] * missing], dim)
        return piece.contiguous()


@dataclass(frozen=True)
class Shard:
    """The part of every rank of one pipeline stage; its tensor-parallel ranks hold equal parts.

    Attributes:
        stage: index of the pipeline stage; a stage holds consecutive layers.
    """

    spec: ModelSpec
    mapping: ParallelMapping
    stage: int

    @property
    def layers(self) -> range:
        """The layers of this stage."""
        count = self.spec.num_layers // self.mapping.pp
        return range(self.stage * count, (self.stage + 1) * count)

    @property
    def is_last(self) -> bool:
        """Whether this stage computes the logits."""
        return self.stage == self.mapping.pp - 1

    def modules(self) -> Iterator[Module]:
        """The modules of this rank, with the shapes of its part of them."""
        yield from filter(self._holds, Rank(self.spec, self.mapping.tp).part.modules())

    def kv_layout(self, block_size: int, itemsize: int) -> KVLayout:
        """The KV cache of this rank."""
        spec = self.spec
        windows = tuple(spec.windows[layer] for layer in self.layers)
        heads = 1 if spec.latent else spec.num_kv_heads // self.mapping.tp  # every rank holds the whole latent
        groups = kv_groups(windows, spec.chunked)
        return KVLayout(groups, block_size, heads, spec.cached_dim, itemsize, spec.cached_arrays)

    def _holds(self, module: Module) -> bool:
        if module.name.startswith("layers."):
            return int(module.name.split(".")[1]) in self.layers
        if module.name == "embed":
            return self.stage == 0 or (self.is_last and self.spec.tied_embeddings)
        return self.stage == 0 if module.name in _FIRST_STAGE else self.is_last


def obstacle(model: CheckpointConfig, mapping: ParallelMapping) -> str:
    """Why a model can't be split like this; empty when it can.

    Heads, key/value heads, the MLP's width and the layers have to divide evenly, and a quantized weight can be cut
    only between the units that its format packs.
    """
    spec, tp, pp = model.spec, mapping.tp, mapping.pp
    if tp > 1 and spec.qk_norm == "width":
        return "a norm over all heads can't be split"
    evenly = {
        "attention heads": (spec.num_heads, tp),
        "key/value heads": (spec.num_kv_heads, tp),
        "intermediate size": (spec.intermediate_size, tp),
        "layers": (spec.num_layers, pp),
    }
    if spec.moe:
        evenly["width of an expert"] = spec.moe.intermediate_size, tp
        evenly["width of the shared expert"] = spec.moe.shared_size, tp
    for what, (count, parts) in evenly.items():
        if count % parts:
            return f"{parts} does not divide {count} {what}"
    for module in spec.modules():
        if module.kind is not Kind.LINEAR:
            continue
        for suffix, stored in model.quantization.stored(module, DTYPES[model.dtype]).items():
            size, unit = (
                (module.shape[0], stored.rows) if module.split is Split.ROWS else (module.shape[-1], stored.columns)
            )
            if unit > 1 and size % (unit * tp):
                return f"{tp} parts of {module.name}.{suffix} would cut a unit of {unit}"
    return ""
