"""From a checkpoint's tensor names to canonical ones, strictly both ways.

`resolve` reads headers only. It finds the stored tensor, or the rows of one, behind every tensor that the model needs,
and lists what does not fit: stored but unknown, needed but missing, or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from trtx.converters.errors import InputError
from trtx.converters.families import Family
from trtx.converters.shards import Header
from trtx.quantize.formats import Stored

TIED_HEAD = "lm_head.weight"
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """Where a canonical tensor comes from: all of a stored tensor, or `rows` rows of it from `start` on."""

    source: str
    start: int = 0
    rows: int | None = None

    def cut(self, tensor: Tensor) -> Tensor:
        """This piece of the stored tensor, as a view."""
        return tensor if self.rows is None else tensor.narrow(0, self.start, self.rows)


@dataclass
class Assignment:
    """How a checkpoint's tensors fill the model, and what does not fit.

    Attributes:
        pieces: canonical tensor name → where it comes from.
        ignored: stored tensors that are known and not needed.
        tied_head: the stored output projection where the config ties it to the embedding.
        unknown: stored tensors that no row of the family names.
        missing: 'NAME SHAPE' of canonical tensors that nothing stored fills.
        misshapen: 'NAME has SHAPE, expected SHAPE' of stored tensors.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    tied_head: str | None = None
    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What does not fit, a sentence for each kind; empty when the checkpoint can be converted."""
        found = {
            "of another shape than config.json implies": self.misshapen,
            "missing": self.missing,
            "not part of the model that config.json describes": self.unknown,
        }
        return [f"{_count(names)} {kind}: {_some(names)}." for kind, names in found.items() if names]

    def require_complete(self, where: str) -> None:
        """Refuse a checkpoint whose tensors do not fit.

        Raises:
            InputError: names the first few tensors of each kind, with expected and found shapes.
        """
        if self.problems:
            raise InputError(
                f"{where}: {' '.join(self.problems)}",
                "Check that config.json belongs to these weights, or download the checkpoint again.",
            )


def identity(expected: Mapping[str, Stored]) -> Assignment:
    """The assignment of a source that has canonical names already."""
    return Assignment({name: Piece(name) for name in expected})


def resolve(
    family: Family, expected: Mapping[str, Stored], headers: Mapping[str, Header], tied_embeddings: bool
) -> Assignment:
    """Find what fills each expected tensor.

    Args:
        expected: the model's tensors, by canonical name.
        headers: the checkpoint's tensors, by its names.
        tied_embeddings: the model has no output projection of its own; a stored one is not an error.
    """
    rows = [(_compile(source), targets) for source, targets in family.tensors.items()]
    ignored = [_compile(pattern) for pattern in family.ignored]
    result = Assignment()
    for name, header in headers.items():
        targets = _targets(name, rows)
        if targets and all(target in expected for target in targets):
            _assign(result, name, header.shape, targets, expected)
        elif targets == [TIED_HEAD] and tied_embeddings:
            result.tied_head = name
        elif any(pattern.fullmatch(name) for pattern in ignored):
            result.ignored.append(name)
        else:
            result.unknown.append(name)
    result.missing = [f"{name} {list(expected[name].shape)}" for name in expected if name not in result.pieces]
    return result


def _assign(
    result: Assignment, name: str, shape: tuple[int, ...], targets: list[str], expected: Mapping[str, Stored]
) -> None:
    shapes = [expected[target].shape for target in targets]
    stacked = (sum(s[0] for s in shapes), *shapes[0][1:])
    if shape != stacked:
        result.misshapen.append(f"{name} has {list(shape)}, expected {list(stacked)}")
    start = 0
    for target, (rows, *_) in zip(targets, shapes, strict=True):
        result.pieces[target] = Piece(name) if len(targets) == 1 else Piece(name, start, rows)
        start += rows


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _targets(name: str, rows: list[tuple[re.Pattern[str], str | tuple[str, ...]]]) -> list[str]:
    """The canonical tensors that a stored tensor holds; empty when no row names it."""
    module, _, suffix = name.rpartition(".")
    for pattern, targets in rows:
        if match := pattern.fullmatch(module):
            found = (targets,) if isinstance(targets, str) else targets
            return [f"{_fill(target, match.groups())}.{suffix}" for target in found]
    return []


def _fill(pattern: str, numbers: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    return "".join(part + number for part, number in zip(parts, (*numbers, ""), strict=True))


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
