"""Weight formats: what is stored for a linear, how it is packed, and what it means.

A format is the one source of truth for its stored tensors. Readers, the ledger, fusing, tensor-parallel slicing and the
op sets all ask it. O and I are a linear's output and input features, g the group size.

    format     tensor            dtype     shape      meaning
    none       weight            dtype     [O, I]     W
    fp8        weight            e4m3      [O, I]     W = weight * weight_scale
               weight_scale      f32       []
               input_scale       f32       []         x ≈ e4m3(clamp(x / input_scale, ±448)) * input_scale
    fp8_wo     weight            e4m3      [O, I]     W = weight * weight_scale[:, None]
               weight_scale      f32       [O]
    fp8_pc_pt  as fp8_wo, and                         per token: s = max|x| / 448; x ≈ e4m3(x / s) * s
    int8_wo    weight            int8      [O, I]     W = weight * weight_scale[:, None]
               weight_scale      f32       [O]
    int8_sq    as int8_wo, and
               pre_quant_scale   f32       [I]        x ← x * pre_quant_scale, then
               input_scale       f32       []         x ≈ clamp(round(x / input_scale), -128, 127) * input_scale
    int4_awq   weight            uint8     [O/2, I]   two's-complement nibbles, low: row 2i, high: row 2i+1
               weight_scale      f32       [O, I/g]   W = q * weight_scale[:, i // g]
               pre_quant_scale   f32       [I]        x ← x * pre_quant_scale
    w4a8_awq   as int4_awq, and
               weight_scale_2    f32       []         W = e4m3(clamp(q * weight_scale / weight_scale_2, ±448)) *
                                                      weight_scale_2
               input_scale       f32       []         x ← x * pre_quant_scale, then as fp8
    nvfp4_wo   weight            uint8     [O, I/2]   E2M1 nibbles, low: even column, bit 3: sign
               weight_scale      e4m3      [O, I/16]  W = E2M1[q] * weight_scale * weight_scale_2
               weight_scale_2    f32       []
    nvfp4      as nvfp4_wo, and
               input_scale       f32       []         per block of 16: s = e4m3(min(max|x| / (6 input_scale), 448)) *
                                                      input_scale; x ≈ round_e2m1(x / s) * s
    mxfp4      weight            uint8     [O, I/2]   E2M1 nibbles as in nvfp4
               weight_scale      uint8     [O, I/32]  E8M0: W = E2M1[q] * 2^(weight_scale - 127)
    mxfp8      weight            e4m3      [O, I]     W = weight * 2^(weight_scale - 127)
               weight_scale      uint8     [O, I/32]  E8M0
                                                      per block of 32: s = 2^max(ceil(log2(max|x| / 448)), -127);
                                                      x ≈ e4m3(x / s) * s

These are ModelOpt's layouts (unified export of 0.47), except that a `pre_quant_scale` is never folded into a norm.
`trtx quantize` makes those that have a gate in `pipeline.MAX_PPL_INCREASE`; `Format.pack` rounds a weight to any.
The KV cache in fp8: k ≈ e4m3(k / k_scale) * k_scale, one scale a layer for keys and one for values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.spec import Kind, Module

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E2M1_TIES_UP = (0.75, 1.75, 3.5)
"""Ties go to the even code: up at these bounds, down at the others."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Unquantized dtypes by the name that commands and files use."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One stored tensor: dtype, shape, and what an index of its first and last dimension stands for.

    Attributes:
        rows: output features per index of dimension 0; 0 when the tensor does not run along the outputs.
        columns: input features per index of the last dimension; 0 when it does not run along the inputs.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int = 0
    columns: int = 0

    @property
    def bytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class Format(ABC):
    """How a linear's weight is stored and computed with. Stateless; see `FORMATS`."""

    name: str
    bits: int
    """Bits a weight takes, scales aside."""
    summary: str
    group_sizes: tuple[int, ...] = ()
    """Possible group sizes along the inputs, largest first; empty: the format has no groups."""
    input_tensors: tuple[str, ...] = ()
    """The stored tensors that `activation` needs."""

    @abstractmethod
    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        """The tensors of a linear of `out` outputs and `into` inputs, by suffix, the bias aside."""

    @abstractmethod
    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the stored tensors stand for, computed in fp32 and rounded once to `dtype`."""

    @abstractmethod
    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        """The stored tensors of a weight [O, I], rounded to nearest.

        Those of `input_tensors` are not among them: they take calibration. A weight that a `pre_quant_scale` goes with
        has to be divided by it before.
        """

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the linear multiplies `x` [..., I] with its weight as: scaled and rounded as the format says."""
        return x

    @property
    def changes_input(self) -> bool:
        """Whether `activation` does anything."""
        return type(self).activation is not Format.activation

    def group_size(self, into: int) -> int:
        """The largest group size that divides `into`; 0 for a format without groups.

        Raises:
            UnsupportedError: none divides it.
        """
        if not self.group_sizes:
            return 0
        for size in self.group_sizes:
            if into % size == 0:
                return size
        raise UnsupportedError(
            f"{self.name}: an input width of {into} is not a multiple of {self.group_sizes[-1]}.",
            "Use fp8 or int8_sq, which have no groups.",
        )


