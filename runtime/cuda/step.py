"""A step on the GPU: packed tokens, and what attention needs to know of their sequences.

What changes from step to step travels in two copies: numbers of tokens and sequences, and block tables. A runner holds
their tensors at fixed addresses, since captured graphs read them there. Neither travels while the same sequences decode
in the blocks that they have: each step leaves there what the next one needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtx.runtime.batch import PENDING, SequenceSlice
from trtx.runtime.cuda.attention import AttentionStep, query_tile, tiles_of
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import Constant, Launch


@dataclass
class CudaStep:
    """What the words of the op set read of a step.

    Attributes:
        token_ids, positions: [T] int32.
        rows: [R] int32, the tokens that want logits; None: all of them.
    """

    token_ids: Tensor
    positions: Tensor
    rows: Tensor | None
    attention: AttentionStep
    cache: CudaKVCache


MOST_STEPS = 16
"""The most steps of single tokens that are launched at once."""


class Mailbox:
    """A tensor of int32 on the device, and pinned copies of it on the host, one for each step that may be in flight.

    A launch may be put together when the one before the last has been read.
    """

    IN_FLIGHT = 2 * MOST_STEPS

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(self.IN_FLIGHT)]
        self._turn = 0

    @property
    def host(self) -> np.ndarray:
        """Where the numbers of the next `send` are put."""
        return self._hosts[self._turn].numpy()

    def send(self, count: int | None = None) -> None:
        """Copy the first `count` rows to the device, behind what its stream does now."""
        self.device[:count].copy_(self._hosts[self._turn][:count], non_blocking=True)
        self._turn = (self._turn + 1) % self.IN_FLIGHT


DECODE_FIELDS = ("ids", "sources", "positions", "lengths", "sequence")
"""The numbers of a step of single tokens; the others follow from their count."""


class StepInputs:
    """Fixed places on the device for the numbers of a step.

    Args:
        tokens, batch: the most tokens and sequences of a step.
    """

    FIELDS = (*DECODE_FIELDS, "starts", "rows", "tiles")

    def __init__(self, tokens: int, batch: int, device: torch.device) -> None:
        sizes = dict.fromkeys(self.FIELDS, tokens)
        sizes.update(lengths=batch, starts=batch + 1, tiles=2 * (tokens + batch))
        self._places: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self._places[name] = slice(start, start + size)
            start += -(-size // 4) * 4  # pointers are multiples of 16 bytes
        self._mailbox = Mailbox((start,), device)

    def field(self, name: str, count: int) -> Tensor:
        """The first `count` numbers of a field, on the device."""
        return self._mailbox.device[self._places[name]][:count]

    def fill(self, values: dict[str, Sequence[int] | np.ndarray]) -> None:
        """Send the numbers of the next step on their way; all that stands before the last field given is sent."""
        host, end = self._mailbox.host, 0
        for name, numbers in values.items():
            start = self._places[name].start
            host[start : start + len(numbers)] = numbers
            end = max(end, start + len(numbers))
        self._mailbox.send(end)


class BlockTables:
    """The block tables of the running sequences on the device.

    Attributes:
        device: per KV group [batch, width] int32.

    Args:
        batch, width: the most sequences of a step, padding included, and blocks of a sequence.
        groups: KV groups.
    """

    def __init__(self, batch: int, groups: int, width: int, device: torch.device) -> None:
        self._mailboxes = [Mailbox((batch, width), device) for _ in range(groups)]
        self.device = [mailbox.device for mailbox in self._mailboxes]
        self._mirrors = [np.zeros((batch, width), dtype=np.int32) for _ in range(groups)]
        self._held: list[tuple[tuple[Sequence[int], ...], int]] = [((), 0)] * batch

    def fill(self, batch: Sequence[SequenceSlice], rows: Sequence[int]) -> None:
        """Send the tables of the next step, if they have changed.

        A sequence's table only grows at its end. Entries before its window turn to 0, which nobody reads: they are
        left as they were.

        Args:
            rows: where each goes, in ascending order.
        """
        changed = False
        for row, piece in zip(rows, batch, strict=True):
            known, count = self._held[row]
            tables = piece.tables
            length = len(tables[0])
            same = len(known) == len(tables) and all(old is new for old, new in zip(known, tables, strict=True))
            if same and length == count:
                continue
            first = count if same and length > count else 0
            for mirror, table in zip(self._mirrors, tables, strict=True):
                mirror[row, first:length] = table[first:]
            self._held[row] = tables, length
            changed = True
        if changed:
            end = rows[-1] + 1
            for mailbox, mirror in zip(self._mailboxes, self._mirrors, strict=True):
                mailbox.host[:end] = mirror[:end]
                mailbox.send(end)


@dataclass(frozen=True)
class Shape:
    """What a step's kernels are launched for, and so what a graph is captured for.

    Attributes:
        rows: tokens that want logits; None: all of them, in their order.
        tiles: of prefill; see `attention.tiles_of`.
        decodes: the first so many sequences have one token each, or none.
    """

    tokens: int
    sequences: int
    rows: int | None
    tiles: int
    decodes: int

    @classmethod
    def of_decodes(cls, count: int) -> Shape:
        """So many sequences with one token each, all of which want logits."""
        return cls(count, count, None, 0, count)

    def numbers(self, batch: Sequence[SequenceSlice]) -> list[int]:
        """Which of the shape's sequences a step's slices are, single tokens first: the others follow all `decodes`."""
        alone = _decodes(batch)
        return [*range(alone), *range(self.decodes, self.decodes + len(batch) - alone)]


class StepMaker:
    """Makes the steps of one engine.

    Attributes:
        tile: new tokens of a sequence in a prefill tile.

    Args:
        inputs: where the numbers of steps stand.
        heads: query heads.
        itemsize: bytes of a number of the compute dtype.
        shared_bytes: see `Launch`.
    """

    def __init__(
        self,
        inputs: StepInputs,
        tables: BlockTables,
        cache: CudaKVCache,
        heads: int,
        itemsize: int,
        shared_bytes: int,
    ) -> None:
        self._inputs, self._tables, self._cache = inputs, tables, cache
        layout = cache.layout
        self.tile = query_tile(heads, layout.kv_heads, layout.head_dim, itemsize, shared_bytes)
        batch, device = len(tables.device[0]), tables.device[0].device
        # A program's counter each, however few query heads a program takes.
        self._counters = torch.zeros(batch * heads, dtype=torch.int32, device=device)
        self._every = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._standing: np.ndarray | None = None

    def shape_of(self, batch: Sequence[SequenceSlice]) -> Shape:
        """The shape of exactly this step; decodes come first."""
        counts = [len(piece.tokens) for piece in batch]
        decodes = _decodes(batch)
        tiles = sum(-(-count // self.tile) for count in counts[decodes:])
        rows = max(1, sum(piece.logits for piece in batch))  # no kernel is launched for none
        return Shape(sum(counts), len(batch), rows, tiles, decodes)

    def step(self, shape: Shape, token_ids: Tensor) -> CudaStep:
        """A step whose numbers `fill` or `fill_decodes` sends; its tokens will stand at `token_ids`."""
        inputs, count = self._inputs, shape.sequences
        attention = AttentionStep(
            positions=inputs.field("positions", shape.tokens),
            sequence=inputs.field("sequence", shape.tokens),
            starts=self._every[: count + 1] if shape.rows is None else inputs.field("starts", count + 1),
            lengths=inputs.field("lengths", count),
            tables=[table[:count] for table in self._tables.device],
            tiles=inputs.field("tiles", 2 * shape.tiles).view(-1, 2),
            decodes=shape.decodes,
            counters=self._counters,
        )
        rows = None if shape.rows is None else inputs.field("rows", shape.rows)
        return CudaStep(token_ids[: shape.tokens], attention.positions, rows, attention, self._cache)

    def fill(self, batch: Sequence[SequenceSlice], shape: Shape) -> None:
        """Send the numbers of a step, padded to `shape`: tokens and rows at their end, decodes behind the decodes."""
        numbers_of = shape.numbers(batch)
        counts, lengths = np.zeros((2, shape.sequences), dtype=np.int32)
        counts[numbers_of] = [len(piece.tokens) for piece in batch]
        lengths[numbers_of] = [piece.end for piece in batch]
        ends = np.cumsum(counts)
        tiles = tiles_of(counts.tolist(), lengths.tolist(), shape.decodes, self.tile)
        rows = [
            row for piece, end in zip(batch, ends[numbers_of], strict=True) for row in range(end - piece.logits, end)
        ]
        numbers: dict[str, Any] = {
            "ids": np.concatenate([_NONE, *(np.asarray(piece.tokens, dtype=np.int32) for piece in batch)]),
            "sources": [piece.source or 0 for piece in batch[: _decodes(batch)]],
            "positions": np.concatenate([_NONE, *(np.arange(p.start, p.end, dtype=np.int32) for p in batch)]),
            "lengths": lengths,
            "sequence": np.repeat(np.arange(shape.sequences, dtype=np.int32), counts),
            "starts": np.concatenate([[0], ends]),
            "rows": rows,
            "tiles": np.asarray(tiles, dtype=np.int32).ravel(),
        }
        sizes = dict.fromkeys(numbers, shape.tokens)
        sizes.update(lengths=shape.sequences, starts=shape.sequences + 1, rows=shape.rows or 0, tiles=2 * shape.tiles)
        for name, values in numbers.items():
            padded = np.full(sizes[name], _PADDING.get(name, 0), dtype=np.int32)
            padded[: len(values)] = values
            numbers[name] = padded
        self._inputs.fill(numbers)

    def fill_decodes(self, batch: Sequence[SequenceSlice], count: int) -> None:
        """Send the numbers of a step of single tokens, padded to `count` sequences without any.

        They are not sent if they stand there: mostly a step is what the one before has become.
        """
        size = len(batch)
        numbers = np.zeros((len(DECODE_FIELDS), count), dtype=np.int32)
        ids, sources, positions, lengths, sequence = numbers
        ids[:size] = [piece.tokens[0] for piece in batch]
        sources[:size] = [piece.source or 0 for piece in batch]
        positions[:size] = [piece.start for piece in batch]
        lengths[:size] = positions[:size] + 1
        sequence[:size] = np.arange(size)
        sequence[size:] = -1
        if self._standing is None or not np.array_equal(numbers, self._standing):
            self._inputs.fill(dict(zip(DECODE_FIELDS, numbers, strict=True)))
            self._standing = numbers

    def publish(self, launch: Launch, chosen: Tensor, host: Tensor, count: int, decodes: bool) -> None:
        """Put what `count` rows have chosen, [2, batch], into the host's memory.

        Not launched dependently: kernels of the next step read lengths before they wait for the one before them.

        Args:
            decodes: the step was one of single tokens, and becomes the next one of the same sequences.
        """
        fields = [self._inputs.field(name, count) if decodes else None for name in DECODE_FIELDS[:4]]
        block = 128
        constants: dict[str, Constant] = {"STRIDE": chosen.stride(0), "PENDING": PENDING, "BLOCK": block}
        launch("step.publish", (-(-count // block),), (chosen, host, *fields, count), constants)
        if decodes and self._standing is not None:
            ids, sources, positions, lengths = self._standing[:4, :count]
            ids[:] = PENDING
            sources[:] = np.arange(count)
            positions += 1
            lengths += 1

    def fill_nothing(self, shape: Shape) -> None:
        """Send the numbers of a step of this shape without any sequence, for a trial."""
        if shape.rows is None:
            self.fill_decodes([], shape.tokens)
        else:
            self.fill([], shape)


def _decodes(batch: Sequence[SequenceSlice]) -> int:
    """How many of a step's slices are single tokens."""
    return sum(len(piece.tokens) == 1 for piece in batch)


_NONE = np.zeros(0, dtype=np.int32)

_PADDING = {"sequence": -1, "tiles": -1}
"""What stands for nothing; elsewhere it is 0."""


def resolve(launch: Launch, inputs: StepInputs, count: int, last: Tensor, out: Tensor) -> None:
    """Put the step's token ids into `out` [T], pending ones taken from `last`."""
    block = 128
    args = inputs.field("ids", count), inputs.field("sources", count), last, out, count
    launch("step.resolve", (-(-count // block),), args, {"BLOCK": block}, pdl=True)
