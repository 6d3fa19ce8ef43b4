"""Reports as files, tables and pictures; two of them side by side."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.runtime.bench.fakes import FakeClock, FakeExecutor, request
from trtx.converters.errors import InputError, OutputError
from trtx.runtime.bench.compare import bootstrap_ratio, check_same_workload, compare
from trtx.runtime.bench.load import Load, drive
from trtx.runtime.bench.metrics import measure
from trtx.runtime.bench.plot import write_plot
from trtx.runtime.bench.report import EngineIdentity, Machine, Report, RequestRecord, check_target, tables
from trtx.runtime.bench.roofline import Ceiling, Cost

ENGINE = EngineIdentity(
    "engines/tiny", "00ff", "llama", 135_000_000, "torch", "cpu", "int8_sq", "fp32", "fp32", 1, 1, False
)
MACHINE = Machine("cpu", "A CPU", 1, 2, 2)
WORKLOAD = {
    "prompts": "random, 4 in, 8 out",
    "request_rate": None,
    "concurrency": 4,
    "num_requests": 40,
    "warmup": 2,
    "seed": 0,
}


def make_report(requests=None, step_seconds=0.1):
    clock = FakeClock()
    requests = requests or [request(str(i), 4, 2 + i % 7) for i in range(40)]
    trace = drive(FakeExecutor(clock, 4, step_seconds), requests, Load(), clock=clock)
    metrics = measure(trace, 1, lambda step: Cost(10**9, 10**9), Ceiling(20e9, 1e12, "measured on this machine"))
    records = [RequestRecord.of(record, trace.start, token_times=False) for record in trace.requests]
    report = Report("2026-11-21T00:00:00+00:00", {"trtx": "0"}, ENGINE, MACHINE, WORKLOAD, metrics, records)
    return report, trace


def scaled(report, factor, noise, seed):
    """The report of a run of the same requests whose latencies are `factor` times as large, with noise."""
    rng = np.random.default_rng(seed)
    records = [
        replace(
            record,
            ttft_ms=record.ttft_ms * factor * rng.normal(1, noise),
            tpot_ms=record.tpot_ms * factor * rng.normal(1, noise),
            e2e_ms=record.e2e_ms * factor * rng.normal(1, noise),
        )
        for record in report.requests
    ]
    return replace(report, requests=records)


def test_a_report_survives_its_file(tmp_path):
    report, _ = make_report()
    path = tmp_path / "new" / "report.json"
    check_target(path)
    report.write(path)
    assert Report.read(path) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "trtx-bench-0"}', '{"a": 1}', '{"schema": "trtx-bench-2"}'])
def test_what_is_no_report_is_named(tmp_path, content):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        Report.read(path)


def test_tables_say_what_was_measured():
    report, _ = make_report([request("a", 4, 5), request("b", first=13)])
    text = json.dumps([(table.title, table.rows) for table in tables(report)])
    assert "1 completed, 1 failed" in text and "TPOT" in text and "% of the roofline" in text
    assert "random weights" not in text
    random = replace(report, engine=replace(ENGINE, random_weights=True))
    assert "random weights" in json.dumps([table.rows for table in tables(random)])


def test_a_request_that_failed_has_no_times():
    report, _ = make_report([request("a", 4, 5), request("b", first=14)])
    failed = next(record for record in report.requests if record.id == "b")
    assert (failed.ttft_ms, failed.tpot_ms, failed.e2e_ms) == (None, None, None)
    assert failed.error == "logits are not finite"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".html"])
def test_plots_are_written(tmp_path, suffix):
    report, trace = make_report()
    path = tmp_path / f"plot{suffix}"
    write_plot(path, report, trace)
    if suffix == ".png":
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 500 and image.std() > 5
    elif suffix == ".svg":
        assert "Time to first token" in "".join(ElementTree.parse(path).getroot().itertext())
    elif suffix == ".html":
        page = path.read_text(encoding="utf-8")
        assert "<svg" in page and "end-to-end" in page and "<?xml" not in page
        assert not re.search(r"(src|href)=\"http", page), "one file, nothing fetched"
    else:
        assert path.read_bytes().startswith(b"%PDF")


def test_a_plot_of_nothing_says_so(tmp_path):
    report, trace = make_report([request("a", first=13)])
    write_plot(tmp_path / "plot.svg", report, trace)
    assert "no values" in "".join(ElementTree.parse(tmp_path / "plot.svg").getroot().itertext())


def test_an_unknown_plot_format_is_refused(tmp_path):
    report, trace = make_report()
    with pytest.raises(OutputError, match=r"plot\.bmp"):
        write_plot(tmp_path / "plot.bmp", report, trace)


def test_equal_runs_show_no_difference():
    report, _ = make_report()
    comparison = compare(scaled(report, 1.0, 0.1, seed=1), scaled(report, 1.0, 0.1, seed=2))
    latencies = [ratio for ratio in comparison.ratios if ratio.low is not None]
    assert {ratio.name for ratio in latencies} >= {"TTFT mean", "TPOT p50", "end-to-end p90"}
    assert all(ratio.low <= 1.0 <= ratio.high and ratio.verdict == "no difference" for ratio in latencies)


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "worse"), (0.9, "better")])
def test_a_shift_of_a_tenth_is_seen(factor, verdict):
    report, _ = make_report([request(str(i), 4, 2 + i % 7) for i in range(200)])
    comparison = compare(scaled(report, 1.0, 0.1, seed=1), scaled(report, factor, 0.1, seed=2))
    (mean,) = (ratio for ratio in comparison.ratios if ratio.name == "TPOT mean")
    assert mean.ratio == pytest.approx(factor, rel=0.03)
    assert mean.low < factor < mean.high
    assert mean.verdict == verdict


def test_throughput_is_one_value_a_run_and_has_no_interval():
    report, _ = make_report()
    slower, _ = make_report(step_seconds=0.2)
    (rate,) = (ratio for ratio in compare(report, slower).ratios if ratio.name == "output tokens/s")
    assert (rate.ratio, rate.low, rate.verdict) == (pytest.approx(0.5), None, "")


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """95% intervals of the ratio of two means: exact coverage would miss 5 of 100; more than 14 has p < 0.0003."""
    missed = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        low, high = bootstrap_ratio(rng.gamma(4, 1, 100), rng.gamma(4, 1, 100), np.mean, paired=False, seed=trial)
        missed += not low <= 1.0 <= high
    assert 0 < missed <= 14


def test_pairs_take_the_spread_of_the_lengths_out():
    rng = np.random.default_rng(0)
    old = rng.uniform(1, 100, 100)
    new = old * 1.02 * rng.normal(1, 0.01, 100)
    low, high = bootstrap_ratio(old, new, np.mean, paired=True, seed=0)
    assert 1.0 < low < 1.02 < high
    low, high = bootstrap_ratio(old, new, np.mean, paired=False, seed=0)
    assert low < 1.0 < high


def test_another_workload_is_refused_and_another_machine_warned_about():
    report, _ = make_report()
    check_same_workload(WORKLOAD, dict(WORKLOAD), "old.json")
    with pytest.raises(InputError, match=r"old\.json: .*seed: 0 then, 5 now"):
        check_same_workload(WORKLOAD, {**WORKLOAD, "seed": 5}, "old.json")
    moved = replace(report, machine=replace(MACHINE, name="Another CPU"), workload={**WORKLOAD, "seed": 5})
    warnings = " ".join(compare(report, moved).warnings)
    assert "'A CPU' then, 'Another CPU' now" in warnings and "seed" in warnings
