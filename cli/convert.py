"""`trtx convert`: any model to a trtx checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from trtx.cli.common import DtypeChoice, Force, Json, Verbose, emit, note, progress, warn
from trtx.converters.errors import InputError

if TYPE_CHECKING:
    from trtx.converters.convert import Conversion
    from trtx.converters.report import CheckReport

_SHOWN = 3
"""Tensors that are named; --json names all."""


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A Hugging Face folder, a hub id (org/name), a .gguf file, or random:CONFIG.json (random weights).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write the checkpoint to.", show_default=False)
    ] = None,
    dtype: Annotated[
        DtypeChoice,
        typer.Option(help="Of the weights; auto: the source's, bf16 where it is quantized."),
    ] = DtypeChoice.AUTO,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the hub.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Say whether SRC would convert, from headers only; if it has no weights, from config.json and index.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of random weights.")] = 0,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Convert a model to a trtx checkpoint, or --check whether it would convert."""
    if check and out is not None:
        raise typer.BadParameter("--check writes nothing: leave out OUT.")
    if not check and out is None:
        raise typer.BadParameter("OUT is missing. Give a folder to write to, or --check to write nothing.")
    if out is None:
        _check(source, dtype, revision, seed, as_json)
    else:
        _convert(source, out, dtype, revision, seed, force, as_json)


def _check(source: str, dtype: DtypeChoice, revision: str | None, seed: int, as_json: bool) -> None:
    from trtx.converters.convert import check

    report = check(source, dtype=dtype.value, revision=revision, seed=seed)
    emit(report.to_json(), as_json, lambda: _render_check(report))
    if not report.converts:
        raise InputError(f"{source}: would not convert.", "Download it again, or correct its config.json.")


def _convert(
    source: str, out: Path, dtype: DtypeChoice, revision: str | None, seed: int, force: bool, as_json: bool
) -> None:
    from trtx.converters.convert import convert

    result = convert(
        source,
        out,
        dtype=dtype.value,
        revision=revision,
        force=force,
        seed=seed,
        progress=partial(progress, "Converting"),
    )
    emit(result.to_json(), as_json, lambda: _render(result))
    for warning in result.warnings:
        warn(warning)
    if not as_json:
        note(f"Next: trtx quantize {out} OUT, or trtx build {out} ENGINE")


def _render(result: Conversion) -> Table:
    table = _facts(result.report)
    speed = result.report.bytes / max(result.seconds, 1e-9)
    table.add_row("time", f"{result.seconds:.1f} s ({decimal(int(speed))}/s)")
    table.add_row("checkpoint", str(result.out))
    return table


def _render_check(report: CheckReport) -> Table:
    table = _facts(report)
    if report.ignored:
        more = len(report.ignored) - _SHOWN
        shown = ", ".join(report.ignored[:_SHOWN])
        table.add_row("not needed", f"{shown}, and {more} more" if more > 0 else shown)
    for text in report.notes:
        table.add_row("note", text)
    for problem in report.problems:
        table.add_row("problem", problem)
    unseen = {"headers": "", "names": " (shapes were not seen)", "config": " (tensors were not seen)"}
    table.add_row("converts", f"yes{unseen[report.seen]}" if report.converts else "no")
    return table


def _facts(report: CheckReport) -> Table:
    spec = report.spec
    table = Table.grid(padding=(0, 2))
    table.add_row("model", f"{spec.family}, {spec.num_layers} layers, hidden size {spec.hidden_size}")
    weights = "random weights" if report.provenance["kind"] == "random" else f"from {report.source}"
    if scheme := report.provenance.get("dequantized"):
        weights += f", dequantized from {scheme['method']}"
    table.add_row("weights", f"{report.parameters:,} parameters in {report.tensors} tensors, {weights}")
    table.add_row("size", f"{decimal(report.bytes)} in {report.dtype}")
    return table
