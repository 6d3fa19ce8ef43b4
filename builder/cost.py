"""What a step moves and computes: the cost model behind the planner and the roofline figures of `trtx bench`.

Counted is what any implementation has to do, not what one happens to do: every weight read once a step, every key and
value that is attended to read once a sequence, two operations a multiply-add.

    bytes of a decode step   weights + batch * (KV of `context` tokens)
    FLOPs of a step          2 * tokens * (parameters of the layers' linears) + 2 * rows * vocab * hidden
                             + 4 * heads * head_dim * (query, key) pairs of each layer
    time                     max(FLOPs / peak, bytes / bandwidth)

`rows` are those that want logits; the last term is QKᵀ and PV. The FLOPs are those of Kaplan et al. 2020
(arXiv:2001.08361, section 2.1), the time is the roofline of Williams et al. 2009 (doi:10.1145/1498765.1498785).

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    return weight_bytes(model) + batch * kv_read_bytes(_spec(model), _kv_dtype(model), context)


def decode_flops(model: Model, batch: int, context: int) -> int:
    """FLOPs of that step."""
    return batch * flops(_spec(model), tokens=1, before=context - 1)


def prefill_bytes(model: Model, tokens: int, before: int = 0) -> int:
    """Bytes read by a step that computes `tokens` prompt tokens of a sequence with `before` tokens in the KV cache."""
    return weight_bytes(model) + kv_read_bytes(_spec(model), _kv_dtype(model), before + tokens)


def prefill_flops(model: Model, tokens: int, before: int = 0) -> int:
    """FLOPs of that step, logits of its last token included."""
    return flops(_spec(model), tokens, before)


def weight_bytes(model: Model) -> int:
    """Bytes of the weights that every step reads; of an untied embedding it reads only a few rows.

    A checkpoint's weights count as stored. An engine's count as its backend holds them: the `torch` backend holds all
    of them in the compute dtype.
    """
    from trtx.builder.engine import EngineConfig
    from trtx.quantize.formats import DTYPES

    if isinstance(model, EngineConfig):
        return resident_bytes(model.model.spec, model.compute_dtype)
    stored = (model.quantization.stored(module, DTYPES[model.dtype]) for module in _streamed(model.spec))
    return sum(tensor.bytes for tensors in stored for tensor in tensors.values())


def resident_bytes(spec: ModelSpec, dtype: str) -> int:
    """Bytes of the weights that every step reads, when all are held in `dtype`."""
    return ITEMSIZE[dtype] * sum(module.parameters for module in _streamed(spec))


def kv_read_bytes(spec: ModelSpec, kv_dtype: str, context: int) -> int:
    """Bytes of the keys and values that the last of `context` tokens attends to, all layers together."""
    seen = sum(min(context, window or context) for window in spec.windows)
    return 2 * seen * spec.num_kv_heads * spec.head_dim * ITEMSIZE[kv_dtype]


def flops(spec: ModelSpec, tokens: int, before: int = 0, rows: int = 1) -> int:
    """FLOPs of `tokens` tokens of one sequence at positions `before`, `before` + 1, …; `rows` of them want logits."""
    layers = sum(m.parameters for m in spec.modules() if m.kind is Kind.LINEAR and m.name != "lm_head")
    pairs = sum(_pairs(tokens, before, window) for window in spec.windows)
    head = spec.vocab_size * spec.hidden_size
    return 2 * tokens * layers + 2 * rows * head + 4 * spec.num_heads * spec.head_dim * pairs


def _spec(model: Model) -> ModelSpec:
    from trtx.builder.engine import EngineConfig

    return model.model.spec if isinstance(model, EngineConfig) else model.spec


def _kv_dtype(model: Model) -> str:
    from trtx.builder.engine import EngineConfig

    if isinstance(model, EngineConfig):
        return model.limits.kv_dtype
    return "fp8" if model.quantization.kv_cache == "fp8" else model.dtype


def _streamed(spec: ModelSpec) -> Iterator[Module]:
    """The modules that a step reads whole; a tied embedding is read as the output projection."""
    return (m for m in spec.modules() if m.kind is not Kind.EMBEDDING or spec.tied_embeddings)


def _pairs(tokens: int, before: int, window: int | None) -> int:
    """(query, key) pairs of one layer: the token at position p sees min(p + 1, window) keys."""
    end = before + tokens
    limit = end if window is None else window

    def seen(count: int) -> int:
        """Pairs of the first `count` positions."""
        growing = min(count, limit)
        return growing * (growing + 1) // 2 + (count - growing) * limit

    return seen(end) - seen(before)
