"""The interpreter of TensorRT networks against onnxruntime (the network comes from TensorRT's own ONNX parser) and, for
what ONNX can't say, against the documented formula written another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tensorrt.interpreter import _LAYERS, Interpreter, InterpreterError, evaluate

trt = pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402


class _Log(trt.ILogger):
    """Collects TensorRT's errors, less those about the missing driver."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR and "catchCudaError" not in msg:
            self.errors.append(msg)


LOG = _Log()
BUILDER = trt.Builder(LOG)
STRONG = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
NONE, SOFTMAX = trt.AttentionNormalizationOp.NONE, trt.AttentionNormalizationOp.SOFTMAX
PACKED = trt.AttentionIOForm.PACKED_NHD
TRT_DTYPES = {
    torch.float32: trt.float32,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.int8: trt.int8,
    torch.int32: trt.int32,
    torch.int64: trt.int64,
    torch.bool: trt.bool,
    torch.float8_e4m3fn: trt.fp8,
}


# ---- ONNX snippets ----


@dataclass(frozen=True)
class X:
    """An input: a shape such as "b=2 s=3 8" (named dimensions are dynamic), its values drawn by `make` or given."""

    shape: str = "b=2 s=3 8"
    make: Callable[[tuple[int, ...], np.random.Generator], np.ndarray] | np.ndarray | None = None

    def dims(self) -> list[int | str]:
        return [d.split("=")[0] if "=" in d else int(d) for d in self.shape.split()]

    def values(self, dtype: Any, rng: np.random.Generator) -> np.ndarray:
        shape = tuple(int(d.split("=")[-1]) for d in self.shape.split())
        if isinstance(self.make, np.ndarray):
            assert self.make.shape == shape
            return self.make
        drawn = rng.standard_normal(shape) if self.make is None else self.make(shape, rng)
        return drawn.astype(dtype) if np.issubdtype(drawn.dtype, np.floating) else drawn


@dataclass(frozen=True)
class Snippet:
    """An ONNX node, and the kind of layer that TensorRT's parser must make of it (among others)."""

    kind: str
    op: str
    inputs: dict[str, X] = field(default_factory=lambda: {"x": X()})
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    order: tuple[str, ...] | None = None  # node inputs; default: inputs, then constants
    opset: int = 23
    label: str = ""

    def nodes(self) -> list[Any]:
        names = self.order if self.order is not None else (*self.inputs, *self.constants)
        return [helper.make_node(self.op, list(names), list(self.outputs), name="node", **self.attributes)]

    def __str__(self) -> str:
        return f"{self.kind}-{self.op}-{self.label}" if self.label else f"{self.kind}-{self.op}"


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def uniform(low: float, high: float) -> Callable[[tuple[int, ...], np.random.Generator], np.ndarray]:
    return lambda shape, rng: rng.uniform(low, high, shape)


def integers(
    low: int, high: int, dtype: Any = np.int64
) -> Callable[[tuple[int, ...], np.random.Generator], np.ndarray]:
    return lambda shape, rng: rng.integers(low, high, shape).astype(dtype)


def booleans(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, shape).astype(bool)


