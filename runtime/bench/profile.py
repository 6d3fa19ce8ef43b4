"""What the time of a step goes to, kernel by kernel: `trtx bench --profile`.

A few requests are served once more under `torch.profiler`, one step at a time: none is launched before the one before
has been read. Steps that prefill come first, then, in the middle of the answers, steps that decode.

On a GPU a step is what stands on its timeline, from its first kernel to the end of its last: what the profiler costs
the host does not count, but where a step is launched kernel by kernel and the GPU waits for the host. On a CPU it is
the wall time of the step, and its operators have their self time.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from trtx.runtime.bench.roofline import Ceiling, Cost
from trtx.runtime.bench.trace import Phase, Slice, StepTrace
from trtx.runtime.bench.watch import Watch
from trtx.runtime.cuda.launch import LIBRARY
from trtx.runtime.executor import Executor
from trtx.runtime.request import Request

IDLE = "idle"
"""The part of a step in which no kernel runs."""
HOST = "outside operators"
"""The part of a step of a CPU that no operator takes."""
COPIES = "copies"

STEPS = 16
"""The most steps that are recorded at the beginning, and again in the middle."""

_MARK = "trtx step "
_LIBRARIES = ("nvjet", "gemm", "gemv", "cutlass", "cublas", "xmma")

BytesOf = Callable[[Sequence[Slice]], Mapping[str, int]]
"""A step's slices → bytes by kernel: 'module.function' of `runtime.kernels`, or `LIBRARY`."""


@dataclass(frozen=True)
class Row:
    """A kernel of a phase; on a CPU, an operator. All figures are means of a step.

    Attributes:
        percent: of the step's time.
        bytes: it has to read and write; None: not known.
        bandwidth_percent: of the memory's bandwidth, what it reaches.
    """

    kernel: str
    calls: float
    ms: float
    percent: float
    bytes: float | None = None
    bandwidth_percent: float | None = None


@dataclass(frozen=True)
class PhaseProfile:
    """The steps of one phase.

    Attributes:
        steps: recorded ones.
        tokens, ms: of a step, on average.
        roofline_percent: of their time, what the roofline would take.
        rows: the longest first, and what no kernel takes last.
    """

    phase: str
    steps: int
    tokens: float
    ms: float
    roofline_percent: float
    rows: list[Row]


@dataclass(frozen=True)
class Profile:
    """What a step's time goes to.

    Attributes:
        of: 'kernels' of a GPU or 'operators' of a CPU.
    """

    of: str
    phases: list[PhaseProfile]


