"""The block manager: which KV block holds what. Plain Python.

Every block of the pool is in one of three states, and free + used + cached == total always holds:

    used    one or more sequences refer to it
    cached  nobody refers to it, but its content is known by a key and may be reused by an equal prefix
    free    neither

When no block is free, the cached block that was given back longest ago is taken. Block 0 is never handed out: masked
table entries point at it.

A full block is published under a key that stands for everything before it as well: blake2b(key of the block before,
salt or tokens). Equal keys therefore mean equal content, whichever sequence computed it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from trtx.runtime.kv_layout import KVGroup, KVLayout

Key = tuple[int, bytes]
"""KV group and content."""


class BlockPool:
    """Reference-counted blocks 1 … total, with an index of those whose content may be reused."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = deque(range(1, total + 1))
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can give."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks that sequences refer to."""
        return len(self._references)

    def take(self) -> int:
        """A block for new content; the caller has made sure that one is available."""
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def share(self, block: int) -> int:
        """One more reference to a used or cached block."""
        self._cached.pop(block, None)
        self._references[block] = self._references.get(block, 0) + 1
        return block

    def give_back(self, block: int) -> None:
        """One reference less; the last one frees the block, or leaves it cached when its content is known."""
        self._references[block] -= 1
        if self._references[block]:
            return
        del self._references[block]
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def publish(self, block: int, key: Key) -> None:
        """Let equal prefixes find a block that is full. The first block under a key stays the one that is found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: Key) -> int | None:
        """The block with this content, if it is still there."""
        return self._block_of.get(key)

    def is_shared(self, block: int) -> bool:
        """Whether another sequence holds a used block, or may find it."""
        return block in self._key_of or self._references[block] > 1

    def check_integrity(self) -> None:
        """Assert the invariants: every block in exactly one state, index and keys in agreement."""
        states = [*self._free, *self._references, *self._cached]
        assert sorted(states) == list(range(1, self.total + 1)), "a block is lost or in two states"
        assert all(count > 0 for count in self._references.values())
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert not self._key_of.keys() & set(self._free), "a free block is still indexed"
        assert self._cached.keys() <= self._key_of.keys()


@dataclass
class SequenceBlocks:
    """The blocks of one sequence.

    Attributes:
        tables: per KV group, the block of each `block_size` positions; 0 where it was given back.
        published: full blocks whose keys are known to the pool.
        digests: the key of each full block, as far as computed.
    """

    tables: list[list[int]]
    published: int = 0
    digests: list[bytes] = field(default_factory=list)


class BlockManager:
    """Block tables of sequences over one pool.

    Args:
        blocks: size of the pool, block 0 included.
        reuse: look up and publish prefixes.
        salt: kept apart from sequences with another salt (an adapter, a tenant).
    """

    def __init__(self, layout: KVLayout, blocks: int, reuse: bool = True, salt: bytes = b"") -> None:
        self.layout = layout
        self.pool = BlockPool(blocks - 1)
        self.reuse = reuse
        self.salt = salt

    def open(self, tokens: Sequence[int], digests: list[bytes] | None = None) -> tuple[SequenceBlocks, int]:
        """Blocks for a new sequence, holding the longest known prefix, and that prefix's length.

        The last token is always left to compute: its logits are wanted.

        Args:
            digests: what an earlier attempt with these tokens computed; extended, so that none is computed twice.
        """
        held = SequenceBlocks([[] for _ in self.layout.groups], digests=[] if digests is None else digests)
        if not self.reuse:
            return held, 0
        full = (len(tokens) - 1) // self.layout.block_size
        self._extend_digests(held, tokens, full)
        found = [[self.pool.find((g, key)) for key in held.digests[:full]] for g in range(len(held.tables))]
        count = self._longest_usable(found, full)
        for group, table, blocks in zip(self.layout.groups, held.tables, found, strict=True):
            first = self._first_needed(group, count * self.layout.block_size)
            table += [0] * first
            table += [self.pool.share(block) for block in islice(blocks, first, count) if block is not None]
        held.published = count
        return held, count * self.layout.block_size

    def fork(self, parent: SequenceBlocks, length: int) -> tuple[SequenceBlocks, int]:
        """Blocks for a sequence that shares the parent's first `length` tokens, and how many of them it holds.

        Only full blocks are shared, so none is ever written by two sequences; the rest is computed again.
        """
        count = length // self.layout.block_size
        tables = [[self.pool.share(block) if block else 0 for block in table[:count]] for table in parent.tables]
        for group, table in zip(self.layout.groups, tables, strict=True):
            if 0 in table[self._first_needed(group, count * self.layout.block_size) :]:
                self.close(SequenceBlocks(tables))
                return SequenceBlocks([[] for _ in tables]), 0
        shared = SequenceBlocks(tables, min(parent.published, count), parent.digests[:count])
        return shared, count * self.layout.block_size

    def reserve(self, held: SequenceBlocks, start: int, end: int) -> bool:
        """Make room for positions start … end - 1; False, with nothing taken, when too few blocks are available.

        Blocks that have left the window of their group by `start` are given back first.
        """
        for group, table in zip(self.layout.groups, held.tables, strict=True):
            if group.window is not None:
                self._give_back_passed(group, table, start)
        count = self._count(end)
        if len(held.tables[0]) >= count:  # tables are of one length
            return True
        if sum(count - len(table) for table in held.tables) > self.pool.available:
            return False
        for table in held.tables:
            table += [self.pool.take() for _ in range(count - len(table))]
        return True

    def missing_whole(self, held: SequenceBlocks, length: int, chunk: int) -> int:
        """How many blocks a sequence of `length` tokens will need beyond those it holds, fed `chunk` tokens a step."""
        return self.layout.blocks_for(length, chunk) - sum(block > 0 for table in held.tables for block in table)

    def publish(self, held: SequenceBlocks, tokens: Sequence[int], computed: int) -> None:
        """Let others reuse the full blocks among the first `computed` tokens."""
        full = computed // self.layout.block_size
        if not self.reuse or full <= held.published:
            return
        self._extend_digests(held, tokens, full)
        for g, table in enumerate(held.tables):
            for index in range(held.published, full):
                if table[index]:
                    self.pool.publish(table[index], (g, held.digests[index]))
        held.published = full

    def truncate(self, held: SequenceBlocks, length: int) -> int:
        """Keep the first `length` tokens, give the blocks of the rest back; returns how many tokens are still held.

        A block kept in part will be written again. One that others hold or may find must not be: it is given back too.
        """
        full = length // self.layout.block_size
        keep = self._count(length)
        if keep > full and any(self.pool.is_shared(table[full]) for table in held.tables):
            keep, length = full, full * self.layout.block_size
        self._cut(held, keep)
        held.published = min(held.published, full)
        del held.digests[full:]
        return length

    def close(self, held: SequenceBlocks) -> None:
        """Give all blocks back. The digests stay: they hold for the tokens, wherever these are computed."""
        self._cut(held, 0)
        held.published = 0

    def _cut(self, held: SequenceBlocks, keep: int) -> None:
        """Give back all but the first `keep` blocks of every table."""
        for table in held.tables:
            # Last first: the longer prefix is evicted before the shorter one it builds on.
            for block in reversed(table[keep:]):
                if block:
                    self.pool.give_back(block)
            del table[keep:]

    def _count(self, length: int) -> int:
        return -(-length // self.layout.block_size)

    def _first_needed(self, group: KVGroup, position: int) -> int:
        """The first block that a token at `position` or later can see."""
        return group.first_seen(position) // self.layout.block_size

    def _give_back_passed(self, group: KVGroup, table: list[int], position: int) -> None:
        for index in range(min(self._first_needed(group, position), len(table)) - 1, -1, -1):
            if not table[index]:
                return
            self.pool.give_back(table[index])
            table[index] = 0

    def _longest_usable(self, found: list[list[int | None]], full: int) -> int:
        """The largest number of leading blocks such that every group has all that a token behind them can see."""
        longest = 0
        runs = [0] * len(found)
        for count in range(1, full + 1):
            runs = [run + 1 if blocks[count - 1] else 0 for run, blocks in zip(runs, found, strict=True)]
            needed = [count - self._first_needed(g, count * self.layout.block_size) for g in self.layout.groups]
            if all(run >= need for run, need in zip(runs, needed, strict=True)):
                longest = count
        return longest

    def _extend_digests(self, held: SequenceBlocks, tokens: Sequence[int], full: int) -> None:
        size = self.layout.block_size
        for index in range(len(held.digests), full):
            before = held.digests[-1] if held.digests else self.salt
            content = array("q", tokens[index * size : (index + 1) * size]).tobytes()
            held.digests.append(blake2b(len(before).to_bytes(4, "little") + before + content, digest_size=16).digest())