def halves(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Multiples of 1/4, so that ties between roundings occur."""
    return rng.integers(-40, 40, shape) / 4


def odd(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Infinities and NaNs among numbers."""
    return rng.choice(np.array([np.inf, -np.inf, np.nan, 0.0, 1.5]), shape)


def two(make: Any = None, other: str = "b=2 1 8") -> dict[str, X]:
    return {"x": X(make=make), "z": X(other, make)}


UNARY = [
    *[
        Snippet("UNARY", op)
        for op in ("Exp", "Abs", "Neg", "Sin", "Cos", "Sinh", "Cosh", "Atan", "Asinh", "Erf", "Sign")
    ],
    *[Snippet("UNARY", op, {"x": X(make=uniform(0.1, 4))}) for op in ("Log", "Sqrt", "Reciprocal")],
    *[Snippet("UNARY", op, {"x": X(make=uniform(-0.9, 0.9))}) for op in ("Asin", "Acos", "Atanh", "Tan")],
    Snippet("UNARY", "Acosh", {"x": X(make=uniform(1.1, 4))}),
    *[Snippet("UNARY", op, {"x": X(make=halves)}) for op in ("Ceil", "Floor", "Round")],
    *[Snippet("UNARY", op, {"x": X(make=odd)}) for op in ("IsNaN", "IsInf")],
    Snippet("UNARY", "Not", {"x": X(make=booleans)}),
    Snippet("UNARY", "Neg", {"x": X(make=integers(-9, 9))}, label="int"),
    Snippet("UNARY", "Abs", {"x": X(make=integers(-9, 9))}, label="int"),
]
ELEMENTWISE = [
    *[Snippet("ELEMENTWISE", op, two()) for op in ("Add", "Mul", "Sub", "Max", "Min", "Greater", "Less")],
    Snippet("ELEMENTWISE", "Div", two(uniform(0.5, 3))),
    Snippet("ELEMENTWISE", "Pow", two(uniform(0.5, 3))),
    *[Snippet("ELEMENTWISE", op, two(booleans)) for op in ("And", "Or", "Xor")],
    *[
        Snippet("ELEMENTWISE", op, two(integers(-3, 3)), label="int")
        for op in ("Add", "Mul", "Sub", "Max", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
    ],
    Snippet("ELEMENTWISE", "Div", {"x": X(make=integers(-9, 9)), "z": X("b=2 1 8", integers(2, 5))}, label="int"),
    Snippet("ELEMENTWISE", "Mod", {"x": X(make=integers(-9, 9)), "z": X("b=2 1 8", integers(2, 5))}, label="floor_div"),
]
ACTIVATION = [
    *[Snippet("ACTIVATION", op) for op in ("Relu", "Sigmoid", "Tanh", "Softsign", "Softplus", "Gelu")],
    Snippet("ACTIVATION", "Gelu", attributes={"approximate": "tanh"}, label="tanh"),
    Snippet("ACTIVATION", "LeakyRelu", attributes={"alpha": 0.3}),
    Snippet("ACTIVATION", "Elu", attributes={"alpha": 0.7}),
    Snippet("ACTIVATION", "Selu", attributes={"alpha": 1.5, "gamma": 1.2}),
    Snippet("ACTIVATION", "HardSigmoid", attributes={"alpha": 0.4, "beta": 0.3}),
    Snippet("ACTIVATION", "ThresholdedRelu", attributes={"alpha": 0.4}),
    Snippet("ACTIVATION", "Clip", {"x": X()}, {"low": np.array(-0.5, np.float32), "high": np.array(0.7, np.float32)}),
]
PRODUCTS = [
    Snippet("MATRIX_MULTIPLY", "MatMul", {"x": X("b=2 s=3 8"), "z": X("b=2 8 5")}),
    Snippet("MATRIX_MULTIPLY", "MatMul", {"x": X("b=2 4 s=3 8"), "z": X("8 5")}, label="broadcast"),
    Snippet("MATRIX_MULTIPLY", "MatMul", {"x": X("b=2 s=3 8"), "z": X("8")}, label="vector"),
    Snippet("MATRIX_MULTIPLY", "MatMul", {"x": X("8"), "z": X("8 e=5")}, label="row"),
    Snippet("MATRIX_MULTIPLY", "Gemm", {"x": X("8 b=3"), "z": X("5 8")}, attributes={"transA": 1, "transB": 1}),
    *[
        Snippet("EINSUM", "Einsum", inputs, attributes={"equation": equation}, label=equation)
        for equation, inputs in (
            ("bhsd,bhtd->bhst", {"x": X("b=2 3 s=4 8"), "z": X("b=2 3 t=5 8")}),
            ("bsd,de->bse", {"x": X(), "z": X("8 5")}),
            ("ij,jk", {"x": X("i=3 4"), "z": X("4 k=2")}),
            ("b...d,ed->b...e", {"x": X("b=2 3 s=4 8"), "z": X("5 8")}),
        )
    ],
    Snippet("SOFTMAX", "Softmax", attributes={"axis": -1}),
    Snippet("SOFTMAX", "Softmax", attributes={"axis": 1}, label="middle"),
]
REDUCE = [
    Snippet("REDUCE", op, constants={"axes": ints(*axes)}, attributes={"keepdims": keep}, label=f"{axes}-{keep}")
    for op in ("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean")
    for axes, keep in (((-1,), 1), ((0, 2), 0))
]
INDEXING = [
    Snippet("GATHER", "Gather", {"x": X("t=9 8"), "i": X("b=2 s=3", integers(0, 9))}, attributes={"axis": 0}),
    Snippet(
        "GATHER",
        "Gather",
        {"x": X("b=2 9 8"), "i": X("n=3", integers(-9, 9))},
        attributes={"axis": 1},
        label="negative",
    ),
    Snippet("GATHER", "Gather", {"x": X("b=2 9 8")}, {"i": np.array(-2)}, {"axis": 2}, label="scalar"),
    Snippet("GATHER", "GatherElements", {"x": X("b=2 9"), "i": X("b=2 n=4", integers(-9, 9))}, attributes={"axis": 1}),
    Snippet("GATHER", "GatherND", {"x": X("4 5 d=3"), "i": X("n=6 2", integers(-4, 4))}),
    Snippet(
        "GATHER",
        "GatherND",
        {"x": X("b=3 5 d=4"), "i": X("b=3 n=2 1", integers(0, 5))},
        attributes={"batch_dims": 1},
        label="batch",
    ),
    Snippet(
        "SCATTER",
        "ScatterND",
        {"x": X("t=6 d=4"), "i": X("3 1", ints(4, 0, -3).reshape(3, 1)), "u": X("3 d=4")},
    ),
    Snippet(
        "SCATTER",
        "ScatterElements",
        {"x": X("2 6"), "i": X("2 3", ints(4, 0, 2, 1, 5, -2).reshape(2, 3)), "u": X("2 3")},
        attributes={"axis": 1},
    ),
    Snippet("TOPK", "TopK", {"x": X("b=3 8")}, {"k": ints(3)}, outputs=("y", "i")),
    Snippet(
        "TOPK", "TopK", {"x": X("b=3 8 2")}, {"k": ints(3)}, {"axis": 1, "largest": 0}, ("y", "i"), label="smallest"
    ),
    Snippet("TOPK", "TopK", {"x": X("b=3 8", halves)}, {"k": ints(8)}, outputs=("y", "i"), label="ties"),
    Snippet(
        "ONE_HOT",
        "OneHot",
        {"i": X("b=2 s=3", integers(0, 5)), "v": X("2", np.array([0.5, 2.0], np.float32))},
        {"n": np.array(5)},
        {"axis": 1},
        order=("i", "n", "v"),
    ),
    *[
        Snippet(
            "CUMULATIVE",
            "CumSum",
            constants={"a": np.array(1)},
            attributes={"exclusive": e, "reverse": r},
            label=f"{e}{r}",
        )
        for e in (0, 1)
        for r in (0, 1)
    ],
]
SHAPES = [
    Snippet("SHUFFLE", "Reshape", {"x": X("b=2 s=3 8")}, {"d": ints(0, -1, 2, 4)}, label="zero"),
    Snippet("SHUFFLE", "Reshape", {"x": X("b=2 s=3 8"), "d": X("2", ints(-1, 4))}, label="dynamic"),
    Snippet("SHUFFLE", "Transpose", {"x": X("b=2 s=3 4 5")}, attributes={"perm": [2, 0, 3, 1]}),
    Snippet("SHUFFLE", "Flatten", {"x": X("b=2 3 4 5")}, attributes={"axis": 2}),
    Snippet("SQUEEZE", "Squeeze", {"x": X("b=2 1 s=3 1")}, {"a": ints(1, -1)}),
    Snippet("UNSQUEEZE", "Unsqueeze", {"x": X("b=2 s=3")}, {"a": ints(0, -1)}),
    Snippet(
        "SLICE", "Slice", {"x": X("b=4 9 6")}, {"s": ints(1, -2), "e": ints(8, -7), "a": ints(1, 2), "t": ints(3, -1)}
    ),
    Snippet(
        "SLICE",
        "Slice",
        {"x": X("b=4 s=9"), "s": X("1", ints(2)), "e": X("1", ints(7)), "a": X("1", ints(1)), "t": X("1", ints(2))},
        label="dynamic",
    ),
    *[
        Snippet("SLICE", "Pad", {"x": X("3 4")}, {"p": ints(1, 2, 0, 3), **extra}, {"mode": mode}, label=mode)
        for mode, extra in (("constant", {"v": np.array(1.5, np.float32)}), ("edge", {}), ("reflect", {}), ("wrap", {}))
    ],
    Snippet("SLICE", "Expand", {"x": X("b=2 1 4"), "d": X("3", ints(1, 3, 1))}),
    Snippet("SLICE", "Tile", {"x": X("b=2 3 4")}, {"r": ints(2, 1, 3)}),
    Snippet("CONCATENATION", "Concat", {"x": X("b=2 s=3 8"), "z": X("b=2 t=4 8")}, attributes={"axis": 1}),
    Snippet("SELECT", "Where", {"c": X("b=2 s=3 1", booleans), "x": X(), "z": X("1 1 8")}),
    Snippet("IDENTITY", "Identity", {"x": X("b=2 s=3")}),
    Snippet("SHAPE", "Shape", {"x": X("b=2 s=3 8")}),
    Snippet("FILL", "Range", {"a": X("", np.array(3)), "z": X("", np.array(17)), "d": X("", np.array(4))}),
    Snippet(
        "FILL",
        "Range",
        {},
        {"a": np.array(-1, np.float32), "z": np.array(2, np.float32), "d": np.array(0.25, np.float32)},
        label="float",
    ),
    *[
        Snippet("CAST", "Cast", {"x": X(make=make)}, attributes={"to": to}, label=label)
        for label, make, to in (
            ("float-int", halves, TensorProto.INT32),
            ("float-bool", integers(-1, 2, np.float32), TensorProto.BOOL),
            ("int-float", integers(-9, 9), TensorProto.FLOAT16),
            ("half", None, TensorProto.FLOAT16),
            ("bool-float", booleans, TensorProto.FLOAT),
        )
    ],
    Snippet(
        "NORMALIZATION",
        "LayerNormalization",
        {"x": X("b=2 s=3 8"), "w": X("8"), "b": X("8")},
        attributes={"epsilon": 0.1},
    ),
    Snippet(
        "NORMALIZATION", "LayerNormalization", {"x": X("b=2 3 8"), "w": X("3 8")}, attributes={"axis": 1}, label="axes"
    ),
]
HEADS = {"q": X("b=2 4 s=3 8"), "k": X("b=2 2 t=5 8"), "v": X("b=2 2 t=5 8")}
EQUAL = {"q": X("b=2 4 s=3 8"), "k": X("b=2 2 s=3 8"), "v": X("b=2 2 s=3 8")}
ATTENTION = [
    Snippet("ATTENTION_OUTPUT", "Attention", HEADS, label="plain"),
    Snippet("ATTENTION_OUTPUT", "Attention", EQUAL, attributes={"is_causal": 1}, label="causal"),
    Snippet("ATTENTION_OUTPUT", "Attention", HEADS, attributes={"is_causal": 1}, label="causal-longer"),
    Snippet(
        "ATTENTION_OUTPUT",
        "Attention",
        HEADS | {"m": X("1 4 s=3 t=5", booleans)},
        attributes={"scale": 0.7},
        label="bool",
    ),
    Snippet("ATTENTION_OUTPUT", "Attention", HEADS | {"m": X("b=2 1 s=3 t=5")}, label="additive"),
    *[
        Snippet(
            "ROTARY_EMBEDDING",
            "RotaryEmbedding",
            {"x": X("b=2 4 s=3 8"), "c": X(table), "n": X(table), **ids},
            attributes={"interleaved": interleaved, "rotary_embedding_dim": rotary},
            label=label,
        )
        for label, table, ids, interleaved, rotary in (
            ("halves", "9 4", {"p": X("b=2 s=3", integers(0, 9))}, 0, 0),
            ("pairs", "9 4", {"p": X("b=2 s=3", integers(0, 9))}, 1, 0),
            ("tables", "b=2 s=3 4", {}, 0, 0),
            ("partial", "b=2 s=3 2", {}, 0, 4),
            ("partial-pairs", "9 2", {"p": X("b=2 s=3", integers(0, 9))}, 1, 4),
        )
    ],
    Snippet(
        "KV_CACHE_UPDATE",
        "TensorScatter",
        {"c": X("b=2 4 9 8"), "u": X("b=2 4 s=3 8"), "w": X("b=2", ints(5, 0))},
        attributes={"axis": 2},
        opset=24,
    ),
]
SNIPPETS = [*UNARY, *ELEMENTWISE, *ACTIVATION, *PRODUCTS, *REDUCE, *INDEXING, *SHAPES, *ATTENTION]
FLOATS = (np.float32, np.float16)
PARSERS: list[Any] = []  # a parser owns the constants of its network


def onnx_model(
    nodes: Sequence[Any],
    feeds: dict[str, np.ndarray],
    dims: dict[str, list[Any]],
    constants: dict[str, Any],
    outputs: Sequence[str],
    opset: int,
) -> Any:
    as_type = helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        list(nodes),
        "snippet",
        [helper.make_tensor_value_info(n, as_type(v.dtype), dims[n]) for n, v in feeds.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [onnx.numpy_helper.from_array(v, n) if isinstance(v, np.ndarray) else v for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    return onnx.shape_inference.infer_shapes(model)


def run_onnx(model: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """onnxruntime without its optimizer, which replaces some of the Q/DQ arithmetic by other arithmetic."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def parse(model: Any) -> Any:
    network = BUILDER.create_network(STRONG)
    parser = trt.OnnxParser(network, LOG)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    PARSERS.append(parser)
    return network


def kinds(network: Any) -> set[str]:
    return {trt.ILayer.type.fget(network.get_layer(i)).name for i in range(network.num_layers)}


def assert_close(mine: Tensor, theirs: np.ndarray) -> None:
    expected = torch.from_numpy(np.ascontiguousarray(theirs))
    assert mine.dtype == expected.dtype
    if mine.dtype == torch.float16:
        torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3, equal_nan=True)
    else:
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


def floating(snippet: Snippet) -> bool:
    made = [x.values(np.float16, np.random.default_rng(0)).dtype for x in snippet.inputs.values()]
    return np.dtype(np.float16) in made and all(v.dtype != np.float32 for v in snippet.constants.values())


CASES = [pytest.param(s, t, id=f"{s}-{t.__name__}") for s in SNIPPETS for t in FLOATS if t is np.float32 or floating(s)]


@pytest.mark.parametrize(("snippet", "dtype"), CASES)
def test_onnx_snippet(snippet: Snippet, dtype: Any) -> None:
    rng = np.random.default_rng(len(str(snippet)))
    feeds = {name: x.values(dtype, rng) for name, x in snippet.inputs.items()}
    dims = {name: x.dims() for name, x in snippet.inputs.items()}
    model = onnx_model(snippet.nodes(), feeds, dims, snippet.constants, snippet.outputs, snippet.opset)
    expected = run_onnx(model, feeds)
    network = parse(model)
    assert snippet.kind in kinds(network)
    results = evaluate(network, {}, {name: torch.from_numpy(v) for name, v in feeds.items()})
    for name, theirs in zip(snippet.outputs, expected, strict=True):
        assert_close(results[name], theirs)


def adopt(codes: Tensor, element: int, name: str) -> Any:
    """An initializer of a type that numpy hasn't, from its bytes (INT4: two values a byte)."""
    shape = [*codes.shape[:-1], codes.shape[-1] * (2 if element == TensorProto.INT4 else 1)]
    return helper.make_tensor(name, element, shape, codes.numpy().tobytes(), raw=True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", ["INT8", "FLOAT8E4M3FN"])
def test_quantized_activations(target: str, dtype: Any) -> None:
    """Per tensor: x -> QuantizeLinear -> DequantizeLinear, with values past the range and on ties."""
    element = getattr(TensorProto, target)
    x = (np.random.default_rng(0).integers(-70, 70, (3, 16)) * 4.25).astype(dtype)
    x[0, :3] = 2000.0, -2000.0, 0.0
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=element),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": x}, {"x": ["b", 16]}, {"s": np.array(0.5, dtype)}, ["y"], 23)
    (expected,) = run_onnx(model, {"x": x})
    network = parse(model)
    assert {"QUANTIZE", "DEQUANTIZE"} <= kinds(network)
    assert_close(evaluate(network, {}, {"x": torch.from_numpy(x)})["y"], expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("target", ["INT8", "FLOAT8E4M3FN", "INT4"])
def test_quantized_weights(target: str, axis: int) -> None:
    """Per channel or, for INT4, in blocks of 4; FP8 and INT4 constants can only be had from the table."""
    element = getattr(TensorProto, target)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    codes = torch.from_numpy(rng.integers(0, 255, (8, 8 if target != "INT4" else 4)).astype(np.uint8))
    if target == "FLOAT8E4M3FN":
        codes[(codes & 127) == 127] = 0  # NaN
    scales = rng.uniform(0.5, 2, (8,) if target != "INT4" else (8, 2) if axis else (2, 8)).astype(np.float32)
    attributes = {"axis": axis} | ({"block_size": 4} if target == "INT4" else {})
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dequantize", **attributes),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="multiply"),
    ]
    model = onnx_model(nodes, {"x": x}, {"x": ["b", 8]}, {"w": adopt(codes, element, "w"), "s": scales}, ["y"], 23)
    (expected,) = run_onnx(model, {"x": x})
    network = parse(model)
    assert "DEQUANTIZE" in kinds(network)
    table = {"w": codes.view(torch.int8) if target == "INT8" else codes}
    assert_close(evaluate(network, table, {"x": torch.from_numpy(x)})["y"], expected)


# ---- networks built by hand ----


class Net:
    """A network under construction; every layer's result must have a shape that TensorRT could infer."""

    def __init__(self) -> None:
        self.network = BUILDER.create_network(STRONG)
        self.inputs: dict[str, Tensor] = {}
        self.kept: list[Tensor] = []

    def input(self, name: str, value: Tensor, shape: tuple[int, ...] | None = None) -> Any:
        """Of the value's shape, all dimensions dynamic unless `shape` says otherwise."""
        self.inputs[name] = value
        return self.network.add_input(name, TRT_DTYPES[value.dtype], shape or (-1,) * value.dim())

    def constant(self, value: Tensor, dtype: Any = None, shape: tuple[int, ...] | None = None, name: str = "") -> Any:
        self.kept.append(value)
        shape = tuple(value.shape) if shape is None else shape
        held = trt.Weights(dtype or TRT_DTYPES[value.dtype], value.data_ptr(), math.prod(shape))
        layer = self.network.add_constant(shape, held)
        if name:
            layer.name = name
        return layer.get_output(0)

    def run(self, *tensors: Any, weights: dict[str, Tensor] | None = None, collective: Any = None) -> list[Tensor]:
        for i, tensor in enumerate(tensors):
            try:
                tensor.shape  # noqa: B018
            except RuntimeError as error:
                raise AssertionError(LOG.errors[-1:]) from error
            tensor.name = f"result{i}"
            self.network.mark_output(tensor)
        results = evaluate(self.network, weights or {}, self.inputs, collective)
        return [results[f"result{i}"] for i in range(len(tensors))]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Unscaled attention by torch, [B, N, S, D], query heads grouped over key heads."""
    mask = bias if bias is not None else allowed
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=True)


def attention(net: Net, q: Tensor, k: Tensor, v: Tensor, causal: str = "NONE", norm: Any = SOFTMAX) -> Any:
    operands = [net.input(name, value, (-1, *value.shape[1:])) for name, value in (("q", q), ("k", k), ("v", v))]
    layer = net.network.add_attention_v2(*operands, norm, getattr(trt.CausalMaskKind, causal))
    layer.decomposable = True
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"])
@pytest.mark.parametrize("lengths", [None, (7, 4)])
def test_attention_over_a_cache(causal: str, lengths: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """3 new queries, 7 cached keys of which the second sequence uses 4: the position of query i is length - 3 + i."""
    q, k, v = (
        rand(2, 4, 3, 8, dtype=dtype),
        rand(2, 2, 7, 8, seed=1, dtype=dtype),
        rand(2, 2, 7, 8, seed=2, dtype=dtype),
    )
    net = Net()
    layer = attention(net, q, k, v, causal)
    if lengths:
        layer.key_value_lengths = net.input("n", torch.tensor(lengths, dtype=torch.int32))
    (mine,) = net.run(layer.get_output(0))
    allowed = torch.zeros(2, 1, 3, 7, dtype=torch.bool)
    for b, length in enumerate(lengths or (7, 7)):
        for i in range(3):
            last = {"NONE": length - 1, "UPPER_LEFT": i, "LOWER_RIGHT": length - 3 + i}[causal]
            allowed[b, 0, i, : min(last + 1, length)] = True
    expected = sdpa(q.double(), k.double(), v.double(), allowed).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def test_attention_over_a_cache_as_onnx_defines_it() -> None:
    """nonpad_kv_seqlen of ONNX 24: is_causal aligned per sequence. TensorRT's parser drops it: the network is ours."""
    q, k, v = rand(3, 4, 2, 8), rand(3, 2, 9, 8, seed=1), rand(3, 2, 9, 8, seed=2)
    n = torch.tensor([9, 2, 5])
    net = Net()
    layer = attention(net, q, k, v, "LOWER_RIGHT")
    layer.key_value_lengths = net.input("n", n.int())
    (mine,) = net.run(layer.get_output(0))
    node = helper.make_node("Attention", ["q", "k", "v", "", "", "", "n"], ["y"], is_causal=1, scale=1.0)
    feeds = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "n": n.numpy()}
    model = onnx_model([node], feeds, {name: list(value.shape) for name, value in feeds.items()}, {}, ["y"], 24)
    assert_close(mine, run_onnx(model, feeds)[0])


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_attention_mask_with_lengths(kind: str) -> None:
    q, k, v = rand(2, 4, 3, 8), rand(2, 2, 5, 8, seed=1), rand(2, 2, 5, 8, seed=2)
    allowed = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    allowed[..., 0] = True
    bias = rand(1, 4, 3, 5, seed=4)
    net = Net()
    layer = attention(net, q, k, v)
    layer.mask = net.input("m", allowed if kind == "bool" else bias)
    layer.key_value_lengths = net.input("n", torch.tensor([5, 2], dtype=torch.int32))
    (mine,) = net.run(layer.get_output(0))
    within = (torch.arange(5) < torch.tensor([5, 2])[:, None])[:, None, None]
    if kind == "bool":
        expected = sdpa(q, k, v, allowed & within)
    else:
        expected = sdpa(q, k, v, bias=bias.masked_fill(~within, -math.inf))
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", ["NONE", "UPPER_LEFT", "LOWER_RIGHT"])
@pytest.mark.parametrize("packed_keys", [False, True])
def test_packed_attention(packed_keys: bool, causal: str) -> None:
    """Sequences of 2, 1 and 4 queries over 5, 3 and 4 keys; one row of padding at the end is undefined."""
    counts, keys = (2, 1, 4), (5, 3, 4)
    q = rand(8, 4, 8)
    k, v = (rand(3, 2, 6, 8, seed=s) for s in (1, 2))
    net = Net()
    if packed_keys:
        held = [torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(keys)]) for t in (k, v)]
    else:
        held = [k, v]
    layer = attention(net, q, *held, causal)
    layer.query_form = PACKED
    layer.query_lengths = net.input("nq", torch.tensor([0, 2, 3, 7], dtype=torch.int32))
    if packed_keys:
        layer.key_value_form = PACKED
        layer.key_value_lengths = net.input("nk", torch.tensor([0, 5, 8, 12], dtype=torch.int32))
    else:
        layer.key_value_lengths = net.input("nk", torch.tensor(keys, dtype=torch.int32))
    (mine,) = net.run(layer.get_output(0))
    row = 0
    for b, (count, length) in enumerate(zip(counts, keys, strict=True)):
        query = q[row : row + count].transpose(0, 1)[None]
        i, j = torch.arange(count)[:, None], torch.arange(length)
        allowed = {"NONE": j >= 0, "UPPER_LEFT": j <= i, "LOWER_RIGHT": j <= i + length - count}[causal].expand(
            count, length
        )
        expected = sdpa(query, k[b : b + 1, :, :length], v[b : b + 1, :, :length], allowed)[0].transpose(0, 1)
        torch.testing.assert_close(mine[row : row + count], expected, rtol=1e-5, atol=1e-6)
        row += count
    assert mine[row:].isnan().all()


def test_attention_without_normalization() -> None:
    q, k, v = rand(2, 4, 3, 8), rand(2, 2, 5, 8, seed=1), rand(2, 2, 5, 8, seed=2)
    net = Net()
    (mine,) = net.run(attention(net, q, k, v, norm=NONE).get_output(0))
    expected = (q @ k.repeat_interleave(2, 1).mT) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["fp8", "int8"])
def test_attention_with_quantized_probabilities(target: str) -> None:
    q, k, v = rand(1, 2, 3, 8), rand(1, 2, 5, 8, seed=1), rand(1, 2, 5, 8, seed=2)
    net = Net()
    layer = attention(net, q, k, v)
    layer.normalization_quantize_to_type = getattr(trt, target)
    layer.normalization_quantize_scale = net.constant(torch.tensor(1 / 64))
    (mine,) = net.run(layer.get_output(0))
    weights = (q @ k.mT).softmax(-1) * 64
    weights = weights.to(torch.float8_e4m3fn).float() if target == "fp8" else weights.round()
    torch.testing.assert_close(mine, weights / 64 @ v, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mine, (q @ k.mT).softmax(-1) @ v, rtol=1e-3)


def test_a_query_that_sees_nothing_is_undefined() -> None:
    q, k, v = rand(1, 1, 3, 8), rand(1, 1, 2, 8, seed=1), rand(1, 1, 2, 8, seed=2)
    net = Net()
    (mine,) = net.run(attention(net, q, k, v, "LOWER_RIGHT").get_output(0))
    assert mine[0, 0].isnan().any(-1).tolist() == [True, False, False]


def test_prefill_and_decode_equal_one_pass() -> None:
    """KV cache updates and LOWER_RIGHT attention, run chunk by chunk, give the rows of one causal pass."""
    total, limit = (6, 4), 8
    q, k, v = rand(2, 4, 8, 8), rand(2, 2, 8, 8, seed=1), rand(2, 2, 8, 8, seed=2)
    caches = [torch.full((2, 2, limit, 8), 1e4) for _ in range(2)]
    past = torch.zeros(2, dtype=torch.int32)
    outputs: list[list[Tensor]] = [[], []]
    for size in (2, 1, 1):
        net = Net()
        new = [torch.stack([t[b, :, int(past[b]) :][:, :size] for b in range(2)]) for t in (q, k, v)]
        at = net.input("at", past)
        updated = []
        for name, cache, update in zip("kv", caches, new[1:], strict=True):
            held = net.input(f"{name} cache", cache, (-1, 2, limit, 8))
            chunk = net.input(f"{name} new", update, (-1, 2, -1, 8))
            updated.append(net.network.add_kv_cache_update(held, chunk, at, trt.KVCacheMode.LINEAR).get_output(0))
        query = net.input("q", new[0], (-1, 4, -1, 8))
        layer = net.network.add_attention_v2(query, *updated, SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT)
        past = past + size
        layer.key_value_lengths = net.input("n", past)
        result, *caches = net.run(layer.get_output(0), *updated)
        for b in range(2):
            outputs[b].append(result[b])
    for b in range(2):
        mine = torch.cat(outputs[b], 1)
        full = torch.nn.functional.scaled_dot_product_attention(
            *(t[b : b + 1, :, : min(4, total[b])] for t in (q, k, v)), is_causal=True, scale=1.0, enable_gqa=True
        )
        torch.testing.assert_close(mine, full[0], rtol=1e-5, atol=1e-6)


def test_packed_cache_update() -> None:
    """Sequences of 2, 0 and 3 tokens written at 1, 4 and 3; the last of 6 rows is padding and goes nowhere."""
    cache, update = rand(3, 2, 6, 4), rand(6, 2, 4, seed=1)
    net = Net()
    layer = net.network.add_kv_cache_update(
        net.input("c", cache, (-1, 2, 6, 4)),
        net.input("u", update, (-1, 2, 4)),
        net.input("at", torch.tensor([1, 4, 3], dtype=torch.int32)),
        trt.KVCacheMode.LINEAR,
    )
    layer.update_form = PACKED
    layer.update_lengths = net.input("n", torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    (mine,) = net.run(layer.get_output(0))
    expected = cache.clone()
    for row, (b, position) in enumerate([(0, 1), (0, 2), (2, 3), (2, 4), (2, 5)]):
        for head in range(2):
            expected[b, head, position] = update[row, head]
    assert torch.equal(mine, expected)
    assert torch.equal(net.inputs["c"], rand(3, 2, 6, 4))


def test_a_write_past_the_cache_is_refused() -> None:
    net = Net()
    operands = (
        net.input("c", rand(1, 2, 6, 4), (1, 2, 6, 4)),
        net.input("u", rand(1, 2, 3, 4)),
        net.input("at", torch.tensor([4])),
    )
    with pytest.raises(InterpreterError, match=r"writes \[4, 7\) into a cache of 6"):
        net.run(net.network.add_kv_cache_update(*operands, trt.KVCacheMode.LINEAR).get_output(0))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 4])
