"""`trtx quantize`: a checkpoint to a smaller one, and how much it lost."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from trtx.cli.common import Force, Json, Verbose, emit, note, progress, warn

if TYPE_CHECKING:
    from trtx.quantize.pipeline import QualityReport


class FormatChoice(str, Enum):
    """Values of `--format`."""

    FP8 = "fp8"
    FP8_WO = "fp8_wo"
    FP8_PC_PT = "fp8_pc_pt"
    INT8_SQ = "int8_sq"
    INT4_AWQ = "int4_awq"
    NVFP4 = "nvfp4"
    NONE = "none"


class KVCacheChoice(str, Enum):
    """Values of `--kv-cache`."""

    NONE = "none"
    FP8 = "fp8"


class DeviceChoice(str, Enum):
    """Values of `--device`."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def quantize(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint made by trtx convert.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write to.", show_default=False)],
    format: Annotated[
        FormatChoice,
        typer.Option(help="Of the linears' weights; none: quantize only the KV cache.", show_default=False),
    ],
    kv_cache: Annotated[KVCacheChoice, typer.Option(help="Format of the KV cache.")] = KVCacheChoice.NONE,
    excluded: Annotated[
        list[str],
        typer.Option(
            "--exclude", metavar="GLOB", help="Linears that stay as they are, by canonical name. Replaces the default."
        ),
    ] = ["lm_head"],  # noqa: B006 - typer copies it
    calib_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or JSONL to calibrate on; else the text that comes with trtx."),
    ] = None,
    calib_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to calibrate on.")] = 16,
    calib_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in each.")] = 256,
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text or JSONL to judge on, another than the calibration's."),
    ] = None,
    eval_samples: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of text to judge on.")] = 8,
    eval_length: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens in each.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Windows in one step.")] = 8,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Fail if the perplexity rises by more than this, not the format's gate."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep OUT even if it fails; the exit code stays 7.")] = False,
    device: Annotated[DeviceChoice, typer.Option(help="Where to calibrate and judge.")] = DeviceChoice.AUTO,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a checkpoint, compare what was written with the source, and fail if it lost too much.

    \b
                                                 gate (perplexity)
    fp8       E4M3 weights and activations                    +5%
    fp8_wo    E4M3 weights, a scale a channel                 +5%
    fp8_pc_pt the same, and activations, a scale a token      +5%
    int8_sq   INT8 weights and activations, SmoothQuant      +10%
    int4_awq  INT4 weights, AWQ                              +25%
    nvfp4     FP4 weights and activations                    +25%
    none      only the KV cache (--kv-cache fp8)              +2%
    """
    from trtx.quantize import pipeline

    settings = pipeline.QuantizeSettings(
        format=format.value,
        kv_cache=kv_cache.value,
        excluded=tuple(excluded),
        calib_data=calib_data,
        calib_samples=calib_samples,
        calib_length=calib_length,
        eval_data=eval_data,
        eval_samples=eval_samples,
        eval_length=eval_length,
        batch_size=batch_size,
        max_ppl_increase=max_ppl_increase,
        device=device.value,
    )
    try:
        report = pipeline.quantize(checkpoint, out, settings, force=force, keep=keep, progress=progress)
    except pipeline.GateError as error:
        _show(error.report, as_json)
        raise
    _show(report, as_json)
    if not as_json:
        note(f"Next: trtx build {out} ENGINE")


def _show(report: QualityReport, as_json: bool) -> None:
    emit(report.to_json(), as_json, lambda: _render(report))
    if report.random_weights:
        warn("random weights: the figures say nothing about accuracy.")


def _render(report: QualityReport) -> Table:
    found, chosen = report.comparison, report.quantization
    verdict = "passed" if report.passed else "failed"
    worst = (f"{layer} (error {100 * error:.1f}%)" for layer, error in found.worst_layers(3))
    rows = {
        "format": chosen.format + (f", groups of {chosen.group_size}" if chosen.group_size else ""),
        "KV cache": chosen.kv_cache,
        "unquantized": ", ".join(chosen.excluded) or "no linear",
        "size": f"{decimal(report.source_bytes)} → {decimal(report.bytes)}",
        "perplexity": f"{found.source_perplexity:.3f} → {found.perplexity:.3f} ({found.ppl_increase:+.2f}%; "
        f"the gate is {report.max_ppl_increase:g}%: {verdict})",
        "mean KL": f"{found.mean_kl:.4f} nats",
        "same top token": f"{100 * found.top1_agreement:.1f}% of {found.positions} positions",
        "worst layers": ", ".join(worst),
        "calibrated on": _corpus(report.calibration),
        "judged on": _corpus(report.evaluation),
    }
    table = Table.grid(padding=(0, 2))
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def _corpus(facts: Mapping[str, Any]) -> str:
    return f"{facts['windows']} × {facts['length']} tokens, {facts['source']}"
