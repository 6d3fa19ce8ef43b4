"""What a step moves and computes: the cost model behind the planner and the roofline figures of `trtx bench`.

Counted is what any implementation has to do, not what one happens to do: every weight read once a step, every key and
value that is attended to read once a sequence, two operations a multiply-add.

    bytes of a decode step   weights + batch * (KV of `context` tokens)
    FLOPs of a step          2 * tokens * (parameters of the layers' linears) + 2 * rows * vocab * hidden
                             + 2 * heads * (head_dim + value_dim) * (query, key) pairs of each layer
    time                     max(FLOPs / peak, bytes / bandwidth)

`rows` are those that want logits; the last term is QKᵀ and PV. Of E experts of which a token uses k, a step of n tokens
reads E * (1 - (1 - k/E)**n): what routing at random would use. The FLOPs are those of Kaplan et al. 2020
(arXiv:2001.08361, section 2.1), the time is the roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785).

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from trtx.converters.spec import Kind, ModelSpec, Module

if TYPE_CHECKING:
    from trtx.builder.engine import EngineConfig
    from trtx.converters.checkpoint import CheckpointConfig

    Model: TypeAlias = CheckpointConfig | EngineConfig

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
"""Bytes of a number, by the dtype names that commands and files use."""


def decode_bytes(model: Model, batch: int, context: int) -> int:
    """Bytes read by a step that decodes one token for each of `batch` sequences of `context` tokens."""
    return weight_bytes(model, batch) + batch * kv_read_bytes(_spec(model), _kv_dtype(model), context)


def decode_flops(model: Model, batch: int, context: int) -> int:
    """FLOPs of that step."""
    return batch * flops(_spec(model), tokens=1, before=context - 1)


def prefill_bytes(model: Model, tokens: int, before: int = 0) -> int:
    """Bytes read by a step that computes `tokens` prompt tokens of a sequence with `before` tokens in the KV cache."""
    return weight_bytes(model, tokens) + kv_read_bytes(_spec(model), _kv_dtype(model), before + tokens)


def prefill_flops(model: Model, tokens: int, before: int = 0) -> int:
    """FLOPs of that step, logits of its last token included."""
    return flops(_spec(model), tokens, before)


def weight_bytes(model: Model, tokens: int = 1) -> int:
    """Bytes of the weights that a step of `tokens` tokens reads; of an untied embedding it reads only a few rows.

    Weights count as stored; but the `torch` backend holds all of an engine's in the compute dtype.
    """
    from trtx.builder.engine import EngineConfig
    from trtx.quantize.formats import DTYPES

    if isinstance(model, EngineConfig):
        if model.backend == "torch":
            return resident_bytes(model.model.spec, model.compute_dtype, tokens)
        model = model.model

    def stored(module: Module) -> int:
        return sum(tensor.bytes for tensor in model.quantization.stored(module, DTYPES[model.dtype]).values())

    return _read(model.spec, tokens, stored)


def resident_bytes(spec: ModelSpec, dtype: str, tokens: int = 1) -> int:
    """Bytes of the weights that a step reads, when all are held in `dtype`."""
    return _read(spec, tokens, lambda module: ITEMSIZE[dtype] * module.parameters)


def kv_read_bytes(spec: ModelSpec, kv_dtype: str, context: int) -> int:
    """Bytes of the keys and values (or latents) that the last of `context` tokens attends to, all layers together."""
    seen = sum(spec.seen_from(layer, context - 1) for layer in range(spec.num_layers))
    return spec.cached_arrays * seen * spec.cached_heads * spec.cached_dim * ITEMSIZE[kv_dtype]


def flops(spec: ModelSpec, tokens: int, before: int = 0, rows: int = 1) -> int:
    """FLOPs of `tokens` tokens of one sequence at positions `before`, `before` + 1, …; `rows` of them want logits."""
    maps = [m for m in spec.modules() if m.kind in (Kind.LINEAR, Kind.MATRIX) and m.name != "lm_head"]
    used = sum(m.parameters for m in maps if not m.is_expert)
    if spec.moe:
        used += sum(m.parameters for m in maps if m.is_expert) * spec.moe.top_k // spec.moe.experts
    pairs = sum(_pairs(tokens, before, window, spec.chunked) for window in spec.windows)
    head = spec.vocab_size * (spec.embedding_size or spec.hidden_size)
    return 2 * tokens * used + 2 * rows * head + 2 * spec.num_heads * (spec.head_dim + spec.value_dim) * pairs


def _spec(model: Model) -> ModelSpec:
    from trtx.builder.engine import EngineConfig

    return model.model.spec if isinstance(model, EngineConfig) else model.spec


def _kv_dtype(model: Model) -> str:
    from trtx.builder.engine import EngineConfig

    if isinstance(model, EngineConfig):
        return model.limits.kv_dtype
    return "fp8" if model.quantization.kv_cache == "fp8" else model.dtype


def _read(spec: ModelSpec, tokens: int, size: Callable[[Module], int]) -> int:
    """Bytes of the modules that a step of `tokens` tokens reads; a tied embedding is read as the output projection."""
    total = experts = 0
    for module in spec.modules():
        if module.is_expert:
            experts += size(module)
        elif module.kind is not Kind.EMBEDDING or (spec.tied_embeddings and module.name == "embed"):
            total += size(module)
    if spec.moe is None:
        return total
    return total + int(experts * (1 - (1 - spec.moe.top_k / spec.moe.experts) ** tokens))


def _pairs(tokens: int, before: int, window: int | None, chunked: bool) -> int:
    """(query, key) pairs of one layer; see `ModelSpec.seen_from`."""
    end = before + tokens
    limit = end if window is None else window

    def seen(count: int) -> int:
        """Pairs of the first `count` positions."""
        if chunked:
            whole, rest = divmod(count, limit)
            return whole * limit * (limit + 1) // 2 + rest * (rest + 1) // 2
        growing = min(count, limit)
        return growing * (growing + 1) // 2 + (count - growing) * limit

    return seen(end) - seen(before)
