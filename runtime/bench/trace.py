"""What happened while a load ran: when requests arrived, when each token came, and what every step held.

Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Outcome(str, Enum):
    """How a request ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass
class RequestTrace:
    """One request.

    Attributes:
        arrival: when its user sent it. Waiting for admission is part of every latency.
        token_times: when each output token was returned.
        outcome: None while it runs.
        error: why it failed.
    """

    id: str
    prompt_tokens: int
    arrival: float
    token_times: list[float] = field(default_factory=list)
    outcome: Outcome | None = None
    error: str = ""

    @property
    def output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def ttft(self) -> float:
        """Time to first token: from arrival to the first token."""
        return self.token_times[0] - self.arrival

    @property
    def e2e(self) -> float:
        """End-to-end latency: from arrival to the last token."""
        return self.token_times[-1] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, (e2e - TTFT) / (output tokens - 1); None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: the time between each token and the one before."""
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]


class Phase(str, Enum):
    """What a step is, by its slices: a slice of one token decodes, a longer one is a chunk of a prompt."""

    PREFILL = "prefill"
    MIXED = "mixed"
    DECODE = "decode"


class Slice(NamedTuple):
    """What a step computed of one sequence.

    Attributes:
        before: tokens that were in the KV cache.
        tokens: computed ones; 1: it decoded.
        rows: how many of them wanted logits.
    """

    before: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class StepTrace:
    """One step of the executor.

    Attributes:
        decode_tokens: sequences that computed one token.
        context_tokens: KV cache entries that those attended to, in all.
        chunks: of prompts; `prefill_tokens` in all.
    """

    start: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    context_tokens: int
    chunks: tuple[Slice, ...] = ()

    @classmethod
    def of(cls, slices: Sequence[Slice], start: float, seconds: float) -> StepTrace:
        """The step that computed these."""
        ends = [piece.before + 1 for piece in slices if piece.tokens == 1]
        chunks = tuple(piece for piece in slices if piece.tokens > 1)
        return cls(start, seconds, sum(piece.tokens for piece in chunks), len(ends), sum(ends), chunks)

    @property
    def phase(self) -> Phase | None:
        """None for a step that brought nothing: an overlapping executor launched its first."""
        if not self.prefill_tokens:
            return Phase.DECODE if self.decode_tokens else None
        return Phase.MIXED if self.decode_tokens else Phase.PREFILL


@dataclass
class Trace:
    """One run of a load.

    Attributes:
        reused_tokens: prompt tokens found in the KV cache.
        preemptions: sequences that gave their KV blocks back in the middle and were computed again.
    """

    start: float
    end: float = 0.0
    requests: list[RequestTrace] = field(default_factory=list)
    steps: list[StepTrace] = field(default_factory=list)
    reused_tokens: int = 0
    preemptions: int = 0

    @property
    def completed(self) -> list[RequestTrace]:
        return [request for request in self.requests if request.outcome is Outcome.COMPLETED]

    def outcomes(self) -> Counter[Outcome | None]:
        """How many requests ended in which way."""
        return Counter(request.outcome for request in self.requests)
