"""Linears on resident weights: which kernel multiplies, by the number of tokens and the weight's format.

    tokens    way
    1         `gemv`: each program reads a few rows of the weight; bound by reading it
    to 16     few.cu, where it fits: tensor cores; still bound by reading it
    few       `skinny`: the same by Triton, programs share the K of a tile
    more      of a gated MLP gated.cu, where it fits; else cuBLAS, on codes of 8 bits where it takes them, or on the
              weight dequantized for the call

Weights of 4 bits have kernels of their own, `gemv4` and `skinny4`; up to 128 tokens, 64 at a time are less
work than dequantizing.

The kernels apply the activation of a gated MLP and treat the input as the format says; before cuBLAS and after it
kernels of their own do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS, Format
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda.launch import H100_SHARED, Constant, Launch, TensorMap, power_of_two

SKINNY, SKINNY_LARGE = 64, 16
"""The most tokens that `skinny` multiplies, measured against cuBLAS on an H100 (before gated.cu was there): of a gated
MLP, whose activation cuBLAS leaves to a kernel of its own, or of a small weight; and of others, among them all codes of
8 bits."""

_LARGE = 1 << 24
"""Numbers of a weight that is not small."""

SKINNY_WORDS = 128
"""The most tokens that `skinny4` multiplies, `SKINNY` at a time: 128 took an H100 26.9 ms so, in Llama-3.1-8B, and 32.8
with weights dequantized."""

_GATED_TILE = 128
"""Tokens, and outputs, of a tile of gated.cu."""

_PROGRAMS = 264
"""Programs that keep an H100 busy: two for each of its multiprocessors."""


@dataclass(frozen=True)
class _Way:
    """How the kernels treat a format.

    Attributes:
        input, scale: see `runtime.kernels.linear`; input 'by token' is 'codes' of a kernel of its own.
        codes: of 4-bit weights, which are kept as words.
    """

    input: str = "plain"
    scale: str = "one"
    codes: str | None = None


_WAYS = {
    "none": _Way(),
    "fp8": _Way("e4m3"),
    "fp8_wo": _Way(scale="row"),
    "fp8_pc_pt": _Way("by token", "row"),
    "int8_wo": _Way(scale="row"),
    "int8_sq": _Way("int8", "row"),
    "w4a8_awq": _Way("e4m3"),
    "int4_awq": _Way("smooth", codes="int4"),
    "mxfp4": _Way(codes="e2m1"),
    "nvfp4_wo": _Way(scale="tensor", codes="e2m1"),
    "nvfp4": _Way(scale="tensor", codes="e2m1"),
}
"""Other formats are dequantized when they are laid out for the kernels; w4a8_awq becomes e4m3, which it multiplies."""

_ROUNDED_BY_TORCH = ("nvfp4", "mxfp8")
"""Formats whose rounding of the input has no kernel."""

_RUN = 32
"""Columns that a run of words holds; a 4-bit weight with a part of a run left is dequantized."""


def is_dequantized(form: str) -> bool:
    """Whether a weight of a format is dequantized for each product of many tokens."""
    return form != "none" and form in _WAYS and _WAYS[form].input not in ("e4m3", "by token")


def is_rounded_by_torch(form: str) -> bool:
    """Whether torch makes the input of such a product, in fp32 in between."""
    return form in _ROUNDED_BY_TORCH or (form in _WAYS and _WAYS[form].input == "int8")


@dataclass(frozen=True)
class CudaLinear:
    """A linear's weight, or several fused along their outputs, ready for the kernels.

    Attributes:
        weight: [N, K] of a float dtype, e4m3 or int8; int32 words [N, K / 8] of 4-bit weights.
        rows: output features of each fused part.
        scale: of each row of codes, [N], or [] for all.
        groups: of words: the scales [N, K / group size].
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
    groups: Tensor | None = None
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
        return self.weight.shape[1] * (8 if self.words else 1)

    @property
    def words(self) -> bool:
        """Whether the weight is kept in words."""
        return self.weight.dtype == torch.int32


