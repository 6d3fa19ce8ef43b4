"""What an engine is asked to hold, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtx.builder.engine import ParallelMapping
from trtx.builder.gpus import Target
from trtx.converters.checkpoint import CheckpointConfig


@dataclass(frozen=True)
class Sizing:
    """The dimensions of an engine. See `builder.engine.Limits` for those of the same name.

    Attributes:
        compute_dtype, kv_dtype: 'fp32', 'fp16', 'bf16'; `kv_dtype` also 'fp8'.
        fp8_attention: whether attention multiplies in FP8.
        memory_fraction: the part of the device's memory that the engine may take.
        kv_cache_memory: the most bytes for the KV cache of a rank; None: whatever is left.
    """

    model: CheckpointConfig
    target: Target
    compute_dtype: str
    kv_dtype: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    kv_block_size: int
    fp8_attention: bool = False
    memory_fraction: float = 0.9
    kv_cache_memory: int | None = None
    mapping: ParallelMapping = field(default_factory=ParallelMapping)
