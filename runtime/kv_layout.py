"""How the KV cache is laid out: groups of layers over one pool of equal blocks. Plain Python.

A block holds keys and values, or latents, of `block_size` consecutive tokens for `slots` layers. Layers with the same
attention window form a kind; each kind is cut into groups of at most `slots` layers, and each group of a sequence has
its own block table. All groups draw from one pool, so a model that mixes full and windowed layers wastes nothing on a
fixed split, and a windowed group gives blocks back once no later token can see them.

    one kind of layer (Llama, Mistral)   one group, slots = number of layers
    6 full + 18 windowed layers          slots = 6: one full group, three windowed ones
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from trtx.converters.spec import ModelSpec

BLOCK_SIZES = (8, 16, 32, 64, 128)
_MAX_GROUPS = 8


@dataclass(frozen=True)
class KVGroup:
    """Layers that share block tables.

    Attributes:
        window: how many latest positions a token attends to; None: all of them.
        layers: the layer in each slot.
        chunked: the window does not slide: a token attends from the last multiple of `window` on.
    """

    window: int | None
    layers: tuple[int, ...]
    chunked: bool = False

    def first_seen(self, position: int) -> int:
        """The first position that a token at `position` or later can attend to."""
        if self.window is None:
            return 0
        return position // self.window * self.window if self.chunked else max(0, position - self.window + 1)


@dataclass(frozen=True)
class KVLayout:
    """The shape of the KV cache.

    Attributes:
        block_size: tokens a block.
        kv_heads: key/value heads on this rank; 1 for latents.
        head_dim: numbers in a row: a head's key, or a latent.
        itemsize: bytes of a stored number.
        arrays: 2: keys and values; 1: latents.
    """

    groups: tuple[KVGroup, ...]
    block_size: int
    kv_heads: int
    head_dim: int
    itemsize: int
    arrays: int = 2

    @classmethod
    def of(cls, spec: ModelSpec, block_size: int, itemsize: int) -> KVLayout:
        """The layout for a model on one rank."""
        groups = kv_groups(spec.windows, spec.chunked)
        return cls(groups, block_size, spec.cached_heads, spec.cached_dim, itemsize, spec.cached_arrays)

    @classmethod
    def linear(cls, layers: int, length: int, kv_heads: int, head_dim: int, itemsize: int) -> KVLayout:
        """A block is a whole sequence of `length` tokens in all layers; windows give nothing back."""
        return cls((KVGroup(None, tuple(range(layers))),), length, kv_heads, head_dim, itemsize)

    @property
    def slots(self) -> int:
        """Layers a block holds."""
        return max(len(group.layers) for group in self.groups)

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """Layer → (group index, slot)."""
        return layer_places(self.groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all slots together."""
        return self.arrays * self.slots * self.block_size * self.kv_heads * self.head_dim * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes that one token adds to the cache while no window has passed, all groups together."""
        return self.block_bytes * len(self.groups) // self.block_size

    def blocks_for(self, length: int, chunk: int) -> int:
        """The most blocks that one sequence of `length` tokens holds at once, fed at most `chunk` tokens a step."""
        return sum(self._group_blocks(group, length, chunk) for group in self.groups)

    def _group_blocks(self, group: KVGroup, length: int, chunk: int) -> int:
        whole = -(-length // self.block_size)
        if group.window is None:
            return whole
        # The window and the chunk may each start in the middle of a block.
        return min(whole, -(-(group.window + chunk) // self.block_size) + 1)


def layer_places(groups: tuple[KVGroup, ...]) -> dict[int, tuple[int, int]]:
    """Layer → (group index, slot)."""
    return {layer: (g, s) for g, group in enumerate(groups) for s, layer in enumerate(group.layers)}


def kv_groups(windows: tuple[int | None, ...], chunked: bool = False) -> tuple[KVGroup, ...]:
    """Cut layers into groups by window so that as few slots as possible stay empty, in at most 8 groups if possible."""
    kinds: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(window, []).append(layer)
    sizes = [len(layers) for layers in kinds.values()]

    def cost(slots: int) -> tuple[bool, int, int]:
        groups = sum(-(-size // slots) for size in sizes)
        return groups > max(_MAX_GROUPS, len(sizes)), groups * slots, groups

    slots = min(range(1, max(sizes) + 1), key=cost)
    return tuple(
        KVGroup(window, tuple(layers[start : start + slots]), chunked and window is not None)
        for window, layers in kinds.items()
        for start in range(0, len(layers), slots)
    )