def test_rotary_embedding_turns_complex_numbers(rotary: int, interleaved: bool) -> None:
    x, angles = rand(2, 3, 5, 8), rand(9, (rotary or 8) // 2, seed=1)
    ids = torch.tensor([[0, 8, 3, 3, 1], [5, 4, 2, 7, 6]])
    net = Net()
    tables = [net.constant(t) for t in (angles.cos(), angles.sin())]
    layer = net.network.add_rotary_embedding(net.input("x", x, (-1, 3, -1, 8)), *tables, interleaved, rotary)
    layer.set_input(3, net.input("ids", ids))
    (mine,) = net.run(layer.get_output(0))
    size = rotary or 8
    pairs = x[..., :size].unflatten(-1, (-1, 2)) if interleaved else x[..., :size].unflatten(-1, (2, -1)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(2, 5, size // 2), angles[ids])[:, None]
    turned = torch.view_as_real(turned)
    expected = torch.cat([(turned if interleaved else turned.mT).flatten(-2), x[..., size:]], -1)
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def fp4_table() -> list[float]:
    """e2m1 by code: 1 sign, 2 exponent (bias 1), 1 mantissa bit."""
    values = []
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        values.append(-magnitude if code & 8 else magnitude)
    return values


def test_fp4_weights_with_two_levels_of_scales() -> None:
    """NVFP4 weight: codes [2, 32], FP8 scales of 16, one scale of those."""
    codes = torch.arange(64) % 16
    packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).reshape(2, 16)
    scales = torch.tensor([[0.5, 2.0], [448.0, 0.015625]]).to(torch.float8_e4m3fn)
    net = Net()
    outer = net.constant(torch.tensor(0.25))
    inner = net.constant(scales, name="scales")
    data = net.constant(packed, trt.fp4, (2, 32), name="data")
    high = net.network.add_dequantize(inner, outer, trt.float32).get_output(0)
    (mine,) = net.run(
        net.network.add_dequantize(data, high, trt.float16).get_output(0), weights={"data": packed, "scales": scales}
    )
    expected = torch.tensor([fp4_table()[c] for c in codes]).reshape(2, 2, 16) * (scales.float() * 0.25)[..., None]
    assert torch.equal(mine, expected.reshape(2, 32).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nvfp4_activations(dtype: torch.dtype) -> None:
    """Data and scales of every block of 16, found by search over the codes; a block of zeros gives zeros."""
    x = rand(3, 32, dtype=dtype) * 3
    x[1, :16] = 0
    net = Net()
    outer = net.constant(torch.tensor(0.01))
    layer = net.network.add_dynamic_quantize(net.input("x", x, (-1, 32)), 1, 16, trt.fp4, trt.fp8)
    layer.set_input(1, outer)
    scale = net.network.add_dequantize(layer.get_output(1), outer, trt.float32)
    back = net.network.add_dequantize(layer.get_output(0), scale.get_output(0), TRT_DTYPES[dtype])
    data, scales, mine = net.run(layer.get_output(0), layer.get_output(1), back.get_output(0))
    grid = torch.tensor(sorted(set(fp4_table())))
    for r in range(3):
        for b in range(2):
            block = x[r, 16 * b :][:16].float()
            wanted = (block.abs().max() / 6 / 0.01).to(torch.float8_e4m3fn)
            assert scales[r, b] == wanted
            step = wanted.float() * 0.01
            codes = grid[(block[:, None] - grid * step).abs().argmin(-1)]
            assert torch.equal(data[r, 16 * b :][:16], codes if step else torch.zeros(16))
            assert torch.equal(mine[r, 16 * b :][:16], (codes * step if step else torch.zeros(16)).to(dtype))


def test_fp4_rounds_ties_to_even_codes() -> None:
    """Two blocks of 16: the ties between neighbouring codes (and what is past the last), of scales 1 and 4."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    block = torch.cat([ties, -ties])
    net = Net()
    x = net.input("x", torch.cat([block, 4 * block])[None], (1, 32))
    (mine,) = net.run(net.network.add_quantize(x, net.constant(torch.tensor([[1.0, 4.0]])), trt.fp4).get_output(0))
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert mine[0].tolist() == 2 * (even + [-v for v in even])


def test_mxfp8_activations() -> None:
    """Blocks of 32 with power-of-two scales: the smallest that brings the block within 448."""
    x = rand(3, 64) * torch.tensor([[1e-3], [1.0], [1e4]])
    x[1, :32] = 0
    x[0, 0] = 448 * 2.0**-7  # exactly a power of two: no step up
    net = Net()
    layer = net.network.add_dynamic_quantize(net.input("x", x, (-1, 64)), 1, 32, trt.fp8, trt.e8m0)
    back = net.network.add_dequantize(layer.get_output(0), layer.get_output(1), trt.float32)
    data, scales, mine = net.run(layer.get_output(0), layer.get_output(1), back.get_output(0))
    for r in range(3):
        for b in range(2):
            block = x[r, 32 * b :][:32]
            exponents = [e for e in range(-127, 128) if block.abs().max() <= 448 * 2.0**e]
            assert scales[r, b].float() == 2.0 ** exponents[0]
            assert torch.equal(
                data[r, 32 * b :][:32].float(), (block / 2.0 ** exponents[0]).to(torch.float8_e4m3fn).float()
            )
    torch.testing.assert_close(mine, x, rtol=0.07, atol=1e-6)
    assert not mine[1, :32].any()


@pytest.mark.parametrize(
    "name", ["BF16", "FP8", "INT4", "FP4", "E8M0", "FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL"]
)
def test_constants(name: str) -> None:
    """Read from the layer where TensorRT gives the values back, from the table elsewhere."""
    codes = torch.tensor([[1, 2, 15, 8], [7, 9, 0, 14]])
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    numbers = codes.float() - 4
    given, expected = {
        "BF16": (numbers.bfloat16(), numbers.bfloat16()),
        "FP8": (numbers.to(torch.float8_e4m3fn), numbers.to(torch.float8_e4m3fn)),
        "INT4": (packed, torch.where(codes > 7, codes - 16, codes).to(torch.int8)),
        "FP4": (packed, torch.tensor(fp4_table())[codes]),
        "E8M0": (codes.to(torch.uint8) + 120, torch.exp2(codes.float() - 7).to(torch.float8_e8m0fnu)),
        "FLOAT": (numbers, numbers),
        "HALF": (numbers.half(), numbers.half()),
        "INT8": (numbers.to(torch.int8), numbers.to(torch.int8)),
        "INT32": (numbers.int(), numbers.int()),
        "INT64": (numbers.long(), numbers.long()),
        "BOOL": (codes > 7, codes > 7),
    }[name]
    net = Net()
    tensor = net.constant(given, getattr(trt.DataType, name), (2, 4), name="c")
    opaque = name in ("BF16", "FP8", "INT4", "FP4", "E8M0")
    found = Interpreter(net.network, {"c": given}, {})[tensor.name]
    assert found.dtype == expected.dtype
    assert torch.equal(found.float(), expected.float())
    if opaque:
        with pytest.raises(InterpreterError, match="name it in weights"):
            Interpreter(net.network, {}, {})[tensor.name]
    else:
        assert torch.equal(Interpreter(net.network, {}, {})[tensor.name], expected)
        with pytest.raises(InterpreterError, match="differ"):
            Interpreter(net.network, {"c": ~given if name == "BOOL" else given + 1}, {})[tensor.name]


# ---- what ONNX has no word for ----


def test_elementwise_floor_division_of_floats() -> None:
    a, b = torch.tensor([7.5, -7.5, 7.5, -0.5]), torch.tensor([2.0, 2.0, -2.0, 4.0])
    net = Net()
    layer = net.network.add_elementwise(net.input("a", a), net.input("b", b), trt.ElementWiseOperation.FLOOR_DIV)
    assert net.run(layer.get_output(0))[0].tolist() == [3.0, -4.0, -4.0, -1.0]


def test_scaled_tanh_and_parametric_softplus() -> None:
    x = rand(2, 8)
    net = Net()
    tensor = net.input("x", x)
    results = []
    for kind in (trt.ActivationType.SCALED_TANH, trt.ActivationType.SOFTPLUS):
        layer = net.network.add_activation(tensor, kind)
        layer.alpha, layer.beta = 0.7, 1.3
        results.append(layer.get_output(0))
    first, second = net.run(*results)
    torch.testing.assert_close(first, 0.7 * torch.tanh(1.3 * x))
    torch.testing.assert_close(second, 0.7 * torch.log(torch.exp(1.3 * x) + 1))


@pytest.mark.parametrize("form", ["matrix-vector", "vector-matrix", "vector-vector", "transposes"])
def test_matrix_operations(form: str) -> None:
    op = trt.MatrixOperation
    a, b, op0, op1, expected = {
        "matrix-vector": (rand(2, 3, 8), rand(2, 8, seed=1), op.NONE, op.VECTOR, "bij,bj->bi"),
        "vector-matrix": (rand(2, 8), rand(2, 8, 3, seed=1), op.VECTOR, op.NONE, "bj,bjk->bk"),
        "vector-vector": (rand(2, 8), rand(2, 8, seed=1), op.VECTOR, op.VECTOR, "bj,bj->b"),
        "transposes": (rand(2, 8, 3), rand(1, 5, 8, seed=1), op.TRANSPOSE, op.TRANSPOSE, "bji,xkj->bik"),
    }[form]
    net = Net()
    tensors = net.input("a", a, tuple(a.shape)), net.input("b", b, tuple(b.shape))
    layer = net.network.add_matrix_multiply(tensors[0], op0, tensors[1], op1)
    torch.testing.assert_close(net.run(layer.get_output(0))[0], torch.einsum(expected, a, b))


def test_gather_with_an_elementwise_dimension_and_out_of_bounds() -> None:
    data, indices = rand(3, 5, 4), torch.tensor([[0, 4], [7, 1], [2, 2]], dtype=torch.int32)
    net = Net()
    layer = net.network.add_gather(net.input("d", data, (3, 5, 4)), net.input("i", indices, (3, 2)), 1)
    layer.num_elementwise_dims = 1
    (mine,) = net.run(layer.get_output(0))
    for b in range(3):
        for n in range(2):
            expected = data[b, indices[b, n]] if indices[b, n] < 5 else torch.zeros(4)
            assert torch.equal(mine[b, n], expected)


def test_non_zero() -> None:
    x = torch.tensor([[0, 2, 0], [-1, 0, 5]], dtype=torch.int32)
    net = Net()
    layer = net.network.add_non_zero(net.input("x", x), trt.int64)
    (mine,) = net.run(layer.get_output(0))
    assert mine.tolist() == [[0, 1, 1], [1, 0, 2]]
    assert mine.dtype == torch.int64


def test_fill_of_two_dimensions() -> None:
    """The header's example: alpha 1, beta [100, 10]."""
    net = Net()
    layer = net.network.add_fill((1, 1), trt.FillOperation.LINSPACE, trt.int32)
    layer.set_input(0, net.network.add_shape(net.input("x", rand(3, 4))).get_output(0))
    layer.set_input(1, net.constant(torch.tensor(1, dtype=torch.int32)))
    layer.set_input(2, net.constant(torch.tensor([100, 10], dtype=torch.int32)))
    (mine,) = net.run(layer.get_output(0))
    assert mine.tolist() == [[1, 11, 21, 31], [101, 111, 121, 131], [201, 211, 221, 231]]


def test_shuffle_zero_copies_the_transposed_dimension() -> None:
    x = rand(2, 3, 4, 5)
    net = Net()
    layer = net.network.add_shuffle(net.input("x", x, (2, 3, 4, 5)))
    layer.first_transpose, layer.reshape_dims, layer.second_transpose = (3, 2, 1, 0), (0, 0, -1), (2, 0, 1)
    (mine,) = net.run(layer.get_output(0))
    assert torch.equal(mine, torch.einsum("abcd->dcba", x).reshape(5, 4, 6).permute(2, 0, 1))


def test_dist_collective() -> None:
    """One rank: the identity. More: the caller's function is asked, and its result must have TensorRT's shape."""
    x = rand(2, 4)
    arguments = trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE, -1
    net = Net()
    layer = net.network.add_dist_collective(net.input("x", x, (2, 4)), *arguments, [0])
    assert torch.equal(net.run(layer.get_output(0))[0], x)
    net = Net()
    layer = net.network.add_dist_collective(net.input("x", x, (2, 4)), *arguments, [0, 1])
    layer.num_ranks, layer.metadata = 2, "all_gather"
    with pytest.raises(InterpreterError, match="2 ranks"):
        net.run(layer.get_output(0))
    answers = {"all_gather": lambda value: torch.cat([value, -value])}
    result = evaluate(net.network, {}, net.inputs, lambda asked, value: answers[asked.metadata](value))
    assert torch.equal(result["result0"], torch.cat([x, -x]))


def test_halves_are_summed_in_fp32() -> None:
    """4096 ones (adding one by one in fp16 stops at 2048), and a normalization whose variance overflows fp16."""
    ones, wide = torch.ones(4096, dtype=torch.float16), rand(2, 64, dtype=torch.float16) * 400
    net = Net()
    total = net.network.add_reduce(net.input("x", ones), trt.ReduceOperation.SUM, 1, False)
    scale, bias = (net.constant(torch.full((1, 64), v, dtype=torch.float16)) for v in (1.0, 0.0))
    normal = net.network.add_normalization_v2(net.input("y", wide, (-1, 64)), scale, bias, 2)
    first, second = net.run(total.get_output(0), normal.get_output(0))
    assert first.item() == 4096
    expected = torch.nn.functional.layer_norm(wide.double(), (64,), eps=1e-5)
    torch.testing.assert_close(second, expected.half(), rtol=1e-3, atol=1e-6)


def test_layers_run_when_needed_not_in_order() -> None:
    """An early layer is rewired to a later one's output; an unused layer without a rule doesn't matter."""
    x = rand(2, 3)
    net = Net()
    tensor = net.input("x", x, (2, 3))
    first = net.network.add_unary(tensor, trt.UnaryOperation.NEG)
    second = net.network.add_unary(tensor, trt.UnaryOperation.EXP)
    first.set_input(0, second.get_output(0))
    net.network.add_fill((3,), trt.FillOperation.RANDOM_UNIFORM, trt.float32)
    torch.testing.assert_close(net.run(first.get_output(0))[0], -x.exp())
    torch.testing.assert_close(Interpreter(net.network, {}, net.inputs)[second.get_output(0).name], x.exp())


def test_deep_networks() -> None:
    net = Net()
    tensor = net.input("x", torch.zeros(1))
    for _ in range(3000):
        tensor = net.network.add_elementwise(
            tensor, net.constant(torch.ones(1)), trt.ElementWiseOperation.SUM
        ).get_output(0)
    assert net.run(tensor)[0].item() == 3000


def test_attention_of_mixed_types_is_refused() -> None:
    """TensorRT's shape inference lets it pass."""
    q, k = rand(1, 2, 3, 8), rand(1, 2, 3, 8, dtype=torch.float16)
    with pytest.raises(InterpreterError, match="types differ"):
        net = Net()
        net.run(attention(net, q, k, k).get_output(0))
    with pytest.raises(InterpreterError, match="types differ"):
        net = Net()
        layer = attention(net, q, q, q)
        layer.mask = net.input("m", rand(1, 2, 3, 3, dtype=torch.float16))
        net.run(layer.get_output(0))


def test_errors_name_the_layer() -> None:
    net = Net()
    x = net.input("x", rand(1, 1, 4, 4))
    layer = net.network.add_lrn(x, 3, 1.0, 0.5, 1.0)
    layer.name = "odd one"
    with pytest.raises(InterpreterError, match="odd one: no rule for layers of kind LRN"):
        net.run(layer.get_output(0))
    net = Net()
    layer = net.network.add_slice(net.input("x", rand(3)), (1,), (3,), (1,))
    layer.name = "too far"
    with pytest.raises(InterpreterError, match=r"too far \(SLICE\): axis 0 of length 3.*out of bounds"):
        net.run(layer.get_output(0))
    net = Net()
    data, updates = net.input("d", rand(4, 2)), net.input("u", rand(2, 2))
    layer = net.network.add_scatter(
        data, net.constant(torch.tensor([[1], [1]], dtype=torch.int32)), updates, trt.ScatterMode.ND
    )
    with pytest.raises(InterpreterError, match="same element"):
        net.run(layer.get_output(0))


def test_inputs_weights_and_assertions_are_checked() -> None:
    net = Net()
    x = net.input("x", rand(2, 3), (-1, 3))
    positive = net.network.add_elementwise(
        net.network.add_reduce(x, trt.ReduceOperation.MAX, 3, False).get_output(0),
        net.constant(torch.zeros(())),
        trt.ElementWiseOperation.GREATER,
    )
    net.network.add_assertion(positive.get_output(0), "x is negative")
    (mine,) = net.run(net.network.add_identity(x).get_output(0))
    assert torch.equal(mine, net.inputs["x"])
    for weights, inputs, message in (
        ({}, {"x": -torch.ones(2, 3)}, "x is negative"),
        ({}, {}, "wanted"),
        ({}, {"x": torch.ones(2, 4)}, "shape"),
        ({}, {"x": torch.ones(2, 3).half()}, "FLOAT"),
        ({"nobody": torch.ones(1)}, {"x": torch.ones(2, 3)}, "without a constant layer"),
    ):
        with pytest.raises(InterpreterError, match=message):
            evaluate(net.network, weights, inputs)


def test_every_rule_is_tested() -> None:
    """A kind of layer is compared with onnxruntime above, or is one of those built by hand."""
    by_hand = {
        "CONSTANT",
        "QUANTIZE",
        "DEQUANTIZE",
        "DYNAMIC_QUANTIZE",
        "NON_ZERO",
        "DIST_COLLECTIVE",
        "MOE",  # in test_experts.py
        "ATTENTION_INPUT",
    }
    assert {s.kind for s in SNIPPETS} | by_hand == set(_LAYERS)
