"""Evaluates a TensorRT network with torch on the CPU, layer by layer as TensorRT holds it. For tests: needs no GPU.

What each layer does is read from include/NvInfer.h of TensorRT 11.1 (github.com/NVIDIA/TensorRT); "[hdr C]" cites its
class, enum or function C. What the header leaves open is said where it's decided. test_interpreter.py compares every
kind with onnxruntime, the network coming from TensorRT's own ONNX parser, or with a formula.

Precision: a layer's floating-point work is done in fp32 on the exact input values, and its result is rounded once to
the dtype that the strongly typed network declares. So elementwise layers are correctly rounded; sums (matrix multiply,
attention, reductions) are at least as exact as a kernel's. Attention keeps its probabilities in fp32, where kernels
round them to the input's dtype.

Values: FLOAT, HALF, BF16, INT8, INT32, INT64, BOOL, UINT8, FP8 and E8M0 are torch tensors of that dtype; INT4 is int8
in [-8, 7], FP4 is float32 holding e2m1 values, both of the logical (unpacked) shape. What TensorRT leaves undefined (a
query row that may attend to nothing, packed rows past the last length) is NaN, so that a network that uses it shows.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "FP8": torch.float8_e4m3fn,
    "E8M0": torch.float8_e8m0fnu,
    "INT4": torch.int8,
    "FP4": torch.float32,
}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by code; bit 3 is the sign [hdr DataType::kFP4]
_CLAMP = {"INT8": (-128.0, 127.0), "INT4": (-8.0, 7.0), "FP8": (-448.0, 448.0), "FP4": (-6.0, 6.0)}

Collective = Callable[[Any, Tensor], Tensor]


class InterpreterError(Exception):
    """A layer that can't be evaluated, or whose result isn't what the network declares."""


def evaluate(
    network: Any,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    collective: Collective | None = None,
) -> dict[str, Tensor]:
    """The network's outputs by name. See Interpreter for the arguments and for tensors in between."""
    return Interpreter(network, weights, inputs, collective).outputs()


class Interpreter:
    """The values of a network's tensors for one set of inputs, by tensor name: computed on demand and kept.

    weights: by IConstantLayer name, the tensor whose buffer the layer was given (4-bit: packed bytes, low nibble
    first; FP8 and E8M0: their torch dtype or bytes). Constants not named there are read from the layer, which
    TensorRT's Python API allows for FLOAT, HALF, INT8, INT32, INT64 and BOOL only; for those, a named tensor that
    differs from the layer's values is an error.
    inputs: by name, in the declared dtype, of a shape that fits the declared one.
    collective: (layer, local value) -> result, for IDistCollectiveLayers; without it they must have one rank, and are
    the identity.
    """

    def __init__(
        self,
        network: Any,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        collective: Collective | None = None,
    ) -> None:
        self.network = network
        self.weights = weights
        self.collective = collective
        self.trt = sys.modules[type(network).__module__]
        self._values: dict[str, Tensor] = {}
        self._tensors: dict[str, Any] = {}
        self._producers: dict[str, Any] = {}
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        for layer in layers:
            for tensor in _outputs(layer):
                if tensor.name in self._producers:
                    raise InterpreterError(f"{layer.name}: two tensors are named {tensor.name}")
                self._producers[tensor.name] = layer
                self._tensors[tensor.name] = tensor
        constants = {layer.name for layer in layers if self._kind(layer) == "CONSTANT"}
        if unknown := set(weights) - constants:
            raise InterpreterError(f"weights without a constant layer: {sorted(unknown)}")
        self._assertions = [layer for layer in layers if self._kind(layer) == "ASSERTION"]
        declared = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
        if set(inputs) != set(declared):
            raise InterpreterError(f"inputs {sorted(inputs)} given, {sorted(declared)} wanted")
        for name, tensor in declared.items():
            self._tensors[name] = tensor
            self._values[name] = self._checked(f"input {name}", tensor, inputs[name])

    def outputs(self) -> dict[str, Tensor]:
        """The network's outputs by name. Also evaluates every IAssertionLayer: a false one is an error."""
        names = [self.network.get_output(i).name for i in range(self.network.num_outputs)]
        values = {name: self[name] for name in names}
        for layer in self._assertions:
            if not bool(self[layer.get_input(0).name].all()):
                raise InterpreterError(
                    f"{layer.name}: the assertion is false: {_downcast(self.trt, layer, 'IAssertionLayer').message}"
                )
        return values

    def __getitem__(self, name: str) -> Tensor:
        """The value of any tensor of the network.

        Depth first with a stack: get_layer() isn't in topological order, and networks are deep.
        """
        stack = [name]
        while stack:
            if stack[-1] in self._values:
                stack.pop()
                continue
            layer = self._producers.get(stack[-1])
            if layer is None:
                raise InterpreterError(f"no tensor is named {stack[-1]}")
            if self._kind(layer) not in _LAYERS:
                raise InterpreterError(f"{layer.name}: no rule for layers of kind {self._kind(layer)}")
            missing = [x.name for x in self._operands(layer) if x is not None and x.name not in self._values]
            if missing:
                stack += missing
            else:
                self._run(layer)
        return self._values[name]

    def _kind(self, layer: Any) -> str:
        # IActivationLayer.type hides ILayer.type once a layer is downcast
        return self.trt.ILayer.type.fget(layer).name

    def _operands(self, layer: Any) -> list[Any]:
        """Tensors that the layer reads. An attention's output layer reads the operands of its input layer."""
        if self._kind(layer) == "ATTENTION_OUTPUT":
            layer = self._producers[layer.get_input(0).name]
        return [layer.get_input(i) for i in range(layer.num_inputs)]

    def _run(self, layer: Any) -> None:
        kind = self._kind(layer)
        class_name, rule = _LAYERS[kind]
        operands = [None if x is None else self._values[x.name] for x in self._operands(layer)]
        layer = _downcast(self.trt, layer, class_name)
        try:
            results = rule(_Context(self, layer), *operands)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
            raise InterpreterError(f"{layer.name} ({kind}): {error}") from error
        results = results if isinstance(results, tuple) else (results,)
        for tensor, value in zip(_outputs(layer), results, strict=True):
            self._values[tensor.name] = self._checked(layer.name, tensor, value)

    def _checked(self, owner: str, tensor: Any, value: Tensor) -> Tensor:
        """The value, if its dtype and shape are those that TensorRT infers for the tensor."""
        shape, dtype = tuple(tensor.shape), tensor.dtype.name
        if value.dtype != _DTYPES[dtype]:
            raise InterpreterError(f"{owner}: {tensor.name} is {dtype}, the value {value.dtype}")
        if len(shape) != value.dim() or any(d not in (-1, v) for d, v in zip(shape, value.shape, strict=True)):
            raise InterpreterError(f"{owner}: {tensor.name} has shape {shape}, the value {tuple(value.shape)}")
        return value


