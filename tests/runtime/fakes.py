"""A runner without a model: what it 'computes' depends only on the tokens it finds through the block tables."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

from trtx.builder.engine import Limits
from trtx.runtime.batch import PENDING, SequenceSlice
from trtx.runtime.executor import Executor
from trtx.runtime.kv_layout import KVLayout, kv_groups
from trtx.runtime.runner import Runner
from trtx.runtime.sampler import Row, Sampled

VOCAB = 97


class FakeRunner(Runner):
    """Keeps the token of every cache position instead of keys and values, and checks what it is asked.

    The next token is a checksum of the visible tokens as read back through the tables, so a wrong or shared block
    changes the output. One that overlaps reads pending tokens from the step before, and tells a step's tokens only
    once.
    """

    def __init__(
        self,
        limits: Limits,
        windows: tuple[int | None, ...] = (None, None),
        chunked: bool = False,
        overlaps: bool = False,
    ) -> None:
        self.overlaps = overlaps
        self.last: list[Sampled] = []
        self.tickets: list[list[list[Sampled]]] = []
        self.layout = KVLayout(kv_groups(windows, chunked), limits.kv_block_size, 1, 8, 2)
        self.limits = limits
        self.cache = [{} for _ in self.layout.groups]
        self.poison: set[tuple[int, ...]] = set()

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> list[list[Sampled]]:
        assert len(self.tickets) < 2, "a step is launched before the one before the last is read"
        ticket = []
        for step in range(steps):
            assert not step or (all(len(piece.tokens) == 1 for piece in batch) and len(batch) == len(rows))
            ticket.append(self._step(batch, rows))
            batch = [replace(p, tokens=[PENDING], start=p.end, source=row) for row, p in enumerate(batch)]
        self.tickets.append(ticket)
        return ticket

    def _step(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> list[Sampled]:
        assert sum(len(piece.tokens) for piece in batch) <= self.limits.max_num_tokens
        assert len(batch) <= self.limits.max_batch_size
        written: set[tuple[int, int]] = set()
        for piece in batch:
            for offset, token in enumerate(self._known(piece)):
                for group, table in enumerate(piece.tables):
                    place = self._place(table, piece.start + offset)
                    assert (group, place) not in written, "two tokens of a step share a place"
                    written.add((group, place))
                    self.cache[group][place] = token
        wanted = [piece for piece in batch if piece.logits]
        assert len(wanted) == len(rows)
        self.last = [Sampled(self._next(piece, row)) for piece, row in zip(wanted, rows, strict=True)]
        return self.last

    def collect(self, ticket: list[list[Sampled]]) -> list[list[Sampled]]:
        assert self.tickets.pop(0) is ticket, "steps are read in the order of their launches"
        return ticket

    def _known(self, piece: SequenceSlice) -> Sequence[int]:
        """The tokens of a slice, a pending one read from the step before."""
        if PENDING not in piece.tokens:
            return piece.tokens
        assert self.overlaps and len(piece.tokens) == 1 and piece.source is not None
        return [self.last[piece.source].token or 0]

    def _place(self, table: Sequence[int], position: int) -> int:
        block = table[position // self.layout.block_size]
        assert block > 0, "a position without a block"
        return block * self.layout.block_size + position % self.layout.block_size

    def _next(self, piece: SequenceSlice, row: Row) -> int | None:
        seen = []
        for index, group in enumerate(self.layout.groups):
            first = _first_seen(piece.end, group.window, group.chunked) if group.window else 0
            places = [self._place(piece.tables[index], position) for position in range(first, piece.end)]
            seen.append([self.cache[index][place] for place in places])
        if tuple(row.tokens[: row.prompt_length]) in self.poison:
            return None
        return expected_token(seen, row.index)


def expected_token(seen: list[list[int]], index: int) -> int:
    """The 'model': a checksum of what each KV group sees."""
    return zlib.crc32(repr((seen, index)).encode()) % VOCAB


def _first_seen(length: int, window: int, chunked: bool) -> int:
    """The first position that the last of `length` tokens attends to."""
    last = length - 1
    return last - last % window if chunked else max(0, length - window)


def reference(
    prompt: Sequence[int], count: int, windows: Sequence[int | None], index: int = 0, chunked: bool = False
) -> list[int]:
    """What a sequence generates alone."""
    tokens = list(prompt)
    for _ in range(count):
        seen = [tokens if w is None else tokens[_first_seen(len(tokens), w, chunked) :] for w in windows]
        tokens.append(expected_token(seen, index))
    return tokens[len(prompt) :]


def make_limits(**changes) -> Limits:
    values = {
        "max_batch_size": 8,
        "max_num_tokens": 32,
        "max_seq_len": 128,
        "kv_block_size": 8,
        "kv_blocks": 41,
        "kv_dtype": "bf16",
    }
    return Limits(**{**values, **changes})


def make_executor(
    windows: tuple[int | None, ...] = (None, None),
    reuse: bool = True,
    chunked: bool = False,
    overlaps: bool = False,
    **changes,
) -> Executor:
    limits = make_limits(**changes)
    return Executor(FakeRunner(limits, windows, chunked, overlaps), limits, VOCAB, prefix_reuse=reuse)
