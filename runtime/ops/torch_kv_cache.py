"""The paged KV cache of the torch op set.

Per layer keys and values are [blocks, block_size, kv_heads, head_dim]; or latents, [blocks, block_size, 1,
rank + rope_dim].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtx.quantize.formats import E4M3, to_e4m3
from trtx.runtime.kv_layout import KVLayout


class TorchKVCache:
    """The paged KV cache of one rank.

    Attributes:
        arrays: keys and values, or latents alone: [slots, blocks, block_size, kv_heads, head_dim] each.

    Args:
        scales: per layer the (key, value) scales of an fp8 cache; None for a cache in `dtype`.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.scales = scales
        shape = (layout.slots, blocks, layout.block_size, layout.kv_heads, layout.head_dim)
        # Codes of an fp8 cache are kept as bytes: torch can't gather E4M3.
        stored = torch.uint8 if dtype == E4M3 else dtype
        self.arrays = [torch.zeros(shape, dtype=stored, device=device) for _ in range(layout.arrays)]

    def clear(self, blocks: Tensor) -> None:
        """Zero `blocks` [N] of every layer."""
        for array in self.arrays:
            array.index_fill_(1, blocks, 0)

    def write(self, layer: int, positions: Tensor, *rows: Tensor) -> None:
        """Store `rows` [T, kv_heads, head_dim], one of each array, at `positions` [T] (block * block_size + offset)."""
        _, slot = self.layout.places[layer]
        for which, (array, new) in enumerate(zip(self.arrays, rows, strict=True)):
            array[slot].flatten(0, 1).index_copy_(0, positions, self._encode(new, layer, which))

    def read(self, layer: int, blocks: Tensor, dtype: torch.dtype, scratch: Sequence[Tensor]) -> list[Tensor]:
        """What `blocks` [B, N] hold → an array each of [B, N * block_size, kv_heads, head_dim] in `dtype`.

        Args:
            scratch: a buffer of that size for each, in the stored dtype, overwritten.
        """
        _, slot = self.layout.places[layer]
        found = []
        for which, (array, buffer) in enumerate(zip(self.arrays, scratch, strict=True)):
            torch.index_select(array[slot].flatten(1), 0, blocks.flatten(), out=buffer.view(blocks.numel(), -1))
            found.append(self._decode(buffer, layer, which, dtype))
        return found

    def scratch(self, blocks: Tensor) -> list[Tensor]:
        """Buffers for `read`: allocated once a step, since fresh pages cost more than the copy."""
        batch, count = blocks.shape
        shape = (batch, count * self.layout.block_size, self.layout.kv_heads, self.layout.head_dim)
        return [array.new_empty(shape) for array in self.arrays]

    def _encode(self, x: Tensor, layer: int, which: int) -> Tensor:
        if self.scales is None:
            return x.to(self.dtype)
        return to_e4m3(x, self.scales[layer][which]).view(torch.uint8)

    def _decode(self, stored: Tensor, layer: int, which: int, dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return stored.to(dtype)
        return (stored.view(E4M3).float() * self.scales[layer][which]).to(dtype)
