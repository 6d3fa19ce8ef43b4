"""What `trtx convert` says of a checkpoint, with its weights or before they are there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.mapping import Assignment
from trtx.converters.spec import ModelSpec
from trtx.quantize.formats import Stored

DtypeChoice = Literal["auto", "fp32", "fp16", "bf16"]
Seen = Literal["headers", "names", "config"]

TIED_AND_STORED = "{} is stored although config.json ties it to the embedding; conversion compares the two."


@dataclass(frozen=True)
class CheckReport:
    """What a conversion would give.

    Attributes:
        source: what the user called it.
        spec: the model.
        dtype: of the checkpoint.
        provenance: kind of source and where it is.
        tensors: how many the checkpoint has.
        parameters: a tied embedding counts once.
        bytes: of the checkpoint's tensors.
        ignored: stored tensors that are known and not needed.
        problems: why it would not convert; empty when it would.
        notes: what to know about it.
        seen: of the weights: their headers; only their names and total size, in an index; or only a config.json.
    """

    source: str
    spec: ModelSpec
    dtype: str
    provenance: dict[str, Any]
    tensors: int
    parameters: int
    bytes: int
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seen: Seen = "headers"

    @property
    def converts(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "converts": self.converts}


def report_of(
    name: str,
    config: CheckpointConfig,
    expected: dict[str, Stored],
    assignment: Assignment,
    notes: Iterable[str],
    problems: Iterable[str] = (),
    seen: Seen = "headers",
) -> CheckReport:
    """The report on a source called `name`."""
    return CheckReport(
        source=name,
        spec=config.spec,
        dtype=config.dtype,
        provenance=config.provenance,
        tensors=len(expected),
        parameters=config.spec.parameters,
        bytes=sum(stored.bytes for stored in expected.values()),
        ignored=tuple(assignment.ignored),
        problems=(*assignment.problems, *problems),
        notes=tuple(notes),
        seen=seen,
    )
