"""Linear weights as values: an op set is handed one and asks it what it is.

A `LinearWeight` knows its format, its canonical name, how tensor parallelism splits it and, when several linears that
read the same input were fused, which rows belong to which part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtx.converters.spec import Split
from trtx.quantize.formats import Format, Stored


@dataclass(frozen=True)
class LinearWeight:
    """The stored weight of one linear, or of several fused along their outputs.

    Attributes:
        name: canonical module name ('layers.0.attn.o', fused 'layers.0.attn.qkv').
        tensors: by suffix, as `format.stored` lists them; 'bias' too where there is one.
        parts: canonical name and output features of each linear in it, in the order of the rows.
    """

    name: str
    format: Format
    tensors: Mapping[str, Tensor]
    parts: tuple[tuple[str, int], ...]
    split: Split = Split.NONE

    @property
    def rows(self) -> tuple[int, ...]:
        """Output features of each part."""
        return tuple(rows for _, rows in self.parts)

    @property
    def bias(self) -> Tensor | None:
        """[O] or None."""
        return self.tensors.get("bias")

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`, dequantized where it is quantized."""
        return self.format.weight(self.tensors, dtype)


def fusable(weights: Sequence[LinearWeight], stored: Mapping[str, Stored]) -> bool:
    """Whether linears that read one input can be one: same format, same treatment of the input; reads only scales.

    Args:
        stored: what each suffix is, of any of them: tensors along the outputs are concatenated, all others (scales of
            the whole tensor or of its inputs) have to be equal.
    """
    first = weights[0]
    if any(w.format is not first.format or w.tensors.keys() != first.tensors.keys() for w in weights):
        return False
    shared = [suffix for suffix, meaning in stored.items() if not meaning.rows]
    return all(torch.equal(w.tensors[suffix], first.tensors[suffix]) for suffix in shared for w in weights)


def fuse(name: str, weights: Sequence[LinearWeight], stored: Mapping[str, Stored]) -> LinearWeight | None:
    """Join linears that read one input into one along their outputs, or None when they are not `fusable`."""
    if not fusable(weights, stored):
        return None
    first = weights[0]
    tensors = {
        suffix: torch.cat([w.tensors[suffix] for w in weights]) if meaning.rows else first.tensors[suffix]
        for suffix, meaning in stored.items()
    }
    parts = tuple(part for w in weights for part in w.parts)
    return LinearWeight(name, first.format, tensors, parts, first.split)
