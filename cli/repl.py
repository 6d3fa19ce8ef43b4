"""Text as it comes, and the conversation of `trtx run --chat` on a terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from trtx.cli.common import note
from trtx.converters.errors import RequestError

if TYPE_CHECKING:
    from trtx.runtime.llm import LLM, Completion
    from trtx.runtime.request import Request
    from trtx.runtime.sampling import SamplingParams

HELP = "/clear starts over, /exit or Ctrl-D ends. Ctrl-C stops an answer; once more, and trtx."


def write(text: str) -> None:
    """Print text on stdout at once, as it is."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_stream(llm: LLM, request: Request, stopped: Callable[[], bool] = lambda: False) -> Completion:
    """Print the text of a request's only continuation as it comes.

    Args:
        stopped: asked after each token; when it says so, the rest is cancelled.
    """
    from trtx.runtime.llm import Completion

    completion = Completion(request.id, 0, len(request.prompt))
    with closing(llm.stream([request])) as chunks:
        for chunk in chunks:
            completion.append(chunk)
            if chunk.text:
                write(chunk.text)
            if stopped():
                break
    if completion.token_ids:
        write("\n")
    return completion


def converse(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Read messages from the terminal and answer them until the user leaves."""
    import readline  # noqa: F401  (gives input() line editing and history)

    from trtx.cli.app import report
    from trtx.runtime.jobs import opening

    note(HELP)
    messages = opening(system)
    for said in _lines():
        if said == "/clear":
            messages = opening(system)
            continue
        asked = {"role": "user", "content": said}
        try:
            request = llm.request(llm.tokenizer.chat([*messages, asked]), params)
            with _interrupts() as interrupted:
                answer = print_stream(llm, request, interrupted)
            if answer.error is not None:
                raise answer.error
        except RequestError as error:
            report(error)
            continue
        messages += [asked, {"role": "assistant", "content": answer.text}]


def _lines() -> Iterator[str]:
    """What the user types, until /exit or the end of input."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return
        if line == "/exit":
            return
        if line:
            yield line


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it in the middle of a step; the second one interrupts as ever.

    Yields:
        Whether there was one.
    """
    noted = False

    def note_once(number: int, frame: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note_once)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
