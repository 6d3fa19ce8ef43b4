"""Which part of a model one rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trtx.builder.engine import ParallelMapping
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.spec import Kind, ModelSpec, Module, Split
from trtx.quantize.formats import DTYPES
from trtx.runtime.kv_layout import KVLayout, kv_groups

_FIRST_STAGE = ("positions", "embed_in", "embed_norm")


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
        for module in self.spec.modules():
            if self._holds(module):
                yield replace(module, shape=_part(module, self.mapping.tp))

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


def _part(module: Module, tp: int) -> tuple[int, ...]:
    """The shape of one rank's part of a module; the vocabulary is padded where it does not divide."""
    if module.split is Split.ROWS:
        return (-(-module.shape[0] // tp), *module.shape[1:])
    if module.split is Split.COLUMNS:
        return (module.shape[0], module.shape[1] // tp)
    return module.shape
