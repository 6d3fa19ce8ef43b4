"""Embedding, residual addition with norm, and activation, on [T, H]: what is computed row by row.

A decode step is a chain of these between matrix products, and at T = 1 each is all latency: one program a row with
few elements a thread, weights loaded before the wait for the kernel before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.launch import CodeScales, Launch, power_of_two
from trtx.runtime.ops.torch_ops import ResidentNorm

_ELEMENTS = 16
"""Elements a thread: two 16-byte loads of 16-bit numbers."""


def embed(launch: Launch, ids: Tensor, table: Tensor, scale: float | None = None) -> Tensor:
    """Rows of `table` [V, H] for ids [T], times `scale` (rounded to the compute dtype first) → [T, H].

    Args:
        ids: [T], int32; those that the table does not have give zeros.
    """
    out = table.new_empty(len(ids), table.shape[1])
    width = table.shape[1]
    block = min(1024, power_of_two(width))
    rounded = None if scale is None or scale == 1 else torch.tensor(scale, dtype=table.dtype).item()
    launch(
        "elementwise.embed",
        (len(ids), -(-width // block)),
        (ids, table, out),
        {"VOCABULARY": len(table), "WIDTH": width, "BLOCK": block, "SCALE": rounded},
        warps=_warps(block),
        pdl=True,
    )
    return out


def add_norm(launch: Launch, x: Tensor, delta: Tensor, weight: ResidentNorm) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta, [T, H], and its norm."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(launch, x[:, None], out, weight, delta, total)
    return total, out


def norm(launch: Launch, x: Tensor, weight: ResidentNorm, codes: CodeScales | None = None) -> Tensor:
    """Normalize over the last dimension of x, [T, H] or [T, heads, H] (any strides but the last) → contiguous.

    Args:
        codes: of a linear that multiplies e4m3 codes: those are returned.
    """
    out = x.new_empty(x.shape, dtype=E4M3 if codes else x.dtype)
    rows = x if x.dim() == 3 else x[:, None]
    _norm(launch, rows, out, weight, codes=codes)
    return out


def activation(launch: Launch, x: Tensor, kind: str) -> Tensor:
    """A kind of `converters.spec.Activation`, element by element of x [T, H]."""
    x = x.contiguous()
    out = torch.empty_like(x)
    tokens, width = x.shape
    block = min(1024, power_of_two(width))
    launch(
        "elementwise.activation",
        (tokens, -(-width // block)),
        (x, out),
        {"WIDTH": width, "BLOCK": block, "KIND": kind},
        warps=_warps(block),
        pdl=True,
    )
    return out


def _norm(
    launch: Launch,
    x: Tensor,
    out: Tensor,
    weight: ResidentNorm,
    delta: Tensor | None = None,
    total: Tensor | None = None,
    codes: CodeScales | None = None,
) -> None:
    """x [T, heads, H]; `delta`, `total` and `out` have as many rows of H, contiguous."""
    tokens, heads, width = x.shape
    assert x.stride(2) == 1 and (delta is None or delta.is_contiguous())
    block = power_of_two(width)
    rows = max(1, 2048 // block) if heads > 1 else 1
    constants = {
        "WIDTH": width,
        "HEADS": heads,
        "TOKEN_STRIDE": x.stride(0),
        "HEAD_STRIDE": x.stride(1) if heads > 1 else 0,
        "BLOCK": block,
        "ROWS": rows,
        "EPS": weight.norm.eps,
        "CENTERED": weight.norm.kind == "layer",
        "OWN_WEIGHTS": weight.weight.dim() == 2,
    }
    arguments = (x, delta, weight.weight, weight.bias, *(codes or (None, None)), total, out, tokens * heads)
    grid = (-(-tokens * heads // rows),)
    launch("elementwise.norm", grid, arguments, constants, warps=_warps(rows * block), pdl=True)


def _warps(elements: int) -> int:
    return min(16, max(1, elements // (32 * _ELEMENTS)))
