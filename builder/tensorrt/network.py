"""A network under construction: layers by short names, each checked as soon as it is made.

TensorRT reports mistakes in four ways (no layer, no shape, a line in its log, a TypeError), some of them without
stopping the build. `Network` turns the first three into an error with the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trtx.builder.tensorrt.library import Flavor, load, messages, refusal

Value = Any
"""An `ITensor`."""


class Network:
    """A strongly typed `INetworkDefinition`.

    Attributes:
        definition: TensorRT's own.
        constants: values of constant layers by name: TensorRT refers to their memory until the engine is built.
    """

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor
        self.trt = trt = load(flavor)
        self._messages = messages(flavor)
        self._messages.take()
        self.builder = trt.Builder(self._messages.logger)
        self.definition = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.constants: dict[str, Tensor] = {}
        self.dtypes = {
            torch.float32: trt.float32, torch.float16: trt.float16, torch.bfloat16: trt.bfloat16,
            torch.float8_e4m3fn: trt.fp8, torch.int8: trt.int8, torch.int32: trt.int32, torch.int64: trt.int64,
            torch.bool: trt.bool,
        }  # fmt: skip
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}
        self._made: dict[str, Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Put `name` in front of the names of the layers made in the block."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    # Tensors that come from outside.

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """A network input; -1 for sizes that a profile bounds."""
        return self.definition.add_input(name, self.dtypes[dtype], tuple(shape))

    def output(self, value: Value, name: str) -> None:
        """Make a tensor an output of the network."""
        value.name = name
        self.definition.mark_output(value)

    def constant(self, name: str, tensor: Tensor, dtype: Any = None, shape: Sequence[int] | None = None) -> Value:
        """A tensor of weights, made once under its name.

        Args:
            dtype, shape: TensorRT's, where torch has no such dtype (4-bit types: two to a byte).
        """
        if name not in self._made:
            tensor = tensor.contiguous()
            shape = tuple(tensor.shape) if shape is None else tuple(shape)
            self.constants[name] = tensor
            count = torch.Size(shape).numel()
            weights = self.trt.Weights(dtype or self.dtypes[tensor.dtype], tensor.data_ptr(), count)
            self._made[name] = self._checked(self.definition.add_constant(shape, weights), name)
        return self._made[name]

    def once(self, key: str, make: Callable[[], Value]) -> Value:
        """What `make` makes, the first time `key` is asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def number(self, value: float, like: Value) -> Value:
        """A constant with as many dimensions (of 1) as `like`, in its dtype."""
        rank, dtype = len(like.shape), self.dtype_of(like)
        return self.constant(f"number {value!r} {dtype} {rank}", torch.tensor(value, dtype=dtype).reshape((1,) * rank))

    def dtype_of(self, value: Value) -> torch.dtype:
        """torch's name of a tensor's dtype."""
        return next(dtype for dtype, known in self.dtypes.items() if known == value.dtype)

    def bindings(self) -> dict[str, str]:
        """Inputs and outputs: shape (-1: bounded by the profiles) and dtype; those of all layers under one name."""
        definition = self.definition
        tensors = [definition.get_input(index) for index in range(definition.num_inputs)]
        tensors += [definition.get_output(index) for index in range(definition.num_outputs)]
        found: dict[str, str] = {}
        for tensor in tensors:
            name, _, layer = tensor.name.partition(".")
            shape = ", ".join(map(str, tensor.shape))
            found[f"{name}.*" if layer else name] = f"[{shape}] {str(tensor.dtype).rpartition('.')[2].lower()}"
        return found

    # Layers.

    def binary(self, a: Value, b: Value, operation: str) -> Value:
        """An elementwise operation on two tensors of equal rank: SUM, PROD, SUB, DIV, MIN, MAX, LESS, GREATER, …"""
        layer = self.definition.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation))
        return self._finish(layer, operation.lower())

    def unary(self, x: Value, operation: str) -> Value:
        """SQRT, RECIP, NOT, LOG, FLOOR, …"""
        return self._finish(
            self.definition.add_unary(x, getattr(self.trt.UnaryOperation, operation)), operation.lower()
        )

    def activation(self, x: Value, kind: str) -> Value:
        """SIGMOID, TANH, RELU, GELU_ERF, GELU_TANH, …"""
        layer = self.definition.add_activation(x, getattr(self.trt.ActivationType, kind))
        return self._finish(layer, kind.lower())

    def cast(self, x: Value, dtype: torch.dtype) -> Value:
        """x in another dtype; x itself where it has that already."""
        wanted = self.dtypes[dtype]
        return x if x.dtype == wanted else self._finish(self.definition.add_cast(x, wanted), "cast")

    def matmul(self, a: Value, b: Value, transposed: bool = False) -> Value:
        """a @ b, or a @ bᵀ."""
        kinds = self.trt.MatrixOperation
        layer = self.definition.add_matrix_multiply(a, kinds.NONE, b, kinds.TRANSPOSE if transposed else kinds.NONE)
        return self._finish(layer, "matmul")

    def gather(self, x: Value, indices: Value) -> Value:
        """Rows of x."""
        return self._finish(self.definition.add_gather(x, indices, 0), "gather")

    def shape(self, x: Value, sizes: Sequence[int], first: Sequence[int] = (), then: Sequence[int] = ()) -> Value:
        """x transposed by `first`, reshaped to `sizes` (0: as it is, -1: what is left), transposed by `then`."""
        layer = self.definition.add_shuffle(x)
        if first:
            layer.first_transpose = self.trt.Permutation(first)
        if sizes:
            layer.reshape_dims = tuple(sizes)
        if then:
            layer.second_transpose = self.trt.Permutation(then)
        return self._finish(layer, "shuffle")

    def mean(self, x: Value) -> Value:
        """Over the last dimension, which stays as 1."""
        axes = 1 << (len(x.shape) - 1)
        return self._finish(self.definition.add_reduce(x, self.trt.ReduceOperation.AVG, axes, True), "mean")

    def largest_size(self, x: Value) -> Value:
        """The largest magnitude in the last dimension, which stays as 1."""
        axes = 1 << (len(x.shape) - 1)
        sizes = self.unary(x, "ABS")
        return self._finish(self.definition.add_reduce(sizes, self.trt.ReduceOperation.MAX, axes, True), "largest")

    def total(self, x: Value, dimension: int, keep: bool = False) -> Value:
        """The sum over a dimension."""
        layer = self.definition.add_reduce(x, self.trt.ReduceOperation.SUM, 1 << dimension, keep)
        return self._finish(layer, "total")

    def largest(self, x: Value, count: int) -> tuple[Value, Value]:
        """The largest entries of the last dimension, in falling order, and their indices (int32)."""
        layer = self.definition.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << (len(x.shape) - 1))
        return self._finish(layer, "topk"), layer.get_output(1)

    def columns(self, x: Value, start: int, count: int) -> Value:
        """`count` entries of the last dimension, whose size is static, from `start` on."""
        rank = len(x.shape)
        layer = self.definition.add_slice(x, (0,) * (rank - 1) + (start,), (1,) * rank, (1,) * rank)
        sizes = self._finish(self.definition.add_shape(x), "shape")
        ones = [1] * (rank - 1)
        keep = self.constant(f"columns keep {rank}", torch.tensor([*ones, 0]))
        width = self.constant(f"columns width {rank} {count}", torch.tensor([*[0] * (rank - 1), count]))
        layer.set_input(2, self.binary(self.binary(sizes, keep, "PROD"), width, "SUM"))
        return self._finish(layer, "slice")

    def concatenate(self, parts: Sequence[Value]) -> Value:
        """Side by side along the last dimension."""
        layer = self.definition.add_concatenation(list(parts))
        layer.axis = len(parts[0].shape) - 1
        return self._finish(layer, "concatenation")

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """yes where the condition holds, else no."""
        return self._finish(self.definition.add_select(condition, yes, no), "select")

    def softmax(self, x: Value) -> Value:
        """Over the last dimension."""
        layer = self.definition.add_softmax(x)
        layer.axes = 1 << (len(x.shape) - 1)
        return self._finish(layer, "softmax")

    def rotary(self, x: Value, cos: Value, sin: Value, ids: Value, dim: int) -> Value:
        """Rotate halves of the first `dim` features of x [1, N, T, D]; tables [positions, dim / 2], ids [1, T]."""
        layer = self.definition.add_rotary_embedding(x, cos, sin, False, dim)
        layer.set_input(3, ids)
        return self._finish(layer, "rotary")

    def update_cache(self, cache: Value, rows: Value, at: Value, starts: Value) -> Value:
        """Write packed rows [T, N, D] into a cache [B, N, S, D], sequence b's from position at[b] on.

        Args:
            starts: [B + 1], where each sequence's rows begin in T, and T.
        """
        layer = self.definition.add_kv_cache_update(cache, rows, at, self.trt.KVCacheMode.LINEAR)
        layer.update_form = self.trt.AttentionIOForm.PACKED_NHD
        layer.update_lengths = starts
        return self._finish(layer, "kv_cache_update")

    def attention(
        self, q: Value, k: Value, v: Value, lengths: Value, mask: Value | None = None, step: Value | None = None
    ) -> Value:
        """Scaled queries [B, N, Q, D] on keys and values [B, M, S, D]: causal, rows at the end, or as `mask` says.

        Args:
            lengths: [B] int32, keys that count.
            mask: [B or 1, N or 1, Q, S]: bool (true: attend) or added.
            step: if given, probabilities are rounded to E4M3 with this scale.
        """
        kinds = self.trt.CausalMaskKind
        kind = kinds.LOWER_RIGHT if mask is None else kinds.NONE
        layer = self.definition.add_attention_v2(q, k, v, self.trt.AttentionNormalizationOp.SOFTMAX, kind)
        if layer is not None:
            layer.decomposable = True
            layer.key_value_lengths = lengths
            if mask is not None:
                layer.mask = mask
            if step is not None:
                layer.normalization_quantize_to_type = self.trt.fp8
                layer.normalization_quantize_scale = step
        return self._finish(layer, "attention")

    def experts(
        self, x: Value, chosen: Value, scores: Value, weights: Sequence[Value], biases: Sequence[Value]
    ) -> Value:
        """Gated SiLU experts: each token's top ones weighted by its scores and summed.

        Args:
            x: [B, S, H].
            chosen: [B, S, top_k] int32.
            scores: [B, S, top_k] in x's dtype.
            weights: of gate and up [experts, H, I], of down [experts, I, H].
            biases: [experts, I] twice and [experts, H], or none.
        """
        layer = self.definition.add_moe(x, chosen, scores)
        if layer is not None:
            layer.set_gated_weights(*weights, self.trt.MoEActType.SILU)
            if biases:
                layer.set_gated_biases(*biases)
        return self._finish(layer, "moe")

    def collective(self, x: Value, operation: str, ranks: int) -> Value:
        """ALL_REDUCE: the sum over ranks 0 … ranks - 1; ALL_GATHER: what they hold, along the first dimension."""
        trt, kinds = self.trt, self.trt.ReduceOperation
        kind = kinds.SUM if operation == "ALL_REDUCE" else kinds.NONE
        groups = list(range(ranks))
        layer = self.definition.add_dist_collective(x, getattr(trt.CollectiveOperation, operation), kind, -1, groups)
        if layer is not None:
            layer.num_ranks = ranks
            layer.metadata = f"{operation} {groups}"  # neither can be read back
        return self._finish(layer, operation.lower())

    def quantize(self, x: Value, scale: Value, dtype: torch.dtype, axis: int | None = None) -> Value:
        """x / scale, rounded and cut to a type."""
        layer = self.definition.add_quantize(x, scale, self.dtypes[dtype])
        if axis is not None:
            layer.axis = axis
        return self._finish(layer, "quantize")

    def dequantize(self, x: Value, scale: Value, dtype: torch.dtype, axis: int | None = None) -> Value:
        """x * scale; one scale, one for each index of `axis`, or one for each block."""
        layer = self.definition.add_dequantize(x, scale, self.dtypes[dtype])
        if axis is not None:
            layer.axis = axis
        return self._finish(layer, "dequantize")

    def quantize_blocks(self, x: Value, scale: Value) -> tuple[Value, Value]:
        """x in FP4 with E4M3 scales for each 16 of the last dimension, these relative to the given one."""
        trt = self.trt
        layer = self.definition.add_dynamic_quantize(x, len(x.shape) - 1, 16, trt.fp4, trt.fp8)
        if layer is not None:
            layer.set_input(1, scale)
        first = self._finish(layer, "dynamic_quantize")
        return first, layer.get_output(1)

    def quantize_powers(self, x: Value) -> tuple[Value, Value]:
        """x in E4M3 with power-of-two scales (E8M0) for each 32 of the last dimension."""
        trt = self.trt
        layer = self.definition.add_dynamic_quantize(x, len(x.shape) - 1, 32, trt.fp8, trt.e8m0)
        return self._finish(layer, "dynamic_quantize"), layer.get_output(1)

    def _finish(self, layer: Any, kind: str) -> Value:
        """Name a layer after its place and kind, and return its output."""
        name = "/".join([*self._scope, kind])
        number = self._counts[name] = self._counts.get(name, -1) + 1
        return self._checked(layer, f"{name}#{number}" if number else name)

    def _checked(self, layer: Any, name: str) -> Value:
        """Name a layer, make sure that TensorRT took it, and return its output."""
        if layer is None:
            raise refusal(name, self._messages.take())
        layer.name = name
        value = layer.get_output(0)
        try:
            tuple(value.shape)
        except RuntimeError:
            raise refusal(name, self._messages.take()) from None
        if errors := self._messages.take():
            raise refusal(name, errors)
        return value