class _Context:
    """What a rule may ask about its layer beside the values of its inputs."""

    def __init__(self, interpreter: Interpreter, layer: Any) -> None:
        self.interpreter = interpreter
        self.layer = layer

    def dtype_name(self, index: int = 0) -> str:
        return self.layer.get_output(index).dtype.name

    def input_dtype_name(self, index: int = 0) -> str:
        return self.layer.get_input(index).dtype.name

    def cast(self, value: Tensor, index: int = 0) -> Tensor:
        """The value rounded to the declared dtype of an output."""
        return value.to(_DTYPES[self.dtype_name(index)])


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(i) for i in range(layer.num_outputs)]


def _downcast(trt: Any, layer: Any, class_name: str) -> Any:
    """get_layer() answers a bare ILayer unless Python still holds the object that add_*() made."""
    layer.__class__ = getattr(trt, class_name)
    return layer


def _axes(mask: int, rank: int) -> list[int]:
    axes = [d for d in range(rank) if mask >> d & 1]
    if mask >> rank or not axes:
        raise ValueError(f"axes mask {mask:#b} for rank {rank}")
    return axes


def _only_axis(mask: int, rank: int) -> int:
    axes = _axes(mask, rank)
    if len(axes) != 1:
        raise ValueError(f"one axis wanted, the mask is {mask:#b}")
    return axes[0]


def _dims(static: Iterable[int] | None, dynamic: Tensor | None) -> list[int]:
    """A parameter given as Dims or, taking precedence, as an input tensor."""
    if dynamic is not None:
        return [int(v) for v in dynamic.tolist()]
    if static is None:
        raise ValueError("a parameter is neither static nor an input")
    return list(static)


def _high(x: Tensor) -> Tensor:
    """fp32 for floating-point values, else unchanged."""
    return x.float() if x.is_floating_point() else x


def _unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """uint8 bytes -> count codes 0..15, the first of a pair in the low nibble (ONNX's order; the header is silent)."""
    flat = packed.contiguous().view(torch.uint8).flatten()
    if flat.numel() != (count + 1) // 2:
        raise ValueError(f"{flat.numel()} bytes for {count} 4-bit values")
    return torch.stack([flat & 15, flat >> 4], dim=1).flatten()[:count].to(torch.int64)


def _constant(ctx: _Context) -> Tensor:
    layer, name, shape = ctx.layer, ctx.dtype_name(), tuple(ctx.layer.shape)
    count = math.prod(shape)
    held = layer.weights
    given = ctx.interpreter.weights.get(layer.name)
    if given is None:
        if isinstance(held, ctx.interpreter.trt.Weights):
            raise ValueError(f"{name} constants can't be read back: name it in weights")
        return torch.from_numpy(held.copy()).reshape(shape)
    if name == "INT4":
        codes = _unpack_nibbles(given, count)
        return ((codes ^ 8) - 8).to(torch.int8).reshape(shape)
    if name == "FP4":
        codes = _unpack_nibbles(given, count)
        return (torch.tensor(_E2M1)[codes & 7] * (1 - 2 * (codes >> 3))).reshape(shape)
    dtype = _DTYPES[name]
    if given.dtype == torch.uint8 and name in ("FP8", "E8M0"):
        given = given.view(dtype)
    if given.dtype != dtype or given.numel() != count:
        raise ValueError(f"weights hold {given.numel()} values of {given.dtype}, the layer {count} of {name}")
    value = given.detach().cpu().reshape(shape)
    if not isinstance(held, ctx.interpreter.trt.Weights):
        mine = torch.from_numpy(held.copy())
        if not torch.equal(mine.view(torch.uint8), value.flatten().view(torch.uint8)):
            raise ValueError("weights differ from the values that the layer holds")
    return value


def _trunc_divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


# [hdr ElementWiseOperation]. DIV of integers truncates, as ONNX Div does (which the parser maps to it).
_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _trunc_divide,
    "POW": torch.pow,
    "FLOOR_DIV": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}


