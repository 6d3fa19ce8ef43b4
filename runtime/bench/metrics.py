"""Figures from a trace. Definitions are in `DEFINITIONS`; they are printed with every report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from trtx.runtime.bench.roofline import Ceiling, Cost
from trtx.runtime.bench.trace import Outcome, Phase, StepTrace, Trace

DEFINITIONS = {
    "TTFT": "time to first token, from the request's arrival: waiting and prefill",
    "TPOT": "time per output token after the first: (end-to-end - TTFT) / (output tokens - 1)",
    "ITL": "inter-token latency: every gap between two tokens of one request",
    "end-to-end": "from arrival to the last token",
    "throughput": "of completed requests, from the first arrival to the last token; total = input + output tokens",
    "per user": "output tokens / end-to-end latency, mean over requests",
    "decode, prefill, mixed": "steps of single tokens, of chunks of prompts, and of both; GB/s and TFLOP/s count what "
    "they must read (weights once, KV cache of each sequence) and compute",
    "roofline": "time those steps need at the ceilings, the larger of bytes / bandwidth and FLOPs / peak, / their time",
    "percentiles": "linear interpolation between order statistics",
}

MILLI = 1e-3


@dataclass(frozen=True)
class Stats:
    """A distribution in figures, in the unit of its values."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Stats | None:
        """None for no values. Percentiles interpolate linearly; `std` is that of the population."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(array, [50, 90, 95, 99]))
        low, high = float(array.min()), float(array.max())
        return cls(array.size, float(array.mean()), float(array.std()), low, p50, p90, p95, p99, high)


@dataclass(frozen=True)
class Throughput:
    """What the engine as a whole delivered; only completed requests count.

    Attributes:
        seconds: from the first arrival to the last event.
        output_tokens_per_s_per_gpu: divided by the number of ranks.
        output_tokens_per_s_per_user: output tokens / end-to-end latency, mean over requests.
    """

    seconds: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    output_tokens_per_s_per_gpu: float
    output_tokens_per_s_per_user: float


@dataclass(frozen=True)
class Usage:
    """How the steps of one phase used the machine.

    Attributes:
        tokens: computed in them.
        bytes: they had to read: the weights once a step, and the KV cache of the sequences.
        flops: they had to compute.
        roofline_percent: of their time, what the roofline would take.
        ceiling_gb_per_s, ceiling_tflops: the roofline.
        ceiling_source: where it comes from.
    """

    steps: int
    seconds: float
    tokens: int
    bytes: int
    flops: int
    gb_per_s: float
    tflop_per_s: float
    roofline_percent: float
    ceiling_gb_per_s: float
    ceiling_tflops: float
    ceiling_source: str


@dataclass(frozen=True)
class Metrics:
    """Everything measured. Latencies in milliseconds.

    Attributes:
        errors: the distinct reasons of failed requests.
        reused_tokens: input tokens found in the KV cache instead of being computed.
        mean_batch: sequences decoding, mean over steps that decode.
        itl_ms: over all gaps of all requests; the others have one value a request.
        prefill, mixed, decode: of steps that only prefilled, did both, only decoded; None: there were none.
    """

    completed: int
    failed: int
    cancelled: int
    errors: list[str]
    input_tokens: int
    output_tokens: int
    reused_tokens: int
    preemptions: int
    steps: int
    mean_batch: float
    throughput: Throughput | None
    ttft_ms: Stats | None
    tpot_ms: Stats | None
    itl_ms: Stats | None
    e2e_ms: Stats | None
    prefill: Usage | None
    mixed: Usage | None
    decode: Usage | None

    @property
    def usage(self) -> dict[Phase, Usage]:
        """By phase, of those that there were."""
        found = {Phase.PREFILL: self.prefill, Phase.MIXED: self.mixed, Phase.DECODE: self.decode}
        return {phase: usage for phase, usage in found.items() if usage is not None}


def measure(trace: Trace, ranks: int, step_cost: Callable[[StepTrace], Cost], ceiling: Ceiling) -> Metrics:
    """Figures from a trace.

    Args:
        ranks: GPUs that the engine runs on (1 for a CPU).
        step_cost: step → what it must read and compute.
        ceiling: of all ranks together.
    """
    done, outcomes = trace.completed, trace.outcomes()
    usage = _usage(trace.steps, step_cost, ceiling)
    decoding = [step.decode_tokens for step in trace.steps if step.decode_tokens]
    return Metrics(
        completed=outcomes[Outcome.COMPLETED],
        failed=outcomes[Outcome.FAILED],
        cancelled=outcomes[Outcome.CANCELLED],
        errors=sorted({request.error for request in trace.requests if request.error}),
        input_tokens=sum(request.prompt_tokens for request in done),
        output_tokens=sum(request.output_tokens for request in done),
        reused_tokens=trace.reused_tokens,
        preemptions=trace.preemptions,
        steps=len(trace.steps),
        mean_batch=float(np.mean(decoding)) if decoding else 0.0,
        throughput=_throughput(trace, ranks),
        ttft_ms=Stats.of(request.ttft / MILLI for request in done),
        tpot_ms=Stats.of(request.tpot / MILLI for request in done if request.tpot is not None),
        itl_ms=Stats.of(gap / MILLI for request in done for gap in request.gaps),
        e2e_ms=Stats.of(request.e2e / MILLI for request in done),
        prefill=usage[Phase.PREFILL],
        mixed=usage[Phase.MIXED],
        decode=usage[Phase.DECODE],
    )


def _throughput(trace: Trace, ranks: int) -> Throughput | None:
    done = trace.completed
    if not done:
        return None
    seconds = trace.end - trace.start
    output = sum(request.output_tokens for request in done)
    total = output + sum(request.prompt_tokens for request in done)
    return Throughput(
        seconds=seconds,
        requests_per_s=len(done) / seconds,
        output_tokens_per_s=output / seconds,
        total_tokens_per_s=total / seconds,
        output_tokens_per_s_per_gpu=output / seconds / ranks,
        output_tokens_per_s_per_user=float(np.mean([request.output_tokens / request.e2e for request in done])),
    )


def _usage(
    steps: list[StepTrace], step_cost: Callable[[StepTrace], Cost], ceiling: Ceiling
) -> dict[Phase, Usage | None]:
    """By phase.

    A step that brought nothing has launched one: its time is part of the next one's.
    """
    timed: dict[Phase, list[tuple[StepTrace, float]]] = {phase: [] for phase in Phase}
    spent = 0.0
    for step in steps:
        spent += step.seconds
        if step.phase is not None:
            timed[step.phase].append((step, spent))
            spent = 0.0
    return {phase: _usage_of(found, step_cost, ceiling) for phase, found in timed.items()}


def _usage_of(
    timed: list[tuple[StepTrace, float]], step_cost: Callable[[StepTrace], Cost], ceiling: Ceiling
) -> Usage | None:
    """Of steps and their seconds."""
    if not timed:
        return None
    costs = [step_cost(step) for step, _ in timed]
    seconds = sum(spent for _, spent in timed)
    size, flops = sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs)
    return Usage(
        steps=len(timed),
        seconds=seconds,
        tokens=sum(step.prefill_tokens + step.decode_tokens for step, _ in timed),
        bytes=size,
        flops=flops,
        gb_per_s=size / seconds / 1e9,
        tflop_per_s=flops / seconds / 1e12,
        roofline_percent=100 * sum(ceiling.seconds(cost) for cost in costs) / seconds,
        ceiling_gb_per_s=ceiling.bytes_per_s / 1e9,
        ceiling_tflops=ceiling.flops_per_s / 1e12,
        ceiling_source=ceiling.source,
    )
