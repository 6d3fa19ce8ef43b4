"""What every command shares: option types, consoles, progress and results.

Results go to stdout, as a table or, with `--json`, as one JSON object a line. Everything else (progress, notes,
warnings, errors) goes to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

PIPE_WIDTH = 1000
"""Columns when the output is no terminal: wide enough that no table cell is wrapped or cut."""


def _set_up_logging(verbose: bool) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)


def _check_device(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is no device. Give cpu, cuda or cuda:N.")
    return name


class DtypeChoice(str, Enum):
    """Values of `--dtype`."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, one object a line, instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists; the old one stays until the end.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu, cuda or cuda:N. Default: what the engine was built for.", callback=_check_device
    ),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print the libraries' log messages on stderr.", callback=_set_up_logging),
]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the `BrokenPipeError` again (rich would exit with 1): `trtx.cli.app` knows its exit code."""
        raise


def stdout() -> Console:
    """The console for results."""
    return _Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """The console for everything else."""
    return _Console(stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH, highlight=False)


def note(text: str) -> None:
    """Say something on stderr that explains the result but asks for nothing."""
    stderr().print(escape(text), style="dim")


def warn(text: str) -> None:
    """Say something on stderr that the user should look at."""
    stderr().print(f"[bold yellow]warning:[/] {escape(text)}")


def emit(data: Any, as_json: bool, render: Callable[[], RenderableType]) -> None:
    """Print a result on stdout: `data` as one line of JSON, or what `render()` returns."""
    if as_json:
        json_line(data)
    else:
        stdout().print(render())


def json_line(data: Any) -> None:
    """Print `data` as one line of JSON on stdout at once."""
    sys.stdout.write(to_json(data) + "\n")
    sys.stdout.flush()


def to_json(data: Any) -> str:
    """`data` as JSON, paths and enums as text. A NaN or infinity in it is an error: it is not JSON."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else str(value)


@contextmanager
def progress(
    description: str, total: int | None, unit: str = "B", refresh_per_second: float = 10
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr while the block runs; nothing when stderr is no terminal.

    Args:
        total: how many units there are; None when that is not known.
        unit: 'B' shows bytes and bytes/s, anything else (tokens, layers, requests) is counted as it is.
        refresh_per_second: how often it is drawn, by a thread that takes the interpreter from what is being done.

    Yields:
        `advance(n)`: n more units are done.
    """
    from rich import progress as bars  # a quarter of rich's import time, and `trtx --help` has no bars

    counts: tuple[bars.ProgressColumn, ...]
    if unit == "B":
        counts = (bars.DownloadColumn(), bars.TransferSpeedColumn())
    else:
        counts = (bars.MofNCompleteColumn(), bars.TextColumn(unit))
    console = stderr()
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        *counts,
        bars.TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=refresh_per_second,
    ) as display:
        task = display.add_task(escape(description), total=total)
        yield lambda n: display.advance(task, n)
