"""`trtx convert`: any source to a trtx checkpoint, tensor by tensor.

A tensor that keeps its dtype goes from the source's mapping to the output without a copy, so memory stays near the
largest tensor and the speed near that of copying the files.
"""

from __future__ import annotations

import time
import typing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from trtx.converters.artifact import create, refuse_target
from trtx.converters.checkpoint import CheckpointConfig, Dtype
from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.families import find_family
from trtx.converters.mapping import Assignment, Piece, identity, resolve
from trtx.converters.outline import check_outline
from trtx.converters.report import TIED_AND_STORED, CheckReport, DtypeChoice, report_of
from trtx.converters.shards import SHARD_BYTES, Entry, write_shards
from trtx.converters.sources import Source, open_outline, open_source
from trtx.converters.spec import ModelSpec
from trtx.quantize.formats import DTYPE_NAMES, Stored

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Given the bytes to write, a context that yields `advance(bytes)`."""

_CHUNK = 16 << 20
"""Elements cast at a time."""


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: what was written, where, how long it took, and what to know about it."""

    out: Path
    report: CheckReport
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **self.report.to_json(),
            "out": str(self.out),
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Plan:
    source: Source
    config: CheckpointConfig
    expected: dict[str, Stored]
    assignment: Assignment
    notes: tuple[str, ...]

    def report(self, name: str) -> CheckReport:
        return report_of(name, self.config, self.expected, self.assignment, self.notes)

    def entries(self) -> list[Entry]:
        return [
            Entry(name, stored.dtype, stored.shape, _producer(self.source, name, self.assignment.pieces[name], stored))
            for name, stored in self.expected.items()
        ]


@contextmanager
def silent(total: int) -> Iterator[Callable[[int], None]]:
    """The `Progress` that shows nothing."""
    yield lambda count: None


def check(source: str, *, dtype: DtypeChoice = "auto", revision: str | None = None, seed: int = 0) -> CheckReport:
    """Say whether a source would convert, from its headers alone.

    A folder without weights is checked as far as its config.json and its index of shards tell.

    Args: as of `convert`.

    Raises:
        InputError, UnsupportedError, NetworkError: it can't be read, or its config.json is not modelled.
    """
    outline = open_outline(source) if revision is None else None
    if outline is not None:
        return check_outline(source, outline, dtype)
    opened = open_source(source, revision=revision, seed=seed, headers_only=True)
    return _plan(opened, dtype, values=False).report(source)


