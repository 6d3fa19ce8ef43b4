"""few.cu on a GPU, compiled there, against fp64 products of what the stored tensors mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.test_gemv4 import BF16, FP16, assert_products_keep_order
from tests.gpu.test_gemv4 import device as device
from tests.gpu.test_gemv4 import launch as launch
from tests.kernels.checks import poisoned as poisoned
from tests.kernels.test_linear import assert_close, exact, gate, resident, stored
from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3, FORMATS
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import Launch

pytestmark = pytest.mark.gpu

STEP = 2.0**-7
"""The input's scale where there is one: codes are the same whether they are divided by it or multiplied with 1 / it."""


def weight_of(device: torch.device, form: str, n: int, k: int, dtype: torch.dtype, *without: str) -> LinearWeight:
    """A random weight, without the tensors that are named."""
    weight = stored(FORMATS[form], n, k, dtype, device)
    kept = {name: tensor for name, tensor in weight.tensors.items() if name not in without}
    if "input_scale" in kept:
        kept["input_scale"] = torch.tensor(STEP, device=device)
    return replace(weight, tensors=kept)


def codes_by_token(launch: Launch, x: Tensor, w: linear.CudaLinear) -> tuple[Tensor, Tensor]:
    """What `linear.quantize` leaves to a kernel of Triton's."""
    scale = x.float().abs().amax(1) / 448
    return (x.float() / scale[:, None]).to(E4M3), scale


def assert_near(found: Tensor, wanted: Tensor, x: Tensor, weight: LinearWeight) -> None:
    """Each output but for sums in fp32 and its own rounding."""
    assert found.dtype == x.dtype and found.shape == wanted.shape
    sizes = weight.format.activation(x.float(), weight.tensors).double().abs() @ weight.dense(torch.float64).abs().T
    limits = torch.finfo(x.dtype)
    bound = 1e-6 * sizes + limits.eps * (0.51 * wanted.abs() + limits.tiny)
    error = (found.double() - wanted).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize(("n", "k"), [(64, 512), (48, 1152), (2176, 2048), (96, 3584), (6144, 1152), (17056, 512)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["none", "fp8", "fp8_pc_pt", "w4a8_awq"])
def test_products(
    launch: Launch, device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, n: int, k: int
) -> None:
    """Every number of tokens, added to nothing and to what nearly cancels the product: so more of its bits show."""
    monkeypatch.setattr(linear, "quantize", codes_by_token)
    for without in ((), ("bias",)):
        weight = weight_of(device, form, n, k, dtype, *without)
        x, w = torch.randn(16, k).to(device, dtype), resident(weight, dtype)
        wanted = exact(x, weight)
        for m in range(2, 17):
            assert_near(linear.linear(launch, x[:m], w), wanted[:m], x[:m], weight)
            residual = -wanted[:m].to(dtype)
            rest = wanted[:m] + residual.double()
            assert linear.linear(launch, x[:m], w, residual) is residual
            assert_near(residual, rest, x[:m], weight)


@pytest.mark.parametrize("form", ["none", "fp8", "w4a8_awq"])
@pytest.mark.parametrize(
    "activation",
    [
        *(Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")),
        Activation("quick_gelu", limit=1.5, offset=1.0),
    ],
    ids=lambda a: f"{a.kind}-{a.limit}",
)
def test_gated(launch: Launch, device: torch.device, activation: Activation, form: str) -> None:
    """Few rows and many: programs of both kinds."""
    for n, k in ((96, 1536), (8544, 256)) if activation.kind == "silu" else ((96, 1536),):
        weight = weight_of(device, form, 2 * n, k, FP16)
        for m in (3, 16):
            x = torch.randn(m, k).to(device, FP16) / 16
            found = linear.gated(launch, x, resident(weight, FP16), activation)
            assert_close(found, gate(exact(x, weight), activation), FP16)


@pytest.mark.parametrize("form", ["none", "fp8"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_a_number(launch: Launch, device: torch.device, form: str, number: float) -> None:
    """In one token: others are what they are without it. Codes of infinity are the largest."""
    weight = weight_of(device, form, 64, 1024, BF16)
    w, x = resident(weight, BF16), torch.randn(11, 1024).to(device, BF16)
    for token, column in ((0, 0), (4, 7), (10, 1023)):
        given = x.clone()
        given[token, column] = number
        found, wanted = linear.linear(launch, given, w), linear.linear(launch, x, w)
        wanted[token] = exact(given[token : token + 1], weight).to(BF16)
        assert not found[token].isfinite().any() or (form == "fp8" and number == float("inf"))
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=0.1, equal_nan=True)
        others = [i for i in range(11) if i != token]
        assert torch.equal(found[others], wanted[others])


@pytest.mark.parametrize("size", [2048, 6144])
@pytest.mark.parametrize("form", ["none", "fp8"])
def test_launched_dependently(launch: Launch, device: torch.device, form: str, size: int) -> None:
    weights = [weight_of(device, form, size, size, BF16, "bias") for _ in range(2)]
    residents = [resident(weight, BF16) for weight in weights]
    assert_products_keep_order(launch, residents, torch.randn(7, size).to(device, BF16), every=1)


def test_shapes_of_programs_are_all_here() -> None:
    """What Llama's linears are launched as is what these tests launch."""

    def shapes(sizes: list[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
        found = [
            linear.few_shape(m, n, k, itemsize, parts) for n, k, parts in sizes for m in (2, 16) for itemsize in (1, 2)
        ]
        return {(shape.tokens, shape.pairs, shape.blocks) for shape in found if shape}

    llama = [(6144, 4096, 1), (4096, 4096, 1), (14336, 4096, 2), (4096, 14336, 1), (128256, 4096, 1)]
    assert shapes(llama) <= shapes([(6144, 1152, 1), (17056, 512, 1), (2176, 2048, 1), (8544, 256, 2)])
