"""What a benchmark asks for: prompts in token ids and how many tokens to generate for each.

Every request is greedy and ignores end-of-sequence tokens, so its output has exactly the length asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.jsonl import read_objects
from trtx.runtime.request import Request
from trtx.runtime.sampling import SamplingParams

PROMPT_KEYS = ("prompt", "input_ids", "logits")
"""Where a dataset line may hold its prompt; 'logits' is trtllm-bench's older name for 'input_ids'."""
LENGTH_KEYS = ("output_tokens", "max_tokens")
_UNSUPPORTED_KEYS = ("media_paths", "lora_request")


class Stream(IntEnum):
    """Independent streams of random numbers under one seed."""

    INPUT_LENGTHS = 0
    OUTPUT_LENGTHS = 1
    PROMPTS = 2
    SHARED_PREFIX = 3
    ARRIVALS = 4
    WARMUP = 5

    def rng(self, seed: int, *index: int) -> np.random.Generator:
        return np.random.default_rng([seed, self, *index])


@dataclass(frozen=True)
class Lengths:
    """How many tokens each request has.

    Attributes:
        low, high: drawn uniformly from low to high, both included.
        stdev: when not 0, drawn from a normal distribution around low (= high), rounded, and clipped symmetrically
            (at least 1 token, at most twice the mean minus 1) so that the mean stays.
    """

    low: int
    high: int
    stdev: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"{self.low}:{self.high} is not a range of lengths of 1 token or more")
        if self.stdev < 0 or (self.stdev and self.low != self.high):
            raise ValueError("a standard deviation is 0 or more and goes with one mean, not with a range")

    @classmethod
    def parse(cls, text: str, stdev: float = 0.0) -> Lengths:
        """Read '128' or '128:512'.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is neither a length (128) nor a range of lengths (128:512)")
        low = int(match[1])
        return cls(low, int(match[2] or low), stdev)

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """`count` lengths."""
        if self.stdev:
            drawn = np.rint(rng.normal(self.low, self.stdev, count))
            return [int(length) for length in np.clip(drawn, 1, 2 * self.low - 1)]
        return [int(length) for length in rng.integers(self.low, self.high, count, endpoint=True)]

    def __str__(self) -> str:
        if self.stdev:
            return f"{self.low} ± {self.stdev:g}"
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True)
class RandomPrompts:
    """Prompts of random token ids.

    Prompts differ from their first token after the shared prefix on, so that reuse of KV blocks does not flatter the
    result. Request i is the same however many there are.

    Attributes:
        isl, osl: input and output sequence lengths.
        shared_prefix: how many first tokens all prompts share; they count as input.
    """

    isl: Lengths
    osl: Lengths
    shared_prefix: int = 0

    def requests(self, count: int, vocab_size: int, seed: int) -> list[Request]:
        """`count` requests.

        Raises:
            InputError: a prompt would have nothing but the shared prefix.
        """
        inputs = self.isl.draw(count, Stream.INPUT_LENGTHS.rng(seed))
        outputs = self.osl.draw(count, Stream.OUTPUT_LENGTHS.rng(seed))
        if self.shared_prefix >= min(inputs):
            raise InputError(
                f"A shared prefix of {self.shared_prefix} tokens leaves nothing of a prompt of {min(inputs)}.",
                "Give longer prompts (--isl) or a shorter --shared-prefix.",
            )
        prefix = _tokens(self.shared_prefix, vocab_size, Stream.SHARED_PREFIX.rng(seed))
        return [
            _request(str(i), prefix + _tokens(length - len(prefix), vocab_size, Stream.PROMPTS.rng(seed, i)), output)
            for i, (length, output) in enumerate(zip(inputs, outputs, strict=True))
        ]


def warmup_requests(
    like: Sequence[Request], count: int, shared_prefix: int, vocab_size: int, seed: int
) -> list[Request]:
    """Requests as long as the first `count` of `like`, with the same shared prefix and other tokens after it."""
    return [
        _request(
            f"warmup-{i}",
            request.prompt[:shared_prefix]
            + _tokens(len(request.prompt) - shared_prefix, vocab_size, Stream.WARMUP.rng(seed, i)),
            _output_tokens(request),
        )
        for i, request in enumerate(like[k % len(like)] for k in range(count))
    ]


def read_dataset(
    path: Path, encode: Callable[[str], list[int]], vocab_size: int, limit: int | None = None
) -> list[Request]:
    """Read requests from a JSONL file, one object a line.

    `prompt` (text) or `input_ids`, and `output_tokens` or `max_tokens`; `task_id` names the request (else its line
    number does). That is trtllm-bench's format; other keys are left alone.

    Args:
        encode: text → token ids; called for text prompts only.
        limit: read so many requests; None: all.

    Raises:
        InputError: names the file and the line that is not UTF-8, not JSON or lacks something; or fewer requests than
            `limit`.
        UnsupportedError: a request with an image or an adapter.
    """
    requests: dict[str, Request] = {}
    for where, number, fields in _lines(path):
        if len(requests) == limit:
            break
        for key in _UNSUPPORTED_KEYS:
            if fields.get(key):
                raise UnsupportedError(f"{where}: has {key!r}, which trtx can't serve.", "Leave such requests out.")
        prompt = _prompt(fields, where, encode, vocab_size)
        request = _request(str(fields.get("task_id", number)), prompt, _length(fields, where))
        if request.id in requests:
            raise InputError(f"{where}: task_id {request.id} occurs twice.", "Give every line its own task_id.")
        requests[request.id] = request
    if not requests:
        raise InputError(f"{path}: no requests in it.", "Give a file with one JSON object a line.")
    if limit is not None and len(requests) < limit:
        raise InputError(
            f"{path}: {len(requests)} requests, and {limit} are asked for.",
            f"Give --num-requests {len(requests)} or less; repeated prompts would be answered from the KV cache.",
        )
    return list(requests.values())


def check_fits(requests: Sequence[Request], max_seq_len: int) -> None:
    """Check that an engine can serve every request.

    Raises:
        InputError: the longest does not fit.
    """
    longest = max(requests, key=lambda request: len(request.prompt) + _output_tokens(request))
    total = len(longest.prompt) + _output_tokens(longest)
    if total > max_seq_len:
        raise InputError(
            f"Request {longest.id} takes {len(longest.prompt)} input + {_output_tokens(longest)} output = {total} "
            f"tokens; the engine's sequences have at most {max_seq_len}.",
            f"Ask for less, or build the engine with --max-seq-len {total}.",
        )


def _request(name: str, prompt: tuple[int, ...], output_tokens: int) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True))


def _output_tokens(request: Request) -> int:
    assert request.params.max_tokens is not None
    return request.params.max_tokens


def _tokens(count: int, vocab_size: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(vocab_size, size=count).tolist())


def _lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Where it stands ('FILE:LINE'), line number and content of each request."""
    try:
        with path.open("rb") as file:
            for number, fields in read_objects(file, str(path)):
                yield f"{path}:{number}", number, fields
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}).", "Give a JSONL file.") from error


