"""`trtx build`: an engine for one kind of GPU from a checkpoint."""

from __future__ import annotations

import re
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trtx.cli.common import DtypeChoice, Force, Json, Verbose, emit, note, progress, warn

if TYPE_CHECKING:
    from trtx.builder.build import Blueprint
    from trtx.builder.planner import Plan


class BackendChoice(str, Enum):
    """Values of `--backend`."""

    AUTO = "auto"
    TORCH = "torch"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class KVDtypeChoice(str, Enum):
    """Values of `--kv-cache-dtype`."""

    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"


class AttentionChoice(str, Enum):
    """Values of `--attention`."""

    AUTO = "auto"
    FP8 = "fp8"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def _bytes(text: str) -> int:
    """'4GiB', '500MB' or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmg]i?|)b?", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size. Give one like 4GiB, 500MB or a number of bytes.")
    return int(float(match[1]) * _UNITS[match[2]])


def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CKPT", help="A checkpoint, or random:CONFIG.json (random weights).", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write the engine to.", show_default=False)
    ] = None,
    backend: Annotated[BackendChoice, typer.Option(help="What computes.")] = BackendChoice.AUTO,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="auto (the GPU that is here, else the CPU), cpu, or h100-sxm, l4, …")
    ] = "auto",
    gpus: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many GPUs to plan for. Default: 1.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tensor-parallel ranks. Default: planned.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, metavar="N", help="Pipeline stages. Default: planned.")] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Sequences that run at once. Default: 64, on a CPU 8.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of one step, prefill and decode. Default: 2048.")
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of a sequence, prompt and output. Default: the model's, at most 8192."
        ),
    ] = None,
    kv_block_size: Annotated[int, typer.Option(metavar="N", help="Tokens of a KV block: 8, 16, 32, 64 or 128.")] = 32,
    kv_cache_dtype: Annotated[
        KVDtypeChoice, typer.Option(help="Of the KV cache; auto: fp8 where CKPT has its scales, else as --dtype.")
    ] = KVDtypeChoice.AUTO,
    attention: Annotated[
        AttentionChoice, typer.Option(help="What attention multiplies in; auto: --dtype. fp8: TensorRT backends only.")
    ] = AttentionChoice.AUTO,
    dtype: Annotated[DtypeChoice, typer.Option(help="To compute in; auto: CKPT's.")] = DtypeChoice.AUTO,
    memory_fraction: Annotated[
        float, typer.Option(metavar="F", help="Part of the device's memory that the engine may take.")
    ] = 0.9,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=_bytes,
            metavar="SIZE",
            help="Most memory for the KV cache, like 4GiB. Default: what is left, on a CPU 4GiB.",
        ),
    ] = None,
    isl: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Input tokens that plans are rated for. Default: 1024.")
    ] = None,
    osl: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Output tokens that plans are rated for. Default: 256.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of random weights.")] = 0,
    random_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="Weight format of random weights: none, fp8, int4_awq, …")
    ] = "none",
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print ledger and plans; write nothing.")] = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Build an engine for one kind of GPU, or plan one.

    Prints the memory ledger and the ways to split the model over the GPUs.
    """
    if out is None and not plan_only:
        raise typer.BadParameter("OUT is missing. Give a folder to write to, or --plan-only to write nothing.")
    from trtx.builder import build as library
    from trtx.converters.artifact import refuse_target

    if out is not None and not plan_only:
        refuse_target(out, force)
    settings = library.BuildSettings(
        backend=backend.value,
        gpu=gpu,
        gpus=gpus,
        tp=tp,
        pp=pp,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        kv_block_size=kv_block_size,
        kv_cache_dtype=kv_cache_dtype.value,
        attention=attention.value,
        dtype=dtype.value,
        memory_fraction=memory_fraction,
        kv_cache_memory=kv_cache_memory,
        isl=isl,
        osl=osl,
        seed=seed,
        random_format=random_format,
    )
    blueprint = library.prepare(source, settings)
    for text in blueprint.notes:
        warn(text)
    emit(_to_json(blueprint), as_json, lambda: _render(blueprint))
    if plan_only or out is None:
        return
    bars = {
        "progress": partial(progress, "Building"),
        "kernel_progress": partial(progress, "Compiling", unit="kernels"),
        "tuning_progress": partial(progress, "Measuring", unit="products"),
    }
    for text in library.write(blueprint, out, force=force, **bars):
        warn(text)
    if not as_json and blueprint.sizing.mapping.ranks == 1:
        note(f'Next: trtx run {out} "Hello", or trtx bench {out}')


