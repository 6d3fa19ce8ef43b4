"""A report as a picture: PNG, SVG, PDF, or one HTML file with the picture and the tables."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtx.converters.errors import OutputError, writing
from trtx.runtime.bench.metrics import DEFINITIONS, MILLI
from trtx.runtime.bench.report import Report, Table, check_target, tables
from trtx.runtime.bench.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf", ".html")

_MOST_COLOURS = 11
_LABELLED = 0.05
"""Parts of a bar that are a smaller share of it are not labelled."""
_MOST_BINS = 60
_STEPS_A_BIN = 8
_LOG_SPREAD = 20
"""A latency axis is logarithmic when the p99 is so many times the smallest value."""
_BLUE, _ORANGE, _GREY = "#2563a8", "#d9730d", "#6b7280"
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8}
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.edgecolor": _GREY,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def check_plot(path: Path) -> None:
    """Check, before anything is measured, that a plot can be written to `path` in the format that it names.

    Raises:
        OutputError: unknown suffix, or it can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: {path.suffix or 'no suffix'} is no plot format.", f"Use {', '.join(SUFFIXES)}.")
    check_target(path)


def write_plot(path: Path, report: Report, trace: Trace) -> None:
    """Draw `report` and write it in the format of the suffix.

    Raises:
        OutputError: unknown suffix, or it can't be written.
    """
    _write(path, report, lambda: _draw(report, trace))


def write_profile(path: Path, report: Report) -> None:
    """Draw the profile of `report` and write it in the format of the suffix.

    Raises:
        OutputError: unknown suffix, or it can't be written.
    """
    _write(path, report, lambda: _draw_profile(report))


def _write(path: Path, report: Report, draw: Callable[[], Figure]) -> None:
    from matplotlib import rc_context

    check_plot(path)
    with writing(path), rc_context(_STYLE):  # type: ignore[arg-type]
        figure = draw()
        if path.suffix.lower() == ".html":
            path.write_text(_html(report, figure), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)


def _draw(report: Report, trace: Trace) -> Figure:
    """The figure: distributions of TTFT and of ITL and TPOT, output rate and requests in the system over time."""
    from matplotlib.figure import Figure

    done = trace.completed
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    (ttft, itl), (rate, load) = figure.subplots(2, 2)
    figure.suptitle(_title(report), x=0.012, ha="left", fontsize=10, linespacing=1.5)
    _distribution(ttft, "Time to first token", {"TTFT": [r.ttft / MILLI for r in done]})
    _distribution(
        itl,
        "Time between tokens",
        {
            "ITL, every gap": [gap / MILLI for r in done for gap in r.gaps],
            "TPOT, mean of a request": [r.tpot / MILLI for r in done if r.tpot is not None],
        },
    )
    _output_rate(rate, trace)
    _in_system(load, trace)
    return figure


