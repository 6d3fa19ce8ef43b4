"""Linears on resident weights: which kernel multiplies, by the number of tokens and the weight's format.

    tokens    way
    1         `gemv`: each program reads a few rows of the weight; bound by reading it
    to 64     `skinny`: tensor cores, programs share the K of a tile; still bound by reading it
    more      cuBLAS, on codes of 8 bits where it takes them, else on the weight dequantized for the call

The kernels apply the activation of a gated MLP and treat the input as the format says; before cuBLAS and after it
kernels of their own do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS, Format
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda.launch import Constant, Launch

SKINNY, SKINNY_CODES = 64, 16
"""The most tokens that `skinny` multiplies, with weights of 16 and of 8 bits: measured against cuBLAS on an H100."""

_SHARED_BYTES = 160 << 10
"""Shared memory that the stages of a pipeline may take."""

_PROGRAMS = 264
"""Programs that keep an H100 busy: two for each of its multiprocessors."""


@dataclass(frozen=True)
class _Way:
    """How the kernels treat a format.

    Attributes:
        input, scale: see `runtime.kernels.linear`; input 'by token' is 'codes' of a kernel of its own.
    """

    input: str = "plain"
    scale: str = "one"


_WAYS = {
    "none": _Way(),
    "fp8": _Way("e4m3"),
    "fp8_wo": _Way(scale="row"),
    "fp8_pc_pt": _Way("by token", "row"),
    "int8_wo": _Way(scale="row"),
    "int8_sq": _Way("int8", "row"),
    "w4a8_awq": _Way("e4m3"),
}
"""The other formats are dequantized when they are brought into kernel layout."""


@dataclass(frozen=True)
class CudaLinear:
    """A linear's weight, or several fused along their outputs, ready for the kernels.

    Attributes:
        weight: [N, K] of a float dtype, e4m3 or int8.
        rows: output features of each fused part.
        scale: of each row of codes, [N], or [] for all.
        smooth: [K], multiplied into the input.
        input_scale: [] of the input's codes.
        scales: [2] for kernels that round their input: 1 / input scale, and what the sums of products are to be
            multiplied with.
        counters: zeros, for `skinny` to count in; every call leaves zeros behind.
        rounding: the format, where its rounding of the input is left to torch, and the tensors for it.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    rows: tuple[int, ...]
    way: _Way
    counters: Tensor
    scale: Tensor | None = None
    smooth: Tensor | None = None
    input_scale: Tensor | None = None
    scales: Tensor | None = None
    rounding: Format | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def out_features(self) -> int:
        return sum(self.rows)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]