def _elementwise(ctx: _Context, a: Tensor, b: Tensor) -> Tensor:
    """[hdr IElementWiseLayer]: equal ranks, dimensions of 1 are broadcast."""
    _same_rank(a, b)
    return ctx.cast(_ELEMENTWISE[ctx.layer.op.name](_high(a), _high(b)))


def _same_rank(*tensors: Tensor) -> None:
    if len({t.dim() for t in tensors}) != 1:
        raise ValueError(f"ranks differ: {[tuple(t.shape) for t in tensors]}")


# [hdr UnaryOperation]; ROUND is to nearest, ties to even
_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "SINH": torch.sinh,
    "COSH": torch.cosh,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "ASINH": torch.asinh,
    "ACOSH": torch.acosh,
    "ATANH": torch.atanh,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}


def _unary(ctx: _Context, x: Tensor) -> Tensor:
    return ctx.cast(_UNARY[ctx.layer.op.name](_high(x)))


# (x, alpha, beta) -> y, as spelled out at [hdr ActivationType]
_ACTIVATIONS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "RELU": lambda x, a, b: x.clamp(min=0),
    "SIGMOID": lambda x, a, b: x.sigmoid(),
    "TANH": lambda x, a, b: x.tanh(),
    "LEAKY_RELU": lambda x, a, b: torch.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: torch.where(x >= 0, x, a * x.expm1()),
    "SELU": lambda x, a, b: torch.where(x > 0, b * x, b * a * x.expm1()),
    "SOFTSIGN": lambda x, a, b: x / (1 + x.abs()),
    "SOFTPLUS": lambda x, a, b: a * torch.logaddexp(b * x, torch.zeros_like(x)),
    "CLIP": lambda x, a, b: x.clamp(max=b).clamp(min=a),
    "HARD_SIGMOID": lambda x, a, b: (a * x + b).clamp(0, 1),
    "SCALED_TANH": lambda x, a, b: a * (b * x).tanh(),
    "THRESHOLDED_RELU": lambda x, a, b: torch.where(x > a, x, 0.0),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(0.5) * x).erf()),
    "GELU_TANH": lambda x, a, b: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (0.044715 * x**3 + x)).tanh()),
}


def _activation(ctx: _Context, x: Tensor) -> Tensor:
    """IActivationLayer.type is the activation. Integers (RELU, CLIP) stay integers."""
    return ctx.cast(_ACTIVATIONS[ctx.layer.type.name](_high(x), ctx.layer.alpha, ctx.layer.beta))


def _matrix_multiply(ctx: _Context, a: Tensor, b: Tensor) -> Tensor:
    """[hdr MatrixOperation, IMatrixMultiplyLayer]: op(a) @ op(b); of the outer dimensions, those of 1 are broadcast."""
    op0, op1 = ctx.layer.op0.name, ctx.layer.op1.name
    left = a[..., None, :] if op0 == "VECTOR" else a.mT if op0 == "TRANSPOSE" else a
    right = b[..., :, None] if op1 == "VECTOR" else b.mT if op1 == "TRANSPOSE" else b
    _same_rank(left, right)
    result = _high(left) @ _high(right)
    if op1 == "VECTOR":
        result = result.squeeze(-1)
    if op0 == "VECTOR":
        result = result.squeeze(-1 if op1 == "VECTOR" else -2)
    return ctx.cast(result)


def _einsum(ctx: _Context, *operands: Tensor) -> Tensor:
    """[hdr IEinsumLayer]; torch shares its conventions (implicit output order, ellipsis, diagonals, broadcast of 1)."""
    return ctx.cast(torch.einsum(ctx.layer.equation, *[_high(x) for x in operands]))


def _softmax(ctx: _Context, x: Tensor) -> Tensor:
    return ctx.cast(_high(x).softmax(_only_axis(ctx.layer.axes, x.dim())))


def _reduce(ctx: _Context, x: Tensor) -> Tensor:
    """[hdr ReduceOperation]. AVG of integers isn't described there: refused."""
    op, keep = ctx.layer.op.name, ctx.layer.keep_dims
    axes = _axes(ctx.layer.axes, x.dim())
    value = _high(x)
    if op == "PROD":
        for axis in reversed(axes):
            value = value.prod(axis, keepdim=keep)
    elif op == "AVG":
        if not x.is_floating_point():
            raise ValueError("the average of integers isn't defined")
        value = value.mean(axes, keepdim=keep)
    else:
        value = {"SUM": torch.sum, "MAX": torch.amax, "MIN": torch.amin}[op](value, axes, keepdim=keep)
    return ctx.cast(value)


def _wrapped(indices: Tensor, size: int, dynamic: bool) -> Tensor:
    """Negative indices count from the end; along a dynamic axis that's undefined [hdr IGatherLayer]."""
    if dynamic and bool((indices < 0).any()):
        raise ValueError("a negative index along a dynamic axis is undefined")
    return torch.where(indices < 0, indices + size, indices).long()