def _to_json(blueprint: Blueprint) -> dict[str, Any]:
    from dataclasses import asdict

    config = blueprint.config()
    return {
        "backend": config.backend,
        "quantization": config.model.quantization.format,
        "random_weights": config.has_random_weights,
        "compute_dtype": config.compute_dtype,
        "attention_dtype": "fp8" if blueprint.sizing.fp8_attention else config.compute_dtype,
        "limits": asdict(config.limits),
        "mapping": asdict(config.mapping),
        "fingerprint": asdict(config.fingerprint),
        "ledger": config.ledger,
        "kv_bytes_per_token": blueprint.ledger.token_bytes,
        "workload": asdict(blueprint.workload),
        "plans_are": "unchecked estimates",
        "plans": [asdict(plan) for plan in blueprint.plans],
        "notes": blueprint.notes,
    }


def _render(blueprint: Blueprint) -> RenderableType:
    parts: list[RenderableType] = [
        _facts(blueprint),
        Text("\nMemory of the fullest rank" if blueprint.sizing.mapping.ranks > 1 else "\nMemory", "bold"),
    ]
    parts.append(_ledger(blueprint))
    if any(plan.estimate for plan in blueprint.plans) or len(blueprint.plans) > 1:
        isl, osl = blueprint.workload.isl, blueprint.workload.osl
        parts.append(Text(f"\nPlans for {isl} → {osl} tokens (unchecked estimate: roofline)", "bold"))
        parts.append(_plans(blueprint))
    return Group(*parts)


def _facts(blueprint: Blueprint) -> Table:
    sizing, ledger = blueprint.sizing, blueprint.ledger
    spec, quantization = sizing.model.spec, sizing.model.quantization
    weights = (
        "random weights"
        if blueprint.config().has_random_weights
        else quantization.format.replace("none", "unquantized")
    )
    table = Table.grid(padding=(0, 2))
    attention = ", attention in fp8" if sizing.fp8_attention else ""
    table.add_row(
        "model",
        f"{spec.family}, {spec.parameters:,} parameters, {weights}, computing in {sizing.compute_dtype}{attention}",
    )
    table.add_row("device", f"{sizing.target.name}, {blueprint.backend.name} backend")
    table.add_row(
        "limits",
        f"{sizing.max_batch_size} sequences, {sizing.max_num_tokens} tokens a step, {sizing.max_seq_len} a sequence",
    )
    tokens = f"{ledger.kv_blocks:,} blocks of {sizing.kv_block_size} tokens in {sizing.kv_dtype}"
    each = f"{decimal(ledger.token_bytes)} a token"
    table.add_row("KV cache", f"{tokens}, {each}: {ledger.full_sequences:.1f} sequences of full length")
    return table


def _ledger(blueprint: Blueprint) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, size in blueprint.ledger.rows.items():
        share = size / blueprint.sizing.target.memory
        table.add_row(f"  {name.replace('_', ' ')}", Text(decimal(size), justify="right"), f"{share:6.1%}")
    return table


def _plans(blueprint: Blueprint) -> Table:
    table = Table("tp", "pp", "KV blocks", "batch", "TTFT ms", "TPOT ms", "output tok/s", "", box=None, padding=(0, 2))
    for column in table.columns[:-1]:
        column.justify = "right"
    for plan in blueprint.plans:
        remark = "chosen" if plan is blueprint.chosen else plan.problem
        table.add_row(str(plan.mapping.tp), str(plan.mapping.pp), *_figures(plan), remark)
    return table


def _figures(plan: Plan) -> list[str]:
    blocks = f"{plan.ledger.kv_blocks:,}" if plan.ledger and not plan.problem else "–"
    if plan.estimate is None:
        return [blocks, "–", "–", "–", "–"]
    rated = plan.estimate
    return [
        blocks,
        str(rated.batch),
        f"{rated.ttft * 1e3:.1f}",
        f"{rated.tpot * 1e3:.2f}",
        f"{rated.throughput:,.0f}",
    ]
