"""`LLM`: an engine with its tokenizer, for Python and for the command line.

llm = LLM("engines/smollm2")
for completion in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16)):
    print(completion.text)
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from trtx.builder.engine import Engine, EngineConfig
from trtx.converters.errors import InputError, RequestError, TrtxError
from trtx.runtime.executor import Executor
from trtx.runtime.request import FinishReason, Logprob, Request, TokenEvent
from trtx.runtime.runner import runner_of
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.tokenizer import TextStream, Tokenizer

BURST = 8
"""Steps of single tokens that are launched at once where nobody waits for each token."""

Prompt = str | Sequence[int]
"""Text, or token ids."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a continuation as it comes.

    Attributes:
        text: what is certain now; may be empty (half a character, the beginning of a stop string, no tokenizer).
        event: the token behind it.
        finish: set on the last chunk of a continuation.
        seconds: since the request was handed in.
    """

    request: str
    index: int
    text: str
    event: TokenEvent
    finish: FinishReason | None
    seconds: float


@dataclass
class Completion:
    """A finished continuation.

    Attributes:
        index: which of the `n` continuations of its prompt.
        prompt_tokens: length of the prompt in tokens.
        token_ids: the output, an ending end-of-sequence token included.
        text: the output as text, special tokens and the stop string left out; empty without a tokenizer.
        logprobs, top_logprobs: by output token, where the request asked for them.
        error: set when `finish_reason` is ERROR.
        ttft: seconds to the first token.
        seconds: to the last one.
    """

    request: str
    index: int
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[Logprob, ...]] = field(default_factory=list)
    error: TrtxError | None = None
    ttft: float | None = None
    seconds: float = 0.0

    def append(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        event = chunk.event
        self.text += chunk.text
        self.seconds = chunk.seconds
        self.finish_reason = chunk.finish
        self.error = event.error
        if event.token is not None:
            self.token_ids.append(event.token)
            self.ttft = chunk.seconds if self.ttft is None else self.ttft
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)


class LLM:
    """An engine ready to generate. Not thread-safe.

    Args:
        engine: a folder written by `trtx build`.
        device: 'cpu', 'cuda' or 'cuda:N'; what the engine was built for unless given.
        prefix_reuse: let equal prompt prefixes share KV blocks.
        advance: called with the bytes of each weight as it is loaded.

    Attributes:
        config: the engine's configuration.
        executor: the scheduler and runner, for callers that drive steps themselves.
        notes: how this machine differs from the one that the engine was built for.

    Raises:
        TrtxError: not an engine, damaged, or built for another device.
    """

    def __init__(
        self,
        engine: Path | str,
        *,
        device: str | None = None,
        prefix_reuse: bool = True,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        opened = Engine(engine)
        self.path = opened.path
        self.config: EngineConfig = opened.config
        self._tokenizer = Tokenizer.load(opened.path) if (opened.path / "tokenizer.json").is_file() else None
        eos_ids = self._tokenizer.eos_ids if self._tokenizer else frozenset()
        runner = runner_of(opened, device, advance)
        self.notes = runner.notes
        self.executor = Executor(
            runner,
            self.config.limits,
            self.config.model.spec.vocab_size,
            eos_ids,
            prefix_reuse,
        )
        self._ids = count()
        self._arrivals: dict[tuple[str, int], deque[TokenEvent]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InputError: the engine has none.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self.path}: the engine has no tokenizer.json, so prompts can't be text.",
                "Give prompts as token ids, or convert a checkpoint that has a tokenizer.json.",
            )
        return self._tokenizer

    def default_params(self) -> SamplingParams:
        """The model's own sampling defaults (`generation_config.json`); greedy without any.

        Raises:
            InputError: one of them is out of range.
        """
        defaults = self._tokenizer.defaults() if self._tokenizer else {"temperature": 0}
        try:
            return SamplingParams(**defaults)
        except RequestError as error:
            raise InputError(f"{self.path / 'generation_config.json'}: {error.cause}", error.remedy) from error

    def request(self, prompt: Prompt, params: SamplingParams | None = None, id: str | None = None) -> Request:
        """A request for `stream`. Text is tokenized; the model's own sampling defaults stand in for missing `params`.

        Raises:
            InputError: text or stop strings, and the engine has no tokenizer.
        """
        if params is not None and params.stop:
            _ = self.tokenizer
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return Request(id or f"request-{next(self._ids)}", tuple(ids), params or self.default_params())

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Continue prompts, batched in flight.

        Args:
            prompts: one or several, each text or token ids.
            params: for all, or one for each.

        Returns:
            `n` completions for each prompt, in the order of the prompts. A prompt that can't be served has completions
            with an `error`; the others are not touched.

        Raises:
            InputError: text or stop strings, and the engine has no tokenizer.
            RequestError: a text is not valid Unicode, or there are not as many `params` as prompts.
        """
        many = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(many)
        if len(each) != len(many):
            raise RequestError(
                f"{len(each)} sampling parameters for {len(many)} prompts.", "Give one, or one for each."
            )
        requests = [self.request(prompt, p) for prompt, p in zip(many, each, strict=True)]  # type: ignore[arg-type]
        return self.complete(requests)

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> list[Completion]:
        """Answer a conversation ({'role': …, 'content': …} each) through the model's chat template."""
        return self.complete([self.request(self.tokenizer.chat(messages), params)])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their ends; completions in the order of the requests and their continuations.

        Raises:
            RequestError: two of them have the same id.
        """
        for id, times in Counter(request.id for request in requests).items():
            if times > 1:
                raise RequestError(f"request {id!r}: the id is given {times} times.", "Give every request its own id.")
        found = {
            (request.id, index): Completion(request.id, index, len(request.prompt))
            for request in requests
            for index in range(request.params.n)
        }
        self.executor.burst = BURST
        try:
            for chunk in self.stream(requests):
                found[chunk.request, chunk.index].append(chunk)
        finally:
            self.executor.burst = 1
        return list(found.values())

    def stream(self, requests: Iterable[Request]) -> Generator[Chunk, None, None]:
        """Run requests together; yields chunks of all of them as they come. Closing the iterator cancels the rest.

        Several streams may be open at once: a step that one of them takes serves all.
        """
        started = time.perf_counter()
        streams: dict[tuple[str, int], _Continuation] = {}
        arrived: deque[TokenEvent] = deque()
        try:
            for request in requests:
                try:
                    self.executor.add(request)
                except RequestError as error:
                    for index in range(request.params.n):
                        event = TokenEvent(request.id, index, None, finish=FinishReason.ERROR, error=error)
                        yield Chunk(request.id, index, "", event, FinishReason.ERROR, 0.0)
                    continue
                for index in range(request.params.n):
                    streams[request.id, index] = _Continuation(request.params, self._tokenizer)
                    self._arrivals[request.id, index] = arrived
            while streams:
                if not arrived:
                    self._step()
                    continue
                event = arrived.popleft()
                key = event.request, event.index
                if key not in streams:
                    continue  # ended by a stop string
                text, finish = streams[key].take(event)
                if finish is not None:
                    del streams[key], self._arrivals[key]
                    if event.finish is None:
                        self.executor.cancel(*key)
                yield Chunk(*key, text, event, finish, time.perf_counter() - started)
        finally:
            for key in streams:
                del self._arrivals[key]
                self.executor.cancel(*key)

    def _step(self) -> None:
        """Take a step, and hand each event to the stream that waits for it."""
        for event in self.executor.step():
            if (arrived := self._arrivals.get((event.request, event.index))) is not None:
                arrived.append(event)


class _Continuation:
    """The text of one continuation: turns token events into text and finds stop strings."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._text: TextStream | None = tokenizer.stream(params.stop, params.min_tokens) if tokenizer else None

    def take(self, event: TokenEvent) -> tuple[str, FinishReason | None]:
        """The text that the event adds, and how the continuation ends, if it does."""
        if self._text is None:
            return "", event.finish
        ends = event.token is None or event.finish is FinishReason.STOP
        text = "" if ends or event.token is None else self._text.push(event.token)
        if self._text.stopped:
            return text, FinishReason.STOP
        if event.finish is not None:
            text += self._text.finish()
        return text, FinishReason.STOP if self._text.stopped else event.finish
