"""The loop that drives an executor, on a clock that only moves when told to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.bench.fakes import FakeClock, FakeExecutor, request
from trtx.runtime.bench.load import Load, drive
from trtx.runtime.bench.trace import Outcome


def run(requests, load, slots=8, seed=0):
    clock = FakeClock()
    executor = FakeExecutor(clock, slots)
    return drive(executor, requests, load, seed=seed, clock=clock), executor


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process():
    gaps = np.diff(Load(request_rate=5.0).arrivals(20_000, seed=3))
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.03)  # an exponential's mean is its standard deviation
    assert (gaps > 0).all()


def test_arrivals_are_those_of_the_seed():
    load = Load(request_rate=5.0)
    assert load.arrivals(50, seed=1) == load.arrivals(50, seed=1)
    assert load.arrivals(50, seed=1) != load.arrivals(50, seed=2)
    assert load.arrivals(50, seed=1)[0] == 0.0


def test_offline_sends_everything_at_once():
    trace, executor = run([request(str(i)) for i in range(20)], Load(), slots=4)
    assert executor.in_system[0] == 20
    assert {r.arrival for r in trace.requests} == {trace.start}


def test_closed_loop_keeps_exactly_n_in_flight_until_the_last_are_sent():
    requests = [request(str(i), output_tokens=2 + i % 5) for i in range(40)]
    trace, executor = run(requests, Load(concurrency=3))
    last_sent = max(r.arrival for r in trace.requests)
    before = [n for n, step in zip(executor.in_system, trace.steps, strict=True) if step.start <= last_sent]
    assert set(before) == {3}
    assert max(executor.in_system) == 3


def test_closed_loop_counts_from_when_a_request_is_sent():
    trace, _ = run([request(str(i), output_tokens=3) for i in range(4)], Load(concurrency=1))
    assert [r.arrival - trace.start for r in trace.requests] == pytest.approx([0.0, 0.3, 0.6, 0.9])
    assert [r.ttft for r in trace.requests] == pytest.approx([0.1] * 4)


def test_open_loop_counts_the_wait_for_the_executor():
    """Requests come about every 10 ms and each needs 0.3 s alone: the k-th waits for all before it."""
    load = Load(request_rate=100.0)
    trace, _ = run([request(str(i), output_tokens=3) for i in range(10)], load, slots=1)
    arrivals = load.arrivals(10, seed=0)
    for k, record in enumerate(trace.requests):
        assert record.arrival - trace.start == pytest.approx(arrivals[k])
        assert record.ttft == pytest.approx(0.3 * k + 0.1 - arrivals[k])


def test_open_loop_with_a_bound_counts_the_wait_outside_the_executor():
    load = Load(request_rate=100.0, concurrency=1)
    trace, executor = run([request(str(i), output_tokens=3) for i in range(10)], load)
    assert max(executor.in_system) == 1
    arrivals = load.arrivals(10, seed=0)
    assert [r.ttft for r in trace.requests] == pytest.approx([0.3 * k + 0.1 - arrivals[k] for k in range(10)])


def test_it_sleeps_when_idle_until_the_next_arrival():
    load = Load(request_rate=0.1)
    trace, _ = run([request(str(i), output_tokens=1) for i in range(5)], load)
    assert len(trace.steps) == 5
    assert trace.end - trace.start == pytest.approx(load.arrivals(5, seed=0)[-1] + 0.1)


def test_a_refused_a_failed_and_a_cancelled_request_do_not_stop_the_others():
    requests = [request(str(first), first=first) for first in (1, 13, 14, 15, 2)]
    ended = []
    clock = FakeClock()
    trace = drive(FakeExecutor(clock), requests, Load(concurrency=2), clock=clock, advance=ended.append)
    assert {r.id: r.outcome for r in trace.requests} == {
        "1": Outcome.COMPLETED,
        "13": Outcome.FAILED,
        "14": Outcome.FAILED,
        "15": Outcome.CANCELLED,
        "2": Outcome.COMPLETED,
    }
    assert sum(ended) == 5
    assert {r.id: r.error for r in trace.requests if r.error} == {
        "13": "the prompt is unlucky",
        "14": "logits are not finite",
    }


@given(
    outputs=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    rate=st.none() | st.floats(0.5, 50.0),
    concurrency=st.none() | st.integers(1, 5),
    slots=st.integers(1, 4),
)
def test_every_token_of_every_request_is_recorded_once_and_in_order(outputs, rate, concurrency, slots):
    requests = [request(str(i), output_tokens=count) for i, count in enumerate(outputs)]
    trace, _ = run(requests, Load(rate, concurrency), slots)
    assert [r.output_tokens for r in sorted(trace.requests, key=lambda r: int(r.id))] == outputs
    for record in trace.requests:
        assert record.outcome is Outcome.COMPLETED
        assert record.token_times == sorted(set(record.token_times))
        assert trace.start <= record.arrival < record.token_times[0]


@pytest.mark.parametrize("wrong", [{"request_rate": 0.0}, {"request_rate": -1.0}, {"concurrency": 0}])
def test_a_load_without_requests_is_refused(wrong):
    with pytest.raises(ValueError, match="is "):
        Load(**wrong)
