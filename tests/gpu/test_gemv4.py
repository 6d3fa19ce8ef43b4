"""gemv4 in CUDA C++ on a GPU, compiled there, against fp64 products of what the stored tensors mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import poisoned as poisoned
from tests.kernels.test_linear import assert_close, exact, gate, resident, stored
from trtx.builder.cuda.nvrtc import compile_native
from trtx.converters.spec import Activation
from trtx.quantize.formats import FORMATS
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.cubins import Cubin, Kernel, driver
from trtx.runtime.cuda.launch import Arguments, Constants, How, Launch, Variant, type_of

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
UNIT = 2.0**-17
"""How far x may be off, of the largest number of its group: half a unit of 18 bits."""


class Native(Launch):
    """Compiles kernels in CUDA C++ at their first launch, and knows no others."""

    native = True

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        self.sm, self.dependent = f"{major}.{minor}", major >= 9
        self.hopper = self.sm == "9.0"
        self.kernels: dict[Variant, Kernel] = {}

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        variant = self.variant(kernel, tuple(map(type_of, args)), constants, how)
        assert variant.native and variant.pdl == self.dependent
        if variant not in self.kernels:
            code, _ = compile_native(variant, self.sm)
            self.kernels[variant] = Kernel(driver(), Cubin(variant, "", variant.function, variant.shared_bytes), code)
        self.kernels[variant](grid, args, torch.cuda.current_stream().cuda_stream)


@pytest.fixture(scope="module")
def launch() -> Launch:
    return Native()


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda")


def weight_of(device: torch.device, n: int, k: int, dtype: torch.dtype, *without: str) -> LinearWeight:
    """A random weight, with bias and smoothing but for those that are named."""
    weight = stored(FORMATS["int4_awq"], n, k, dtype, device)
    kept = {name: tensor for name, tensor in weight.tensors.items() if name not in without}
    if "pre_quant_scale" in without:
        kept["pre_quant_scale"] = torch.ones(k, device=device)
    return replace(weight, tensors=kept)


def resident_of(weight: LinearWeight, dtype: torch.dtype) -> linear.CudaLinear:
    """Without smoothing where that is by ones."""
    w = resident(weight, dtype)
    return w if w.smooth is None or not w.smooth.eq(1).all() else replace(w, smooth=None)


def assert_near(found: Tensor, wanted: Tensor, x: Tensor, weight: LinearWeight) -> None:
    """Each output but for what x loses as integers, sums in fp32, and its own rounding."""
    assert found.dtype == x.dtype and found.shape == wanted.shape
    given = weight.format.activation(x.float(), weight.tensors).double().abs()
    most = given.unflatten(1, (-1, 128)).amax(2).clamp(min=2.0**-87).repeat_interleave(128, 1)
    size, limits = weight.dense(torch.float64).abs().T, torch.finfo(x.dtype)
    bound = (UNIT * most + 1e-6 * given) @ size + limits.eps * (0.51 * wanted.abs() + limits.tiny)
    error = (found.double() - wanted).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("n", "k"), [(64, 512), (48, 1024), (2128, 512), (2112, 512), (4320, 1024), (128, 4608), (64, 14336)]
)
def test_products(launch: Launch, device: torch.device, n: int, k: int, dtype: torch.dtype) -> None:
    """One tile a program and two, one program a multiprocessor and two, chunks shared evenly or not."""
    for without in ((), ("bias",), ("pre_quant_scale",), ("bias", "pre_quant_scale")):
        weight = weight_of(device, n, k, dtype, *without)
        x, w = torch.randn(1, k).to(device, dtype), resident_of(weight, dtype)
        wanted = exact(x, weight)
        assert_near(linear.linear(launch, x, w), wanted, x, weight)
        # Added to what nearly cancels them, products show more of their bits than they are rounded to.
        residual = -wanted.to(dtype)
        rest = wanted + residual.double()
        assert linear.linear(launch, x, w, residual) is residual
        assert_near(residual, rest, x, weight)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "activation",
    [
        *(Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")),
        Activation("quick_gelu", limit=1.5, offset=1.0),
    ],
    ids=lambda a: f"{a.kind}-{a.limit}",
)
def test_gated(launch: Launch, device: torch.device, activation: Activation, dtype: torch.dtype) -> None:
    weight = weight_of(device, 2 * 32, 1536, dtype)
    x = torch.randn(1, 1536).to(device, dtype) / 16
    found = linear.gated(launch, x, resident_of(weight, dtype), activation)
    assert_close(found, gate(exact(x, weight), activation), dtype)


def test_many_gated_rows(launch: Launch, device: torch.device) -> None:
    """Two programs a multiprocessor."""
    weight = weight_of(device, 2 * 2160, 512, BF16, "bias", "pre_quant_scale")
    x = torch.randn(1, 512).to(device, BF16)
    found = linear.gated(launch, x, resident_of(weight, BF16), Activation("silu"))
    assert_close(found, gate(exact(x, weight), Activation("silu")), BF16)


def test_extreme_inputs(launch: Launch, device: torch.device) -> None:
    """An outlier in each group, in each column once; numbers at both ends of bf16; nothing but zeros."""
    weight = weight_of(device, 64, 1024, BF16, "bias")
    w, x = resident_of(weight, BF16), torch.randn(1, 1024).to(device, BF16)
    outliers = [x.clone() for _ in range(128)]
    for column, some in enumerate(outliers):
        some[0, column::128] *= 3e4
    small = x * 2.0**-120
    for given in (*outliers, x * 2.0**100, small, small * 2.0**-8, x * 1e-10, torch.where(x > 0, x, small)):
        assert_near(linear.linear(launch, given, w), exact(given, weight), given, weight)
    zeros = torch.zeros_like(x)
    assert not linear.linear(launch, zeros, w).any()
    zeros[0, ::128] = x[0, ::128]
    assert_near(linear.linear(launch, zeros, w), exact(zeros, weight), zeros, weight)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number(launch: Launch, device: torch.device, number: float) -> None:
    weight = weight_of(device, 64, 1024, BF16)
    for column in (0, 7, 127, 1023):
        x = torch.randn(1, 1024).to(device, BF16)
        x[0, column] = number
        assert linear.linear(launch, x, resident_of(weight, BF16)).isnan().all()
        assert linear.gated(launch, x, resident_of(weight, BF16), Activation("relu")).isnan().all()


def assert_order_is_kept(chain: Callable[[Callable[[], None]], Tensor], times: int = 5) -> None:
    """Each launch of a chain reads what the one before writes: the same whether it starts early or when all is done.

    Args:
        chain: calls what it is given after each launch; numbers that depend on all of them.
    """
    wanted = chain(torch.cuda.synchronize)
    assert wanted.isfinite().all() and wanted.any()
    for _ in range(times):
        assert torch.equal(chain(lambda: None), wanted)


def assert_products_keep_order(
    launch: Launch, residents: list[linear.CudaLinear], first: Tensor, every: int
) -> None:  # fmt: skip
    """Of products in turn.

    Args:
        every: x is brought back to size after so many pairs of products.
    """

    def chain(launched: Callable[[], None]) -> Tensor:
        x = first.clone()
        for index in range(40):
            y = linear.linear(launch, x, residents[index % 2])
            launched()
            linear.linear(launch, y, residents[1 - index % 2], x)
            launched()
            x = x / x.float().abs().amax().to(BF16) if index % every == every - 1 else x
        return x

    assert_order_is_kept(chain)


def test_launched_dependently(launch: Launch, device: torch.device) -> None:
    weights = [weight_of(device, 2048, 2048, BF16, "bias") for _ in range(2)]
    residents = [resident_of(weight, BF16) for weight in weights]
    assert_products_keep_order(launch, residents, torch.randn(1, 2048).to(device, BF16), every=4)
