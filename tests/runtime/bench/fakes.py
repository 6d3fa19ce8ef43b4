"""A clock that only moves when told to, and an executor whose steps take as long as they are said to."""

from __future__ import annotations

from collections import deque

from trtx.converters.errors import RequestError
from trtx.runtime.executor import ExecutorStats, StepStats
from trtx.runtime.request import FinishReason, Request, TokenEvent
from trtx.runtime.sampling import SamplingParams


class FakeClock:
    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class FakeExecutor:
    """Every step takes `step_seconds` and gives every running request one token; at most `slots` run.

    A request's first step is its prefill. Prompts that begin with token 13 are refused, with 14 fail at their second
    token, with 15 are cancelled there.
    """

    def __init__(self, clock: FakeClock, slots: int = 8, step_seconds: float = 0.1) -> None:
        self.clock, self.slots, self.step_seconds = clock, slots, step_seconds
        self.queue: deque[Request] = deque()
        self.running: dict[str, tuple[Request, int]] = {}
        self.stats = ExecutorStats()
        self.last_step = StepStats(0, 0, 0, 0.0)
        self.in_system: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.running)

    def add(self, request: Request) -> None:
        if request.prompt[0] == 13:
            raise RequestError("the prompt is unlucky", "Choose another.")
        self.queue.append(request)

    def step(self) -> list[TokenEvent]:
        self.in_system.append(len(self.queue) + len(self.running))
        decodes = {name: len(request.prompt) + made for name, (request, made) in self.running.items()}
        prefill = 0
        while self.queue and len(self.running) < self.slots:
            request = self.queue.popleft()
            self.running[request.id] = (request, 0)
            prefill += len(request.prompt)
        self.clock.sleep(self.step_seconds)
        self.last_step = StepStats(prefill, len(decodes), sum(decodes.values()), self.step_seconds)
        return [self._advance(name) for name in list(self.running)]

    def _advance(self, name: str) -> TokenEvent:
        request, made = self.running.pop(name)
        if made == 1 and request.prompt[0] == 14:
            return TokenEvent(name, 0, None, finish=FinishReason.ERROR, error=RequestError("logits are not finite"))
        if made == 1 and request.prompt[0] == 15:
            return TokenEvent(name, 0, None, finish=FinishReason.CANCELLED)
        if made + 1 == request.params.max_tokens:
            return TokenEvent(name, 0, 7, finish=FinishReason.LENGTH)
        self.running[name] = (request, made + 1)
        return TokenEvent(name, 0, 7)


def request(name: str, prompt_tokens: int = 4, output_tokens: int = 3, first: int = 1) -> Request:
    prompt = (first, *([2] * (prompt_tokens - 1)))
    return Request(name, prompt, SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True))
