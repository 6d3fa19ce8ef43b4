"""The result of a benchmark as one value: written and read as JSON, shown as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trtx.converters.errors import InputError, OutputError, writing
from trtx.converters.spec import from_json
from trtx.runtime.bench.load import Load
from trtx.runtime.bench.metrics import MILLI, Metrics
from trtx.runtime.bench.profile import PhaseProfile, Profile
from trtx.runtime.bench.trace import Outcome, RequestTrace

SCHEMA = "trtx-bench-2"
"""Name and version of the JSON format."""


@dataclass(frozen=True)
class EngineIdentity:
    """The engine that was measured.

    Attributes:
        identity: XXH3-128 over the digests of its files.
        random_weights: it holds no trained model; figures are those of its shape.
    """

    path: str
    identity: str
    family: str
    parameters: int
    backend: str
    gpu: str
    quantization: str
    compute_dtype: str
    kv_dtype: str
    tp: int
    pp: int
    random_weights: bool

    @property
    def precision(self) -> str:
        """How weights are stored."""
        return "unquantized" if self.quantization == "none" else self.quantization


@dataclass(frozen=True)
class Machine:
    """Where it was measured.

    Attributes:
        device: 'cpu' or 'cuda'.
        name: of the GPU or CPU.
        count: GPUs in use; 1 for a CPU.
        cores, threads: CPU cores of this process and torch's threads.
    """

    device: str
    name: str
    count: int
    cores: int
    threads: int


@dataclass(frozen=True)
class RequestRecord:
    """One request. Times are None for a request that did not complete.

    Attributes:
        arrival_s: after the first arrival.
        token_times_ms: of each token after the arrival; empty unless asked for.
    """

    id: str
    outcome: str
    input_tokens: int
    output_tokens: int
    arrival_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    error: str = ""
    token_times_ms: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, request: RequestTrace, start: float, token_times: bool) -> RequestRecord:
        """The record of a request of a run that began at `start`."""
        done = request.outcome is Outcome.COMPLETED
        tpot = request.tpot if done else None
        return cls(
            request.id,
            request.outcome.value if request.outcome else "",
            request.prompt_tokens,
            request.output_tokens,
            request.arrival - start,
            request.ttft / MILLI if done else None,
            None if tpot is None else tpot / MILLI,
            request.e2e / MILLI if done else None,
            request.error,
            [(moment - request.arrival) / MILLI for moment in request.token_times] if token_times else [],
        )


@dataclass(frozen=True)
class Report:
    """A benchmark: what was asked, where, and what came out.

    Attributes:
        created: ISO 8601, UTC.
        versions: of Python and libraries.
        workload: prompts, lengths, load and seed: two reports with equal workloads can be compared.
        profile: what the time of a step goes to, if that was asked for.
    """

    created: str
    versions: dict[str, str]
    engine: EngineIdentity
    machine: Machine
    workload: dict[str, Any]
    metrics: Metrics
    requests: list[RequestRecord]
    profile: Profile | None = None
    schema: str = SCHEMA

    @property
    def load(self) -> Load:
        """When its requests were sent."""
        return Load(self.workload["request_rate"], self.workload["concurrency"])

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write the JSON file, replacing what is there at once.

        Raises:
            OutputError: it can't be written.
        """
        with writing(path):
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report.

        Raises:
            InputError: not a report, or of another version.
        """
        remedy = "Give a file written by trtx bench --output."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}).", remedy) from error
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}).", remedy) from error
        found = content.get("schema") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise InputError(f"{path}: its schema is {found!r}; this trtx reads {SCHEMA!r}.", remedy)
        return from_json(cls, content, str(path))


def check_target(path: Path) -> None:
    """Check, before anything is measured, that a result can be written to `path`; makes its folder.

    Raises:
        OutputError: it can't.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder.", "Give the name of a file.")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise OutputError(f"{path.parent}: is no folder.", "Choose another place.") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: its folder can't be written.", "Choose a folder you own.")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"{path}: can't be written.", "Choose another name, or make the file writable.")


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; how they are drawn is the caller's business."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tables(report: Report) -> Iterator[Table]:
    """What a reader wants to see of a report."""
    yield Table("benchmark", ("", ""), list(_setting_rows(report)))
    yield Table("throughput", ("", ""), list(_throughput_rows(report)))
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    yield Table("latency, ms", ("", *columns), list(_latency_rows(report.metrics, columns)))
    for phase in report.profile.phases if report.profile else ():
        yield _profile_table(phase)


