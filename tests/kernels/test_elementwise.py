"""Embedding, norms and activations against the torch op set, or against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.checks import DTYPES, assert_needs_no_values, assert_rounded, poisoned  # noqa: F401
from trtx.converters.spec import Norm
from trtx.runtime.cuda import elementwise
from trtx.runtime.ops.torch_ops import _ACTIVATIONS, ResidentNorm


def exact_norm(x: Tensor, weight: ResidentNorm) -> Tensor:
    """In fp64, from the formulas."""
    x = x.double()
    if weight.norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + weight.norm.eps).sqrt() * weight.weight.double()
    return y if weight.bias is None else y + weight.bias.double()


def resident(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, **fields) -> ResidentNorm:
    """A random norm; its weight is in fp32 where the family has an offset."""
    norm = Norm(eps=1e-5, **fields)
    kept = torch.float32 if norm.offset else dtype
    weight = (torch.randn(shape, device=device) * 0.2 + 1).to(kept)
    return ResidentNorm(weight, torch.randn(shape, device=device).to(kept) if norm.bias else None, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", [{}, {"offset": 1.0}, {"kind": "layer", "bias": True}, {"kind": "layer"}], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (5, 1024), (3, 40)])
def test_add_norm(launch, device, dtype, fields, tokens, width):
    weight = resident((width,), dtype, device, **fields)
    x, delta = (torch.randn(tokens, width, device=device).to(dtype) * 3 for _ in range(2))
    total, normed = elementwise.add_norm(launch, x, delta, weight)
    assert torch.equal(total, x + delta)
    assert_rounded(normed, exact_norm(x + delta, weight), dtype)
    normed = elementwise.norm(launch, x, weight)
    assert_rounded(normed, exact_norm(x, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_of_heads(launch, device, dtype, own, kind):
    """The heads of a part of a fused projection, normalized where they stand."""
    heads, width = 3, 80
    weight = resident((heads, width) if own else (width,), dtype, device, kind=kind)
    whole = torch.randn(7, 5 * width, device=device).to(dtype)
    part = whole[:, width : 4 * width].unflatten(1, (heads, width))
    found = elementwise.norm(launch, part, weight)
    assert found.is_contiguous()
    assert_rounded(found, exact_norm(part, weight), dtype)


def test_norm_of_large_numbers(launch, device):
    """Squares that fp16 cannot hold, and a mean much larger than the spread."""
    x = (torch.randn(2, 300, device=device) * 100 + 1000).half()
    for kind in ("rms", "layer"):
        weight = resident((300,), torch.float16, device, kind=kind)
        found = elementwise.norm(launch, x, weight)
        assert (found.double() - exact_norm(x, weight)).abs().max() < 3e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 5.3])
@pytest.mark.parametrize("width", [48, 1100])
def test_embed(launch, device, dtype, scale, width):
    table = torch.randn(11, width, device=device).to(dtype)
    ids = torch.tensor([3, 10, 0, 3], dtype=torch.int32, device=device)
    expected = F.embedding(ids, table)
    if scale is not None:
        expected = expected * torch.tensor(scale, dtype=dtype, device=device)
    assert torch.equal(elementwise.embed(launch, ids, table, scale), expected)


def test_ids_that_the_table_lacks_give_zeros(launch, device):
    table = torch.randn(4, 16, device=device)
    found = elementwise.embed(launch, torch.tensor([4, -1, 3], dtype=torch.int32, device=device), table)
    assert not found[:2].any() and torch.equal(found[2], table[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", _ACTIVATIONS)
def test_activation(launch, device, dtype, kind):
    x = (torch.randn(3, 1030, device=device) * 4).to(dtype)
    assert_rounded(elementwise.activation(launch, x, kind), _ACTIVATIONS[kind](x.double()), dtype)
    assert elementwise.activation(launch, x * float("nan"), kind).isnan().all()


def test_nothing_depends_on_what_is_computed():
    x, table, ids = torch.empty(3, 48), torch.empty(9, 48), torch.empty(3, dtype=torch.int32)
    x, table, ids = x.to("meta"), table.to("meta"), ids.to("meta")
    weight = ResidentNorm(table[0], table[0], Norm(1e-5, "layer"))
    assert_needs_no_values(lambda launch: elementwise.embed(launch, ids, table, 2.0))
    assert_needs_no_values(lambda launch: elementwise.add_norm(launch, x, x, weight))
    assert_needs_no_values(lambda launch: elementwise.activation(launch, x, "silu"))
