"""In-flight batching: which tokens of which sequences the next step computes. Plain Python.

A step takes at most `max_num_tokens` tokens: first one for every sequence that decodes, then chunks of prompts under
way, then new sequences, oldest first throughout. When the pool runs dry, the youngest running sequence is preempted: it
gives its blocks back and is computed again later, prompt and output alike, as a longer prompt. The pool holds at least
one sequence of the full length, so the oldest always gets on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from trtx.runtime.batch import PENDING, SequenceSlice
from trtx.runtime.kv_blocks import BlockManager, SequenceBlocks
from trtx.runtime.request import Request


@dataclass(eq=False)
class Sequence:
    """One continuation of a request under way.

    Attributes:
        index: which of the request's `n` continuations.
        tokens: prompt and output so far; the last `unread` are `PENDING` while steps are in flight.
        limit: the length at which it ends.
        computed: how many of them are in the KV cache.
        blocks: held while it runs.
        digests: keys of its full blocks, kept for the next attempt while it waits.
        parent: the sequence whose prompt it shares, while that one may still hold it.
        source: the row of logits that a pending token comes from.
    """

    request: Request
    index: int
    tokens: list[int]
    limit: int
    computed: int = 0
    blocks: SequenceBlocks | None = None
    digests: list[bytes] = field(default_factory=list)
    parent: Sequence | None = None
    source: int | None = None
    unread: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet: 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def known(self) -> int:
        """Tokens that are not `PENDING`."""
        return len(self.tokens) - self.unread

    @property
    def is_full(self) -> bool:
        """Whether it may not grow."""
        return len(self.tokens) >= self.limit

    def expect(self, row: int, count: int) -> None:
        """Note that steps are in flight which choose its next `count` tokens, in this row of their logits."""
        self.tokens += [PENDING] * count
        self.unread += count
        self.source = row

    def learn(self, token: int) -> None:
        """Put a token in the place of the first pending one."""
        self.tokens[-self.unread] = token
        self.unread -= 1


@dataclass(frozen=True)
class Scheduled:
    """A sequence's share of a step: its next `count` tokens; or of `steps` steps, one token in each."""

    sequence: Sequence
    count: int
    steps: int = 1

    def slice(self) -> SequenceSlice:
        """What a runner is told, until the next `schedule`: the tables are the sequence's own lists."""
        sequence = self.sequence
        assert sequence.blocks is not None
        end = sequence.computed + self.count
        return SequenceSlice(
            tokens=sequence.tokens[sequence.computed : end],
            start=sequence.computed,
            tables=tuple(sequence.blocks.tables),
            logits=int(end == len(sequence.tokens)),
            source=sequence.source if sequence.unread else None,
        )


@dataclass
class Scheduler:
    """Chooses the work of each step.

    Attributes:
        running: sequences that hold blocks, oldest first.
        waiting: the others, next first.
        preemptions: how often a sequence had to give its blocks back.
        reused: tokens that were found in the KV cache instead of being computed.
    """

    manager: BlockManager
    max_batch_size: int
    max_num_tokens: int
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)
    preemptions: int = 0
    reused: int = 0

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def add_sibling(self, sequence: Sequence) -> None:
        """Put a sequence that shares a running one's prompt at the head of the queue."""
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give its blocks back, if it runs; one that was never added is fine too."""
        if sequence.blocks is not None:
            self._release(sequence)
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def computed(self, work: Scheduled) -> None:
        """Note that a step puts `work` into the KV cache. Call it before new tokens are appended.

        The step may still be in flight: whoever finds the blocks that it fills is served by a later one.
        """
        sequence = work.sequence
        assert sequence.blocks is not None
        sequence.computed += work.count * work.steps
        self.manager.publish(sequence.blocks, sequence.tokens, min(sequence.computed, sequence.known))

    def schedule(self) -> list[Scheduled]:
        """The next step's work, sequences with a single token first; empty when nothing waits or runs."""
        step: dict[Sequence, int] = {}
        budget = self.max_num_tokens
        for sequence in self._decodes_first():
            if sequence.blocks is None or budget == 0:
                continue  # preempted by an older one, or no room in this step
            count = min(sequence.pending, budget)
            if self._make_room(sequence, count, step):
                step[sequence] = count
                budget -= count
        budget = self.max_num_tokens - sum(step.values())
        while budget and self.waiting and len(self.running) < self.max_batch_size:
            sequence = self.waiting[0]
            if sequence.known < len(sequence.tokens):
                break  # preempted while its last token was in flight
            count = self._admit(sequence, budget)
            if not count:
                break
            step[sequence] = count
            budget -= count
        work = [Scheduled(sequence, count) for sequence, count in step.items()]
        return sorted(work, key=lambda item: item.count > 1)

    def lengthen(self, work: list[Scheduled], steps: int) -> list[Scheduled]:
        """Let a step of single tokens be up to `steps` steps: as many as no sequence ends in, where all have room.

        Only when no sequence waits for one that ends: it would wait longer.
        """
        steps = min([steps, *(item.sequence.limit - len(item.sequence.tokens) for item in work)])
        if steps < 2 or len(work) < len(self.running) or (self.waiting and len(self.running) < self.max_batch_size):
            return work
        for item in work:
            sequence = item.sequence
            assert sequence.blocks is not None
            if not self.manager.reserve(sequence.blocks, sequence.computed, sequence.computed + steps):
                return work
        return [Scheduled(item.sequence, 1, steps) for item in work]

    def _decodes_first(self) -> Iterator[Sequence]:
        yield from [s for s in self.running if s.pending == 1]
        yield from [s for s in self.running if s.pending > 1]

    def _make_room(self, sequence: Sequence, count: int, step: dict[Sequence, int]) -> bool:
        """Reserve blocks for the next `count` tokens, preempting younger sequences; False: it was preempted itself."""
        assert sequence.blocks is not None
        while not self.manager.reserve(sequence.blocks, sequence.computed, sequence.computed + count):
            victim = self.running[-1]
            step.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        assert sequence.blocks is not None
        self.manager.close(sequence.blocks)
        sequence.blocks, sequence.computed = None, 0

    def _admit(self, sequence: Sequence, budget: int) -> int:
        """Start a waiting sequence; returns the size of its first chunk, 0 when the pool has no room for all of it."""
        blocks, known = self._open(sequence)
        count = min(len(sequence.tokens) - known, budget)
        # A spare block for each running sequence that will grow: else admission is followed by preemption at once.
        spare = self.manager.pool.available - sum(map(self._will_grow, self.running))
        needed = self.manager.missing_whole(blocks, len(sequence.tokens), self.max_num_tokens)
        if needed > spare or not self.manager.reserve(blocks, known, known + count):
            self.manager.close(blocks)
            return 0
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.blocks, sequence.computed, sequence.parent = blocks, known, None
        self.reused += known
        return count

    def _will_grow(self, sequence: Sequence) -> bool:
        """Whether a running sequence may need more blocks than it holds."""
        assert sequence.blocks is not None
        return self.manager.missing_whole(sequence.blocks, sequence.limit, self.max_num_tokens) > 0

    def _open(self, sequence: Sequence) -> tuple[SequenceBlocks, int]:
        parent = sequence.parent
        if parent is not None and parent.blocks is not None:
            shared = min(parent.computed, sequence.prompt_length - 1)
            return self.manager.fork(parent.blocks, shared)
        return self.manager.open(sequence.tokens, sequence.digests)
