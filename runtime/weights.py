"""From stored tensors to what a decoder computes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trtx.builder.engine import Engine
from trtx.builder.shard import Rank
from trtx.converters.checkpoint import Checkpoint, CheckpointConfig
from trtx.converters.random_weights import random_module
from trtx.converters.spec import FUSIONS, Kind, ModelSpec, Module
from trtx.quantize.formats import DTYPES, Stored
from trtx.quantize.weight import LinearWeight, fuse
from trtx.runtime.decoder import Decoder
from trtx.runtime.ops.base import Ops


@dataclass(frozen=True)
class WeightStore:
    """Stored tensors under canonical names, read module by module.

    Attributes:
        config: spec, dtype and quantization of what is stored.
        tensor: gives a tensor by its full name ('layers.0.attn.q.weight').
        has: whether a full name is stored. An engine may store fused modules instead of their parts.
    """

    config: CheckpointConfig
    tensor: Callable[[str], Tensor]
    has: Callable[[str], bool]

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> WeightStore:
        """The tensors of a checkpoint."""
        return cls(checkpoint.config, checkpoint.tensor, checkpoint.shards.__contains__)

    @classmethod
    def of_engine(cls, engine: Engine, device: torch.device) -> WeightStore:
        """The tensors of an engine: mapped, or generated on `device` where it holds only their seed."""
        model, seed = engine.config.model, engine.config.random_seed
        if seed is None:
            return cls(model, engine.shards.tensor, engine.shards.__contains__)
        return cls.of_seed(model, seed, device)

    @classmethod
    def of_seed(cls, model: CheckpointConfig, seed: int, device: torch.device) -> WeightStore:
        """Random tensors, drawn when they are asked for."""
        modules = {module.name: module for module in model.spec.modules()}
        expected = model.expected()

        @lru_cache(maxsize=1)
        def drawn(name: str) -> dict[str, Tensor]:
            return random_module(modules[name], model.quantization, DTYPES[model.dtype], seed, device)

        def generate(name: str) -> Tensor:
            owner, _, suffix = name.rpartition(".")
            return drawn(owner)[suffix] if owner in modules else torch.ones((), device=device)  # scales of the KV cache

        return cls(model, generate, expected.__contains__)

    def of_rank(self, rank: Rank) -> WeightStore:
        """What one tensor-parallel rank holds: parts of the tensors under the same names. Nothing may be fused yet."""
        if rank.tp == 1:
            return self
        known = {
            f"{module.name}.{suffix}": (module, suffix, stored)
            for module in self.config.spec.modules()
            for suffix, stored in self.stored(module).items()
        }

        def part(name: str) -> Tensor:
            tensor = self.tensor(name)
            return rank.cut(*known[name], tensor) if name in known else tensor  # scales of the KV cache are whole

        return WeightStore(replace(self.config, spec=rank.part), part, self.has)

    def stored(self, module: Module) -> dict[str, Stored]:
        """What is stored for a module, by suffix."""
        return self.config.quantization.stored(module, DTYPES[self.config.dtype])

    def linear(self, module: Module) -> LinearWeight:
        """The weight of one linear."""
        return self._linear(module, module.name, ((module.name, module.shape[0]),))

    def group(self, name: str, modules: list[Module]) -> list[LinearWeight]:
        """The weights of linears that read one input: fused into one where their formats allow it, else each apart."""
        parts = tuple((module.name, module.shape[0]) for module in modules)
        if self.has(f"{name}.weight"):
            return [self._linear(modules[0], name, parts)]
        weights = [self.linear(module) for module in modules]
        fused = fuse(name, weights, self.stored(modules[0]))
        return [fused] if fused else weights

    def _linear(self, module: Module, name: str, parts: tuple[tuple[str, int], ...]) -> LinearWeight:
        names = {suffix: f"{name}.{suffix}" for suffix in self.stored(module)}  # an engine may do with fewer
        tensors = {suffix: self.tensor(full) for suffix, full in names.items() if self.has(full)}
        return LinearWeight(name, self.config.quantization.format_of(module), tensors, parts, module.split)


def fused_groups(config: CheckpointConfig) -> Iterator[tuple[str, list[Module]]]:
    """The linears as they are used: those that read one input under the fused name, others alone, lm_head last."""
    fused_names = {part: fused for fused, parts in FUSIONS.items() for part in parts}
    groups: dict[str, list[Module]] = {}
    for module in config.spec.modules():
        if module.kind is Kind.LINEAR:
            owner, dot, kind = module.name.rpartition(".")
            groups.setdefault(owner + dot + fused_names.get(kind, kind), []).append(module)
    yield from groups.items()


def kv_scales(store: WeightStore, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The (key, value) scales of an fp8 KV cache, by layer."""
    names = ("k_scale", "v_scale")
    layers = range(store.config.spec.num_layers)
    pairs = [[store.tensor(f"layers.{layer}.attn.{name}").to(device) for name in names] for layer in layers]
    return [(k, v) for k, v in pairs]


def load(store: WeightStore, ops: Ops, advance: Callable[[int], None] = lambda count: None) -> Decoder:
    """Make a decoder's weights resident on an op set.

    Args:
        advance: called with the stored bytes of each tensor read.
    """
    spec = store.config.spec
    weights: dict[str, Any] = {}
    for module in spec.modules():
        if module.kind is not Kind.LINEAR:
            tensors = {suffix: store.tensor(f"{module.name}.{suffix}") for suffix in store.stored(module)}
            weights[module.name] = _resident(module, tensors, spec, store, ops)
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    for name, modules in fused_groups(store.config):
        members = store.group(name, modules)
        resident = [ops.load_linear(weight) for weight in members]
        is_group = name.rpartition(".")[2] in FUSIONS
        weights[name] = resident if is_group else resident[0]
        advance(sum(tensor.nbytes for weight in members for tensor in weight.tensors.values()))
    if spec.tied_embeddings:
        weights["lm_head"] = ops.tie(weights["embed"])
    return Decoder(spec, weights, ops)


def _resident(module: Module, tensors: dict[str, Tensor], spec: ModelSpec, store: WeightStore, ops: Ops) -> Any:
    """What an op set makes of a module that is no linear."""
    name, weight = module.name, tensors["weight"]
    if module.kind is Kind.EMBEDDING:
        return ops.load_table(name, weight)
    if module.kind is Kind.VECTOR:
        return ops.load_vector(name, weight)
    if module.kind is Kind.NORM:
        return ops.load_norm(name, weight, tensors.get("bias"), spec.norm_of(name))
    if name.endswith((".k_up", ".v_up")):
        return ops.load_matrix(name, weight)
    form = store.config.quantization.format_of(module)
    linear = LinearWeight(name, form, tensors, ((name, module.shape[0]),), module.split)
    return ops.load_router(linear) if name.endswith(".router") else ops.load_linear(linear)
