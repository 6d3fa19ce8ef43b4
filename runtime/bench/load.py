"""When requests are sent, and the loop that drives an executor with them.

    all at once     every request arrives at time 0 (offline)
    at a rate       Poisson arrivals, whatever the engine manages (open loop)
    so many at once the next request is sent when one ends (closed loop)

A rate and a concurrency together: Poisson arrivals, of which at most so many are in the executor; the others wait, and
their wait counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trtx.converters.errors import RequestError
from trtx.runtime.bench.trace import Outcome, RequestTrace, Slice, StepTrace, Trace
from trtx.runtime.bench.workload import Stream
from trtx.runtime.request import FinishReason, Request, TokenEvent

if TYPE_CHECKING:
    from trtx.runtime.executor import ExecutorStats, StepStats

OUTCOMES = {
    FinishReason.STOP: Outcome.COMPLETED,
    FinishReason.LENGTH: Outcome.COMPLETED,
    FinishReason.CANCELLED: Outcome.CANCELLED,
    FinishReason.ERROR: Outcome.FAILED,
}


class Clock(Protocol):
    """What tells the time; tests give their own."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def sleep(self, seconds: float) -> None:
        """Let so much time pass."""


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Server(Protocol):
    """What the loop needs of `runtime.executor.Executor`."""

    last_step: StepStats
    stats: ExecutorStats

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def step(self) -> list[TokenEvent]: ...


@dataclass(frozen=True)
class Load:
    """When requests are sent.

    Attributes:
        request_rate: mean arrivals a second of a Poisson process; None: none waits for another.
        concurrency: the most requests in the executor at once; None: no bound.
    """

    request_rate: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.request_rate is not None and not 0 < self.request_rate < float("inf"):
            raise ValueError("a request rate is above 0")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError("a concurrency is 1 or more")

    @property
    def closed_loop(self) -> bool:
        """Whether a request is sent because another has ended."""
        return self.request_rate is None and self.concurrency is not None

    def arrivals(self, count: int, seed: int) -> list[float]:
        """When each request arrives, in seconds after the first."""
        if self.request_rate is None:
            return [0.0] * count
        gaps = Stream.ARRIVALS.rng(seed).exponential(1 / self.request_rate, count)
        gaps[0] = 0.0
        return [float(moment) for moment in np.cumsum(gaps)]

    def __str__(self) -> str:
        if self.request_rate is None:
            return "all at once" if self.concurrency is None else f"{self.concurrency} in flight"
        bound = "" if self.concurrency is None else f", at most {self.concurrency} in flight"
        return f"{self.request_rate:g} requests/s (Poisson){bound}"


def drive(
    executor: Server,
    requests: Sequence[Request],
    load: Load,
    *,
    seed: int = 0,
    clock: Clock | None = None,
    advance: Callable[[int], None] = lambda count: None,
    chunks: Callable[[], tuple[Slice, ...]] = tuple,
) -> Trace:
    """Send `requests` as `load` says, step the executor until all have ended, and return what happened.

    A request that the executor refuses, or that fails, is recorded as such; the others go on.

    Args:
        requests: one continuation each (`n` = 1).
        seed: of the arrivals.
        advance: called with 1 for each request that ended.
        chunks: gives those of prompts that the step which was read last computed.
    """
    return _Driver(executor, requests, load, seed, clock or SystemClock(), advance, chunks).run()


class _Driver:
    def __init__(
        self,
        executor: Server,
        requests: Sequence[Request],
        load: Load,
        seed: int,
        clock: Clock,
        advance: Callable[[int], None],
        chunks: Callable[[], tuple[Slice, ...]],
    ) -> None:
        self.executor = executor
        self.load = load
        self.clock = clock
        self.advance = advance
        self.chunks = chunks
        self.trace = Trace(start=clock.now())
        arrivals = (self.trace.start + offset for offset in load.arrivals(len(requests), seed))
        self.waiting = deque(zip(arrivals, requests, strict=True))
        self.in_flight: dict[str, RequestTrace] = {}

    def run(self) -> Trace:
        before = replace(self.executor.stats)
        while self.waiting or self.in_flight:
            self._send()
            if self.executor.has_work:
                self._step()
            elif self.waiting:
                self.clock.sleep(max(0.0, self.waiting[0][0] - self.clock.now()))
        self.trace.end = self.clock.now()
        self.trace.reused_tokens = self.executor.stats.reused_tokens - before.reused_tokens
        self.trace.preemptions = self.executor.stats.preemptions - before.preemptions
        return self.trace

    def _send(self) -> None:
        """Hand the executor every request that has arrived, up to the concurrency."""
        now = self.clock.now()
        while self.waiting and self.waiting[0][0] <= now and not self._full():
            arrival, request = self.waiting.popleft()
            record = RequestTrace(request.id, len(request.prompt), now if self.load.closed_loop else arrival)
            self.trace.requests.append(record)
            self.in_flight[request.id] = record
            try:
                self.executor.add(request)
            except RequestError as error:
                self._end(record, Outcome.FAILED, error.cause)

    def _full(self) -> bool:
        return self.load.concurrency is not None and len(self.in_flight) >= self.load.concurrency

    def _step(self) -> None:
        start = self.clock.now()
        events = self.executor.step()
        now = self.clock.now()
        step = self.executor.last_step
        chunks = self.chunks() if step.prefill_tokens else ()
        self.trace.steps.append(
            StepTrace(start, now - start, step.prefill_tokens, step.decode_tokens, step.context_tokens, chunks)
        )
        for event in events:
            record = self.in_flight[event.request]
            if event.token is not None:
                record.token_times.append(now)
            if event.finish is not None:
                self._end(record, OUTCOMES[event.finish], event.error.cause if event.error else "")

    def _end(self, record: RequestTrace, outcome: Outcome, error: str) -> None:
        record.outcome, record.error = outcome, error
        del self.in_flight[record.id]
        self.advance(1)
