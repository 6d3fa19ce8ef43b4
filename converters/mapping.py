"""From a checkpoint's tensor names to canonical ones, strictly both ways.

`resolve` reads headers only. It finds the stored tensor, or the rows of one, behind every tensor that the model needs,
and lists what does not fit: stored but unknown, needed but missing, or of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from trtx.converters.errors import InputError
from trtx.converters.families import Family, Packed
from trtx.converters.shards import Header
from trtx.converters.spec import ModelSpec
from trtx.quantize.formats import Stored

TIED_HEAD = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SUFFIXES = (".weight", ".bias")
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """Where a canonical tensor comes from: a stored tensor, or rows of it. See `families.family.Packed`.

    Attributes:
        index: of the stored tensor's first dimension; None: there is no such dimension.
        transposed: the stored tensor is [in, out].
        skip: stored rows in front that are not used.
        groups, start, rows: the rest is `groups` equal groups, of each of which this takes `rows` rows from `start` on;
            None: all.
        order: which row of each head, or of any such run of rows, comes first, second, …; None: as stored.
        per_head: a row is a head: `order` is that of the columns.
    """

    source: str
    index: int | None = None
    transposed: bool = False
    skip: int = 0
    groups: int = 1
    start: int = 0
    rows: int | None = None
    order: tuple[int, ...] | None = None
    per_head: bool = False

    def cut(self, tensor: Tensor) -> Tensor:
        """This piece of the stored tensor (of its `index`), a view where that is possible."""
        if self.transposed and tensor.dim() > 1:
            tensor = tensor.t()
        tensor = tensor[self.skip :]
        if self.rows is not None:
            tensor = tensor.unflatten(0, (self.groups, -1)).narrow(1, self.start, self.rows).flatten(0, 1)
        if self.order is not None and self.per_head:
            return tensor[:, list(self.order)]
        if self.order is not None:
            tensor = tensor.unflatten(0, (-1, len(self.order)))[:, list(self.order)].flatten(0, 1)
        return tensor


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
    family: Family, spec: ModelSpec, interleaved: bool, expected: Mapping[str, Stored], headers: Mapping[str, Header]
) -> Assignment:
    """Find what fills each expected tensor.

    Args:
        interleaved: query and key rows are stored in pairs; see `Family.interleaves`.
        expected: the model's tensors, by canonical name.
        headers: the checkpoint's tensors, by its names.
    """
    rows = [(_compile(source), Packed.of(row)) for source, row in family.tensors.items()]
    ignored = [_compile(pattern) for pattern in family.ignored]
    result = Assignment()
    for name, header in headers.items():
        renamed = _renamed(name, family)
        packed = _find(renamed, rows)
        targets = _targets(packed, spec) if packed else []
        if targets and all(target in expected for group in targets for target in group):
            assert packed is not None
            _assign(result, name, header.shape, packed, targets, _Order(spec, interleaved), expected)
        elif targets == [[TIED_HEAD]] and spec.tied_embeddings:
            result.tied_head = name
        elif any(pattern.fullmatch(renamed) for pattern in ignored) or _is_extra(renamed, family, spec):
            result.ignored.append(name)
        else:
            result.unknown.append(name)
    result.missing = [f"{name} {list(expected[name].shape)}" for name in expected if name not in result.pieces]
    return result


def _assign(
    result: Assignment,
    name: str,
    shape: tuple[int, ...],
    packed: Packed,
    targets: list[list[str]],
    order: _Order,
    expected: Mapping[str, Stored],
) -> None:
    """Note where the targets, a list for each expert or a single one, stand in the stored tensor."""
    shapes = [expected[target].shape for target in targets[0]]
    whole = (packed.skip + sum(s[0] for s in shapes), *shapes[0][1:])
    if packed.transposed:
        whole = whole[::-1]
    if packed.experts:
        whole = (len(targets), *whole)
    if shape != whole:
        result.misshapen.append(f"{name} has {list(shape)}, expected {list(whole)}")
    groups = {"none": 1, "heads": order.spec.num_kv_heads, "rows": shapes[0][0]}[packed.interleave]
    for expert, members in enumerate(targets):
        start = 0
        for target, (rows, *_) in zip(members, shapes, strict=True):
            result.pieces[target] = Piece(
                name,
                index=expert if packed.experts else None,
                transposed=packed.transposed,
                skip=packed.skip,
                groups=groups,
                start=start,
                rows=rows // groups if len(members) > 1 else None,
                order=order.of(target),
                per_head=len(shapes[0]) == 2 and target.endswith("_norm.weight"),
            )
            start += rows // groups


@dataclass(frozen=True)
class _Order:
    """The order of the rows within a head: features that RoPE rotates come first, and in halves, not in pairs."""

    spec: ModelSpec
    interleaved: bool

    def of(self, target: str) -> tuple[int, ...] | None:
        """The order for a canonical tensor; None: as stored."""
        owner, _, module = target.rpartition(".")[0].rpartition(".")
        if not owner.endswith(".attn"):
            return None
        rotated = list(range(self.spec.rotated_dim))
        if self.interleaved:
            rotated = rotated[::2] + rotated[1::2]
        if self.spec.latent:
            return self._latent(module, rotated)
        if module not in ("q", "k", "q_norm", "k_norm") or not self.interleaved:
            return None
        return (*rotated, *range(len(rotated), self.spec.head_dim))

    def _latent(self, module: str, rotated: list[int]) -> tuple[int, ...] | None:
        """DeepSeek stores what is rotated behind what is not."""
        if module == "k_rope":
            return tuple(rotated) if self.interleaved else None
        rest = self.spec.head_dim - len(rotated)
        return (*(rest + i for i in rotated), *range(rest)) if module in ("q", "q_b") else None


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", r"(\d+)"))


def _renamed(name: str, family: Family) -> str:
    for beginning, ours in family.renames:
        if name.startswith(beginning):
            return ours + name.removeprefix(beginning)
    return name


def _is_extra(name: str, family: Family, spec: ModelSpec) -> bool:
    match = _LAYER.match(name)
    return family.extra_layers and match is not None and int(match[1]) >= spec.num_layers


def _find(name: str, rows: list[tuple[re.Pattern[str], Packed]]) -> Packed | None:
    """The row for a stored tensor, with the numbers of its name in the targets, and their suffixes."""
    module, _, suffix = name.rpartition(".")
    for pattern, packed in rows:
        is_tensor = packed.targets[0].endswith(_SUFFIXES)
        if not is_tensor and f".{suffix}" not in _SUFFIXES:
            continue
        if match := pattern.fullmatch(name if is_tensor else module):
            found = [_fill(target, match.groups()) for target in packed.targets]
            return replace(packed, targets=tuple(found if is_tensor else (f"{target}.{suffix}" for target in found)))
    return None


def _targets(packed: Packed, spec: ModelSpec) -> list[list[str]]:
    """The canonical tensors in a stored one, a list for each expert or a single one."""
    if not packed.experts:
        return [list(packed.targets)]
    experts = range(spec.moe.experts if spec.moe else 0)
    return [[target.replace("#", str(expert)) for target in packed.targets] for expert in experts]


def _fill(pattern: str, numbers: tuple[str, ...]) -> str:
    parts = pattern.split("*")
    return "".join(part + number for part, number in zip(parts, (*numbers, ""), strict=True))


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return "; ".join(names[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
