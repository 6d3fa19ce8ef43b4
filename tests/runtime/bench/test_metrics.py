"""Figures from a hand-made trace, against values worked out by hand."""

import numpy as np
import pytest

from tests.builder.models import TINY, spec_of
from trtx.builder.engine import EngineConfig, Fingerprint, Limits, ParallelMapping
from trtx.converters.checkpoint import CheckpointConfig
from trtx.runtime.bench.metrics import Stats, measure
from trtx.runtime.bench.roofline import Ceiling, Cost, step_cost
from trtx.runtime.bench.trace import Outcome, Phase, RequestTrace, Slice, StepTrace, Trace

CEILING = Ceiling(bytes_per_s=1000e9, flops_per_s=100e12, source="a table")


def cost(step):
    return Cost(bytes=10**9 + 10**6 * step.context_tokens, flops=10**12 * (step.decode_tokens + step.prefill_tokens))


def make_trace():
    """Two completed requests, one failed, one cancelled; two steps with prefill and two without."""
    return Trace(
        start=10.0,
        end=14.0,
        requests=[
            RequestTrace("a", 100, 10.0, [10.5, 11.0, 12.0, 12.5], Outcome.COMPLETED),
            RequestTrace("b", 300, 11.0, [13.0, 14.0], Outcome.COMPLETED),
            RequestTrace("c", 900, 10.0, [10.1], Outcome.FAILED, "broken"),
            RequestTrace("d", 900, 10.0, [10.1, 10.2], Outcome.CANCELLED),
        ],
        steps=[
            StepTrace(10.0, 0.5, 100, 0, 0),
            StepTrace(10.5, 0.5, 0, 1, 1000),
            StepTrace(11.0, 2.0, 300, 1, 1001),
            StepTrace(13.0, 1.5, 0, 2, 2000),
        ],
        reused_tokens=16,
        preemptions=1,
    )


def test_counts_leave_out_what_did_not_complete():
    metrics = measure(make_trace(), 1, cost, CEILING)
    assert (metrics.completed, metrics.failed, metrics.cancelled) == (2, 1, 1)
    assert (metrics.input_tokens, metrics.output_tokens) == (400, 6)
    assert metrics.errors == ["broken"]
    assert (metrics.reused_tokens, metrics.preemptions, metrics.steps) == (16, 1, 4)
    assert metrics.mean_batch == pytest.approx(4 / 3)


def test_latencies():
    metrics = measure(make_trace(), 1, cost, CEILING)
    assert metrics.ttft_ms.mean == pytest.approx((500 + 2000) / 2)
    assert metrics.e2e_ms.mean == pytest.approx((2500 + 3000) / 2)
    # a: (2.5 - 0.5) / 3; b: (3 - 2) / 1
    assert (metrics.tpot_ms.min, metrics.tpot_ms.max) == pytest.approx((2000 / 3, 1000))
    # gaps 0.5, 1, 0.5 and 1: the mean of all gaps is not the mean of the requests' TPOT
    assert metrics.itl_ms.count == 4
    assert metrics.itl_ms.mean == pytest.approx(750)


def test_throughput():
    throughput = measure(make_trace(), 2, cost, CEILING).throughput
    assert throughput.seconds == pytest.approx(4)
    assert throughput.requests_per_s == pytest.approx(2 / 4)
    assert throughput.output_tokens_per_s == pytest.approx(6 / 4)
    assert throughput.total_tokens_per_s == pytest.approx(406 / 4)
    assert throughput.output_tokens_per_s_per_gpu == pytest.approx(6 / 4 / 2)
    assert throughput.output_tokens_per_s_per_user == pytest.approx((4 / 2.5 + 2 / 3) / 2)


def test_decode_counts_only_steps_without_prefill():
    decode = measure(make_trace(), 1, cost, CEILING).decode
    assert (decode.steps, decode.tokens, decode.seconds) == (2, 3, pytest.approx(2.0))
    assert decode.bytes == (10**9 + 10**9) + (10**9 + 2 * 10**9)
    assert decode.gb_per_s == pytest.approx(5 / 2)
    # first step: 2 ms of reading, 10 ms of computing; second: 3 and 20
    assert decode.roofline_percent == pytest.approx(100 * (0.010 + 0.020) / 2)


