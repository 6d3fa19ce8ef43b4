"""The block manager: invariants under random use, prefix reuse, windows."""

from __future__ import annotations

import random

import pytest

from trtx.runtime.kv_blocks import BlockManager, SequenceBlocks
from trtx.runtime.kv_layout import KVGroup, KVLayout, kv_groups

FULL = (None,) * 4
MIXED = (None, 24, 24, 24)
WINDOWED = (24,) * 4


def manager(
    windows: tuple[int | None, ...] = FULL, blocks: int = 41, block_size: int = 8, chunked: bool = False, **options
) -> BlockManager:
    return BlockManager(KVLayout(kv_groups(windows, chunked), block_size, 2, 16, 2), blocks, **options)


def fill(blocks: BlockManager, tokens: list[int], chunk: int = 16) -> SequenceBlocks:
    """Compute a whole sequence chunk by chunk, as the scheduler does."""
    held, known = blocks.open(tokens)
    while known < len(tokens):
        end = min(known + chunk, len(tokens))
        assert blocks.reserve(held, known, end)
        known = end
        blocks.publish(held, tokens, known)
    return held


@pytest.mark.parametrize(
    ("windows", "chunked", "size"),
    [(FULL, False, 19), (MIXED, False, 61), (WINDOWED, False, 16), (MIXED, True, 61)],
    ids=["full", "mixed", "windowed", "chunked"],
)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
def test_invariants_hold_through_random_steps(windows, chunked, size, reuse):
    """free + used + cached == total after each of 10,000 random steps, and nothing is left in use at the end."""
    rng = random.Random(f"{windows}{reuse}")
    blocks = manager(windows, blocks=size, chunked=chunked, reuse=reuse)
    running: list[tuple[SequenceBlocks, list[int], int]] = []
    reused = refused = 0
    for _ in range(10_000):
        action = rng.choices(["open", "grow", "close", "truncate", "fork"], [3, 12, 3, 1, 1])[0]
        if action == "open" and len(running) < 8:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))] * rng.randrange(1, 12)
            held, known = blocks.open(tokens)
            assert known < len(tokens)
            reused += known
            running.append((held, tokens, known))
        elif running:
            index = rng.randrange(len(running))
            held, tokens, computed = running[index]
            if action == "grow":
                if computed == len(tokens):
                    tokens.append(rng.randrange(2))
                end = min(len(tokens), computed + rng.randrange(1, 20))
                if blocks.reserve(held, computed, end):
                    blocks.publish(held, tokens, end)
                    running[index] = (held, tokens, end)
                else:
                    refused += 1
            elif action == "close":
                blocks.close(held)
                running.pop(index)
            elif action == "truncate" and windows == FULL:
                length = rng.randrange(computed + 1)
                length = blocks.truncate(held, length)
                running[index] = (held, tokens[: max(1, length)], length)
            elif action == "fork" and len(running) < 8:
                child, known = blocks.fork(held, rng.randrange(computed + 1))
                running.append((child, list(tokens[: known + 1]) if known < len(tokens) else list(tokens), known))
        pool = blocks.pool
        pool.check_integrity()
        assert pool.available + pool.used == pool.total
    assert refused, "the pool never ran dry: the test is too easy"
    assert bool(reused) == reuse
    for held, _, _ in running:
        blocks.close(held)
    blocks.pool.check_integrity()
    assert blocks.pool.used == 0


def test_equal_prefix_is_shared_and_the_last_token_is_computed():
    blocks = manager()
    first = fill(blocks, list(range(32)))
    second, known = blocks.open(list(range(32)))
    assert known == 24, "the last block holds the last token, whose logits are wanted"
    assert second.tables[0] == first.tables[0][:3]
    longer, known = blocks.open([*range(32), 99])
    assert (known, longer.tables[0]) == (32, first.tables[0])


def test_different_beginning_shares_nothing():
    blocks = manager()
    fill(blocks, list(range(32)))
    _, known = blocks.open([1, *range(1, 32)])
    assert known == 0