def kernel_layout(weight: LinearWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a stored weight as the kernels read them, by suffix: what an engine holds."""
    tensors, form = weight.tensors, weight.format
    kept = {suffix: tensors[suffix] for suffix in form.input_tensors}
    if weight.bias is not None:
        kept["bias"] = weight.bias.to(dtype)
    way = _WAYS.get(form.name, _Way())
    if way.codes and _columns(tensors["weight"], way) % _RUN == 0:
        return {**tensors, "weight": _words(tensors["weight"], way), **kept}
    if form.name == "w4a8_awq":
        scale = tensors["weight_scale_2"]
        return {"weight": (form.weight(tensors, torch.float32) / scale).to(E4M3), "weight_scale": scale, **kept}
    if form.name in _WAYS and form.name != "none" and not way.codes:
        return {**tensors, **kept}
    return {"weight": form.weight(tensors, dtype), **kept}


def _columns(packed: Tensor, way: _Way) -> int:
    """Input features of a packed 4-bit weight."""
    return packed.shape[1] * (1 if way.codes == "int4" else 2)


def _words(packed: Tensor, way: _Way) -> Tensor:
    """Words [N, K / 8] of a packed 4-bit weight; see `runtime.kernels.linear`."""
    if way.codes == "int4":
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten(0, 1) ^ 8
    else:
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)
    runs = nibbles.unflatten(1, (-1, 8, 4))
    words = runs[:, :, 0].int()
    for place in range(1, 8):
        words |= runs[:, :, place].int() << 4 * place
    return words.flatten(1)


def resident(
    name: str, form: Format, tensors: Mapping[str, Tensor], rows: tuple[int, ...], dtype: torch.dtype
) -> CudaLinear:
    """A weight in kernel layout, on its device, ready to be multiplied with."""
    weight, groups, bias = tensors["weight"], None, tensors.get("bias")
    scale, input_scale = tensors.get("weight_scale"), tensors.get("input_scale")
    way = _Way() if weight.dtype == dtype else _WAYS[form.name]
    if way.codes:
        groups, scale = scale, tensors.get("weight_scale_2")
    scales = None
    if way.input in ("e4m3", "int8"):
        assert scale is not None and input_scale is not None
        scales = torch.stack([1 / input_scale, input_scale if way.scale == "row" else input_scale * scale])
    by_torch = form.changes_input and (weight.dtype == dtype or form.name in _ROUNDED_BY_TORCH)
    return CudaLinear(
        name=name,
        weight=weight,
        bias=bias,
        rows=rows,
        way=way,
        counters=torch.zeros(-(-sum(rows) // 16), dtype=torch.int32, device=weight.device),
        scale=scale,
        groups=groups,
        smooth=None if by_torch else tensors.get("pre_quant_scale"),
        input_scale=input_scale,
        scales=scales,
        rounding=form if by_torch else None,
        tensors=dict(tensors) if by_torch else {},
    )


def dense(name: str, weight: Tensor, rows: tuple[int, ...]) -> CudaLinear:
    """An unquantized weight [N, K] without bias."""
    return resident(name, FORMATS["none"], {"weight": weight}, rows, weight.dtype)


@dataclass(frozen=True)
class Codes:
    """What a linear multiplies: e4m3 codes [M, K] with the scale of its input, in the place of x in `dtype`."""

    codes: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def device(self) -> torch.device:
        return self.codes.device


def linear(launch: Launch, x: Tensor | Codes, w: CudaLinear, add_to: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight, plus its bias → [M, N].

    Args:
        add_to: [M, N], to which the product is added, and which is returned.
    """
    return _linear(launch, x, w, None, add_to)


def gated(
    launch: Launch, x: Tensor | Codes, w: CudaLinear, activation: Activation, reader: CudaLinear | None = None
) -> Tensor | Codes:
    """act(gate) * up of x [M, K], for a weight whose rows are the gate's and as many of up → [M, N / 2].

    Args:
        reader: the linear that the result is for: where it `takes_codes`, they are returned.
    """
    if len(x) <= most_tokens(w, x.dtype, gated=True):
        return _linear(launch, x, w, activation, None)
    reader = reader if reader and takes_codes(x, reader) else None
    if launch.native and launch.hopper and fits_gated(w, x.dtype):
        return gated_natively(launch, x, w, activation, reader)
    return gated_activation(launch, _linear(launch, x, w, None, None), activation, reader)


def takes_codes(x: Tensor | Codes, w: CudaLinear) -> bool:
    """Whether as many tokens as x has are multiplied as e4m3 codes with one scale, so that `Codes` may come instead."""
    few = len(x) <= most_tokens(w, x.dtype, gated=False)
    return not few and w.way.input == "e4m3" and w.rounding is None and _multiplies_codes(x, w)


class GatedShape(NamedTuple):
    """How gated.cu is launched: see there.

    Attributes:
        group: tiles of tokens, or pairs of those that share the weight.
        programs: at most; 0: as many as the GPU has multiprocessors.
    """

    slots: int = 4
    lead: int = 2
    token_mates: int = 2
    output_mates: int = 1
    group: int = 8
    programs: int = 0


def gated_shape(m: int, outputs: int) -> GatedShape:
    """For m tokens: programs share the weight, unless fewer rounds are needed where they share tokens."""
    tokens, tiles, pairs = -(-m // _GATED_TILE), outputs // _GATED_TILE, _PROGRAMS // 4
    if tiles % 2:
        return GatedShape(token_mates=1) if tokens == 1 else GatedShape()
    rounds, others = -(-(-(-tokens // 2) * tiles) // pairs), -(-tokens * tiles // 2 // pairs)
    return GatedShape(token_mates=1, output_mates=2) if tokens == 1 or others < rounds else GatedShape()


def fits_gated(w: CudaLinear, dtype: torch.dtype) -> bool:
    """Whether gated.cu knows the weight of a gated MLP for x of a dtype."""
    kinds = w.weight.dtype == dtype or (w.weight.dtype == E4M3 and w.way.input in ("e4m3", "by token"))
    line = w.weight.shape[1] * w.weight.itemsize
    return dtype.itemsize == 2 and kinds and w.out_features % (2 * _GATED_TILE) == 0 and line % 128 == 0


def gated_natively(
    launch: Launch,
    x: Tensor | Codes,
    w: CudaLinear,
    activation: Activation,
    reader: CudaLinear | None = None,
    shape: GatedShape | None = None,
) -> Tensor | Codes:
    """`gated` of any number of tokens by gated.cu, where that `fits_gated`; codes, if there is a reader."""
    dtype, given, by_token = x.dtype, x, None
    if not isinstance(given, Codes):
        given = _rounded(given, w)
        if w.weight.dtype == E4M3:
            given, by_token = quantize(launch, given, w)
    operand = given.codes if isinstance(given, Codes) else given
    m, n, codes = len(operand), w.out_features // 2, w.weight.dtype == E4M3
    shape = shape or gated_shape(m, n)
    out = operand.new_empty(m, n, dtype=E4M3 if reader else dtype)
    smooth = reader.smooth if reader else None
    tiles = -(-m // (_GATED_TILE * shape.token_mates)) * (n // (_GATED_TILE * shape.output_mates))
    mates = shape.token_mates * shape.output_mates
    shared = shape.slots * (3 * 128 * _GATED_TILE + 16) + (16 << 10) * (1 if reader else 2) + 1024
    launch(
        "cu.gated",
        (mates * min(tiles, (shape.programs or launch.multiprocessors) // mates),),
        (
            TensorMap(operand, _GATED_TILE // shape.output_mates), TensorMap(w.weight, _GATED_TILE),
            TensorMap(out, 16), _step(w, by_token) if codes else None, w.scale if codes else None, w.bias,
            reader.scales if reader else None, smooth, m,
        ),
        {
            **_activation(activation), "N": n, "K": w.in_features, "BYTES": w.weight.itemsize,
            "HALF": dtype == torch.float16, "BIAS": w.bias is not None, "BY_ROW": by_token is not None,
            "CODES": reader is not None, "SMOOTH": smooth is not None, "SLOTS": shape.slots, "LEAD": shape.lead,
            "TOKEN_MATES": shape.token_mates, "OUTPUT_MATES": shape.output_mates, "GROUP": shape.group,
            "SHARED": shared,
        },
        warps=12,
        stages=1,
        pdl=True,
    )  # fmt: skip
    return Codes(out, dtype) if reader else out


def gated_activation(
    launch: Launch, y: Tensor, activation: Activation, reader: CudaLinear | None = None
) -> Tensor | Codes:
    """act(gate) * up of y [M, 2 * I], gate and up side by side → [M, I], as codes for the `reader` if there is one."""
    out = y.new_empty(len(y), y.shape[1] // 2, dtype=E4M3 if reader else y.dtype)
    block = min(1024, power_of_two(out.shape[1]))
    launch(
        "linear.gated_activation",
        (len(y), -(-out.shape[1] // block)),
        (y, reader.scales if reader else None, reader.smooth if reader else None, out),
        {
            "WIDTH": out.shape[1], "KIND": activation.kind, "LIMIT": activation.limit, "OFFSET": activation.offset,
            "BLOCK": block,
        },
        warps=max(1, block // 256),
        pdl=True,
    )  # fmt: skip
    return Codes(out, y.dtype) if reader else out


def quantize(launch: Launch, x: Tensor, w: CudaLinear) -> tuple[Tensor, Tensor | None]:
    """x [M, K] as the codes that the weight's format multiplies, or smoothed; and their scales [M], if by token."""
    m, k = x.shape
    if w.way.input == "by token":
        codes, scale = torch.empty_like(x, dtype=E4M3), x.new_empty(m, dtype=torch.float32)
        block = power_of_two(k)
        launch("linear.by_token", (m,), (x, codes, scale), {"K": k, "BLOCK": block}, _warps(block, 8), pdl=True)
        return codes, scale
    codes = torch.empty_like(x, dtype={"e4m3": E4M3, "int8": torch.int8}.get(w.way.input, x.dtype))
    block = min(1024, power_of_two(k))
    launch(
        "linear.multiplied",
        (m, -(-k // block)),
        (x, w.scales, w.smooth, codes),
        {"K": k, "INPUT": w.way.input, "BLOCK": block},
        warps=_warps(block, 8),
        pdl=True,
    )
    return codes, None


def _linear(
    launch: Launch, x: Tensor | Codes, w: CudaLinear, activation: Activation | None, add_to: Tensor | None
) -> Tensor:
    if isinstance(x, Codes):
        return _product_of_codes(launch, x, None, w, add_to)
    x = _rounded(x, w)
    m, n = len(x), w.out_features // (1 if activation is None else 2)
    if m > most_tokens(w, x.dtype, activation is not None):
        return _product(launch, x, w, add_to)
    out = w.counters.new_empty(m, n, dtype=x.dtype) if add_to is None else add_to
    constants = {"N": n, "K": w.in_features, "SCALE": w.way.scale, **_activation(activation)}
    x_scale, given = None, w.way.input
    if w.words:
        _multiply_words(launch, x, w, add_to, out, constants)
        return out
    if w.way.input == "by token":
        x, x_scale = quantize(launch, x, w)
        given = "codes"
    smooth = None if given == "codes" else w.smooth
    operands = (x, w.weight, w.scale, w.scales, smooth, x_scale, w.bias, add_to, out)
    constants["INPUT"] = given
    if m == 1:
        _gemv(launch, operands, constants, w.weight.itemsize)
    elif not _few(launch, operands, constants, w, m):
        _skinny(launch, operands, constants, w, m)
    return out


def _rounded(x: Tensor, w: CudaLinear) -> Tensor:
    """x without gaps, rounded where that is left to torch."""
    x = x.contiguous()
    return x if w.rounding is None else w.rounding.activation(x, w.tensors)


def most_tokens(w: CudaLinear, dtype: torch.dtype, gated: bool) -> int:
    """The most tokens that are not left to gated.cu and cuBLAS."""
    if dtype == torch.float32:
        return 1
    if w.words:
        return SKINNY_WORDS
    small = gated or w.weight.numel() < _LARGE
    return SKINNY if small and w.weight.itemsize > 1 else SKINNY_LARGE


def _multiply_words(
    launch: Launch, x: Tensor, w: CudaLinear, add_to: Tensor | None, out: Tensor, constants: dict[str, Constant]
) -> None:
    """x times a weight in words."""
    assert w.groups is not None
    n, k, parts = out.shape[1], w.in_features, 2 if constants["GATED"] else 1
    constants |= {"CODES": w.way.codes, "GROUP": k // w.groups.shape[1]}
    if len(x) == 1:
        _gemv4(launch, x, w, add_to, out, constants)
        return
    if w.smooth is not None:
        x, _ = quantize(launch, x, w)
    for some, part in zip(x.split(SKINNY), out.split(SKINNY), strict=True):
        shape = skinny4_shape(len(some), n, k)
        tiles = -(-n // shape.rows)
        launch(
            "linear.skinny4",
            (tiles, shape.splits),
            (
                some, w.weight, w.groups, w.scale, w.bias, None if add_to is None else part, part,
                _partials(shape, tiles, parts, w), w.counters, len(some),
            ),
            {
                **constants, "BLOCK_M": shape.tokens, "BLOCK_N": shape.rows, "WORDS": shape.block,
                "SPLITS": shape.splits,
            },
            shape.warps,
            shape.stages,
            pdl=True,
        )  # fmt: skip


def _gemv4(
    launch: Launch, x: Tensor, w: CudaLinear, add_to: Tensor | None, out: Tensor, constants: dict[str, Constant]
) -> None:
    """x [1, K] times a weight in words: by the kernel in CUDA C++, or where that does not fit, by Triton's."""
    n, k, parts = out.shape[1], w.in_features, 2 if constants["GATED"] else 1
    fits = x.dtype != torch.float32 and constants["CODES"] == "int4" and constants["GROUP"] == 128
    native = native_gemv4_shape(n, k, parts) if launch.native and fits else None
    if native is not None:
        tiles, warps, blocks = native
        launch(
            "cu.gemv4",
            (n * parts // (16 * tiles),),
            (x, w.weight, w.groups, w.smooth, w.bias, add_to, out),
            {
                **constants, "SMOOTH": w.smooth is not None, "HALF": x.dtype == torch.float16, "TILES": tiles,
                "BLOCKS": blocks,
            },
            warps,
            stages=1,
            pdl=True,
        )  # fmt: skip
        return
    rows, words, warps = gemv4_shape(n, k, parts)
    launch(
        "linear.gemv4",
        (-(-n // rows),),
        (x, w.weight, w.groups, w.scale, w.smooth, w.bias, add_to, out),
        {**constants, "INPUT": w.way.input, "ROWS": rows, "WORDS": words},
        warps,
        stages=1,
        pdl=True,
    )


def gemv4_shape(n: int, k: int, parts: int) -> tuple[int, int, int]:
    """Rows a program, words at a time, and warps: as `gemv_shape`."""
    words = power_of_two(k // 8)
    if words > 512:
        words = next((b for b in (512, 256) if -(-k // (8 * b)) * 8 * b <= 1.15 * k), 128)
    rows = 8 // parts
    while rows > 1 and n < rows * _PROGRAMS:
        rows //= 2
    return rows, words, _warps(words, 4)


def native_gemv4_shape(n: int, k: int, parts: int) -> tuple[int, int, int] | None:
    """How gemv4.cu is launched: tiles of 16 rows and warps of a program, programs side by side; None: it does not fit.

    The best of those tried on an H100 in Llama's shapes: two tiles if that leaves a program for half of its
    multiprocessors, and up to eight warps, which share the chunks of 512 columns evenly. A warp with several takes
    too many registers for two programs side by side.
    """
    tiles = 1 if parts == 1 and (n % 32 or n < 8 * _PROGRAMS) else 2
    rows, chunks = 16 * tiles // parts, k // 512
    if k % 512 or n % rows:
        return None
    each = -(-chunks // 8)
    return tiles, -(-chunks // each), 2 if each == 1 and n > rows * _PROGRAMS // 2 else 1


def skinny4_shape(m: int, n: int, k: int) -> Skinny:
    """How `skinny4` is launched: `block` counts words."""
    rows, words, tokens = 64, 32, max(16, power_of_two(m))
    splits = _splits(-(-n // rows), -(-k // (8 * words)), 1)
    return Skinny(rows, tokens, words, splits, stages=3 if tokens <= 16 else 2)


Operands = tuple[Tensor | None, ...]


def _gemv(launch: Launch, operands: Operands, constants: dict[str, Constant], itemsize: int) -> None:
    n, k, parts = _sizes(constants)
    rows, block, warps = gemv_shape(n, k, itemsize, parts)
    launch(
        "linear.gemv", (-(-n // rows),), operands, {**constants, "ROWS": rows, "BLOCK_K": block}, warps, stages=1,
        pdl=True,
    )  # fmt: skip


def _sizes(constants: dict[str, Constant]) -> tuple[int, int, int]:
    """Outputs, inputs, and rows of the weight an output."""
    n, k = constants["N"], constants["K"]
    assert isinstance(n, int) and isinstance(k, int)
    return n, k, 2 if constants["GATED"] else 1


def gemv_shape(n: int, k: int, itemsize: int, parts: int) -> tuple[int, int, int]:
    """Rows a program, elements of K at a time, and warps: the best of those tried on an H100 in Llama's shapes.

    Args:
        n: outputs, each of `parts` rows of the weight.
    """
    block = power_of_two(k)
    most = 1024 if parts > 1 and itemsize == 1 else 4096 if parts == 1 and itemsize > 1 and k > 8192 else 2048
    if block > most:
        block = next((b for b in (most, 1024) if -(-k // b) * b <= 1.15 * k), 512)
    rows = 1 if block > 2048 else 4 // parts if itemsize > 1 or parts == 1 else 1
    while rows > 1 and n < rows * _PROGRAMS:
        rows //= 2
    return rows, block, _warps(block, 8 if block <= 2048 else 32)


def _skinny(launch: Launch, operands: Operands, constants: dict[str, Constant], w: CudaLinear, m: int) -> None:
    n, k, parts = _sizes(constants)
    shape = skinny_shape(m, n, k, w.weight.itemsize, parts, launch.shared_bytes)
    tiles = -(-n // shape.rows)
    launch(
        "linear.skinny",
        (tiles, shape.splits),
        (*operands, _partials(shape, tiles, parts, w), w.counters, m),
        {
            **constants, "BLOCK_M": shape.tokens, "BLOCK_N": shape.rows, "BLOCK_K": shape.block,
            "SPLITS": shape.splits,
        },
        shape.warps,
        shape.stages,
        pdl=True,
    )  # fmt: skip


def _few(launch: Launch, operands: Operands, constants: dict[str, Constant], w: CudaLinear, m: int) -> bool:
    """Multiply by the kernel in CUDA C++ for few tokens, if it fits; whether it does."""
    smooth, out = operands[4], operands[-1]
    n, k, parts = _sizes(constants)
    assert out is not None
    plain = constants["INPUT"] == "plain"
    fits = w.weight.dtype == (out.dtype if plain else E4M3) and not (plain and smooth is not None)
    shape = few_shape(m, n, k, w.weight.itemsize, parts) if launch.native and fits else None
    if shape is None:
        return False
    launch(
        "cu.few",
        (n * parts // (16 * shape.tiles),),
        (*operands, m),
        {
            **constants, "BYTES": w.weight.itemsize, "SMOOTH": smooth is not None, "HALF": out.dtype == torch.float16,
            "TOKENS": shape.tokens, "TILES": shape.tiles, "PAIRS": shape.pairs, "BLOCKS": shape.blocks,
        },
        shape.warps,
        stages=1,
        pdl=True,
    )  # fmt: skip
    return True


@dataclass(frozen=True)
class Few:
    """The shape of a launch of few.cu: see there."""

    tokens: int
    tiles: int
    pairs: int
    warps: int
    blocks: int


def few_shape(m: int, n: int, k: int, itemsize: int, parts: int) -> Few | None:
    """How few.cu is launched for m tokens and n outputs, each of `parts` rows of a weight; None: it does not fit.

    The best of those tried on an H100 in Llama's shapes: programs of 16 warps where each has a multiprocessor for
    itself, and in 16 bits also where there are many; else two of 8 share one.
    """
    tokens, line = 8 if m <= 8 else 16, 128 // itemsize
    tiles = 1 if parts == 1 and (n % 32 or n < 8 * _PROGRAMS) else 2
    programs = n * parts // (16 * tiles)
    large = programs <= _PROGRAMS // 2 or (itemsize > 1 and programs > 2 * _PROGRAMS)
    pairs = 2 if not large and itemsize > 1 and k % (2 * line) == 0 else 1
    if m > tokens or n * parts % (16 * tiles) or k % (line * pairs):
        return None
    most, chunks = 16 if large else 8, k // (line * pairs)
    return Few(tokens, tiles, pairs, -(-chunks // -(-chunks // most)), 1 if large else 2)


@dataclass(frozen=True)
class Skinny:
    """The shape of a `skinny` launch: outputs and tokens of a tile, K at a time, programs that share a tile's K."""

    rows: int
    tokens: int
    block: int
    splits: int
    warps: int = 4
    stages: int = 4


def skinny_shape(m: int, n: int, k: int, itemsize: int, parts: int, shared: int = H100_SHARED) -> Skinny:
    """How `skinny` is launched for m tokens and n outputs, each of `parts` rows of a weight.

    Args:
        shared: memory of a program, of which the stages of its pipeline take up to two thirds.
    """
    rows, tokens = 64, max(16, power_of_two(m))
    column = rows * parts * itemsize + tokens * 2
    block = min(128 // itemsize * 2, power_of_two(k))
    while block > 32 and 2 * block * column > shared * 2 // 3:
        block //= 2
    splits = _splits(-(-n // rows), -(-k // block), 4)
    return Skinny(rows, tokens, block, splits, stages=max(2, min(4, shared * 2 // 3 // (block * column))))


def _splits(tiles: int, blocks: int, least: int) -> int:
    """Programs that share the blocks of a tile's K, so that all are busy and each has `least` or more to do."""
    splits = max(1, min(_PROGRAMS // tiles, blocks // least, 8))
    while -(-blocks // splits) * (splits - 1) >= blocks:  # the last would have nothing
        splits -= 1
    return splits


def _partials(shape: Skinny, tiles: int, parts: int, w: CudaLinear) -> Tensor | None:
    """Where programs that share a tile leave their sums."""
    if shape.splits == 1:
        return None
    return w.counters.new_empty(tiles * shape.splits * parts * shape.rows * shape.tokens, dtype=torch.float32)


def _product(launch: Launch, x: Tensor, w: CudaLinear, add_to: Tensor | None) -> Tensor:
    """x times the weight, for many tokens: by cuBLASLt, or by torch where that is not there or refuses."""
    if w.way.input == "plain" or w.words or w.weight.dtype == x.dtype:
        given = x if w.smooth is None else quantize(launch, x, w)[0]
    else:
        codes, by_token = quantize(launch, x, w)
        if w.weight.dtype == E4M3 and _multiplies_codes(x, w):
            return _product_of_codes(launch, Codes(codes, x.dtype), by_token, w, add_to)
        given = (codes.float() * _step(w, by_token)).to(x.dtype)
    weight = w.weight if w.weight.dtype == x.dtype else _dequantized(launch, w, x.dtype)
    if launch.products is not None:
        y = launch.products.linear(given, weight, w.bias, add_to, add_to is not None)
        if y is not None:
            return y
    return _added(F.linear(given, weight, w.bias), add_to)


def _product_of_codes(
    launch: Launch, x: Codes, by_token: Tensor | None, w: CudaLinear, add_to: Tensor | None
) -> Tensor:
    step, scale = _step(w, by_token), w.scale
    assert scale is not None
    if launch.products is not None:
        y = launch.products.scaled(x.codes, w.weight, step, scale, w.bias, add_to, add_to is not None, x.dtype)
        if y is not None:
            return y
    scale = scale if by_token is None else scale[None]
    y = torch._scaled_mm(x.codes, w.weight.t(), step, scale, w.bias, out_dtype=x.dtype, use_fast_accum=True)
    return _added(y, add_to)


def _step(w: CudaLinear, by_token: Tensor | None) -> Tensor:
    """What codes of the input count: [], or [M, 1]."""
    step = w.input_scale if by_token is None else by_token[:, None]
    assert step is not None
    return step


def _added(y: Tensor, to: Tensor | None) -> Tensor:
    return y if to is None else to.add_(y)


def _multiplies_codes(x: Tensor | Codes, w: CudaLinear) -> bool:
    """Whether cuBLAS multiplies these codes: on a GPU, 16-bit outputs (bf16 if by token), sizes in multiples of 16."""
    outputs = (torch.bfloat16,) if w.way.input == "by token" else (torch.bfloat16, torch.float16)
    return x.device.type != "cpu" and x.dtype in outputs and not w.in_features % 16 and not w.out_features % 16


def _dequantized(launch: Launch, w: CudaLinear, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] for one product."""
    n, k = w.out_features, w.in_features
    out = w.weight.new_empty(n, k, dtype=dtype)
    if w.groups is not None:
        block = min(256, power_of_two(k // 8))
        launch(
            "linear.dequantize4", (n, -(-k // (8 * block))), (w.weight, w.groups, w.scale, out),
            {"K": k, "SCALE": w.way.scale, "CODES": w.way.codes, "GROUP": k // w.groups.shape[1], "WORDS": block},
            _warps(block, 4), pdl=True,
        )  # fmt: skip
        return out
    block = min(2048, power_of_two(k))
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
