"""What each weight format is in layers: weights as constants, quantized ones behind a dequantize layer.

TensorRT fuses quantize and dequantize layers into the kernels of the matrix product; that is how it is told to compute
in few bits. 4-bit weights are repacked: TensorRT wants neighbours of a row in a byte, the first in its low half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trtx.builder.tensorrt.network import Network, Value
from trtx.quantize.formats import E4M3
from trtx.quantize.weight import LinearWeight


class Linear:
    """A linear's weight (or several fused) as constants of a network.

    Args:
        dtype: what the network computes in.
    """

    def __init__(self, net: Network, weight: LinearWeight, dtype: torch.dtype) -> None:
        self.net = net
        self.name = weight.name
        self.dtype = dtype
        self.rows = weight.rows
        self.tensors = weight.tensors
        self._weight, self._input = _FORMATS[weight.format.name]

    def __call__(self, x: Value) -> Value:
        """[T, I] → [T, O]."""
        with self.net.scope(self.name):
            y = self.net.matmul(self._input(self, x), self._weight(self), transposed=True)
            if "bias" not in self.tensors:
                return y
            return self.net.binary(y, self.constant("bias", self.tensors["bias"].to(self.dtype)[None]), "SUM")

    def constant(self, suffix: str, tensor: Tensor, dtype: Any = None, shape: tuple[int, ...] | None = None) -> Value:
        """One of its tensors."""
        return self.net.constant(f"{self.name}.{suffix}", tensor, dtype, shape)

    def scale(self, suffix: str) -> Value:
        """A scale as it is stored, in fp32."""
        return self.constant(suffix, self.tensors[suffix].float())

    def smoothed(self, x: Value) -> Value:
        """x * pre_quant_scale, in fp32: rounded to 16 bits before it is quantized, it would get other codes."""
        scale = self.constant("pre_quant_scale", self.tensors["pre_quant_scale"].float()[None])
        return self.net.binary(self.net.cast(x, torch.float32), scale, "PROD")

    def rounded(self, x: Value, dtype: torch.dtype) -> Value:
        """x on the grid that `input_scale` gives a dtype of 8 bits."""
        scale = self.scale("input_scale")
        return self.net.dequantize(self.net.quantize(x, scale, dtype), scale, self.dtype)


def _as_is(linear: Linear, x: Value) -> Value:
    return x


def _dense(linear: Linear) -> Value:
    return linear.constant("weight", linear.tensors["weight"].to(linear.dtype))


def _fp8(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, linear.scale("weight_scale"), linear.dtype)


def _fp8_input(linear: Linear, x: Value) -> Value:
    return linear.rounded(x, E4M3)


def _int8(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, linear.scale("weight_scale"), linear.dtype, axis=0)


def _int8_input(linear: Linear, x: Value) -> Value:
    return linear.rounded(linear.smoothed(x), torch.int8)


def _int4(linear: Linear) -> Value:
    return _int4_in(linear, linear.dtype)


def _int4_in(linear: Linear, dtype: torch.dtype) -> Value:
    """INT4 weights in a dtype, which TensorRT wants their scales in too."""
    stored = linear.tensors["weight"]
    rows = torch.stack([stored & 0xF, stored >> 4], dim=1).flatten(0, 1)  # [O, I], a code a byte
    packed = rows[:, ::2] | rows[:, 1::2] << 4
    weight = linear.constant("weight", packed, linear.net.trt.int4, tuple(rows.shape))
    scale = linear.constant("weight_scale", linear.tensors["weight_scale"].to(dtype))
    return linear.net.dequantize(weight, scale, dtype)


def _int4_input(linear: Linear, x: Value) -> Value:
    return linear.net.cast(linear.smoothed(x), linear.dtype)


def _w4a8(linear: Linear) -> Value:
    scale = linear.scale("weight_scale_2")
    codes = linear.net.quantize(_int4_in(linear, torch.float32), scale, E4M3)
    return linear.net.dequantize(codes, scale, linear.dtype)


def _w4a8_input(linear: Linear, x: Value) -> Value:
    return linear.rounded(linear.smoothed(x), E4M3)


def _fp4(linear: Linear) -> Value:
    stored = linear.tensors["weight"]
    return linear.constant("weight", stored, linear.net.trt.fp4, (stored.shape[0], 2 * stored.shape[1]))


def _nvfp4(linear: Linear) -> Value:
    blocks = linear.constant("weight_scale", linear.tensors["weight_scale"])
    scale = linear.net.dequantize(blocks, linear.scale("weight_scale_2"), linear.dtype)
    return linear.net.dequantize(_fp4(linear), scale, linear.dtype)


def _nvfp4_input(linear: Linear, x: Value) -> Value:
    whole = linear.scale("input_scale")
    codes, blocks = linear.net.quantize_blocks(x, whole)
    scale = linear.net.dequantize(blocks, whole, linear.dtype)
    return linear.net.dequantize(codes, scale, linear.dtype)


def _powers(linear: Linear) -> Value:
    """Block scales that are powers of two."""
    return linear.constant("weight_scale", linear.tensors["weight_scale"], linear.net.trt.e8m0)


def _mxfp4(linear: Linear) -> Value:
    return linear.net.dequantize(_fp4(linear), _powers(linear), linear.dtype)


def _mxfp8(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, _powers(linear), linear.dtype)


def _mxfp8_input(linear: Linear, x: Value) -> Value:
    codes, scales = linear.net.quantize_powers(x)
    return linear.net.dequantize(codes, scales, linear.dtype)


_FORMATS: dict[str, tuple[Callable[[Linear], Value], Callable[[Linear, Value], Value]]] = {
    "none": (_dense, _as_is),
    "fp8": (_fp8, _fp8_input),
    "int8_wo": (_int8, _as_is),
    "int8_sq": (_int8, _int8_input),
    "int4_awq": (_int4, _int4_input),
    "w4a8_awq": (_w4a8, _w4a8_input),
    "nvfp4_wo": (_nvfp4, _as_is),
    "nvfp4": (_nvfp4, _nvfp4_input),
    "mxfp4": (_mxfp4, _as_is),
    "mxfp8": (_mxfp8, _mxfp8_input),
}
"""By the name of a format: its weight [O, I], and what it does to the input, in the dtype of the network."""