def test_salt_keeps_tenants_apart():
    tokens = list(range(32))
    mine, yours = manager(salt=b"a"), manager(salt=b"b")
    a, b = fill(mine, tokens), fill(yours, tokens)
    assert not set(a.digests) & set(b.digests)


def test_cached_blocks_are_evicted_oldest_first():
    blocks = manager(blocks=9)
    old = fill(blocks, [1] * 32)
    blocks.close(old)
    new = fill(blocks, [2] * 32)
    blocks.close(new)
    fill(blocks, [3] * 16)
    assert blocks.open([2] * 32)[1] == 24
    _, known = blocks.open([1] * 32)
    assert known == 16, "of the oldest, the end went first"


def test_window_gives_blocks_back_and_keeps_what_is_visible():
    blocks = manager(WINDOWED)
    held = fill(blocks, list(range(200)), chunk=8)
    (table,) = held.tables
    visible = range(199 - 24 + 1, 200)
    assert all(table[position // 8] for position in visible)
    assert blocks.pool.used <= -(-(24 + 8) // 8) + 1
    assert KVLayout(kv_groups(WINDOWED), 8, 2, 16, 2).blocks_for(200, 8) >= blocks.pool.used


def test_chunk_gives_the_chunks_before_it_back():
    blocks = manager(WINDOWED, chunked=True)
    held = fill(blocks, list(range(200)), chunk=8)
    (table,) = held.tables
    last_chunk = range(199 // 24 * 24, 200)
    assert all(table[position // 8] for position in last_chunk)
    assert blocks.pool.used == len(last_chunk) // 8
    assert KVLayout(kv_groups(WINDOWED, True), 8, 2, 16, 2).blocks_for(200, 8) >= blocks.pool.used


def test_window_prefix_needs_only_the_window():
    blocks = manager(WINDOWED)
    tokens = list(range(200))
    blocks.close(fill(blocks, tokens, chunk=8))
    held, known = blocks.open(tokens)
    assert known == 192
    assert held.tables[0][:20] == [0] * 20 and all(held.tables[0][-3:])


def test_fork_shares_full_blocks_only():
    blocks = manager()
    parent = fill(blocks, list(range(30)))
    child, known = blocks.fork(parent, 29)
    assert known == 24 and child.tables[0] == parent.tables[0][:3]
    blocks.close(parent)
    blocks.pool.check_integrity()
    assert blocks.pool.used == 3


def test_truncated_block_that_others_may_find_is_not_written_again():
    blocks = manager()
    held = fill(blocks, list(range(16)))
    assert blocks.truncate(held, 12) == 8 and len(held.tables[0]) == 1
    other, known = blocks.open([*range(16), 99])
    assert known == 16, "the block is still found, with its content"
    assert blocks.reserve(held, 8, 16) and held.tables[0][1] != other.tables[0][1]


def test_truncated_block_of_its_own_is_kept():
    blocks = manager(reuse=False)
    held = fill(blocks, list(range(16)))
    before = list(held.tables[0])
    assert blocks.truncate(held, 12) == 12 and held.tables[0] == before


def test_keys_are_computed_once_however_often_a_sequence_is_opened(monkeypatch):
    blocks = manager()
    digests: list[bytes] = []
    first, _ = blocks.open(list(range(32)), digests)
    blocks.close(first)
    assert len(digests) == 3
    monkeypatch.setattr("trtx.runtime.kv_blocks.blake2b", lambda *arguments, **options: pytest.fail("hashed again"))
    blocks.open(list(range(32)), digests)


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ((None,) * 3, [KVGroup(None, (0, 1, 2))]),
        ((8,) * 2, [KVGroup(8, (0, 1))]),
        ((None, 8, 8, None, 8, 8), [KVGroup(None, (0, 3)), KVGroup(8, (1, 2)), KVGroup(8, (4, 5))]),
    ],
)
def test_groups(windows, groups):
    assert list(kv_groups(windows)) == groups


def test_block_bytes_of_llama_8b():
    layout = KVLayout(kv_groups((None,) * 32), 16, 8, 128, 2)
    assert layout.token_bytes == 128 * 1024
    assert layout.block_bytes == 16 * 128 * 1024