class Event(NamedTuple):
    """A kernel or a copy on the GPU's timeline, in µs."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Recorded:
    """A step that was recorded.

    Attributes:
        calls, times: by kernel; µs.
        rest: µs that no kernel takes.
    """

    slices: tuple[Slice, ...]
    calls: Counter[str]
    times: dict[str, float]
    rest: float

    @property
    def us(self) -> float:
        return sum(self.times.values()) + self.rest


def exclusive(events: Iterable[Event]) -> tuple[dict[str, float], float]:
    """What each kernel adds to the time, by name, and the time in which none runs; together, the whole span.

    With programmatic dependent launch a kernel starts while the one before still runs, and waits inside: durations
    overlap, and their sum says nothing. What kernels share belongs to the one that ends first, so that of a chain of
    them each has the time from the end of the one before (or its own start, if that is later) to its own end.
    """
    ordered = sorted(events, key=lambda event: event.end)
    times: dict[str, float] = defaultdict(float)
    reached = min((event.start for event in ordered), default=0.0)
    gaps: list[tuple[float, float]] = []  # before `reached`, in which nothing that ended so far has run
    for name, start, end in ordered:
        times[name] += end - max(start, reached)
        if start > reached:
            gaps.append((reached, start))
        while gaps and gaps[-1][1] > start:
            low, high = gaps.pop()
            times[name] += high - max(low, start)
            if low < start:
                gaps.append((low, start))
        reached = end
    return dict(times), sum(high - low for low, high in gaps)


def short_name(name: str) -> str:
    """A kernel's function without namespaces, template arguments and parameters; one name for matrix libraries."""
    if name.startswith("Mem"):
        return COPIES
    plain = name.replace("->", "").replace("(anonymous namespace)", "")
    while (shorter := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = shorter
    qualified = re.split(r"[<(]", plain)[0].split()[-1:] or [name]
    lowered = qualified[0].lower()
    if any(library in lowered for library in _LIBRARIES) and "fmha" not in lowered:
        return LIBRARY
    return qualified[0].rpartition("::")[2].removeprefix("aten::")


def profile(
    executor: Executor,
    watch: Watch,
    requests: Sequence[Request],
    device: torch.device,
    *,
    bytes_of: BytesOf | None,
    step_cost: Callable[[StepTrace], Cost],
    ceiling: Ceiling,
) -> Profile:
    """Serve requests under the profiler.

    Args:
        executor: drives `watch`; nothing is in it.
        requests: sent all at once; they are cancelled when enough has been seen.
    """
    watch.overlaps, overlaps = False, watch.overlaps
    try:
        steps = _record(executor, watch, requests, device)
    finally:
        watch.overlaps = overlaps
    return summarize(steps, device.type == "cuda", bytes_of, step_cost, ceiling)


def _record(executor: Executor, watch: Watch, requests: Sequence[Request], device: torch.device) -> list[Recorded]:
    """Steps from the beginning on that prefill, and steps in the middle of the answers."""
    for request in requests:
        executor.add(request)

    def prefilling() -> bool:
        return _phase(watch.slices) is not Phase.DECODE

    first = _session(executor, watch, device, prefilling)
    while executor.has_work and prefilling():
        executor.step()
    lengths = [request.params.max_tokens or 0 for request in requests]
    for _ in range(sum(lengths) // len(lengths) // 2 - STEPS // 2):
        if executor.has_work:
            executor.step()
    middle = _session(executor, watch, device, lambda: True)
    for request in requests:
        executor.cancel(request.id)
    while executor.has_work:
        executor.step()
    return [step for step in first if _phase(step.slices) is not Phase.DECODE] + middle


def _session(executor: Executor, watch: Watch, device: torch.device, go_on: Callable[[], bool]) -> list[Recorded]:
    """Record up to `STEPS` steps."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says when it starts and stops
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    steps: list[tuple[Slice, ...]] = []
    with torch.profiler.profile(activities=activities) as profiler:
        with record_function("trtx"):  # the first one takes long
            pass
        while executor.has_work and len(steps) < STEPS and (not steps or go_on()):
            with record_function(f"{_MARK}{len(steps)}"):
                executor.step()
            steps.append(watch.slices)
    return (_on_gpu if on_gpu else _on_cpu)(profiler.events(), steps)


def _marks(events: Iterable[Any], count: int) -> list[Any]:
    """The events on the host that steps stand in, in their order."""
    found = {event.name: event for event in events if event.device_type == DeviceType.CPU}
    return [found[f"{_MARK}{number}"] for number in range(count)]


def _on_gpu(events: Sequence[Any], steps: Sequence[tuple[Slice, ...]]) -> list[Recorded]:
    """Steps on the GPU's timeline.

    Copies of a step's numbers before its first kernel are left out: while serving, they do not wait for the host.
    """
    starts = [mark.time_range.start for mark in _marks(events, len(steps))]
    by_step: list[list[Event]] = [[] for _ in steps]
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.name.startswith("trtx"):  # our marks stand there too
            number = bisect_right(starts, event.time_range.start) - 1
            if number >= 0:
                by_step[number].append(Event(event.name, event.time_range.start, event.time_range.end))
    return [recorded(slices, found) for slices, found in zip(steps, by_step, strict=True)]


def recorded(slices: tuple[Slice, ...], events: Sequence[Event]) -> Recorded:
    """A step from what ran on the GPU."""
    begin = min((event.start for event in events if not event.name.startswith("Mem")), default=0.0)
    counted = [event for event in events if event.start >= begin]
    times, idle = exclusive(counted)
    return Recorded(slices, Counter(event.name for event in counted), times, idle)


def _on_cpu(events: Sequence[Any], steps: Sequence[tuple[Slice, ...]]) -> list[Recorded]:
    """Steps on the CPU: operators with their self time."""
    marks = _marks(events, len(steps))
    starts = [mark.time_range.start for mark in marks]
    calls: list[Counter[str]] = [Counter() for _ in steps]
    times: list[dict[str, float]] = [defaultdict(float) for _ in steps]
    for event in events:
        number = bisect_right(starts, event.time_range.start) - 1
        if number >= 0 and event.name.startswith("aten::") and event.time_range.end <= marks[number].time_range.end:
            calls[number][event.name] += 1
            times[number][event.name] += event.self_cpu_time_total
    spans = [mark.time_range.end - mark.time_range.start for mark in marks]
    return [
        Recorded(slices, count, spent, span - sum(spent.values()))
        for slices, count, spent, span in zip(steps, calls, times, spans, strict=True)
    ]


def summarize(
    steps: Sequence[Recorded],
    on_gpu: bool,
    bytes_of: BytesOf | None,
    step_cost: Callable[[StepTrace], Cost],
    ceiling: Ceiling,
) -> Profile:
    """Means of the steps of each phase."""
    phases = []
    for phase in Phase:
        found = [step for step in steps if step.us and _phase(step.slices) is phase]
        if found:
            phases.append(_summary(phase, found, IDLE if on_gpu else HOST, bytes_of, step_cost, ceiling))
    return Profile("kernels" if on_gpu else "operators", phases)


def _summary(
    phase: Phase,
    steps: Sequence[Recorded],
    rest: str,
    bytes_of: BytesOf | None,
    step_cost: Callable[[StepTrace], Cost],
    ceiling: Ceiling,
) -> PhaseProfile:
    calls: Counter[str] = Counter()
    times: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for step in steps:
        moved = bytes_of(step.slices) if bytes_of else {}
        known = {kernel.rpartition(".")[2]: kernel for kernel in moved}
        size.update(moved)
        for name, spent in step.times.items():
            kernel = known.get(name) or short_name(name)
            calls[kernel] += step.calls[name]
            times[kernel] += spent  # type: ignore[assignment]
    count, total = len(steps), sum(step.us for step in steps)

    def row(kernel: str, calls: int, us: float) -> Row:
        moved = size.get(kernel)
        rate = None if not moved or not us else 100 * moved / (us * 1e-6) / ceiling.bytes_per_s
        return Row(kernel, calls / count, us / count / 1e3, 100 * us / total, moved and moved / count, rate)

    rows = [row(kernel, calls[kernel], us) for kernel, us in times.most_common()]
    traces = [StepTrace.of(step.slices, 0.0, step.us * 1e-6) for step in steps]
    return PhaseProfile(
        phase.value,
        count,
        sum(step.prefill_tokens + step.decode_tokens for step in traces) / count,
        total / count / 1e3,
        100 * sum(ceiling.seconds(step_cost(step)) for step in traces) / (total * 1e-6),
        [*rows, row(rest, 0, sum(step.rest for step in steps))],
    )


def _phase(slices: Sequence[Slice]) -> Phase | None:
    return StepTrace.of(slices, 0.0, 0.0).phase