def _prompt(fields: dict[str, Any], where: str, encode: Callable[[str], list[int]], vocab_size: int) -> tuple[int, ...]:
    given = [key for key in PROMPT_KEYS if fields.get(key) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "neither prompt nor input_ids"
        raise InputError(f"{where}: {found} given.", "Give either prompt (text) or input_ids (token ids).")
    (key,) = given
    value = fields[key]
    if key == "prompt":
        if not isinstance(value, str):
            raise InputError(f"{where}: prompt is no text.", "Write the prompt as one string.")
        value = encode(value)
    elif not isinstance(value, list) or not all(type(token) is int and 0 <= token < vocab_size for token in value):
        raise InputError(f"{where}: {key} is no list of token ids below {vocab_size}.", "Use this model's tokenizer.")
    if not value:
        raise InputError(f"{where}: the prompt is empty.", "Give at least one token.")
    return tuple(value)


def _length(fields: dict[str, Any], where: str) -> int:
    for key in LENGTH_KEYS:
        if key in fields:
            value = fields[key]
            if type(value) is not int or value < 1:
                raise InputError(f"{where}: {key} is {value!r}.", "Give a whole number of tokens, 1 or more.")
            return value
    raise InputError(f"{where}: output_tokens is missing.", "Say how many tokens to generate for each prompt.")