def kernel_layout(weight: LinearWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a stored weight as the kernels read them, by suffix: what an engine holds."""
    tensors, form = dict(weight.tensors), weight.format
    if form.name == "w4a8_awq":
        codes = form.weight(tensors, torch.float32) / tensors["weight_scale_2"]
        tensors = {"weight": codes.to(E4M3), "weight_scale": tensors.pop("weight_scale_2"), **_but(tensors, "weight")}
    elif form.name not in _WAYS or form.name == "none":
        tensors = {"weight": form.weight(tensors, dtype), **_but(tensors, "weight")}
    if "bias" in tensors:
        tensors["bias"] = tensors["bias"].to(dtype)
    return tensors


def _but(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {suffix: tensor for suffix, tensor in tensors.items() if not suffix.startswith(start)}


def resident(
    name: str, form: Format, tensors: Mapping[str, Tensor], rows: tuple[int, ...], dtype: torch.dtype
) -> CudaLinear:
    """A weight in kernel layout, on its device, ready to be multiplied with."""
    way = _WAYS.get(form.name, _Way())
    weight, scale, input_scale = (tensors.get(suffix) for suffix in ("weight", "weight_scale", "input_scale"))
    assert weight is not None
    scales = None
    if way.input in ("e4m3", "int8"):
        assert scale is not None and input_scale is not None
        scales = torch.stack([1 / input_scale, input_scale if way.scale == "row" else input_scale * scale])
    by_torch = form.changes_input and form.name not in _WAYS
    return CudaLinear(
        name=name,
        weight=weight,
        bias=tensors.get("bias"),
        rows=rows,
        way=way,
        counters=torch.zeros(-(-sum(rows) // 16), dtype=torch.int32, device=weight.device),
        scale=scale,
        smooth=None if by_torch else tensors.get("pre_quant_scale"),
        input_scale=input_scale,
        scales=scales,
        rounding=form if by_torch else None,
        tensors=dict(tensors) if by_torch else {},
    )


def dense(name: str, weight: Tensor, rows: tuple[int, ...]) -> CudaLinear:
    """An unquantized weight [N, K] without bias."""
    return resident(name, FORMATS["none"], {"weight": weight}, rows, weight.dtype)


def linear(launch: Launch, x: Tensor, w: CudaLinear, out: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight, plus its bias → [M, N]."""
    return _linear(launch, x, w, None, out)


def gated(launch: Launch, x: Tensor, w: CudaLinear, activation: Activation) -> Tensor:
    """act(gate) * up of x [M, K], for a weight whose rows are the gate's and as many of up → [M, N / 2]."""
    return _linear(launch, x, w, activation, None)


def gated_activation(launch: Launch, y: Tensor, activation: Activation) -> Tensor:
    """act(gate) * up of y [M, 2 * I], gate and up side by side → [M, I]."""
    out = y.new_empty(len(y), y.shape[1] // 2)
    block = min(1024, _power_of_two(out.shape[1]))
    launch(
        "linear.gated_activation",
        (len(y), -(-out.shape[1] // block)),
        (y, out),
        {
            "WIDTH": out.shape[1], "KIND": activation.kind, "LIMIT": activation.limit, "OFFSET": activation.offset,
            "BLOCK": block,
        },
        warps=max(1, block // 256),
        pdl=True,
    )  # fmt: skip
    return out


def quantize(launch: Launch, x: Tensor, w: CudaLinear) -> tuple[Tensor, Tensor | None]:
    """x [M, K] as the codes that the weight's format multiplies, or smoothed; and their scales [M], if by token."""
    m, k = x.shape
    if w.way.input == "by token":
        codes, scale = torch.empty_like(x, dtype=E4M3), x.new_empty(m, dtype=torch.float32)
        block = _power_of_two(k)
        launch("linear.by_token", (m,), (x, codes, scale), {"K": k, "BLOCK": block}, _warps(block, 8), pdl=True)
        return codes, scale
    codes = torch.empty_like(x, dtype={"e4m3": E4M3, "int8": torch.int8}.get(w.way.input, x.dtype))
    block = min(1024, _power_of_two(k))
    launch(
        "linear.multiplied",
        (m, -(-k // block)),
        (x, w.scales, w.smooth, codes),
        {"K": k, "INPUT": w.way.input, "BLOCK": block},
        warps=_warps(block, 8),
        pdl=True,
    )
    return codes, None


def _linear(launch: Launch, x: Tensor, w: CudaLinear, activation: Activation | None, out: Tensor | None) -> Tensor:
    x = x.contiguous()
    if w.rounding is not None:
        x = w.rounding.activation(x, w.tensors)
    m, n = len(x), w.out_features // (1 if activation is None else 2)
    exact = x.dtype == torch.float32
    if m > (1 if exact else SKINNY if w.weight.itemsize > 1 else SKINNY_CODES):
        y = _product(launch, x, w)
        if activation is not None:
            y = gated_activation(launch, y, activation)
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(m, n)
    if w.way.input == "by token":
        x, x_scale = quantize(launch, x, w)
        given = "codes"
    else:
        x_scale, given = None, w.way.input
    operands = (x, w.weight, w.scale, w.scales, w.smooth, x_scale, w.bias, out)
    constants = {"N": n, "K": w.in_features, "INPUT": given, "SCALE": w.way.scale, **_activation(activation)}
    if m == 1:
        _gemv(launch, operands, constants, w.weight.itemsize)
    else:
        _skinny(launch, operands, constants, w, m)
    return out


Operands = tuple[Tensor | None, ...]


def _gemv(launch: Launch, operands: Operands, constants: dict[str, Constant], itemsize: int) -> None:
    n, k, parts = constants["N"], constants["K"], 2 if constants["GATED"] else 1
    assert isinstance(n, int) and isinstance(k, int)
    rows, block, warps = gemv_shape(n, k, itemsize, parts)
    launch(
        "linear.gemv", (-(-n // rows),), operands, {**constants, "ROWS": rows, "BLOCK_K": block}, warps, stages=1,
        pdl=True,
    )  # fmt: skip


def gemv_shape(n: int, k: int, itemsize: int, parts: int) -> tuple[int, int, int]:
    """Rows a program, elements of K at a time, and warps: the best of those tried on an H100 in Llama's shapes.

    Args:
        n: outputs, each of `parts` rows of the weight.
    """
    block = _power_of_two(k)
    most = 1024 if parts > 1 and itemsize == 1 else 4096 if parts == 1 and itemsize > 1 and k > 8192 else 2048
    if block > most:
        block = next((b for b in (most, 1024) if -(-k // b) * b <= 1.15 * k), 512)
    rows = 1 if parts > 1 or block > 2048 else 4
    while rows > 1 and n < rows * _PROGRAMS:
        rows //= 2
    return rows, block, _warps(block, 8 if block <= 2048 else 32)


def _skinny(launch: Launch, operands: Operands, constants: dict[str, Constant], w: CudaLinear, m: int) -> None:
    n, k, parts = constants["N"], constants["K"], 2 if constants["GATED"] else 1
    assert isinstance(n, int) and isinstance(k, int)
    shape = skinny_shape(m, n, k, w.weight.itemsize, parts)
    tiles = -(-n // shape.rows)
    partials = None
    if shape.splits > 1:
        size = tiles * shape.splits * parts * shape.rows * shape.tokens
        partials = w.counters.new_empty(size, dtype=torch.float32)
    launch(
        "linear.skinny",
        (tiles, shape.splits),
        (*operands, partials, w.counters, m),
        {
            **constants, "BLOCK_M": shape.tokens, "BLOCK_N": shape.rows, "BLOCK_K": shape.block,
            "SPLITS": shape.splits,
        },
        shape.warps,
        shape.stages,
        pdl=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Skinny:
    """The shape of a `skinny` launch: outputs and tokens of a tile, K at a time, programs that share a tile's K."""

    rows: int
    tokens: int
    block: int
    splits: int
    warps: int = 4
    stages: int = 4


def skinny_shape(m: int, n: int, k: int, itemsize: int, parts: int) -> Skinny:
    """How `skinny` is launched for m tokens and n outputs, each of `parts` rows of a weight."""
    rows = 64
    block = min(128 // itemsize * 2, _power_of_two(k))
    tiles, blocks = -(-n // rows), -(-k // block)
    splits = max(1, min(_PROGRAMS // tiles, blocks // 4, 8))
    while -(-blocks // splits) * (splits - 1) >= blocks:  # the last would have nothing
        splits -= 1
    tokens = max(16, _power_of_two(m))
    stage = block * (rows * parts * itemsize + tokens * 2)
    return Skinny(rows, tokens, block, splits, stages=max(2, min(4, _SHARED_BYTES // stage)))


def _product(launch: Launch, x: Tensor, w: CudaLinear) -> Tensor:
    """x times the weight, for many tokens."""
    weight, bias, dtype = w.weight, w.bias, x.dtype
    if weight.dtype == dtype:
        return F.linear(x, weight, bias)
    if w.way.input == "plain":
        return F.linear(x, _dequantized(launch, w, dtype), bias)
    codes, by_token = quantize(launch, x, w)
    if weight.dtype == E4M3 and _multiplies_codes(x, w):
        assert w.scale is not None
        if by_token is None:
            scales = w.input_scale, w.scale
        else:
            scales = by_token[:, None], w.scale[None]
        return torch._scaled_mm(codes, weight.t(), *scales, bias=bias, out_dtype=dtype)
    scale = w.input_scale if by_token is None else by_token[:, None]
    return F.linear((codes.float() * scale).to(dtype), _dequantized(launch, w, dtype), bias)


def _multiplies_codes(x: Tensor, w: CudaLinear) -> bool:
    """Whether cuBLAS multiplies these codes: on a GPU, 16-bit outputs (bf16 if by token), sizes in multiples of 16."""
    outputs = (torch.bfloat16,) if w.way.input == "by token" else (torch.bfloat16, torch.float16)
    return x.device.type != "cpu" and x.dtype in outputs and not w.in_features % 16 and not w.out_features % 16


def _dequantized(launch: Launch, w: CudaLinear, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(w.weight, dtype=dtype)
    n, k = out.shape
    block = min(2048, _power_of_two(k))
    launch(
        "linear.dequantize", (n, -(-k // block)), (w.weight, w.scale, out),
        {"K": k, "SCALE": w.way.scale, "BLOCK": block}, _warps(block, 16), pdl=True,
    )  # fmt: skip
    return out


def _activation(activation: Activation | None) -> dict[str, Constant]:
    """The constants that say what is done to the sums."""
    if activation is None:
        return {"GATED": False, "KIND": "", "LIMIT": None, "OFFSET": 0.0}
    return {"GATED": True, "KIND": activation.kind, "LIMIT": activation.limit, "OFFSET": activation.offset}


def _warps(elements: int, each: int) -> int:
    """Warps for a block of elements, of which a thread has `each`; up to 8."""
    return min(8, max(1, elements // (32 * each)))


def _power_of_two(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()