class Dense(Format):
    """Unquantized."""

    name, bits, summary = "none", 16, "weights in the checkpoint's dtype"

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {"weight": Stored(dtype, (out, into), rows=1, columns=1)}

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return tensors["weight"].to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        return {"weight": weight}


class FP8(Format):
    """FP8 E4M3 weights and activations, one scale a tensor (W8A8)."""

    name, bits, summary = "fp8", 8, "E4M3 weights and activations, per-tensor scales"
    input_tensors = ("input_scale",)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(E4M3, (out, into), rows=1, columns=1),
            "weight_scale": Stored(torch.float32, ()),
            "input_scale": Stored(torch.float32, ()),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"]).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        scale = _step(weight.float().abs().amax(), E4M3_MAX)
        return {"weight": to_e4m3(weight, scale), "weight_scale": scale}

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return round_e4m3(x, tensors["input_scale"])


class PerChannel(Format):
    """Weights of 8 bits, with a scale for each output channel."""

    bits = 8
    codes: torch.dtype

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(self.codes, (out, into), rows=1, columns=1),
            "weight_scale": Stored(torch.float32, (out,), rows=1),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (tensors["weight"].float() * tensors["weight_scale"][:, None]).to(dtype)


class FP8WeightOnly(PerChannel):
    """FP8 E4M3 weights per output channel (W8A16)."""

    name, codes, summary = "fp8_wo", E4M3, "E4M3 weight-only, per-channel scales"

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        scale = _step(weight.float().abs().amax(1), E4M3_MAX)
        return {"weight": to_e4m3(weight, scale[:, None]), "weight_scale": scale}


class FP8PerToken(FP8WeightOnly):
    """FP8 E4M3 weights per output channel; activations with a scale a token, taken from the token (W8A8)."""

    name, summary = "fp8_pc_pt", "E4M3 weights per channel, E4M3 activations per token"

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).float()
        return round_e4m3(x, _step(largest, E4M3_MAX))


class Int8WeightOnly(PerChannel):
    """INT8 weights per output channel."""

    name, codes, summary = "int8_wo", torch.int8, "INT8 weight-only, per-channel scales"

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        scale = _step(weight.float().abs().amax(1), 127)
        return {"weight": torch.round(weight.float() / scale[:, None]).to(torch.int8), "weight_scale": scale}


class Int8SmoothQuant(Int8WeightOnly):
    """INT8 weights per output channel and activations per tensor, smoothed (Xiao et al. 2022, arXiv:2211.10438)."""

    name, summary = "int8_sq", "INT8 SmoothQuant: per-channel weights, per-tensor activations"
    input_tensors = ("pre_quant_scale", "input_scale")

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            **super().stored(out, into, group_size, dtype),
            "pre_quant_scale": Stored(torch.float32, (into,), columns=1),
            "input_scale": Stored(torch.float32, ()),
        }

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        scale = tensors["input_scale"]
        smooth = x.float() * tensors["pre_quant_scale"]
        return (torch.clamp(torch.round(smooth / scale), -128, 127) * scale).to(x.dtype)


