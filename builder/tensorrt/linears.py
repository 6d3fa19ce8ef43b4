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
from trtx.quantize.formats import E4M3, E4M3_MAX
from trtx.quantize.weight import LinearWeight

_LEAST = 2.0**-100
"""Far below any activation."""


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
        self._weight, self._product = _FORMATS[weight.format.name]

    def __call__(self, x: Value) -> Value:
        """[T, I] → [T, O]."""
        with self.net.scope(self.name):
            y = self._product(self, x)
            if "bias" not in self.tensors:
                return y
            return self.net.binary(y, self.constant("bias", self.tensors["bias"].to(self.dtype)[None]), "SUM")

    def times_weight(self, x: Value) -> Value:
        """x @ Wᵀ, x being in the network's dtype."""
        return self.net.matmul(x, self._weight(self), transposed=True)

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


def _times_weight(linear: Linear, x: Value) -> Value:
    return linear.times_weight(x)


def _dense(linear: Linear) -> Value:
    return linear.constant("weight", linear.tensors["weight"].to(linear.dtype))


def _fp8(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, linear.scale("weight_scale"), linear.dtype)


def _fp8_product(linear: Linear, x: Value) -> Value:
    return linear.times_weight(linear.rounded(x, E4M3))


def _per_channel(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, linear.scale("weight_scale"), linear.dtype, axis=0)


def _per_token_product(linear: Linear, x: Value) -> Value:
    """Tokens are brought to one range, rounded with one scale, multiplied, and brought back.

    TensorRT compiles no quantize layer whose scales are computed. A power of two as the scale leaves the codes what
    they are, and products within what fp16 holds: no input is beyond 448 / 512.
    """
    net = linear.net
    exact = net.cast(x, torch.float32)
    largest = net.largest_size(exact)
    some = net.binary(largest, net.number(_LEAST, largest), "MAX")  # a token of zeros: divided by something
    step = net.binary(some, net.number(E4M3_MAX, some), "DIV")
    range_ = net.binary(step, net.number(512.0, step), "PROD")
    scale = linear.constant("unit_scale", torch.tensor(1 / 512))
    codes = net.quantize(net.binary(exact, range_, "DIV"), scale, E4M3)
    y = linear.times_weight(net.dequantize(codes, scale, linear.dtype))
    return net.cast(net.binary(net.cast(y, torch.float32), range_, "PROD"), linear.dtype)


def _int8_product(linear: Linear, x: Value) -> Value:
    return linear.times_weight(linear.rounded(linear.smoothed(x), torch.int8))


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


def _int4_product(linear: Linear, x: Value) -> Value:
    return linear.times_weight(linear.net.cast(linear.smoothed(x), linear.dtype))


def _w4a8(linear: Linear) -> Value:
    scale = linear.scale("weight_scale_2")
    codes = linear.net.quantize(_int4_in(linear, torch.float32), scale, E4M3)
    return linear.net.dequantize(codes, scale, linear.dtype)


def _w4a8_product(linear: Linear, x: Value) -> Value:
    return linear.times_weight(linear.rounded(linear.smoothed(x), E4M3))


def _fp4(linear: Linear) -> Value:
    stored = linear.tensors["weight"]
    return linear.constant("weight", stored, linear.net.trt.fp4, (stored.shape[0], 2 * stored.shape[1]))


def _nvfp4(linear: Linear) -> Value:
    blocks = linear.constant("weight_scale", linear.tensors["weight_scale"])
    scale = linear.net.dequantize(blocks, linear.scale("weight_scale_2"), linear.dtype)
    return linear.net.dequantize(_fp4(linear), scale, linear.dtype)


def _nvfp4_product(linear: Linear, x: Value) -> Value:
    whole = linear.scale("input_scale")
    codes, blocks = linear.net.quantize_blocks(x, whole)
    scale = linear.net.dequantize(blocks, whole, linear.dtype)
    return linear.times_weight(linear.net.dequantize(codes, scale, linear.dtype))


def _powers(linear: Linear) -> Value:
    """Block scales that are powers of two."""
    return linear.constant("weight_scale", linear.tensors["weight_scale"], linear.net.trt.e8m0)


def _mxfp4(linear: Linear) -> Value:
    return linear.net.dequantize(_fp4(linear), _powers(linear), linear.dtype)


def _mxfp8(linear: Linear) -> Value:
    weight = linear.constant("weight", linear.tensors["weight"])
    return linear.net.dequantize(weight, _powers(linear), linear.dtype)


def _mxfp8_product(linear: Linear, x: Value) -> Value:
    codes, scales = linear.net.quantize_powers(x)
    return linear.times_weight(linear.net.dequantize(codes, scales, linear.dtype))


_FORMATS: dict[str, tuple[Callable[[Linear], Value], Callable[[Linear, Value], Value]]] = {
    "none": (_dense, _times_weight),
    "fp8": (_fp8, _fp8_product),
    "fp8_wo": (_per_channel, _times_weight),
    "fp8_pc_pt": (_per_channel, _per_token_product),
    "int8_wo": (_per_channel, _times_weight),
    "int8_sq": (_per_channel, _int8_product),
    "int4_awq": (_int4, _int4_product),
    "w4a8_awq": (_w4a8, _w4a8_product),
    "nvfp4_wo": (_nvfp4, _times_weight),
    "nvfp4": (_nvfp4, _nvfp4_product),
    "mxfp4": (_mxfp4, _times_weight),
    "mxfp8": (_mxfp8, _mxfp8_product),
}
"""By the name of a format: its weight [O, I], and the product of an input with it, in the dtype of the network."""
