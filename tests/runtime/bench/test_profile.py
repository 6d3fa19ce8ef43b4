"""What the time of a step goes to: timelines made by hand, and a tiny engine on the CPU."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import DeviceType

from tests.runtime.bench.fakes import request
from tests.runtime.bench.test_report import make_report
from tests.runtime.fakes import make_executor
from trtx.runtime.bench import profile
from trtx.runtime.bench.load import Load, drive
from trtx.runtime.bench.plot import write_profile
from trtx.runtime.bench.profile import IDLE, Event, Recorded, exclusive, recorded, short_name, summarize
from trtx.runtime.bench.report import Report, tables
from trtx.runtime.bench.roofline import Ceiling, Cost
from trtx.runtime.bench.trace import Slice
from trtx.runtime.bench.watch import Watch
from trtx.runtime.cuda.launch import LIBRARY

DECODE, CHUNK = Slice(9, 1, 1), Slice(0, 8, 1)
CEILING = Ceiling(bytes_per_s=1e9, flops_per_s=1e12, source="a table")


def test_a_chain_of_kernels_that_wait_for_each_other_is_not_counted_twice():
    """`b` and `c` are launched while the one before runs; each ends when its own work is done."""
    times, idle = exclusive([Event("a", 0, 10), Event("b", 2, 14), Event("c", 12, 20), Event("b", 21, 24)])
    assert times == {"a": 10, "b": 4 + 3, "c": 6} and idle == 1


def test_time_between_two_kernels_belongs_to_a_third_that_runs_all_along():
    times, idle = exclusive([Event("a", 1, 3), Event("b", 6, 7), Event("long", 0, 10)])
    assert times == {"a": 2, "b": 1, "long": 7} and idle == 0
    times, idle = exclusive([Event("a", 0, 3), Event("b", 8, 9), Event("late", 5, 10)])
    assert times == {"a": 3, "b": 1, "late": 4} and idle == 2


def test_nothing_takes_no_time():
    assert exclusive([]) == ({}, 0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=12))
def test_every_moment_belongs_to_the_running_kernel_that_ends_first(spans):
    events = [Event(str(number), start, start + length) for number, (start, length) in enumerate(spans)]
    expected, idle = Counter(), 0
    for moment in range(min(event.start for event in events), max(event.end for event in events)):
        running = [event for event in events if event.start <= moment < event.end]
        if running:
            expected[min(running, key=lambda event: event.end).name] += 1
        else:
            idle += 1
    times, found = exclusive(events)
    assert {name: time for name, time in times.items() if time} == expected and found == idle


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("gemv", LIBRARY),  # trtx's own is known by name before
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", LIBRARY),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", LIBRARY),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<int> >(int::Params)", LIBRARY),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>(int)", LIBRARY),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::cublasSplitKParams<float>)", LIBRARY),
        ("void pytorch_flash::flash_fwd_kernel<Traits<128, cutlass::bfloat16_t>, false>(Params)", "flash_fwd_kernel"),
        ("fmha_cutlassF_bf16_sm80(AttentionKernel<cutlass::bfloat16_t>::Params)", "fmha_cutlassF_bf16_sm80"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::f()::{lambda(float)"
            "#1}::operator()() const::{lambda()->int}, std::array<char*, 2ul> >(int, std::array<char*, 2ul>)",
            "vectorized_elementwise_kernel",
        ),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<int>(int)", "indexSelectLargeIndex"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("aten::silu", "silu"),
    ],
)
def test_names(name, short):
    assert short_name(name) == short


def test_a_step_begins_with_its_first_kernel():
    step = recorded((DECODE,), [Event("Memcpy HtoD", 0, 2), Event("gemv", 50, 60), Event("Memcpy DtoH", 61, 63)])
    assert step.times == {"gemv": 10, "Memcpy DtoH": 2} and step.rest == 1 and step.us == 13


def event(name, start, end, device=DeviceType.CUDA, own=0.0):
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), self_cpu_time_total=own
    )


def test_kernels_belong_to_the_step_that_launched_them():
    """Marks of steps stand on the host's timeline, and again on the GPU's, where they are no kernels."""
    marks = [event(f"trtx step {number}", 100 * number, 100 * number + 90, DeviceType.CPU) for number in range(2)]
    copies = [event(f"trtx step {number}", 100 * number + 20, 100 * number + 60) for number in range(2)]
    kernels = [event("b", 130, 150), event("a", 20, 60), event("b", 160, 170), event("before", -10, -5)]
    first, second = profile._on_gpu([*kernels, *marks, *copies], [(CHUNK,), (DECODE,)])
    assert first.times == {"a": 40} and first.slices == (CHUNK,)
    assert second.times == {"b": 30} and second.rest == 10 and second.calls == {"b": 2}


def test_operators_have_their_self_time_and_the_host_the_rest():
    mark = event("trtx step 0", 10, 110, DeviceType.CPU)
    inside = [event("aten::linear", 20, 60, DeviceType.CPU, 5.0), event("aten::mm", 25, 60, DeviceType.CPU, 35.0)]
    outside = [event("aten::add", 0, 5, DeviceType.CPU, 5.0), event("aten::add", 120, 125, DeviceType.CPU, 5.0)]
    (step,) = profile._on_cpu([mark, *inside, *outside], [(DECODE,)])
    assert step.times == {"aten::linear": 5, "aten::mm": 35} and step.rest == 60


def make_profile():
    """Two decodes of 1 ms and 3 ms, of which a quarter is idle, and a prefill."""
    steps = [
        Recorded((DECODE,), Counter(gemv=2, decode=1), {"gemv": 500.0, "decode": 250.0}, 250.0),
        Recorded((DECODE,), Counter(gemv=2, decode=1), {"gemv": 1500.0, "decode": 750.0}, 750.0),
        Recorded((CHUNK,), Counter({"nvjet_a": 1, "nvjet_b": 2}), {"nvjet_a": 1000.0, "nvjet_b": 3000.0}, 0.0),
        Recorded((), Counter(), {}, 0.0),
    ]

    def moved(slices):
        return {"linear.gemv": 500_000} if slices == (DECODE,) else {LIBRARY: 4000}

    return summarize(steps, True, moved, lambda step: Cost(10**6, 10**6), CEILING)


def test_figures_are_means_of_the_steps_of_a_phase():
    prefill, decode = make_profile().phases
    assert (decode.phase, decode.steps, decode.tokens, decode.ms) == ("decode", 2, 1, 2)
    assert decode.roofline_percent == pytest.approx(50), "1 ms of reading in 2 ms"
    gemv, attention, idle = decode.rows
    assert (gemv.kernel, gemv.calls, gemv.ms, gemv.percent) == ("linear.gemv", 2, 1, 50)
    assert gemv.bytes == 500_000 and gemv.bandwidth_percent == pytest.approx(50), "0.5 MB in 1 ms, of 1 GB/s"
    assert (attention.kernel, attention.bytes, attention.bandwidth_percent) == ("decode", None, None)
    assert (idle.kernel, idle.ms, idle.percent, idle.bytes) == (IDLE, 0.5, 25, None)
    assert (prefill.phase, prefill.tokens) == ("prefill", 8)
    assert [(row.kernel, row.calls, row.ms) for row in prefill.rows] == [(LIBRARY, 3, 4), (IDLE, 0, 0)]


def test_a_profile_is_shown_and_drawn(tmp_path):
    report = replace(make_report()[0], profile=make_profile())
    shown = {table.title: table for table in tables(report) if table.title.startswith("profile")}
    decode = next(table for title, table in shown.items() if "decode" in title)
    assert decode.rows[0] == ("linear.gemv", "2", "1.000", "50.0", "0.50", "50") and "roofline" in decode.title
    write_profile(tmp_path / "profile.svg", report)
    drawn = (tmp_path / "profile.svg").read_text()
    assert "linear.gemv" in drawn and "decode: 1 tokens a step" in drawn and IDLE in drawn
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report
    nothing = replace(report, profile=replace(report.profile, phases=[]))
    write_profile(tmp_path / "nothing.svg", nothing)
    assert "no values" in (tmp_path / "nothing.svg").read_text()


def watched(overlaps):
    executor = make_executor(overlaps=overlaps)
    executor.runner.notes = []
    executor.runner = Watch(executor.runner)
    return executor, executor.runner


@pytest.mark.parametrize("overlaps", [False, True], ids=["plain", "overlapped"])
def test_chunks_are_those_of_the_step_that_was_read(overlaps):
    executor, watch = watched(overlaps)
    requests = [request(str(number), 3 + number, 6) for number in range(6)]
    trace = drive(executor, requests, Load(concurrency=2), chunks=lambda: watch.chunks)
    assert sum(len(step.chunks) for step in trace.steps) >= len(requests)
    for step in trace.steps:
        assert sum(chunk.tokens for chunk in step.chunks) == step.prefill_tokens


def test_steps_are_taken_one_by_one_and_nothing_is_left():
    """In the middle of the answers; steps overlap again afterwards."""
    executor, watch = watched(overlaps=True)
    requests = [request(str(number), 4, 20) for number in range(2)]
    found = profile.profile(
        executor,
        watch,
        requests,
        torch.device("cpu"),
        bytes_of=None,
        step_cost=lambda step: Cost(step.context_tokens, 1),
        ceiling=Ceiling(1e-6, 1e30, "a table"),
    )
    assert [(phase.phase, phase.steps, phase.tokens) for phase in found.phases] == [
        ("prefill", 1, 8),
        ("decode", 16, 2),
    ]
    assert watch.overlaps and not executor.has_work and executor.blocks.pool.used == 0
    # after the prefill, one decode and two more: contexts of 8 … 23 tokens
    decode = found.phases[1]
    seconds = decode.roofline_percent / 100 * decode.ms * 1e-3 * decode.steps
    assert seconds * 1e-6 == pytest.approx(2 * sum(range(8, 24)))
