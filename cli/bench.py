"""`trtx bench`: serve a load with an engine and measure it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trtx.cli.common import Device, Json, Verbose, emit, note, progress, warn
from trtx.converters.errors import RequestError

if TYPE_CHECKING:
    from trtx.runtime.bench import report as reports
    from trtx.runtime.bench.compare import Comparison
    from trtx.runtime.bench.load import Load
    from trtx.runtime.bench.workload import RandomPrompts

_LENGTH = "128"


def bench(
    engine: Annotated[
        Path, typer.Argument(metavar="ENGINE", help="A folder written by trtx build.", show_default=False)
    ],
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Keep N requests in flight: the next is sent when one ends."),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(metavar="R", help="Send R requests/s on average (Poisson); with --concurrency, the rest wait."),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Requests to measure. Default: the dataset's, else 32 or 4 x --concurrency."
        ),
    ] = None,
    isl: Annotated[
        str | None,
        typer.Option(metavar="N|LOW:HIGH", help="Input tokens: a number, or a uniform range. Default: 128."),
    ] = None,
    osl: Annotated[
        str | None,
        typer.Option(metavar="N|LOW:HIGH", help="Output tokens of a request, likewise. Default: 128."),
    ] = None,
    isl_stdev: Annotated[
        float | None,
        typer.Option(min=0, metavar="S", help="Draw input lengths from a normal distribution around --isl."),
    ] = None,
    osl_stdev: Annotated[
        float | None, typer.Option(min=0, metavar="S", help="Draw output lengths from one around --osl.")
    ] = None,
    shared_prefix: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="First N input tokens that all random prompts share.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL", help="Prompts from a file: prompt or input_ids, and output_tokens or max_tokens."
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Requests served before, not counted.")] = 2,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of prompts, lengths and arrivals.")] = 0,
    prefix_reuse: Annotated[
        bool, typer.Option("--prefix-reuse/--no-prefix-reuse", help="Let equal prefixes share KV blocks.")
    ] = True,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="JSON", help="Also write the report to this file.")
    ] = None,
    save_requests: Annotated[
        bool, typer.Option("--save-requests", help="Keep the time of every token in the report.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the report: .png, .svg, .pdf or .html.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also see what the time of a step goes to, and draw it: .png, .svg, .pdf or .html."
        ),
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD", help="Compare with a report written by --output.")
    ] = None,
    compare_anyway: Annotated[
        bool, typer.Option("--compare-anyway", help="Compare even if OLD measured another workload.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure an engine: throughput, TTFT, TPOT, ITL, latency, bandwidth.

    Without --concurrency and --request-rate all requests are sent at once (offline). Outputs have exactly the length
    asked for: end-of-sequence tokens are ignored.

    With --profile a few requests more are served under torch's profiler, and the report says for steps that prefill and
    that decode how long each kernel takes, how much it reads and writes, and which share of the bandwidth that is.
    """
    from trtx.runtime.bench.benchmark import Settings, run_benchmark
    from trtx.runtime.bench.compare import check_same_workload
    from trtx.runtime.bench.compare import compare as set_side_by_side
    from trtx.runtime.bench.plot import check_plot, write_plot, write_profile
    from trtx.runtime.bench.report import Report, check_target

    prompts = dataset or _random_prompts(isl or _LENGTH, isl_stdev, osl or _LENGTH, osl_stdev, shared_prefix)
    if dataset and any(given is not None for given in (isl, osl, isl_stdev, osl_stdev, shared_prefix)):
        raise typer.BadParameter("--dataset has its own lengths: leave out --isl, --osl and the like.")
    settings = Settings(prompts, _load(request_rate, concurrency), num_requests, warmup, seed, prefix_reuse)
    targets = [path.resolve() for path in (plot, profile, output) if path is not None]
    if len(set(targets)) < len(targets):
        raise typer.BadParameter("--plot, --profile and --output need files of their own.")
    # Whatever can be refused is refused before the time is spent.
    for picture in (plot, profile):
        if picture is not None:
            check_plot(picture)
    if output is not None:
        check_target(output)
    old = Report.read(compare) if compare is not None else None
    if old is not None and not compare_anyway:
        check_same_workload(old.workload, settings.describe(), str(compare))

    calm = partial(progress, refresh_per_second=1)  # drawing the bar takes time from what is measured
    report, trace = run_benchmark(
        engine, settings, device=device, token_times=save_requests, profile=profile is not None, progress=calm
    )

    comparison = set_side_by_side(old, report, seed) if old is not None else None
    data = report.to_json()
    if comparison is not None:
        data["comparison"] = comparison.to_json()
    emit(data, as_json, lambda: _render(report, comparison))
    for text in comparison.warnings if comparison else ():
        warn(text)
    if output is not None:
        report.write(output)
        note(f"Report: {output}")
    if plot is not None:
        write_plot(plot, report, trace)
        note(f"Plot: {plot}")
    if profile is not None:
        write_profile(profile, report)
        note(f"Profile: {profile}")
        if report.profile is not None and not report.profile.phases:
            warn("--profile: torch's profiler saw no kernels; KINETO_LOG_LEVEL=0 in the environment makes it say why.")
    if report.metrics.failed:
        raise RequestError(
            f"{report.metrics.failed} of {len(report.requests)} requests failed: {'; '.join(report.metrics.errors)}",
            "Look at the errors of `requests` in the report (--output).",
        )


def _random_prompts(
    isl: str, isl_stdev: float | None, osl: str, osl_stdev: float | None, shared_prefix: int | None
) -> RandomPrompts:
    from trtx.runtime.bench.workload import Lengths, RandomPrompts

    def lengths(option: str, text: str, stdev: float | None) -> Lengths:
        try:
            return Lengths.parse(text, stdev or 0.0)
        except ValueError as error:
            raise typer.BadParameter(f"{option}: {error}.") from error

    return RandomPrompts(lengths("--isl", isl, isl_stdev), lengths("--osl", osl, osl_stdev), shared_prefix or 0)


def _load(request_rate: float | None, concurrency: int | None) -> Load:
    from trtx.runtime.bench.load import Load

    try:
        return Load(request_rate, concurrency)
    except ValueError as error:
        raise typer.BadParameter(f"--request-rate: {error}.") from error


def _render(report: reports.Report, comparison: Comparison | None) -> RenderableType:
    from trtx.runtime.bench.metrics import DEFINITIONS
    from trtx.runtime.bench.report import tables

    parts: list[RenderableType] = []
    for table in tables(report):
        parts += [Text(table.title, "bold"), _draw(table), Text("")]
    if comparison is not None:
        parts += [_render_comparison(comparison), Text("")]
    parts += [Text(f"{term}: {text}", "dim") for term, text in DEFINITIONS.items()]
    return Group(*parts)


def _draw(table: reports.Table) -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(table.header))
    for number, name in enumerate(table.header):
        drawn.add_column(name, justify="right" if name else "left", style="cyan" if number == 0 else "")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _render_comparison(comparison: Comparison) -> RenderableType:
    from trtx.runtime.bench.compare import CAVEAT, comparison_table

    table = comparison_table(comparison)
    return Group(Text(table.title, "bold"), _draw(table), Text(CAVEAT, "dim"))
