"""Prompts as people hand them in, and their completions in the same order.

A line of a batch file is an object with one of

    "prompt"     text
    "input_ids"  token ids
    "messages"   a conversation, put through the model's chat template; "tools" may stand beside it

and, where wanted, an "id" and any field of `SamplingParams`, which overrides the command's own for this line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from trtx.converters.errors import InputError, RequestError
from trtx.converters.spec import from_json
from trtx.runtime.llm import LLM, Completion
from trtx.runtime.request import FinishReason, Request
from trtx.runtime.sampling import SamplingParams

PROMPT_KEYS = ("prompt", "input_ids", "messages")
_PARAMETERS = tuple(field.name for field in fields(SamplingParams))
_KEYS = ("id", *PROMPT_KEYS, "tools", *_PARAMETERS)


@dataclass(frozen=True)
class Job:
    """One prompt that was handed in.

    Attributes:
        id: its name in the results.
        request: None when it can't be made; then `error` says why.
    """

    id: str | int
    request: Request | None
    error: RequestError | None = None


@dataclass(frozen=True)
class JobReader:
    """Makes jobs for one engine.

    Attributes:
        params: sampling parameters where a line has none of its own.
        chat: a text is the user's message in a conversation, not the beginning of a text.
        system: what the conversation's system message says, if there is one.
    """

    llm: LLM
    params: SamplingParams
    chat: bool = False
    system: str | None = None

    def texts(self, texts: Iterable[str]) -> list[Job]:
        """A job for each text, numbered from 1."""
        return [self._job(i, partial(self._encode, text), lambda: self.params) for i, text in enumerate(texts, start=1)]

    def lines(self, objects: Iterable[tuple[int, dict[str, Any]]], name: str) -> list[Job]:
        """A job for each line of a batch file, as `converters.jsonl.read_objects` reads it.

        Lines without an id are called by their number. One that is well-formed but can't be served becomes a job with
        an error.

        Raises:
            InputError: names the line with an unknown key, a wrong type, no prompt or an id that was there before.
        """
        jobs: dict[str, Job] = {}
        for number, content in objects:
            job = self._line(content, number, f"{name}:{number}")
            if str(job.id) in jobs:
                raise InputError(f"{name}:{number}: the id {job.id!r} occurs twice.", "Give every line its own id.")
            jobs[str(job.id)] = job
        return list(jobs.values())

    def _line(self, content: dict[str, Any], number: int, where: str) -> Job:
        if unknown := [key for key in content if key not in _KEYS]:
            raise InputError(f"{where}: unknown key {unknown[0]!r}.", f"Known keys: {', '.join(_KEYS)}.")
        id = content.get("id", number)
        if type(id) not in (str, int):
            raise InputError(f"{where}: id is {id!r}.", "Give a string or a whole number.")
        encode = self._prompt(content, where)
        own = {key: value for key, value in content.items() if key in _PARAMETERS}
        if isinstance(own.get("stop"), str):
            own["stop"] = [own["stop"]]
        return self._job(id, encode, lambda: from_json(SamplingParams, {**asdict(self.params), **own}, where))

    def _prompt(self, content: Mapping[str, Any], where: str) -> Callable[[], Sequence[int]]:
        """What makes the token ids of a line's prompt."""
        given = [key for key in PROMPT_KEYS if key in content]
        if len(given) != 1:
            raise InputError(
                f"{where}: {' and '.join(given) or 'no prompt'} given.", f"Give one of {', '.join(PROMPT_KEYS)}."
            )
        value, tools = content[given[0]], content.get("tools")
        if given == ["messages"]:
            return partial(self.llm.tokenizer.chat, value, tools=tools)
        if tools is not None:
            raise InputError(f"{where}: tools without messages.", "Give the conversation as messages.")
        if given == ["input_ids"]:
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise InputError(f"{where}: input_ids is no list of token ids.", "Give whole numbers.")
            return lambda: value
        if not isinstance(value, str):
            raise InputError(f"{where}: prompt is no text.", "Write the prompt as one string.")
        return partial(self._encode, value)

    def _job(self, id: str | int, encode: Callable[[], Sequence[int]], params: Callable[[], SamplingParams]) -> Job:
        try:
            return Job(id, self.llm.request(encode(), params(), str(id)))
        except RequestError as error:
            return Job(id, None, RequestError(f"request {str(id)!r}: {error.cause}", error.remedy))

    def _encode(self, text: str) -> Sequence[int]:
        if not self.chat:
            return self.llm.tokenizer.encode(text)
        return self.llm.tokenizer.chat([*opening(self.system), {"role": "user", "content": text}])


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def complete(llm: LLM, jobs: Sequence[Job]) -> Iterator[tuple[Job, Completion]]:
    """Run jobs together, batched in flight.

    Yields:
        Each continuation when it and all before it have ended, in the order of the jobs. One that could not be served
        has an `error`; the others are not touched.
    """
    requests = [job.request for job in jobs if job.request is not None]
    results = [(job, completion) for job in jobs for completion in _blank(job)]
    by_key = {(completion.request, completion.index): completion for _, completion in results}
    shown = 0
    for chunk in llm.stream(requests):
        by_key[chunk.request, chunk.index].append(chunk)
        while shown < len(results) and results[shown][1].finish_reason is not None:
            yield results[shown]
            shown += 1
    yield from results[shown:]


def _blank(job: Job) -> list[Completion]:
    """The completions of a job before it runs."""
    if job.request is None:
        return [Completion(str(job.id), 0, 0, finish_reason=FinishReason.ERROR, error=job.error)]
    request = job.request
    return [Completion(request.id, index, len(request.prompt)) for index in range(request.params.n)]
