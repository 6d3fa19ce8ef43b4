"""Kernels that treat each row of [T, H] by itself: embedding, residual addition with norm, activation; and rounding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """A kind of `converters.spec.Activation` of fp32 numbers.

    The tanh form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415) is written as a sigmoid, which it equals:
    (1 + tanh(u)) / 2 = sigmoid(2u).
    """
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu2")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if KIND == "relu2":
            y = y * y
    return y


@triton.jit
def rounded(v, inverse, INPUT: tl.constexpr):
    """v times inverse as the codes of INPUT, e4m3 or int8: saturating; in fp32."""
    v = v * inverse
    if INPUT == "e4m3":
        return tl.clamp(v, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv).to(tl.float32)
    else:  # adding 1.5 * 2^23 rounds to an integer, ties to even
        return tl.clamp(v, -128.0, 127.0, propagate_nan=tl.PropagateNan.ALL) + 12582912.0 - 12582912.0


@triton.jit
def activation(x, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr):
    """out = KIND(x), both [T, WIDTH]. Grid: (T, blocks of a row)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    inside = column < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + place, mask=inside).to(tl.float32)
    tl.store(out + place, activate(value, KIND).to(out.dtype.element_ty), mask=inside)


@triton.jit
def embed(
    ids,
    table,
    out,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of `table` [VOCABULARY, WIDTH], times SCALE; zeros for ids outside of it. Grid: (T, blocks of a row)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.load(ids + token).to(tl.int64)
    known = (row >= 0) & (row < VOCABULARY)
    value = tl.load(table + row * WIDTH + column, mask=inside & known, other=0.0)
    if SCALE is not None:
        value = (value.to(tl.float32) * SCALE).to(out.dtype.element_ty)
    tl.store(out + token.to(tl.int64) * WIDTH + column, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm(
    x,
    delta,
    weight,
    bias,
    scales,
    smooth,
    total,
    out,
    rows,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    OWN_WEIGHTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """RMSNorm, or LayerNorm (CENTERED), of `rows` = T * HEADS rows of WIDTH, each read once. Grid: blocks of rows.

    Args:
        x: [T, HEADS, WIDTH] with strides (TOKEN_STRIDE, HEAD_STRIDE, 1).
        delta: [rows, WIDTH] to add first, or absent.
        weight, bias: [WIDTH], or [HEADS, WIDTH] with OWN_WEIGHTS; the bias may be absent.
        scales: of a linear that multiplies e4m3 codes, 1 / input scale first: `out` are those codes. Or absent.
        smooth: [WIDTH], multiplied with before; or absent.
        total: where x + delta goes, rounded, which is also what is normalized.
        out: [rows, WIDTH].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    head = row % HEADS
    entry = head * WIDTH + column if OWN_WEIGHTS else column
    factor = tl.load(weight + entry, mask=column < WIDTH, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + entry, mask=column < WIDTH, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    source = (row // HEADS).to(tl.int64) * TOKEN_STRIDE + head * HEAD_STRIDE + column
    value = tl.load(x + source, mask=inside, other=0.0).to(tl.float32)
    place = row.to(tl.int64) * WIDTH + column
    if delta is not None:
        added = tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        stored = (value + added).to(total.dtype.element_ty)
        tl.store(total + place, stored, mask=inside)
        value = stored.to(tl.float32)
    if CENTERED:
        mean = tl.sum(value, 1, keep_dims=True) / WIDTH
        value = tl.where(inside, value - mean, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / WIDTH + EPS)
    value *= factor
    if bias is not None:
        value += shift
    if scales is not None:
        value = value.to(x.dtype.element_ty).to(tl.float32)
        if smooth is not None:
            value *= tl.load(smooth + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        value = rounded(value, tl.load(scales), "e4m3")
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
