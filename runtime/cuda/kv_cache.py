"""The paged KV cache of the cuda op set.

Per layer keys and values are [blocks, kv_heads, block_size, head_dim], so that what a head reads of a block is
contiguous; or latents, [blocks, 1, block_size, rank + rope_dim].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtx.runtime.kv_layout import KVLayout


class CudaKVCache:
    """The paged KV cache of one rank.

    Args:
        scales: per layer the (key, value) scales of an fp8 cache; None for a cache in `dtype`.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self.layout = layout
        self._scales = scales
        shape = (layout.slots, blocks, layout.kv_heads, layout.block_size, layout.head_dim)
        self._arrays = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.arrays)]

    def arrays(self, layer: int) -> list[Tensor]:
        """Keys and values, or latents alone, of a layer: [blocks, kv_heads, block_size, head_dim] each."""
        _, slot = self.layout.places[layer]
        return [array[slot] for array in self._arrays]

    def group(self, layer: int) -> int:
        """Which block tables a layer uses."""
        return self.layout.places[layer][0]

    def scales(self, layer: int) -> tuple[float, float]:
        """Of keys and values as they are stored."""
        return (1.0, 1.0) if self._scales is None else self._scales[layer]