def _setting_rows(report: Report) -> Iterator[tuple[str, str]]:
    engine, machine, workload, metrics = report.engine, report.machine, report.workload, report.metrics
    random = ", random weights" if engine.random_weights else ""
    yield "engine", f"{engine.path} ({engine.family}, {engine.parameters / 1e6:,.0f} M parameters{random})"
    yield "precision", f"{engine.precision} weights, {engine.compute_dtype} compute, {engine.kv_dtype} KV cache"
    count = f"{machine.count} × " if machine.device == "cuda" else ""
    cores = f" ({machine.threads} threads)" if machine.device == "cpu" else ""
    yield "machine", f"{count}{machine.name}{cores}, {engine.backend} backend"
    yield "prompts", str(workload["prompts"])
    yield "load", str(report.load)
    ended = f"{metrics.completed} completed"
    ended += f", {metrics.failed} failed" if metrics.failed else ""
    ended += f", {metrics.cancelled} cancelled" if metrics.cancelled else ""
    yield "requests", f"{ended}, after {workload['warmup']} of warm-up"
    yield "tokens", f"{metrics.input_tokens:,} in, {metrics.output_tokens:,} out"
    if metrics.reused_tokens:
        yield "prefix reuse", f"{metrics.reused_tokens:,} input tokens were found in the KV cache"
    if metrics.preemptions:
        yield "preemptions", f"{metrics.preemptions:,}: the KV cache was full"


def _throughput_rows(report: Report) -> Iterator[tuple[str, str]]:
    metrics, throughput = report.metrics, report.metrics.throughput
    if throughput is None:
        return
    yield "requests/s", f"{throughput.requests_per_s:,.2f}"
    yield "output tokens/s", f"{throughput.output_tokens_per_s:,.1f}"
    yield "total tokens/s", f"{throughput.total_tokens_per_s:,.1f}"
    if report.machine.device == "cuda":
        yield "output tokens/s per GPU", f"{throughput.output_tokens_per_s_per_gpu:,.1f}"
    yield "output tokens/s per user", f"{throughput.output_tokens_per_s_per_user:,.1f}"
    yield "duration", f"{throughput.seconds:,.2f} s, {metrics.steps:,} steps, {metrics.mean_batch:.1f} decodes a step"
    for phase, usage in metrics.usage.items():
        rates = f"{usage.gb_per_s:,.2f} GB/s, {usage.tflop_per_s:,.3g} TFLOP/s"
        yield phase.value, f"{usage.roofline_percent:.0f}% of the roofline: {rates}"
    for usage in list(metrics.usage.values())[:1]:
        ceilings = f"{usage.ceiling_gb_per_s:,.1f} GB/s, {usage.ceiling_tflops:,.3g} TFLOP/s"
        yield "roofline", f"{ceilings} ({usage.ceiling_source})"


def _latency_rows(metrics: Metrics, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    latencies = {
        "TTFT": metrics.ttft_ms,
        "TPOT": metrics.tpot_ms,
        "ITL": metrics.itl_ms,
        "end-to-end": metrics.e2e_ms,
    }
    for name, stats in latencies.items():
        if stats is not None:
            yield (name, *(f"{getattr(stats, column):,.2f}" for column in columns))


_PROFILE_COLUMNS = ("", "calls a step", "ms a step", "% of the step", "MB a step", "% of the bandwidth")
_SMALL = 1.0
"""Percent of a step; kernels that take less are shown as one row."""
_WITHOUT_BYTES = 4
"""Columns, where no bytes are known."""


def _profile_table(phase: PhaseProfile) -> Table:
    mean = f"{phase.tokens:,.4g} tokens in {phase.ms:,.3f} ms a step (steps: {phase.steps})"
    title = f"profile of {phase.phase}: {mean}, {phase.roofline_percent:.0f}% of the roofline"
    columns = len(_PROFILE_COLUMNS) if any(row.bytes is not None for row in phase.rows) else _WITHOUT_BYTES
    return Table(title, _PROFILE_COLUMNS[:columns], [row[:columns] for row in _profile_rows(phase)])


def _profile_rows(phase: PhaseProfile) -> Iterator[tuple[str, ...]]:
    *kernels, rest = phase.rows
    small = [row for row in kernels if row.percent < _SMALL]
    for row in kernels[: len(kernels) - len(small)]:
        moved = "" if row.bytes is None else f"{row.bytes / 1e6:,.2f}"
        rate = "" if row.bandwidth_percent is None else f"{row.bandwidth_percent:.0f}"
        yield row.kernel, f"{row.calls:,.4g}", f"{row.ms:,.3f}", f"{row.percent:.1f}", moved, rate
    if small:
        calls, ms, percent = (sum(getattr(row, name) for row in small) for name in ("calls", "ms", "percent"))
        yield f"{len(small)} others", f"{calls:,.4g}", f"{ms:,.3f}", f"{percent:.1f}", "", ""
    yield rest.kernel, "", f"{rest.ms:,.3f}", f"{rest.percent:.1f}", "", ""
