"""Linears of every format and number of tokens against fp64 products of what the stored tensors mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import DTYPES
from tests.kernels.checks import poisoned as poisoned
from trtx.converters.spec import Activation, Norm
from trtx.quantize.formats import FORMATS, Format
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda import elementwise, linear
from trtx.runtime.cuda.launch import Launch, RecordLaunch
from trtx.runtime.cuda.linear import CudaLinear
from trtx.runtime.ops.base import Mlp
from trtx.runtime.ops.torch_ops import ResidentNorm, TorchOps

TOKENS = [1, 3, 17, 70]
"""One for each way to multiply, and two for tiles of `skinny`; 4-bit weights go to cuBLAS later."""


def stored(form: Format, rows: int, k: int, dtype: torch.dtype, device: torch.device) -> LinearWeight:
    """A random weight in a format, its inputs' scales fit for normal numbers."""
    tensors = form.pack(torch.randn(rows, k), form.group_size(k))
    if form.name == "none":
        tensors["weight"] = tensors["weight"].to(dtype)
    if "input_scale" in form.input_tensors:
        tensors["input_scale"] = torch.tensor(5 / 127 if form.name == "int8_sq" else 0.011)
    if "pre_quant_scale" in form.input_tensors:
        tensors["pre_quant_scale"] = torch.rand(k) + 0.5
    tensors["bias"] = torch.randn(rows).to(dtype)
    tensors = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
    return LinearWeight("w", form, tensors, (("gate", rows // 2), ("up", rows // 2)))


def resident(weight: LinearWeight, dtype: torch.dtype) -> CudaLinear:
    return linear.resident(weight.name, weight.format, linear.kernel_layout(weight, dtype), weight.rows, dtype)


def exact(x: Tensor, weight: LinearWeight) -> Tensor:
    """The product in fp64."""
    given = weight.format.activation(x.float(), weight.tensors)
    y = given.double() @ weight.dense(torch.float64).T
    return y if weight.bias is None else y + weight.bias.double()


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """But for rounding of operands and result."""
    assert found.dtype == dtype and found.shape == wanted.shape
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype], error


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(66, 96), (64, 256)])
def test_unquantized(launch: Launch, device: torch.device, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    weight = stored(FORMATS["none"], n, k, dtype, device)
    x = torch.randn(m, k).to(device, dtype)
    assert_close(linear.linear(launch, x, resident(weight, dtype)), exact(x, weight), dtype)


@pytest.mark.parametrize(
    ("form", "m"),
    [(form, m) for form in list(FORMATS)[1:] for m in (*TOKENS, *([260] if FORMATS[form].bits == 4 else []))],
)
def test_formats(launch: Launch, device: torch.device, form: str, m: int) -> None:
    n = 18 if m in (1, 260) else 80
    weight = stored(FORMATS[form], n, 192, torch.bfloat16, device)
    x = torch.randn(m, 192).to(device, torch.bfloat16)
    w, wanted = resident(weight, x.dtype), exact(x, weight)
    assert_close(linear.linear(launch, x, w), wanted, x.dtype)
    residual = 10 * torch.randn(m, n).to(device, x.dtype)
    before = residual.double()
    assert linear.linear(launch, x, w, residual) is residual
    assert_close(residual, before + wanted, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["fp8", "fp8_pc_pt", "int8_wo", "int8_sq", "int4_awq", "nvfp4_wo", "mxfp4"])
def test_formats_in_other_dtypes(launch: Launch, device: torch.device, form: str, dtype: torch.dtype) -> None:
    weight = stored(FORMATS[form], 10, 320, dtype, device)
    for m in (1, 5):
        x = torch.randn(m, 320).to(device, dtype)
        assert_close(linear.linear(launch, x, resident(weight, dtype)), exact(x, weight), dtype)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("form", ["none", "fp8", "int4_awq"])
@pytest.mark.parametrize(
    "activation",
    [Activation("silu"), Activation("gelu_tanh"), Activation("quick_gelu", limit=1.5, offset=1.0)],
    ids=lambda a: a.kind,
)
def test_gated(launch: Launch, device: torch.device, form: str, activation: Activation, m: int) -> None:
    weight = stored(FORMATS[form], 20 if m == 1 else 136, 96, torch.bfloat16, device)
    x = torch.randn(m, 96).to(device, torch.bfloat16)
    found = linear.gated(launch, x, resident(weight, x.dtype), activation)
    assert_close(found, gate(exact(x, weight), activation), x.dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"])
def test_gated_activation(launch: Launch, device: torch.device, kind: str) -> None:
    y = 3 * torch.randn(5, 2 * 1100).to(device)
    y[0, 0] = float("nan")
    activation = Activation(kind, limit=2.0, offset=0.5)
    found, wanted = linear.gated_activation(launch, y, activation), gate(y, activation)
    assert found[0, 0].isnan()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


def gate(y: Tensor, activation: Activation) -> Tensor:
    """What the reference op set computes between the linears of an MLP, from both halves of y."""
    ops = TorchOps.__new__(TorchOps)
    ops.linears = lambda x, group: list(x.chunk(2, dim=-1))
    ops.linear = lambda x, weight: x
    return ops.mlp(y, Mlp(None, None), activation)


@pytest.mark.parametrize("form", ["none", "fp8", "int4_awq"])
def test_shared_tiles(launch: Launch, device: torch.device, form: str) -> None:
    """Several programs a tile: counters are zeros again, and the order of the sums is always the same."""
    weight = stored(FORMATS[form], 64, 2048, torch.bfloat16, device)
    w = resident(weight, torch.bfloat16)
    x = torch.randn(9, 2048).to(device, torch.bfloat16)
    first, second = (linear.linear(launch, x, w) for _ in range(2))
    assert_close(first, exact(x, weight), x.dtype)
    assert torch.equal(first, second) and not w.counters.any()


@pytest.mark.parametrize("form", ["fp8", "fp8_pc_pt", "int8_sq"])
def test_codes(launch: Launch, device: torch.device, form: str) -> None:
    """What is rounded apart is what the format says."""
    weight = stored(FORMATS[form], 16, 96, torch.float32, device)
    x = 3 * torch.randn(5, 96).to(device)
    x[1] = 0
    codes, scale = linear.quantize(launch, x, resident(weight, x.dtype))
    step = weight.tensors["input_scale"] if scale is None else scale[:, None]
    torch.testing.assert_close(codes.float() * step, weight.format.activation(x, weight.tensors))


@pytest.mark.parametrize("form", ["fp8", "w4a8_awq"])
def test_codes_of_norms_and_activations(launch: Launch, device: torch.device, form: str) -> None:
    """The same as those of `quantize`."""
    w = resident(stored(FORMATS[form], 16, 192, torch.bfloat16, device), torch.bfloat16)
    x = 3 * torch.randn(5, 384).to(device, torch.bfloat16)
    norm = ResidentNorm((1 + torch.randn(192) / 4).to(device, x.dtype), None, Norm(1e-5))
    assert w.scales is not None
    first = x[:, :192].contiguous()
    found = elementwise.norm(launch, first, norm, (w.scales, w.smooth))
    wanted, _ = linear.quantize(launch, elementwise.norm(launch, first, norm), w)
    assert torch.equal(found.float(), wanted.float())
    found = linear.gated_activation(launch, x, Activation("silu"), w)
    wanted, _ = linear.quantize(launch, linear.gated_activation(launch, x, Activation("silu")), w)
    assert found.dtype == x.dtype and torch.equal(found.codes.float(), wanted.float())


def test_not_a_number(launch: Launch, device: torch.device) -> None:
    for form in ("none", "fp8"):
        weight = stored(FORMATS[form], 16, 64, torch.bfloat16, device)
        x = torch.randn(2, 64).to(device, torch.bfloat16)
        x[1, 5] = float("nan")
        y = linear.linear(launch, x, resident(weight, x.dtype))
        assert y[0].isfinite().all() and y[1].isnan().all()
        assert linear.linear(launch, x[1:], resident(weight, x.dtype)).isnan().all()


@pytest.mark.parametrize("form", list(FORMATS))
def test_build_without_data(form: str) -> None:
    """On meta tensors every launch can be noted down."""
    weight = stored(FORMATS[form], 64, 128, torch.bfloat16, torch.device("cpu"))
    layout = {name: tensor.to("meta") for name, tensor in linear.kernel_layout(weight, torch.bfloat16).items()}
    w = linear.resident("w", FORMATS[form], layout, weight.rows, torch.bfloat16)
    launch = RecordLaunch(dependent=True)
    for m in (*TOKENS, 260):
        x = torch.empty(m, 128, dtype=torch.bfloat16, device="meta")
        assert linear.linear(launch, x, w).shape == (m, 64)
        assert linear.gated(launch, x, w, Activation()).shape == (m, 32)
    one, few = ("gemv4", "skinny4") if w.words else ("gemv", "skinny")
    assert {f"linear.{one}", f"linear.{few}", "linear.gated_activation"} <= {v.kernel for v in launch.variants}