def _draw_profile(report: Report) -> Figure:
    """A bar a phase, as long as a step; a colour for each of the kernels that take longest, the idle time in white."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    phases = report.profile.phases if report.profile else []
    figure = Figure(figsize=(11, 2.6 + 1.1 * len(phases)), layout="constrained")
    figure.suptitle(_title(report), x=0.012, ha="left", fontsize=10, linespacing=1.5)
    if not phases:
        _say_empty(figure.subplots())
        return figure
    total: Counter[str] = Counter()
    for row in (row for phase in phases for row in phase.rows[:-1]):
        total[row.kernel] += row.percent  # type: ignore[assignment]
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = {kernel: palette[place] for place, (kernel, _) in enumerate(total.most_common(_MOST_COLOURS))}
    for axes, phase in zip(figure.subplots(len(phases), squeeze=False)[:, 0], phases, strict=True):
        roofline = f"{phase.roofline_percent:.0f}% of the roofline"
        axes.set(title=f"{phase.phase}: {phase.tokens:,.4g} tokens a step, {roofline}", xlabel="ms", yticks=[])
        axes.set_xlim(0, phase.ms)
        *kernels, rest = phase.rows
        shares = {row.kernel: row.ms for row in kernels if row.kernel in colours}
        shares["others"] = sum(row.ms for row in kernels if row.kernel not in colours)
        shares[rest.kernel] = rest.ms
        left = 0.0
        for kernel, ms in shares.items():
            colour = "white" if kernel == rest.kernel else colours.get(kernel, _GREY)
            axes.barh(0, ms, left=left, color=colour, edgecolor=_GREY, linewidth=0.5)
            if ms > _LABELLED * phase.ms:
                axes.text(left + ms / 2, 0, f"{100 * ms / phase.ms:.0f}%", ha="center", va="center", bbox=_LABEL_BOX)
            left += ms
    legend = {**colours, "others": _GREY, phases[0].rows[-1].kernel: "white"}
    handles = [Patch(facecolor=colour, edgecolor=_GREY, linewidth=0.5, label=name) for name, colour in legend.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=4)
    return figure


def _title(report: Report) -> str:
    engine, machine = report.engine, report.machine
    random = ", random weights" if engine.random_weights else ""
    lines = (
        f"{Path(engine.path).name}: {engine.family}, {engine.parameters / 1e6:,.0f} M parameters, "
        f"{engine.precision} weights, {engine.compute_dtype}{random}",
        f"{machine.name}   |   {report.workload['prompts']}   |   {report.load}",
    )
    return "\n".join(line.replace("$", r"\$") for line in lines)


def _distribution(axes: Axes, title: str, series: dict[str, Sequence[float]]) -> None:
    """Empirical cumulative distributions; p50 and p99 of the first are marked."""
    axes.set(title=title, xlabel="ms", ylabel="share of values at or below", ylim=(0, 1.04))
    drawn = {name: values for name, values in series.items() if values}
    if not drawn:
        _say_empty(axes)
        return
    for colour, (name, values) in zip((_BLUE, _ORANGE), drawn.items(), strict=False):
        axes.ecdf(values, color=colour, linewidth=1.8, label=name)
    first = next(iter(drawn.values()))
    if np.percentile(first, 99) > _LOG_SPREAD * min(first):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
    axes.autoscale_view()  # the marks below ask where on the axes a value is
    for percent in (50, 99):
        _mark_percentile(axes, percent, float(np.percentile(first, percent)))
    if len(drawn) > 1:
        axes.legend(loc="lower right")


def _mark_percentile(axes: Axes, percent: int, value: float) -> None:
    """A dot on the curve, with the value beside it on the side that has more room."""
    axes.plot(value, percent / 100, "o", color=_BLUE, markersize=5)
    across = axes.transAxes.inverted().transform(axes.transData.transform((value, 0)))[0]
    offset, side = ((-7, "right"), (7, "left"))[bool(across < 0.5)]
    axes.annotate(
        f"p{percent} {value:,.4g} ms",
        (value, percent / 100),
        xytext=(offset, 0 if percent == 50 else -9),
        textcoords="offset points",
        ha=side,
        va="center",
        bbox=_LABEL_BOX,
    )


def _output_rate(axes: Axes, trace: Trace) -> None:
    axes.set(title="Output rate", xlabel="s since the first arrival", ylabel="output tokens/s")
    seconds = trace.end - trace.start
    moments = [moment - trace.start for request in trace.requests for moment in request.token_times]
    if not moments:
        _say_empty(axes)
        return
    bins = min(_MOST_BINS, 1 + len(trace.steps) // _STEPS_A_BIN)
    counts, edges = np.histogram(moments, bins=bins, range=(0, seconds))
    axes.stairs(counts / np.diff(edges), edges, fill=True, color=_BLUE, alpha=0.25)
    axes.stairs(counts / np.diff(edges), edges, color=_BLUE, linewidth=1.4)
    mean = len(moments) / seconds
    axes.axhline(mean, color=_GREY, linewidth=1, linestyle="--")
    axes.annotate(f"mean {mean:,.4g}", (seconds, mean), ha="right", va="bottom", bbox=_LABEL_BOX)
    axes.set(xlim=(0, seconds), ylim=(0, None))


def _in_system(axes: Axes, trace: Trace) -> None:
    """Requests that have arrived and not ended, over time: running and waiting."""
    from matplotlib.ticker import MaxNLocator

    axes.set(title="Requests running or waiting", xlabel="s since the first arrival", ylabel="requests")
    changes = sorted(
        (moment - trace.start, change)
        for request in trace.requests
        if request.token_times
        for moment, change in ((request.arrival, 1), (request.token_times[-1], -1))
    )
    if not changes:
        _say_empty(axes)
        return
    moments, steps = zip(*changes, strict=True)
    axes.step(moments, np.cumsum(steps), where="post", color=_BLUE, linewidth=1.4)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlim=(0, trace.end - trace.start), ylim=(0, None))


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color=_GREY)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #111827; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.3rem; }} h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #e5e7eb; }}
th:first-child, td:first-child, table.facts td {{ text-align: left; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .4rem; color: #374151; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _html(report: Report, figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    body = [svg[svg.index("<svg") :], *(_html_table(table) for table in tables(report))]
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in DEFINITIONS.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    body.append(f"<h2>definitions</h2><dl>{terms}</dl><p>{escape(report.created)}; {escape(versions)}</p>")
    return _PAGE.format(title=escape(f"trtx bench: {Path(report.engine.path).name}"), body="\n".join(body))


def _html_table(table: Table) -> str:
    facts = not any(table.header)
    head = "" if facts else f"<tr>{_cells('th', table.header)}</tr>"
    rows = "".join(f"<tr>{_cells('td', row)}</tr>" for row in table.rows)
    kind = ' class="facts"' if facts else ""
    return f"<h2>{escape(table.title)}</h2><table{kind}>{head}{rows}</table>"


def _cells(tag: str, values: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)