class Int4AWQ(Format):
    """INT4 weights in groups along the inputs, activation-aware scaling (Lin et al. 2023, arXiv:2306.00978)."""

    name, bits, summary = "int4_awq", 4, "INT4 weight-only, AWQ scaling, groups of 128, 64 or 32"
    group_sizes = (128, 64, 32)
    input_tensors: tuple[str, ...] = ("pre_quant_scale",)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(torch.uint8, (out // 2, into), rows=2, columns=1),
            "weight_scale": Stored(torch.float32, (out, into // group_size), rows=1, columns=group_size),
            "pre_quant_scale": Stored(torch.float32, (into,), columns=1),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        packed, scale = tensors["weight"], tensors["weight_scale"]
        # Arithmetic shifts of the byte as int8 sign-extend each nibble.
        signed = packed.view(torch.int8)
        codes = torch.stack([(signed << 4) >> 4, signed >> 4], dim=1).flatten(0, 1)
        groups = codes.unflatten(1, (scale.shape[1], -1)).float()
        return (groups * scale[:, :, None]).flatten(1).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        groups = weight.float().unflatten(1, (-1, group_size))
        scale = _step(groups.abs().amax(2), 7)
        codes = torch.round(groups / scale[:, :, None]).to(torch.int8).flatten(1).view(torch.uint8) & 0xF
        return {"weight": codes[::2] | codes[1::2] << 4, "weight_scale": scale}

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return (x.float() * tensors["pre_quant_scale"]).to(x.dtype)


class W4A8AWQ(Int4AWQ):
    """INT4 weights in groups as in `Int4AWQ`, multiplied in FP8 E4M3: rounded a second time, with E4M3 activations."""

    name, bits, summary = "w4a8_awq", 4, "INT4 weights, AWQ scaling, groups of 128, 64 or 32; E4M3 activations"
    input_tensors = ("pre_quant_scale", "input_scale")

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            **super().stored(out, into, group_size, dtype),
            "weight_scale_2": Stored(torch.float32, ()),
            "input_scale": Stored(torch.float32, ()),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return round_e4m3(super().weight(tensors, torch.float32), tensors["weight_scale_2"]).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        tensors = super().pack(weight, group_size)
        return {**tensors, "weight_scale_2": _step(weight.float().abs().amax(), E4M3_MAX)}

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return round_e4m3(x.float() * tensors["pre_quant_scale"], tensors["input_scale"]).to(x.dtype)


class NVFP4WeightOnly(Format):
    """FP4 E2M1 weights in blocks of 16 with E4M3 block scales (W4A16)."""

    name, bits, summary = "nvfp4_wo", 4, "E2M1 weight-only, E4M3 scales per block of 16"
    group_sizes = (16,)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(torch.uint8, (out, into // 2), rows=1, columns=2),
            "weight_scale": Stored(E4M3, (out, into // group_size), rows=1, columns=group_size),
            "weight_scale_2": Stored(torch.float32, ()),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
        blocks = _unpack_e2m1(tensors["weight"]).unflatten(1, (scale.shape[1], -1))
        return (blocks * scale[:, :, None]).flatten(1).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        blocks = weight.float().unflatten(1, (-1, group_size))
        largest = blocks.abs().amax(2)
        whole = _step(largest.amax(), 6 * E4M3_MAX)
        scale = to_e4m3(largest / 6, whole)
        step = (scale.float() * whole)[:, :, None]
        values = torch.where(step == 0, 0.0, blocks / step).flatten(1)
        return {"weight": _pack_e2m1(values), "weight_scale": scale, "weight_scale_2": whole}


class NVFP4(NVFP4WeightOnly):
    """FP4 E2M1 weights and activations in blocks of 16 with E4M3 block scales (W4A4)."""

    name, bits, summary = "nvfp4", 4, "E2M1 weights and activations, E4M3 scales per block of 16"
    input_tensors = ("input_scale",)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {**super().stored(out, into, group_size, dtype), "input_scale": Stored(torch.float32, ())}

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        return round_nvfp4(x, tensors["input_scale"])


class MXFP4(Format):
    """FP4 E2M1 weights in blocks of 32 that share a power of two (OCP Microscaling, W4A16)."""

    name, bits, summary = "mxfp4", 4, "E2M1 weight-only, a power of two per block of 32"
    group_sizes = (32,)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(torch.uint8, (out, into // 2), rows=1, columns=2),
            "weight_scale": Stored(torch.uint8, (out, into // group_size), rows=1, columns=group_size),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return _times_powers(_unpack_e2m1(tensors["weight"]), tensors["weight_scale"]).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        values, powers = _over_powers(weight, group_size, largest=6.0)
        return {"weight": _pack_e2m1(values), "weight_scale": powers}


class MXFP8(Format):
    """FP8 E4M3 weights and activations in blocks of 32 that share a power of two (OCP Microscaling, W8A8)."""

    name, bits, summary = "mxfp8", 8, "E4M3 weights and activations, a power of two per block of 32"
    group_sizes = (32,)

    def stored(self, out: int, into: int, group_size: int, dtype: torch.dtype) -> dict[str, Stored]:
        return {
            "weight": Stored(E4M3, (out, into), rows=1, columns=1),
            "weight_scale": Stored(torch.uint8, (out, into // group_size), rows=1, columns=group_size),
        }

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return _times_powers(tensors["weight"].float(), tensors["weight_scale"]).to(dtype)

    def pack(self, weight: Tensor, group_size: int) -> dict[str, Tensor]:
        values, powers = _over_powers(weight, group_size, largest=E4M3_MAX)
        return {"weight": values.to(E4M3), "weight_scale": powers}

    def activation(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        values, powers = _over_powers(x, self.group_sizes[0], largest=E4M3_MAX)
        return _times_powers(values.to(E4M3).float(), powers).to(x.dtype)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Dense(), FP8(), FP8WeightOnly(), FP8PerToken(), Int8WeightOnly(), Int8SmoothQuant(), Int4AWQ(), W4A8AWQ(),
        NVFP4WeightOnly(), NVFP4(), MXFP4(), MXFP8(),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """Which format each module of a checkpoint has: the one place where precision is decided.

    Attributes:
        format: name of the linears' format.
        group_size: along the inputs; 0 for a format without groups.
        kv_cache: 'none' (the compute dtype) or 'fp8' with a scale a layer for keys and for values.
        excluded: canonical names (glob patterns) of linears that stay unquantized.
    """

    format: str = "none"
    group_size: int = 0
    kv_cache: Literal["none", "fp8"] = "none"
    excluded: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"Unknown weight format {self.format!r}.", f"Known: {', '.join(FORMATS)}.")

    def format_of(self, module: Module) -> Format:
        """The format of a module's weight."""
        quantized = module.kind is Kind.LINEAR and not any(fnmatchcase(module.name, p) for p in self.excluded)
        return FORMATS[self.format if quantized else "none"]

    def stored(self, module: Module, dtype: torch.dtype) -> dict[str, Stored]:
        """Every tensor stored for `module`, by suffix ('weight', 'bias', 'weight_scale', …)."""
        if module.kind is Kind.VECTOR:
            return {"weight": Stored(torch.float32, module.shape)}
        if module.kind is Kind.NORM:
            tensors = {"weight": Stored(dtype, module.shape)}
        else:
            out, into = module.shape
            tensors = self.format_of(module).stored(out, into, self.group_size, dtype)
        if module.bias:
            tensors["bias"] = Stored(dtype, module.shape[:1], rows=1)
        return tensors


def round_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x` to the E4M3 grid of `scale`, saturating; same dtype out."""
    return (to_e4m3(x, scale).float() * scale).to(x.dtype)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of `x / scale`, saturating at ±448."""
    return torch.clamp(x.float() / scale, -E4M3_MAX, E4M3_MAX).to(E4M3)


def round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """Round `x` [..., I] to NVFP4 in blocks of 16 along I with the global `scale`; same shape and dtype out."""
    blocks = x.float().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True)
    step = torch.clamp(largest / (6 * scale), max=E4M3_MAX).to(E4M3).float() * scale
    safe = torch.where(step == 0, 1.0, step)
    values = _constants(E2M1_VALUES, x.device)
    rounded = values[e2m1_codes((blocks / safe).abs())] * blocks.sign() * step
    return rounded.flatten(-2).to(x.dtype)


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once for a device: a CUDA graph can't capture how they get there."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def e2m1_codes(magnitudes: Tensor) -> Tensor:
    """Codes 0…7 of the E2M1 values nearest to non-negative `magnitudes`, ties to the even code."""
    bounds, ties = (_constants(values, magnitudes.device) for values in (_E2M1_BOUNDS, _E2M1_TIES_UP))
    codes = torch.searchsorted(bounds, magnitudes.contiguous())
    return codes + (magnitudes[..., None] == ties).any(-1)


def _pack_e2m1(values: Tensor) -> Tensor:
    """E2M1 nibbles of `values` [O, I], saturating at ±6 → [O, I/2]."""
    codes = (e2m1_codes(values.abs()) | (values < 0).long() << 3).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _unpack_e2m1(packed: Tensor) -> Tensor:
    """[O, I/2] nibbles → [O, I] values in fp32."""
    values = _constants((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), packed.device)
    return values[torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).int()]


def _over_powers(x: Tensor, size: int, largest: float) -> tuple[Tensor, Tensor]:
    """`x` [..., I] in fp32, over the least powers of two that bring its blocks within ±`largest`; and their E8M0."""
    blocks = x.float().unflatten(-1, (-1, size))
    amax = blocks.abs().amax(-1)
    fraction, exponent = torch.frexp(amax / largest)  # fraction in [0.5, 1): exact, as log2 is not
    exponent = torch.where(amax > 0, exponent - (fraction == 0.5).int(), -127).clamp(-127, 127)
    powers = (exponent + 127).to(torch.uint8)
    return (blocks / _e8m0(powers)[..., None]).flatten(-2), powers


def _times_powers(values: Tensor, powers: Tensor) -> Tensor:
    """Blocks of `values` [..., I] times their powers of two, E8M0 [..., I/g]."""
    return (values.unflatten(-1, (powers.shape[-1], -1)) * _e8m0(powers)[..., None]).flatten(-2)


def _e8m0(powers: Tensor) -> Tensor:
    return powers.view(torch.float8_e8m0fnu).float()


def _step(largest: Tensor, levels: float) -> Tensor:
    """The scale that brings `largest` to `levels`; 1 where there is nothing to scale."""
    return torch.where(largest == 0, 1.0, largest / levels)