def convert(
    source: str,
    out: Path,
    *,
    dtype: DtypeChoice = "auto",
    revision: str | None = None,
    force: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Conversion:
    """Convert a model to a trtx checkpoint.

    Args:
        source: a Hugging Face folder, a hub id (`org/name`), a `.gguf` file, or `random:CONFIG.json`.
        out: the checkpoint's folder.
        dtype: of the checkpoint; 'auto': the dtype of most stored parameters, bf16 for a quantized source.
        revision: branch, tag or commit on the hub.
        force: replace `out` if it is a trtx directory.
        seed: of random weights.
        shard_bytes: largest shard.
        progress: shows the bytes written.

    Raises:
        InputError: the source is missing or damaged, or its tensors are not those that its config.json describes.
        UnsupportedError: the model, or a feature of it, is not modelled.
        NetworkError: the hub can't be reached or refused.
        OutputError: `out` exists or can't be written.
    """
    started = time.perf_counter()
    refuse_target(out, force)
    opened = open_source(source, revision=revision, seed=seed)
    plan = _plan(opened, dtype, values=True)
    plan.assignment.require_complete(source)
    report = plan.report(source)
    settings = {"source": source, "dtype": dtype, "revision": revision, "seed": seed}
    versions = {"torch": torch.__version__, "safetensors": safetensors.__version__}
    with (
        create(
            out,
            kind="checkpoint",
            command="convert",
            settings=settings,
            inputs=[opened.identity],
            versions=versions,
            force=force,
        ) as draft,
        progress(report.bytes) as advance,
    ):
        plan.config.write(draft)
        warnings = opened.write_tokenizer(draft)
        write_shards(draft, plan.entries(), shard_bytes=shard_bytes, advance=advance)
    return Conversion(out, report, time.perf_counter() - started, (*plan.notes, *warnings))


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype, refusing what that dtype can't hold.

    Args:
        name: of the tensor, for errors.

    Raises:
        InputError: it holds NaN or infinity.
        UnsupportedError: a value is too large for `dtype`.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    for source, target in zip(tensor.split(rows), result.split(rows), strict=True):
        target.copy_(source)
        if torch.isfinite(target).all():
            continue
        if not torch.isfinite(source).all():
            raise InputError(f"Tensor {name!r} holds NaN or infinity.", "Download the checkpoint again.")
        raise UnsupportedError(
            f"Tensor {name!r} has values up to {source.abs().max().item():.3g}, beyond the range of "
            f"{DTYPE_NAMES[dtype]} ({torch.finfo(dtype).max:.5g}).",
            "Use --dtype bf16 or fp32.",
        )
    return result


def _plan(source: Source, dtype: DtypeChoice, values: bool) -> _Plan:
    """Work out what goes where. With `values`, tensors may be read to settle what headers leave open."""
    family = find_family(source.config, source.config_name)
    spec = family.spec(source.config, source.config_name)
    notes: tuple[str, ...] = ()
    chosen = _choose_dtype(dtype, source)

    def assign(spec: ModelSpec) -> tuple[CheckpointConfig, dict[str, Stored], Assignment]:
        config = CheckpointConfig(spec, chosen, provenance=source.provenance)
        expected = config.expected()
        if source.canonical:
            return config, expected, identity(expected)
        return config, expected, resolve(family, spec, family.interleaves(source.config), expected, source.headers)

    config, expected, assignment = assign(spec)
    head, embedding = assignment.tied_head, assignment.pieces.get("embed.weight")
    if head and embedding:
        if not values:
            notes = (TIED_AND_STORED.format(head),)
        elif _same(source, head, embedding.source):
            assignment.ignored.append(head)
        else:
            notes = (
                f"{head} differs from the embedding although config.json ties them; it is kept, as in transformers.",
            )
            config, expected, assignment = assign(replace(spec, tied_embeddings=False))
    _require_floats(source, assignment)
    return _Plan(source, config, expected, assignment, notes)


def _same(source: Source, a: str, b: str) -> bool:
    return source.headers[a].shape == source.headers[b].shape and torch.equal(source.tensor(a), source.tensor(b))


def _choose_dtype(choice: DtypeChoice, source: Source) -> Dtype:
    if choice != "auto":
        return choice
    if source.default_dtype is not None:
        return source.default_dtype
    parameters: dict[torch.dtype, int] = {}
    for header in source.headers.values():
        parameters[header.dtype] = parameters.get(header.dtype, 0) + torch.Size(header.shape).numel()
    dominant = max(parameters, key=lambda dtype: parameters[dtype], default=torch.bfloat16)
    return typing.cast(Dtype, DTYPE_NAMES.get(dominant, "fp32"))


def _require_floats(source: Source, assignment: Assignment) -> None:
    for piece in assignment.pieces.values():
        header = source.headers[piece.source]
        if header.dtype not in DTYPE_NAMES and header.dtype != torch.float64:
            raise UnsupportedError(
                f"{header.file}: tensor {piece.source!r} is {str(header.dtype).removeprefix('torch.')}; "
                "trtx converts fp32, fp16, bf16 and fp64 weights.",
                "Convert the unquantized model, then use `trtx quantize`.",
            )


def _producer(source: Source, name: str, piece: Piece, stored: Stored) -> Callable[[], Tensor]:
    def produce() -> Tensor:
        tensor = piece.cut(source.tensor(piece.source, piece.index))
        return tensor if tensor.dtype == stored.dtype else cast(tensor, stored.dtype, name)

    return produce
