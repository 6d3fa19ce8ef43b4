"""Checking a checkpoint whose weights are not there: config.json, and the index of its shards if that is there too.

An index has the names of all tensors and their size together; no shapes and no dtypes.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trtx.converters.checkpoint import CheckpointConfig, Dtype
from trtx.converters.families import find_family
from trtx.converters.huggingface import Outline, Sizes
from trtx.converters.mapping import TIED_HEAD, Assignment, resolve
from trtx.converters.prequantized import Packing, Scheme, scheme_of, unquantized
from trtx.converters.report import TIED_AND_STORED, CheckReport, DtypeChoice, report_of
from trtx.converters.shards import Header
from trtx.converters.spec import ModelSpec
from trtx.quantize.formats import DTYPE_NAMES, Stored


def check_outline(name: str, outline: Outline, choice: DtypeChoice) -> CheckReport:
    """Whether it would convert, as far as that can be told."""
    scheme = scheme_of(outline.config, outline.config_name)
    content = unquantized(outline.config, outline.config_name)
    family = find_family(content, outline.config_name)
    spec = family.spec(content, outline.config_name)
    named: Dtype = "bf16" if scheme else _named_dtype(content.get(family.section or "", {}), content)
    provenance = {**outline.provenance, **({"dequantized": scheme.describe()} if scheme else {})}
    config = CheckpointConfig(spec, named if choice == "auto" else choice, provenance=provenance)
    expected = config.expected()
    if outline.index is None:
        note = "only config.json is there: neither names nor shapes of tensors were seen"
        return report_of(name, config, expected, Assignment(), [note], seen="config")
    packing = scheme.pack(outline.names, str(outline.index)) if scheme else Packing({}, frozenset())
    headers = {tensor: Header(torch.bfloat16, (), outline.index) for tensor in packing.logical(outline.names)}
    assignment = resolve(family, spec, family.interleaves(content), expected, headers)
    assignment.misshapen.clear()  # nothing has a shape here
    notes = [f"only names and totals were seen, in {outline.index.name}: no shapes and no dtypes"]
    if assignment.tied_head:
        notes.append(TIED_AND_STORED.format(assignment.tied_head))
    problems: list[str] = []
    if not assignment.problems:
        totals = _Totals.of(_sizes(scheme, packing, expected, assignment), spec, assignment)
        totals.check_size(outline.total_size)
        totals.check_parameters(None if scheme else outline.total_parameters)
        notes, problems = [*notes, *totals.notes], totals.problems
        if choice == "auto" and scheme is None:
            config = replace(config, dtype=totals.dtype(named))
            expected = config.expected()
    return report_of(name, config, expected, assignment, notes, problems, seen="names")


def _named_dtype(*configs: Mapping[str, Any]) -> Dtype:
    """The dtype that a config.json, or a section of it, names."""
    names = [config.get(key) for config in configs for key in ("dtype", "torch_dtype")]
    dtypes = {str(dtype).removeprefix("torch."): name for dtype, name in DTYPE_NAMES.items()}
    return typing.cast(Dtype, next((dtypes[name] for name in names if name in dtypes), "bf16"))


def _sizes(scheme: Scheme | None, packing: Packing, expected: Mapping[str, Stored], assignment: Assignment) -> Sizes:
    """What the tensors that the model needs take in the file; a tied output projection aside."""
    rows: dict[str, int] = {}
    columns: dict[str, int] = {}
    skipped: dict[tuple[str, int | None], int] = {}
    for target, piece in assignment.pieces.items():
        first, *rest = expected[target].shape
        rows[piece.source] = rows.get(piece.source, 0) + first
        columns[piece.source] = torch.Size(rest).numel()
        skipped[piece.source, piece.index] = piece.skip
    for (source, _), skip in skipped.items():
        rows[source] += skip
    kinds: dict[str, int] = {}
    fixed = scales = 0
    for source in rows:
        if scheme and source in packing.packed:
            values, grid = scheme.size((rows[source], columns[source]))
            fixed, scales = fixed + values, scales + grid
        else:
            kind = _kind(source)
            kinds[kind] = kinds.get(kind, 0) + rows[source] * columns[source]
    parts = {part for packed in packing.packed.values() for part in (packed.values, packed.scales)}
    for source in packing.hidden - parts:  # a number each
        kinds[_kind(source)] = kinds.get(_kind(source), 0) + 1
    return Sizes(kinds, fixed, scales)


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


@dataclass
class _Totals:
    """Compares what an index says of all tensors together with what the model's take.

    Attributes:
        sizes: of the model's tensors.
        head: elements of a tied output projection; 0: it is not tied.
        head_named: it stands in the index, though it is tied.
        buffers: elements that are no parameters to transformers.
        others: number of stored tensors that are not needed, and so of unknown size.
        wide: the kinds of tensors that are in fp32; None: not known.
    """

    sizes: Sizes
    head: int
    head_named: bool
    buffers: int
    others: int
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wide: tuple[str, ...] | None = None

    @classmethod
    def of(cls, sizes: Sizes, spec: ModelSpec, assignment: Assignment) -> _Totals:
        modules = {module.name: module.parameters for module in spec.modules()}
        return cls(
            sizes,
            modules["embed"] if spec.tied_embeddings else 0,
            assignment.tied_head is not None,
            sum(count for name, count in modules.items() if name.endswith(".router_correction")),
            len(assignment.ignored),
        )

    def check_size(self, total: int | None) -> None:
        """Bytes: exactly, for one choice of dtypes; at least, where other tensors count too."""
        sizes = self.sizes
        if total is None:
            self.notes.append("the index gives no total_size")
        elif self.others:
            self.notes.append(f"the totals include {self.others} tensors that are not needed, of unknown sizes")
            if total < sizes.least:
                self.problems.append(f"total_size is {total:,} bytes; config.json describes {sizes.least:,} or more.")
        else:
            self._explain(total)

    def check_parameters(self, total: int | None) -> None:
        """A tied output projection may count once or twice, buffers may count or not."""
        count = self.sizes.elements
        counts = (count, count - self.buffers, count + self.head)
        if total is None or total in counts or (self.others and total >= min(counts)):
            return
        self.problems.append(f"total_parameters is {total:,}; config.json describes {count:,}.")

    def dtype(self, named: Dtype) -> Dtype:
        """Of most parameters: what config.json names, unless total_size tells that it is not as wide."""
        if self.wide is None:
            return named
        if 2 * sum(self.sizes.kinds.get(kind, 0) for kind in self.wide) > self.sizes.elements:
            return "fp32"
        return "bf16" if named == "fp32" else named

    def _explain(self, total: int) -> None:
        sizes, twice = self.sizes, replace(self.sizes, kinds={**self.sizes.kinds, TIED_HEAD: self.head})
        named, unnamed = (twice, sizes) if self.head_named else (sizes, twice)
        choices = [(choice, choice.wide(total)) for choice in ((named, unnamed) if self.head else (sizes,))]
        found = [(choice, wide) for choice, wide in choices if wide is not None]
        if not found:
            most = sizes.fixed + 4 * (sizes.scales + sizes.elements)
            self.problems.append(
                f"total_size is {total:,} bytes, which no choice of dtypes explains: config.json describes "
                f"{sizes.least:,} with 16 bits to {most:,} with 32."
            )
            return
        uniform = [(choice, wide) for choice, wide in found if len(wide) in (0, len(choice.kinds))]
        choice, self.wide = (uniform or found)[0]
        if choice is not named:
            self.notes.append("total_size counts the tied output projection, and the names do not, or vice versa")
        if not uniform:
            self.notes.append(f"total_size tells what is in fp32: {', '.join(self.wide)}; the rest has 16 bits")
