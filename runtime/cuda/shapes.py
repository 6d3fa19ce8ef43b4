"""The shapes of steps: those that CUDA graphs are captured for, and which of them a step is padded to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trtx.runtime.cuda.step import Shape


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that decode steps are captured for: all up to 4, then steps of 4, 8, 16 … to `most`."""
    sizes = [1, 2, 3, 4]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(4, 1 << (sizes[-1].bit_length() - 3)))
    return sorted({min(size, most) for size in sizes})


CHUNKS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)
"""Tokens of the prefills that are captured: a longer one takes the GPU longer than the host, which takes half a
millisecond a layer, or a whole one (2048 tokens of Llama-3.1-8B in FP8 are 26 ms of kernels)."""

MIXED = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
"""Tokens of the mixed steps that are captured, when they come: closer than `CHUNKS`, since they come all the time."""

MOST_MIXED = 40
"""The most graphs of mixed steps. They stay: what comes often comes early, so that a later one would mostly take the
place of one that is wanted again sooner. Other steps are launched kernel by kernel, as the first of a shape is."""

PROMPTS = 8
"""The most sequences of a captured step that have more than one token."""

_FAR, _SMALL = 1.5, 256
"""A mixed step is not padded to more than so many times its tokens, unless to so few: reading the weights takes a GPU
as long as multiplying them with these."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of an engine's graphs, by kind, the smallest first."""

    decodes: list[Shape]
    chunks: list[Shape]
    mixed: list[Shape]

    @classmethod
    def of(cls, batch: int, tokens: int, tile: int) -> Shapes:
        """For steps of so many sequences and tokens.

        Args:
            tile: new tokens of a sequence in a prefill tile.
        """
        few = min(PROMPTS, batch)
        chunks = [
            Shape(count, prompts, prompts, count // tile + prompts, 0)
            for count in CHUNKS
            for prompts in sorted({1, few})
            if count <= tokens
        ]
        return cls([Shape.of_decodes(count) for count in batch_sizes(batch)], chunks, _mixed(batch, tokens, tile, few))

    @property
    def graphs(self) -> int:
        """How many there are at most."""
        return len(self.decodes) + len(self.chunks) + min(len(self.mixed), MOST_MIXED)

    def __iter__(self) -> Iterator[tuple[str, Shape]]:
        """All of them, with their kinds."""
        yield from (("decodes", shape) for shape in self.decodes)
        yield from (("chunks", shape) for shape in self.chunks)
        yield from (("mixed", shape) for shape in self.mixed)

    def padded(self, exact: Shape) -> tuple[str, Shape]:
        """The kind of a step, and the smallest shape that takes it; its own, of kind 'mixed', where there is none."""
        most = math.inf
        if exact.decodes == exact.tokens == exact.rows:
            exact = Shape.of_decodes(exact.tokens)
            kind, shapes = "decodes", self.decodes
        elif not exact.decodes:
            kind, shapes = "chunks", self.chunks
        else:
            kind, shapes, most = "mixed", self.mixed, max(_FAR * exact.tokens, _SMALL)
        found = next((shape for shape in shapes if fits(exact, shape)), None)
        return (kind, found) if found and found.tokens <= most else ("mixed", exact)


def _mixed(batch: int, tokens: int, tile: int, few: int) -> list[Shape]:
    """Decodes are 8, 16, 32 … or the batch. A padded one costs attention an idle program a head, and nothing elsewhere:
    the prompts' tokens follow the decodes that there are."""
    most = min(MIXED[-1], tokens)
    return [
        Shape(count, decodes + few, min(decodes + few, count, batch), count // tile + few, decodes)
        for count in sorted({min(count, most) for count in MIXED})
        for decodes in sorted({min(8 << i, batch) for i in range(batch.bit_length())})
        if decodes <= count
    ]


def fits(exact: Shape, shape: Shape) -> bool:
    """Whether a step can be padded to a shape."""
    if exact.rows is None or shape.rows is None:
        return exact.rows is shape.rows and exact.tokens <= shape.tokens
    return (
        exact.tokens <= shape.tokens
        and exact.decodes <= shape.decodes
        and exact.sequences - exact.decodes <= shape.sequences - shape.decodes
        and exact.rows <= shape.rows
    )
