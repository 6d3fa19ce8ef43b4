"""The executor: requests in, token events out, one step at a time.

Single-threaded and driven by its caller: `add` and `cancel` between steps, `step` until `has_work` is false.

Over a runner that computes beside the host, steps overlap: step N + 1 is put together and launched before the tokens of
step N are read. Until then a `PENDING` token stands for each; the device knows it. What N turns out to have ended is
computed once more in N + 1, for nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from trtx.builder.engine import Limits
from trtx.converters.errors import RequestError
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_blocks import BlockManager
from trtx.runtime.request import FinishReason, Request, TokenEvent
from trtx.runtime.runner import Runner
from trtx.runtime.sampler import Row, Sampled
from trtx.runtime.scheduler import Scheduler, Sequence


@dataclass(frozen=True)
class StepStats:
    """What one step did.

    Attributes:
        prefill_tokens: prompt tokens (and preempted sequences' tokens) computed.
        decode_tokens: sequences that computed a single token.
        context_tokens: KV cache entries that the decoding sequences attended to.
        seconds: wall time of the call of `step` that brought its tokens.
    """

    prefill_tokens: int
    decode_tokens: int
    context_tokens: int
    seconds: float


@dataclass
class ExecutorStats:
    """Totals since the executor was made.

    Attributes:
        reused_tokens: tokens found in the KV cache instead of being computed.
        preemptions: sequences that gave their blocks back in the middle.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    peak_running: int = 0


@dataclass
class _Continuations:
    """The state of a request.

    Attributes:
        ends: tokens that end them.
        open: continuations that have not ended.
        started: all of them are with the scheduler; until the first has its first token, only that one is.
    """

    seed: int
    ends: frozenset[int]
    open: dict[int, Sequence]
    started: bool = False


@dataclass(frozen=True)
class _InFlight:
    """A step that was launched.

    Attributes:
        ticket: the runner's.
        steps: how many steps of single tokens it is.
        choosing: the sequences that get a token, in the order of the rows, with their requests' states.
    """

    ticket: Any
    slices: list[SequenceSlice]
    steps: int
    choosing: list[tuple[Sequence, _Continuations]]


class Executor:
    """In-flight batching over one runner.

    Args:
        vocab_size: prompts with other ids are refused.
        eos_ids: tokens that end a continuation unless the request ignores them; ids outside the vocabulary (a
            tokenizer may know more tokens than its model) are left out.
        prefix_reuse: let equal prefixes share KV blocks.

    Attributes:
        burst: how many steps of single tokens may be launched at once, where all take the likeliest token. Worth it
            where nobody waits for each token: the host then works once for them all.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        vocab_size: int,
        eos_ids: Iterable[int] = (),
        prefix_reuse: bool = True,
    ) -> None:
        self.runner = runner
        self.limits = limits
        self.vocab_size = vocab_size
        self.eos_ids = frozenset(token for token in eos_ids if 0 <= token < vocab_size)
        self.blocks = BlockManager(runner.layout, limits.kv_blocks, prefix_reuse)
        self.scheduler = Scheduler(self.blocks, limits.max_batch_size, limits.max_num_tokens)
        self.stats = ExecutorStats()
        self.last_step = StepStats(0, 0, 0, 0.0)
        self._requests: dict[str, _Continuations] = {}
        self._cancelled: list[TokenEvent] = []
        self._in_flight: _InFlight | None = None
        self.burst = 1

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._requests or self._cancelled or self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it can't be served; nothing else is touched.
        """
        self._refuse(request)
        params = request.params
        seed = secrets.randbits(63) if params.seed is None else params.seed
        asked = self.limits.max_seq_len if params.max_tokens is None else len(request.prompt) + params.max_tokens
        limit = min(asked, self.limits.max_seq_len)
        first = Sequence(request, 0, list(request.prompt), limit)
        siblings = [Sequence(request, index, list(request.prompt), limit, parent=first) for index in range(1, params.n)]
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        self._requests[request.id] = _Continuations(seed, ends, {s.index: s for s in (first, *siblings)})
        # The end of an earlier request must not be taken for this one's.
        self._cancelled = [event for event in self._cancelled if event.request != request.id]
        self.scheduler.add(first)

    def cancel(self, request: str, index: int | None = None) -> None:
        """End a request's continuations, or one of them. Unknown ids: nothing.

        Their events come with the next step, unless the id is used again before.
        """
        state = self._requests.get(request)
        for sequence in list(state.open.values()) if state else []:
            if index in (None, sequence.index):
                self._end(sequence)
                self._cancelled.append(TokenEvent(request, sequence.index, None, finish=FinishReason.CANCELLED))

    def step(self) -> list[TokenEvent]:
        """Launch one batch and read another; returns an event for every token that was read and every end."""
        started = time.perf_counter()
        events, self._cancelled = self._cancelled, []
        before, self._in_flight = self._in_flight, None
        if before and not self._may_overlap():
            events += self._collect(before)
            before = None
        launched = self._launch()
        assert launched or before or events or not self._requests, "requests wait and nothing was scheduled"
        read = before
        if self.runner.overlaps:
            self._in_flight = launched
        else:
            read = launched
        if read:
            events += self._collect(read)
        self._count(read, time.perf_counter() - started)
        return events

    def _may_overlap(self) -> bool:
        """Whether the next step can be put together without knowing the last one's tokens."""
        return not any(s.request.params.penalizes for s in self.scheduler.running)

    def _may_burst(self, slices: list[SequenceSlice], rows: list[Row]) -> bool:
        """Whether steps like this one may follow it before its tokens are read."""
        if self.burst < 2 or not self.runner.overlaps or len(rows) != sum(len(piece.tokens) for piece in slices):
            return False
        return all(row.plain for row in rows)

    def _launch(self) -> _InFlight | None:
        """Put the next step together and start it; None when there is nothing to compute."""
        work = self.scheduler.schedule()
        if not work:
            return None
        slices = [item.slice() for item in work]
        choosing = [item.sequence for item, piece in zip(work, slices, strict=True) if piece.logits]
        rows = [self._row(sequence) for sequence in choosing]
        if self._may_burst(slices, rows):
            work = self.scheduler.lengthen(work, self.burst)
        steps = work[0].steps
        ticket = self.runner.launch(slices, rows, steps)
        launched = _InFlight(ticket, slices, steps, [(s, self._requests[s.request.id]) for s in choosing])
        for item in work:
            self.scheduler.computed(item)
        for row, sequence in enumerate(choosing):
            sequence.expect(row, steps)
            if sequence.is_full:
                self.scheduler.remove(sequence)
        return launched

    def _collect(self, step: _InFlight) -> list[TokenEvent]:
        """Read the tokens of a step, or of several."""
        events: list[TokenEvent] = []
        for sampled in self.runner.collect(step.ticket):
            for (sequence, state), one in zip(step.choosing, sampled, strict=True):
                if state.open.get(sequence.index) is sequence:
                    self._advance(sequence, state, one, events)
        return events

    def _refuse(self, request: Request) -> None:
        if request.id in self._requests:
            raise RequestError(f"request {request.id!r}: the id is in use.", "Give every request its own id.")
        if not request.prompt:
            raise RequestError(f"request {request.id!r}: the prompt is empty.", "Give at least one token.")
        longest = self.limits.max_seq_len
        if len(request.prompt) >= longest:
            raise RequestError(
                f"request {request.id!r}: its prompt has {len(request.prompt)} tokens; the engine holds sequences of "
                f"{longest}, output included.",
                "Shorten the prompt, or build the engine with a larger --max-seq-len.",
            )
        strange = [i for i in (*request.prompt, *request.params.stop_token_ids) if not 0 <= i < self.vocab_size]
        if strange:
            raise RequestError(
                f"request {request.id!r}: token id {strange[0]} is outside the vocabulary of {self.vocab_size}.",
                "Use the tokenizer of this model.",
            )

    def _row(self, sequence: Sequence) -> Row:
        params, state = sequence.request.params, self._requests[sequence.request.id]
        forbidden = state.ends if sequence.output_length < params.min_tokens else frozenset()
        return Row(params, sequence.tokens, sequence.prompt_length, state.seed, sequence.index, forbidden)

    def _advance(self, sequence: Sequence, state: _Continuations, sampled: Sampled, events: list[TokenEvent]) -> None:
        """Put the chosen token in the place of the pending one; end the sequence where it ends."""
        if sampled.token is None:
            # What was not started yet would fail on the same prompt.
            events += [self._fail(s) for s in ([sequence] if state.started else list(state.open.values()))]
            return
        sequence.learn(sampled.token)
        if not state.started:
            self._start_siblings(state)
        finish = FinishReason.LENGTH if sequence.known >= sequence.limit else None
        if sampled.token in state.ends:
            finish = FinishReason.STOP
        if finish is not None:
            self._end(sequence)
        events.append(TokenEvent(sequence.request.id, sequence.index, *sampled, finish))

    def _fail(self, sequence: Sequence) -> TokenEvent:
        request = sequence.request
        self._end(sequence)
        error = RequestError(
            f"request {request.id!r}: the model gave logits that are not finite.",
            "Build with --dtype bf16 or fp32; if that does not help, check the checkpoint's weights.",
        )
        return TokenEvent(request.id, sequence.index, None, finish=FinishReason.ERROR, error=error)

    def _start_siblings(self, state: _Continuations) -> None:
        """Queue the other continuations: the prompt is in the KV cache now, for them to share."""
        state.started = True
        for index in sorted(state.open, reverse=True):
            if index:
                self.scheduler.add_sibling(state.open[index])

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        state = self._requests[sequence.request.id]
        del state.open[sequence.index]
        if not state.open:
            del self._requests[sequence.request.id]
        elif sequence.index == 0 and not state.started:
            self._start_siblings(state)

    def _count(self, read: _InFlight | None, seconds: float) -> None:
        slices, steps = (read.slices, read.steps) if read else ([], 0)
        ends = [piece.end for piece in slices if len(piece.tokens) == 1]
        prefill = sum(len(piece.tokens) for piece in slices) - len(ends)
        decodes = steps * len(ends)
        context = steps * sum(ends) + decodes * (steps - 1) // 2
        self.last_step = StepStats(prefill, decodes, context, seconds)
        self.stats = replace(
            self.stats,
            steps=self.stats.steps + steps,
            prefill_tokens=self.stats.prefill_tokens + prefill,
            decode_tokens=self.stats.decode_tokens + decodes,
            reused_tokens=self.scheduler.reused,
            preemptions=self.scheduler.preemptions,
            peak_running=max(self.stats.peak_running, len(self.scheduler.running)),
        )