def _gather(ctx: _Context, data: Tensor, indices: Tensor) -> Tensor:
    """[hdr IGatherLayer]: as ONNX Gather, GatherElements, GatherND; an index out of bounds reads zero."""
    layer, mode, batch = ctx.layer, ctx.layer.mode.name, ctx.layer.num_elementwise_dims
    declared = tuple(layer.get_input(0).shape)
    if mode == "ND":
        depth = indices.shape[-1]
        for d in range(batch):
            if data.shape[d] != indices.shape[d]:
                raise ValueError("the elementwise dimensions differ")
        subscripts: list[Tensor] = []
        inside = torch.ones(indices.shape[:-1], dtype=torch.bool)
        for d in range(batch):
            view = [1] * (indices.dim() - 1)
            view[d] = -1
            subscripts.append(torch.arange(data.shape[d]).view(view).expand(indices.shape[:-1]))
        for j in range(depth):
            size = data.shape[batch + j]
            index = _wrapped(indices[..., j], size, declared[batch + j] == -1)
            inside &= (index >= 0) & (index < size)
            subscripts.append(index.clamp(0, max(size - 1, 0)))
        result = data[tuple(subscripts)]
        return torch.where(
            inside.reshape(inside.shape + (1,) * (result.dim() - inside.dim())), result, torch.zeros_like(result)
        )
    axis = layer.axis
    size = data.shape[axis]
    index = _wrapped(indices, size, declared[axis] == -1)
    inside, index = (index >= 0) & (index < size), index.clamp(0, max(size - 1, 0))
    if mode == "ELEMENT":
        if batch:
            raise ValueError("ELEMENT takes no elementwise dimensions")
        result = data.gather(axis, index)
        return torch.where(inside, result, torch.zeros_like(result))
    if batch == 0:
        result = (
            data.index_select(axis, index.flatten()).unflatten(axis, index.shape)
            if index.dim()
            else data.select(axis, int(index))
        )
        inside = inside.reshape(index.shape + (1,) * (data.dim() - 1 - axis))
        return torch.where(inside, result, torch.zeros_like(result))
    if batch != 1 or axis < 1:
        raise ValueError(f"DEFAULT with {batch} elementwise dimensions and axis {axis}")
    rows = max(data.shape[0], indices.shape[0])
    data, index, inside = (t.expand(rows, *t.shape[1:]) for t in (data, index, inside))
    picked = []
    for row, at, ok in zip(data, index, inside, strict=True):
        result = row.index_select(axis - 1, at.flatten()).reshape(row.shape[: axis - 1] + at.shape + row.shape[axis:])
        picked.append(torch.where(ok.reshape(at.shape + (1,) * (row.dim() - axis)), result, torch.zeros_like(result)))
    return torch.stack(picked)


