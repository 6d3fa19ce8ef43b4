"""What goes into the executor and what comes out, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from trtx.converters.errors import TrtxError
from trtx.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt in token ids and how to continue it. `id` is the caller's and must be unique among those running."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams


class FinishReason(str, Enum):
    """Why a continuation ended."""

    STOP = "stop"
    """An end-of-sequence or stop token, or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the engine's sequence length."""
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Logprob:
    """A token and its log-probability (natural) under the model."""

    token: int
    logprob: float


@dataclass(slots=True)
class TokenEvent:
    """What one step brought for one continuation. One is made for every token, which a frozen one would slow down.

    Attributes:
        index: which of the request's `n` continuations.
        token: the new token; None only when it was cancelled or failed.
        logprob, top_logprobs: where the request asked for them.
        finish: set on the last event of a continuation.
    """

    request: str
    index: int
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[Logprob, ...] = ()
    finish: FinishReason | None = None
    error: TrtxError | None = None