def test_prefill_and_mixed_steps_are_counted_apart():
    metrics = measure(make_trace(), 1, cost, CEILING)
    # 100 tokens are 1 s of computing, 301 are 3.01 s; their reading takes 1 and 2 ms
    assert (metrics.prefill.steps, metrics.prefill.tokens, metrics.prefill.seconds) == (1, 100, pytest.approx(0.5))
    assert metrics.prefill.roofline_percent == pytest.approx(100 * 1 / 0.5)
    assert metrics.prefill.tflop_per_s == pytest.approx(100 / 0.5)
    assert (metrics.mixed.steps, metrics.mixed.tokens) == (1, 301)
    assert metrics.mixed.roofline_percent == pytest.approx(100 * 3.01 / 2)
    assert list(metrics.usage) == [Phase.PREFILL, Phase.MIXED, Phase.DECODE]


def test_a_step_that_only_launches_is_part_of_the_next():
    steps = [StepTrace(0.0, 0.25, 0, 0, 0), StepTrace(0.25, 0.5, 100, 0, 0), StepTrace(0.75, 0.5, 0, 1, 101)]
    metrics = measure(Trace(0.0, 1.25, steps=steps), 1, cost, CEILING)
    assert metrics.prefill.seconds == pytest.approx(0.75) and metrics.decode.seconds == pytest.approx(0.5)


def test_a_step_is_what_its_slices_are():
    chunk, decode = Slice(32, 100, 0), Slice(9, 1, 1)
    step = StepTrace.of([decode, decode, chunk], 1.0, 0.5)
    assert step == StepTrace(1.0, 0.5, 100, 2, 20, (chunk,)) and step.phase is Phase.MIXED
    assert StepTrace.of([decode], 0, 0).phase is Phase.DECODE and StepTrace.of([chunk], 0, 0).phase is Phase.PREFILL
    assert StepTrace.of([], 0, 0).phase is None


def test_cost_of_a_step_of_a_tiny_llama():
    """fp32, 2 layers of width 64: 4 query and 2 key heads of 16, an MLP of 128, a vocabulary of 96."""
    model = CheckpointConfig(spec_of(TINY), "fp32")
    limits = Limits(8, 64, 128, 16, 8, "fp32")
    config = EngineConfig("torch", model, "fp32", limits, ParallelMapping(), Fingerprint("cpu", "cpu", ""), {})
    linears = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128)
    norms, head, kv = (2 * 2 + 1) * 64, 96 * 64, 2 * 2 * 2 * 16
    of = step_cost(config)
    found = of(StepTrace.of([Slice(9, 1, 1), Slice(29, 1, 1), Slice(16, 8, 0), Slice(0, 4, 1)], 0, 0))
    assert found.bytes == 4 * (linears + norms + head + kv * (10 + 30 + 24 + 4))
    # (query, key) pairs: 10 and 30; 17 … 24; 1 … 4. QKᵀ and PV are 2 * 2 * 16 FLOPs a pair, head and layer.
    pairs = 10 + 30 + sum(range(17, 25)) + sum(range(1, 5))
    assert found.flops == 2 * (14 * linears + 3 * head) + 2 * 4 * 2 * 2 * 16 * pairs


def test_reading_can_be_the_roofline():
    slow = Ceiling(bytes_per_s=1e9, flops_per_s=1e30, source="a table")
    assert measure(make_trace(), 1, cost, slow).decode.roofline_percent == pytest.approx(100 * 5 / 2)


def test_a_single_token_has_no_tpot():
    trace = Trace(0.0, 1.0, [RequestTrace("a", 1, 0.0, [1.0], Outcome.COMPLETED)])
    metrics = measure(trace, 1, cost, CEILING)
    assert metrics.tpot_ms is None and metrics.itl_ms is None and not metrics.usage
    assert metrics.ttft_ms.mean == metrics.e2e_ms.mean == pytest.approx(1000)


def test_nothing_completed():
    trace = Trace(0.0, 1.0, [RequestTrace("a", 1, 0.0, [], Outcome.FAILED, "broken")])
    metrics = measure(trace, 1, cost, CEILING)
    assert metrics.throughput is None and metrics.ttft_ms is None and metrics.failed == 1


def test_percentiles_interpolate_linearly():
    stats = Stats.of(float(value) for value in range(101))
    assert (stats.p50, stats.p90, stats.p95, stats.p99) == (50, 90, 95, 99)
    assert Stats.of([0.0, 1.0]).p90 == pytest.approx(0.9)
    assert stats.std == pytest.approx(np.sqrt((101**2 - 1) / 12))