def _scatter(ctx: _Context, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """[hdr IScatterLayer]: as ONNX ScatterElements, ScatterND. Two writes to one element are undefined: refused."""
    size = torch.tensor(data.shape)
    result = data.clone()
    if ctx.layer.mode.name == "ND":
        depth = indices.shape[-1]
        index = indices.long().reshape(-1, depth)
        index = torch.where(index < 0, index + size[:depth], index)
        subscripts = tuple(index.unbind(-1))
        written = torch.zeros(data.shape[:depth], dtype=torch.int64)
        written.index_put_(subscripts, torch.ones(index.shape[0], dtype=torch.int64), accumulate=True)
        result[subscripts] = updates.reshape(index.shape[0], *data.shape[depth:])
    else:
        axis = ctx.layer.axis
        index = _wrapped(indices, data.shape[axis], dynamic=False)
        written = torch.zeros(data.shape, dtype=torch.int64).scatter_add(axis, index, torch.ones_like(index))
        result = result.scatter(axis, index, updates)
    if bool((written > 1).any()):
        raise ValueError("two updates write to the same element, which is undefined")
    return result


def _shuffle(ctx: _Context, x: Tensor, dims: Tensor | None = None) -> Tensor:
    """[hdr IShuffleLayer]: transpose, reshape, transpose.

    A 0 in the reshape copies a dimension of the transposed input: so TensorRT's own shape inference has it.
    """
    layer = ctx.layer
    x = x.permute(list(layer.first_transpose)[: x.dim()])
    static = None if dims is not None else layer.reshape_dims
    if dims is not None or static is not None:
        target = _dims(static, dims)
        if layer.zero_is_placeholder:
            target = [x.shape[i] if d == 0 else d for i, d in enumerate(target)]
        x = x.reshape(target)
    return x.permute(list(layer.second_transpose)[: x.dim()]).contiguous()


def _slice(
    ctx: _Context,
    x: Tensor,
    start: Tensor | None = None,
    size: Tensor | None = None,
    stride: Tensor | None = None,
    fill: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """[hdr ISliceLayer, SampleMode]: output[i] = input[start + i * stride] along each axis; never from the end."""
    layer, mode = ctx.layer, ctx.layer.mode.name
    starts = _dims(None if start is not None else layer.start, start)
    sizes = _dims(None if size is not None else layer.shape, size)
    strides = _dims(None if stride is not None else layer.stride, stride)
    chosen = axes.tolist() if axes is not None else layer.axes
    where = list(range(x.dim())) if chosen is None or len(tuple(chosen)) == 0 else [a % x.dim() for a in chosen]
    if not len(starts) == len(sizes) == len(strides) == len(where):
        raise ValueError(f"start {starts}, size {sizes}, stride {strides} for axes {where}")
    inside = torch.ones((1,) * x.dim(), dtype=torch.bool)
    for axis, first, count, step in zip(where, starts, sizes, strides, strict=True):
        length = x.shape[axis]
        index = first + step * torch.arange(count)
        ok = (index >= 0) & (index < length)
        if mode == "STRICT_BOUNDS" and not bool(ok.all()):
            raise ValueError(
                f"axis {axis} of length {length}: start {first}, size {count}, stride {step} is out of bounds"
            )
        if mode == "WRAP":
            index = index % length
        elif mode == "REFLECT" and length > 1:
            index = index % (2 * length - 2)
            index = torch.minimum(index, 2 * length - 2 - index)
        x = (
            x.index_select(axis, index.clamp(0, max(length - 1, 0)))
            if length or count == 0
            else _empty_taken(x, axis, count, mode)
        )
        inside = inside & ok.view([-1 if d == axis else 1 for d in range(x.dim())])
    if mode == "FILL":
        value = torch.zeros((), dtype=x.dtype) if fill is None else fill.reshape(()).to(x.dtype)
        x = torch.where(inside, x, value)
    return x


def _empty_taken(x: Tensor, axis: int, count: int, mode: str) -> Tensor:
    """A slice of a dimension of length 0: only FILL can give it elements."""
    if mode != "FILL":
        raise ValueError(f"{count} elements from axis {axis} of length 0 in mode {mode}")
    return x.new_zeros([count if d == axis else n for d, n in enumerate(x.shape)])


def _concatenation(ctx: _Context, *parts: Tensor) -> Tensor:
    return torch.cat(parts, ctx.layer.axis)


def _select(ctx: _Context, condition: Tensor, then: Tensor, other: Tensor) -> Tensor:
    _same_rank(condition, then, other)
    return torch.where(condition, then, other)


def _cast(ctx: _Context, x: Tensor) -> Tensor:
    if {ctx.dtype_name(), ctx.input_dtype_name()} & {"INT4", "FP4"}:
        raise ValueError("casts of 4-bit types aren't described")
    return ctx.cast(x)


def _identity(ctx: _Context, x: Tensor) -> Tensor:
    return x


def _normalization(ctx: _Context, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """[hdr INormalizationLayer]: (x - mean) / sqrt(biased variance + epsilon) * scale + bias over a mask of axes."""
    if ctx.layer.num_groups != 1:
        raise ValueError("normalization in groups")
    _same_rank(x, scale, bias)
    axes = _axes(ctx.layer.axes, x.dim())
    value = x.float()
    centred = value - value.mean(axes, keepdim=True)
    value = centred / (centred.square().mean(axes, keepdim=True) + ctx.layer.epsilon).sqrt()
    return ctx.cast(value * scale.float() + bias.float())


def _fill(ctx: _Context, dims: Tensor | None = None, alpha: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
    """[hdr FillOperation]: LINSPACE is alpha + sum over d of beta[d] * index[d]; a static beta is for a 1-D output."""
    layer = ctx.layer
    if layer.operation.name != "LINSPACE":
        raise ValueError(f"{layer.operation.name} isn't reproducible")
    shape = _dims(None if dims is not None else layer.shape, dims)
    integers = not _DTYPES[ctx.dtype_name()].is_floating_point
    first = layer.alpha if alpha is None else alpha.item()
    steps = [layer.beta] if beta is None else beta.reshape(-1).tolist()
    if len(steps) != len(shape):
        raise ValueError(f"{len(steps)} deltas for {len(shape)} dimensions")
    value = torch.full(shape, int(first) if integers else first, dtype=torch.int64 if integers else torch.float64)
    for d, step in enumerate(steps):
        ramp = torch.arange(shape[d], dtype=value.dtype) * (int(step) if integers else step)
        value = value + ramp.view([-1 if i == d else 1 for i in range(len(shape))])
    return ctx.cast(value)


def _shape(ctx: _Context, x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int64)


def _topk(ctx: _Context, x: Tensor, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[hdr ITopKLayer]: sorted. Which of equal values comes first isn't said; here the lower index, as in ONNX."""
    axis = _only_axis(ctx.layer.axes, x.dim())
    count = ctx.layer.k if k is None else int(k)
    order = _high(x).sort(dim=axis, descending=ctx.layer.op.name == "MAX", stable=True).indices.narrow(axis, 0, count)
    return x.gather(axis, order), ctx.cast(order, 1)


def _one_hot(ctx: _Context, indices: Tensor, values: Tensor, depth: Tensor) -> Tensor:
    """[hdr IOneHotLayer]: values are [off, on]. An index outside [0, depth) isn't described: refused."""
    count = int(depth)
    if bool(((indices < 0) | (indices >= count)).any()):
        raise ValueError(f"an index is outside [0, {count})")
    hot = functional.one_hot(indices.long(), count).bool().movedim(-1, ctx.layer.axis)
    return torch.where(hot, values[1], values[0])


def _cumulative(ctx: _Context, x: Tensor, axis: Tensor) -> Tensor:
    """[hdr ICumulativeLayer]: SUM; exclusive leaves out the element itself, reverse runs from the end."""
    layer, d = ctx.layer, int(axis)
    value = x.double() if x.is_floating_point() else x.long()
    value = value.flip(d) if layer.reverse else value
    total = value.cumsum(d)
    total = total - value if layer.exclusive else total
    return ctx.cast(total.flip(d) if layer.reverse else total)


def _non_zero(ctx: _Context, x: Tensor) -> Tensor:
    """[hdr INonZeroLayer]: [rank, n], columns in lexical order."""
    return ctx.cast(x.nonzero().T.contiguous())


def _squeeze(ctx: _Context, x: Tensor, axes: Tensor | None = None) -> Tensor:
    """[hdr ISqueezeLayer]; without axes (RTX) the dimensions that are statically 1 go."""
    if axes is None:
        drop = [d for d, n in enumerate(ctx.layer.get_input(0).shape) if n == 1]
    else:
        drop = [a % x.dim() for a in axes.tolist()]
    if any(x.shape[d] != 1 for d in drop):
        raise ValueError(f"axes {drop} of shape {tuple(x.shape)} aren't all 1")
    return x.reshape([n for d, n in enumerate(x.shape) if d not in drop])


def _unsqueeze(ctx: _Context, x: Tensor, axes: Tensor) -> Tensor:
    """[hdr IUnsqueezeLayer]: axes are those of the output."""
    rank = x.dim() + axes.numel()
    new = {a % rank for a in axes.tolist()}
    rest = iter(x.shape)
    return x.reshape([1 if d in new else next(rest) for d in range(rank)])


def _rotary_embedding(ctx: _Context, x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None = None) -> Tensor:
    """[hdr INetworkDefinition::addRotaryEmbedding]: x [B, N, S, D], tables [B, S, R/2] or, with ids [B, S], [P, R/2].

    The pair rotated by an angle is (d, d + R/2), or (2d, 2d + 1) when interleaved; dimensions past R are copied.
    """
    layer = ctx.layer
    rotary = layer.rotary_embedding_dim or x.shape[-1]
    if ids is not None:
        if bool(((ids < 0) | (ids >= cos.shape[0])).any()):
            raise ValueError(f"a position is outside [0, {cos.shape[0]})")
        cos, sin = cos[ids.long()], sin[ids.long()]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    if cos.shape[-1] != rotary // 2 or cos.shape[-2] != x.shape[-2]:
        raise ValueError(f"tables {tuple(cos.shape)} for input {tuple(x.shape)}, {rotary} rotary dimensions")
    turned, rest = x.float()[..., :rotary], x.float()[..., rotary:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if layer.interleaved else turned.chunk(2, -1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(parts, -1).flatten(-2) if layer.interleaved else torch.cat(parts, -1)
    return ctx.cast(torch.cat([turned, rest], -1))


def _kv_cache_update(ctx: _Context, cache: Tensor, update: Tensor, at: Tensor, lengths: Tensor | None = None) -> Tensor:
    """[hdr IKVCacheUpdateLayer]: a new cache [B, N, S_max, D] with out[b, :, at[b] + s] = step s of sequence b.

    Padded: update [B, N, S, D]. Packed: update [T, N, D], cumulative lengths [B + 1]. A write past S_max is "ignored
    silently", whether wholly or in part isn't said: refused here.
    """
    layer = ctx.layer
    if layer.cache_mode.name != "LINEAR":
        raise ValueError(f"cache mode {layer.cache_mode.name}")
    result = cache.clone()
    if layer.update_form.name == "PACKED_NHD":
        if lengths is None:
            raise ValueError("a packed update without lengths")
        parts = [part.transpose(0, 1) for part in _unpacked(update, lengths)]
    else:
        parts = list(update)
    for b, part in enumerate(parts):
        first, count = int(at[b]), part.shape[1]
        if first < 0 or first + count > cache.shape[2]:
            raise ValueError(f"sequence {b} writes [{first}, {first + count}) into a cache of {cache.shape[2]}")
        result[b, :, first : first + count] = part
    return result


def _unpacked(x: Tensor, lengths: Tensor) -> list[Tensor]:
    """[T, N, D] -> one [T_b, N, D] a sequence; rows past the last length are left out."""
    bounds = lengths.tolist()
    if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > x.shape[0]:
        raise ValueError(f"cumulative lengths {bounds} for {x.shape[0]} rows")
    return [x[a:b] for a, b in itertools.pairwise(bounds)]


def _attention_input(ctx: _Context, *operands: Tensor | None) -> Tensor:
    raise ValueError("the boundary between an attention's two layers has no value of its own")


def _attention(
    ctx: _Context,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    query_lengths: Tensor | None = None,
    kv_lengths: Tensor | None = None,
) -> Tensor:
    """[hdr IAttention]: normalize(query keyT + mask) value, unscaled; consecutive query heads share a key head.

    Operands are padded [B, N, S, D] or packed [T, N, D] with cumulative lengths [B + 1]. Key lengths [B] of the padded
    form cut each sequence short. LOWER_RIGHT lets query i see key j <= i + s_kv - s_q [hdr CausalMaskKind]; the header
    doesn't say whether s_kv is then the sequence's own length: here it is, as in ONNX 24 (Attention, nonpad_kv_seqlen).
    normalization_quantize_scale rounds the probabilities as Q/DQ would; fused kernels round unnormalized ones.
    """
    attention = ctx.layer.attention
    if attention.num_ranks != 1:
        raise ValueError(f"attention over {attention.num_ranks} ranks")
    packed_query = attention.query_form.name == "PACKED_NHD"
    packed_kv = attention.key_value_form.name == "PACKED_NHD"
    if (packed_query and query_lengths is None) or (packed_kv and kv_lengths is None):
        raise ValueError("a packed form without lengths")
    if mask is not None and (packed_query or packed_kv):
        raise ValueError("a mask with a packed form isn't described")
    added = [mask] if mask is not None and mask.dtype != torch.bool else []
    if len({t.dtype for t in (query, key, value, *added)}) != 1:
        raise ValueError(f"types differ: {[t.dtype for t in (query, key, value, *added)]}")
    normalize, causal = attention.norm_op.name, attention.causal_kind.name
    if normalize == "NONE" and (
        causal != "NONE" or kv_lengths is not None or (mask is not None and mask.dtype == torch.bool)
    ):
        raise ValueError("what a masked score becomes without softmax isn't described")
    queries = _unpacked(query, query_lengths) if packed_query else [q.transpose(0, 1) for q in query]
    if packed_kv:
        keys, values = _unpacked(key, kv_lengths), _unpacked(value, kv_lengths)
    else:
        ends = [key.shape[2]] * key.shape[0] if kv_lengths is None else kv_lengths.tolist()
        if any(not 0 <= e <= key.shape[2] for e in ends):
            raise ValueError(f"key lengths {ends} for {key.shape[2]} keys")
        keys = [k.transpose(0, 1)[:e] for k, e in zip(key, ends, strict=True)]
        values = [v.transpose(0, 1)[:e] for v, e in zip(value, ends, strict=True)]
    results = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        groups, rest = divmod(q.shape[1], k.shape[1])
        if rest:
            raise ValueError(f"{q.shape[1]} query heads over {k.shape[1]} key heads")
        k, v = (t.float().repeat_interleave(groups, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k)
        if causal != "NONE":
            offset = k.shape[0] - q.shape[0] if causal == "LOWER_RIGHT" else 0
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(offset + 1)
            scores = scores.masked_fill(hidden, -math.inf)
        if mask is not None:
            local = mask.expand(*query.shape[:3], key.shape[2])[b, ..., : k.shape[0]]
            scores = scores.masked_fill(~local, -math.inf) if mask.dtype == torch.bool else scores + local.float()
        weights = scores.softmax(-1) if normalize == "SOFTMAX" else scores
        if scale is not None:
            quantize = attention.normalization_quantize_to_type.name
            weights = _rounded(weights / scale.float(), quantize).float() * scale.float()
        output = torch.einsum("hqk,khd->qhd", weights, v)
        results.append(output if k.shape[0] else torch.full_like(output, math.nan))
    if not packed_query:
        return ctx.cast(torch.stack([r.transpose(0, 1) for r in results]))
    tail = query.shape[0] - sum(r.shape[0] for r in results)
    return ctx.cast(torch.cat([*results, torch.full((tail, *query.shape[1:]), math.nan)]))


def _rounded(x: Tensor, name: str) -> Tensor:
    """fp32 -> a quantized dtype: clamped, to nearest, ties to even [hdr IQuantizeLayer; for FP4, to the even code]."""
    x = x.clamp(*_CLAMP[name])
    if name == "FP4":
        grid = torch.tensor(_E2M1)
        middles = (grid[1:] + grid[:-1]) / 2
        magnitude = x.abs()
        below, above = torch.bucketize(magnitude, middles), torch.bucketize(magnitude, middles, right=True)
        # on a middle the two differ by one: the even code wins
        code = torch.where(below % 2 == 0, below, above)
        return grid[code].copysign(x)
    return x.to(_DTYPES[name]) if name == "FP8" else x.round().to(_DTYPES[name])


def _spread(ctx: _Context, scale: Tensor, x: Tensor) -> Tensor:
    """The scale of every element [hdr IQuantizeLayer, IDequantizeLayer].

    One for all, one a channel along the layer's axis, or blocks: scales of x's rank, the block being the ratio of dims.
    """
    layer = ctx.layer
    value = scale.float()
    try:
        declared = tuple(layer.block_shape or ())
    except RuntimeError:  # how 1.7 answers when it isn't set
        declared = ()
    if declared and scale.dim() != x.dim():
        raise ValueError(f"block shape {declared} with scales of shape {tuple(scale.shape)}")
    if scale.numel() == 1:
        return value.reshape(())
    if scale.dim() == 1 and (x.dim() > 1 or layer.axis >= 0):
        axis = layer.axis
        if not 0 <= axis < x.dim() or x.shape[axis] != scale.numel():
            raise ValueError(f"{scale.numel()} scales along axis {axis} of shape {tuple(x.shape)}")
        return value.view([-1 if d == axis else 1 for d in range(x.dim())])
    _same_rank(scale, x)
    for d, (blocks, length) in enumerate(zip(scale.shape, x.shape, strict=True)):
        if length % blocks:
            raise ValueError(f"{blocks} blocks over {length} elements")
        block = length // blocks
        if declared and declared[d] not in (block, -1 if blocks == 1 else block):
            raise ValueError(f"blocks of {block} along {d}, block shape {declared}")
        value = value.repeat_interleave(block, d)
    return value


def _no_zero_point(zero: Tensor | None) -> None:
    if zero is not None and bool(zero.float().any()):
        raise ValueError("only symmetric quantization: the zero point must be 0")


def _quantize(ctx: _Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """[hdr IQuantizeLayer]: clamp(round(x / scale))."""
    _no_zero_point(zero)
    return _rounded(x.float() / _spread(ctx, scale, x), ctx.dtype_name())


def _dequantize(ctx: _Context, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """[hdr IDequantizeLayer]: x * scale."""
    _no_zero_point(zero)
    return ctx.cast(x.float() * _spread(ctx, scale, x))


def _dynamic_quantize(ctx: _Context, x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[hdr IDynamicQuantizeLayer]: blocks along an axis (or of a shape), each scaled by its largest magnitude.

    FP4 with FP8 scales (NVFP4): s = fp8(amax / 6 / global), q = fp4(x / (s * global)). FP8 with E8M0 scales (MXFP8):
    s = 2^ceil(log2(amax / 448)), q = fp8(x / s). How a scale is rounded isn't documented by TensorRT: these are
    ModelOpt's rules (qtensor/nvfp4_tensor.py, mxfp8_tensor.py). A block of zeros gives zeros.
    """
    layer, name, scale_name = ctx.layer, ctx.dtype_name(0), ctx.dtype_name(1)
    shape = tuple(layer.block_shape or ())
    if not shape:
        shape = tuple(layer.block_size if d == layer.axis % x.dim() else 1 for d in range(x.dim()))
    block = [n if s == -1 else s for s, n in zip(shape, x.shape, strict=True)]
    if any(n % s for s, n in zip(block, x.shape, strict=True)):
        raise ValueError(f"blocks {block} over shape {tuple(x.shape)}")
    amax = x.float().abs()
    for d, s in enumerate(block):
        amax = amax.unflatten(d, (-1, s)).amax(d + 1)
    if (name, scale_name) == ("FP4", "FP8"):
        if global_scale is None:
            raise ValueError("NVFP4 without the scale of its scales")
        outer = global_scale.float().reshape(())
        scales = _rounded(amax / 6 / outer, "FP8")
        factor = scales.float() * outer
    elif (name, scale_name) == ("FP8", "E8M0") and global_scale is None:
        exponent = torch.where(amax > 0, (amax / 448).log2().ceil(), torch.full_like(amax, -127.0)).clamp(-127, 127)
        scales = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        factor = torch.exp2(exponent)
    else:
        raise ValueError(f"{name} data with {scale_name} scales")
    for d, s in enumerate(block):
        factor = factor.repeat_interleave(s, d)
    return _rounded(torch.where(factor > 0, x.float() / factor, 0.0), name), scales


def _moe(ctx: _Context, x: Tensor, chosen: Tensor, scores: Tensor, *weights: Tensor) -> Tensor:
    """[hdr IMoELayer]: fc(x) = x * w + b; output_i = fcDown(fcUp(x) * activation(fcGate(x))); sums score_i * output_i.

    Inputs 3 to 5 are the weights of gate, up and down, 6 to 8 their biases. SwiGLU's parameters have no formula there.
    """
    layer = ctx.layer
    if (layer.swiglu_param_limit, layer.swiglu_param_alpha, layer.swiglu_param_beta) != (math.inf, 1.0, 0.0):
        raise ValueError("SwiGLU's parameters aren't described")
    if layer.quantization_to_type.name != "FLOAT" or layer.activation_type.name != "SILU":
        raise ValueError("only plain SiLU experts are interpreted")
    gate, up, down = (w.float()[chosen.long()] for w in weights[:3])  # [B, S, top_k, I, O]
    biases = [b.float()[chosen.long()] for b in weights[3:]] or [0.0, 0.0, 0.0]
    rows = x.float()[:, :, None, None]  # [B, S, 1, 1, H]
    inner = (rows @ gate).squeeze(3) + biases[0]
    inner = functional.silu(inner) * ((rows @ up).squeeze(3) + biases[1])
    outputs = (inner[:, :, :, None] @ down).squeeze(3) + biases[2]
    return ctx.cast((outputs * scores.float()[..., None]).sum(2))


def _dist_collective(ctx: _Context, x: Tensor) -> Tensor:
    """[hdr INetworkDefinition::addDistCollective]: every operation of one rank is the identity.

    The layer's op, root and groups can't be read back: a `collective` has to know them (by name or metadata).
    """
    if ctx.interpreter.collective is not None:
        return ctx.interpreter.collective(ctx.layer, x)
    if ctx.layer.num_ranks != 1:
        raise ValueError(f"{ctx.layer.num_ranks} ranks and no `collective`")
    return x


# LayerType -> (class of the Python API, rule); a rule gets the context and the values of the inputs, None where unset
_LAYERS: dict[str, tuple[str, Callable[..., Tensor | tuple[Tensor, ...]]]] = {
    "CONSTANT": ("IConstantLayer", _constant),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "UNARY": ("IUnaryLayer", _unary),
    "ACTIVATION": ("IActivationLayer", _activation),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matrix_multiply),
    "EINSUM": ("IEinsumLayer", _einsum),
    "SOFTMAX": ("ISoftMaxLayer", _softmax),
    "REDUCE": ("IReduceLayer", _reduce),
    "GATHER": ("IGatherLayer", _gather),
    "SCATTER": ("IScatterLayer", _scatter),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "SELECT": ("ISelectLayer", _select),
    "CAST": ("ICastLayer", _cast),
    "IDENTITY": ("IIdentityLayer", _identity),
    "NORMALIZATION": ("INormalizationLayer", _normalization),
    "FILL": ("IFillLayer", _fill),
    "SHAPE": ("IShapeLayer", _shape),
    "TOPK": ("ITopKLayer", _topk),
    "ONE_HOT": ("IOneHotLayer", _one_hot),
    "CUMULATIVE": ("ICumulativeLayer", _cumulative),
    "NON_ZERO": ("INonZeroLayer", _non_zero),
    "SQUEEZE": ("ISqueezeLayer", _squeeze),
    "UNSQUEEZE": ("IUnsqueezeLayer", _unsqueeze),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotary_embedding),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _kv_cache_update),
    "ATTENTION_INPUT": ("IAttentionInputLayer", _attention_input),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention),
    "QUANTIZE": ("IQuantizeLayer", _quantize),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "DYNAMIC_QUANTIZE": ("IDynamicQuantizeLayer", _dynamic_quantize),
    "MOE": ("IMoELayer", _moe),
    "DIST_COLLECTIVE": ("IDistCollectiveLayer", _dist_collective),
}
