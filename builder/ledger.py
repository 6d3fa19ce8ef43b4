"""The memory ledger: every byte of a rank's memory by purpose, and so how many KV blocks fit.

    weights        as resident; on disk they may be smaller
    kv_cache       kv_blocks blocks, the padding block 0 included
    activations    the most that one step allocates
    rope_tables    cosines and sines for max_seq_len positions
    workspace      CUDA context, library buffers
    free           within the budget, and not needed: the KV cache never exceeds what full batches can use
    reserve        outside the budget (1 - memory_fraction): fragmentation, other processes

The rows add up to the memory of the device. What loading takes for a moment (dequantizing one weight) is over before
the KV cache is allocated, and is not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from trtx.builder.backend import Backend
from trtx.builder.shard import Shard
from trtx.builder.sizing import Sizing

CPU_KV_CACHE = 4 << 30
"""Bytes of the KV cache on a CPU unless asked otherwise: RAM is shared with everything else."""


@dataclass(frozen=True)
class Ledger:
    """The memory of one rank, in bytes, and the KV blocks it gives.

    Attributes:
        missing: how much more memory the engine needs; 0: it fits.
        kv_blocks: of the pool, block 0 (padding) included; never fewer than one sequence of max_seq_len needs.
        sequence_blocks: the most blocks that one sequence of max_seq_len holds.
        token_bytes: what one token adds to the KV cache, all layers together, while no window has passed.
    """

    weights: int
    kv_cache: int
    activations: int
    rope_tables: int
    workspace: int
    free: int
    reserve: int
    missing: int
    kv_blocks: int
    sequence_blocks: int
    token_bytes: int

    @property
    def rows(self) -> dict[str, int]:
        """Bytes by purpose; where the engine fits they add up to the device's memory."""
        purposes = ("weights", "kv_cache", "activations", "rope_tables", "workspace", "free", "reserve")
        return {name: size for name, size in asdict(self).items() if name in purposes}

    @property
    def full_sequences(self) -> float:
        """How many sequences of max_seq_len the KV cache holds at once."""
        return (self.kv_blocks - 1) / self.sequence_blocks


def account(sizing: Sizing, backend: Backend) -> Ledger:
    """The ledger of the rank that has the least room."""
    stages = [Shard(sizing.model.spec, sizing.mapping, stage) for stage in range(sizing.mapping.pp)]
    return min((_account(sizing, backend, shard) for shard in stages), key=lambda ledger: ledger.free - ledger.missing)


def _account(sizing: Sizing, backend: Backend, shard: Shard) -> Ledger:
    layout = backend.kv_layout(sizing, shard)
    weights = backend.weight_bytes(sizing, shard)
    activations = backend.activation_bytes(sizing, shard)
    tables = backend.table_bytes(sizing)
    workspace = backend.workspace_bytes(sizing)

    memory = sizing.target.memory
    budget = int(memory * sizing.memory_fraction)
    room = budget - weights - activations - tables - workspace
    per_sequence = layout.blocks_for(sizing.max_seq_len, sizing.max_num_tokens)
    padding = backend.padding_blocks
    least, most = padding + per_sequence, padding + sizing.max_batch_size * per_sequence
    allowed = min(room, _kv_limit(sizing, least * layout.block_bytes))
    held = max(least, min(most, allowed // layout.block_bytes))
    kv_cache = held * layout.block_bytes
    return Ledger(
        weights=weights,
        kv_cache=kv_cache,
        activations=activations,
        rope_tables=tables,
        workspace=workspace,
        free=max(0, room - kv_cache),
        reserve=memory - budget,
        missing=max(0, kv_cache - allowed),
        kv_blocks=1 + held - padding,
        sequence_blocks=per_sequence,
        token_bytes=layout.token_bytes,
    )


def _kv_limit(sizing: Sizing, least: int) -> int:
    """The most bytes that the KV cache may take; a limit that nobody asked for gives way to one whole sequence."""
    if sizing.kv_cache_memory is not None:
        return sizing.kv_cache_memory
    return max(CPU_KV_CACHE, least) if sizing.target.device == "cpu" else sizing.target.memory
