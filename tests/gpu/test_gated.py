"""gated.cu on an H100, compiled there, against fp64 products of what the stored tensors mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.test_few import STEP, weight_of
from tests.gpu.test_gemv4 import BF16, FP16, assert_order_is_kept
from tests.gpu.test_prefill import device as device
from tests.gpu.test_prefill import launch as launch
from tests.kernels.checks import poisoned as poisoned
from tests.kernels.test_linear import assert_close, exact, gate, resident
from trtx.converters.spec import Activation
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.linear import Codes, CudaLinear, GatedShape

pytestmark = pytest.mark.gpu

SILU = Activation("silu")


@pytest.fixture(autouse=True)
def rounded_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels of Triton's make of x."""

    def quantize(launch: Launch, x: Tensor, w: CudaLinear) -> tuple[Tensor, Tensor | None]:
        if w.way.input == "by token":
            scale = x.float().abs().amax(1) / 448
            return (x.float() / scale[:, None]).to(E4M3), scale
        given = x.float() if w.smooth is None else x.float() * w.smooth
        return (given / STEP).clamp(-448, 448).to(E4M3), None

    monkeypatch.setattr(linear, "quantize", quantize)


def some(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Tokens [m, K], such that products are about 1; what lies behind them is NaN."""
    x = torch.full((m + 200, k), float("nan"))
    x[:m] = torch.randn(m, k) / k**0.5
    return x.to(device, dtype)[:m]


SHAPES = [
    None, GatedShape(3, 0, 1, 1, 1, 1), GatedShape(4, 2, 2, 1, 1, 2), GatedShape(4, 3, 2, 1, 2, 4),
    GatedShape(2, 1, 1, 2, 2, 2), GatedShape(4, 4, 1, 2, 8, 6),
]  # fmt: skip
"""With fewer programs than tiles, and more; sharing the weight, sharing tokens, and nothing."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(256, 64), (256, 448), (768, 192)])
def test_sizes(launch: Launch, device: torch.device, n: int, k: int, dtype: torch.dtype, shape: GatedShape) -> None:
    """Around the ends of tiles, and of what a warp stores; with a bias and without."""
    if shape and shape.output_mates == 2 and n // 256 % 2:
        pytest.skip("an odd number of tiles")
    for without in ((), ("bias",)):
        weight = weight_of(device, "none", 2 * n, k, dtype, *without)
        w = resident(weight, dtype)
        for m in (1, 16, 65, 127, 128, 129, 250, 385, 641):
            x = some(m, k, dtype, device)
            found = linear.gated_natively(launch, x, w, SILU, shape=shape)
            assert_close(found, gate(exact(x, weight), SILU), dtype)


@pytest.mark.parametrize(
    "activation",
    [
        *(Activation(kind) for kind in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")),
        Activation("quick_gelu", limit=1.5, offset=1.0),
    ],
    ids=lambda a: f"{a.kind}-{a.limit}",
)
def test_activations(launch: Launch, device: torch.device, activation: Activation) -> None:
    weight = weight_of(device, "none", 512, 256, BF16)
    x = some(130, 256, BF16, device)
    assert_close(linear.gated(launch, x, resident(weight, BF16), activation), gate(exact(x, weight), activation), BF16)


@pytest.mark.parametrize("m", [40, 300])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["fp8", "fp8_pc_pt", "w4a8_awq"])
def test_codes_in(launch: Launch, device: torch.device, form: str, dtype: torch.dtype, m: int) -> None:
    for without in ((), ("bias",)):
        weight = weight_of(device, form, 512, 384, dtype, *without)
        x, w = some(m, 384, dtype, device), resident(weight, dtype)
        wanted = gate(exact(x, weight), SILU)
        assert_close(linear.gated(launch, x, w, SILU), wanted, dtype)
        if form == "fp8":
            codes = Codes((x.float() / STEP).to(E4M3), dtype)
            assert_close(linear.gated(launch, codes, w, SILU), wanted, dtype)


@pytest.mark.parametrize("form", ["none", "fp8"])
@pytest.mark.parametrize("reader", ["fp8", "w4a8_awq"])
def test_codes_out(launch: Launch, device: torch.device, reader: str, form: str) -> None:
    """They are those of the numbers in x's dtype; the largest where these are too large."""
    x, w = some(200, 256, BF16, device), resident(weight_of(device, form, 512, 256, BF16), BF16)
    read = resident(weight_of(device, reader, 128, 256, BF16), BF16)
    read = replace(read, scales=torch.tensor([1 / 0.0021, 0.0021], device=device))
    plain, codes = (linear.gated_natively(launch, x, w, SILU, given) for given in (None, read))
    wanted = plain.float() * (1 if read.smooth is None else read.smooth) * read.scales[0]
    assert torch.equal(codes.codes.float(), wanted.clamp(-448, 448).to(E4M3).float())
    assert codes.dtype == BF16 and codes.codes.float().any(1).all() and wanted.max() > 448


def test_order_is_kept(launch: Launch, device: torch.device) -> None:
    """Each reads what the one before it writes, launched before that has ended; the same as one after the other."""
    first, second = (resident(weight_of(device, "none", 2 * n, k, BF16), BF16) for n, k in ((512, 256), (256, 512)))
    x = some(300, 256, BF16, device)

    def chain(launched: Callable[[], None]) -> Tensor:
        found, y = [], x
        for turn in range(12):
            y = linear.gated(launch, y, (first, second)[turn % 2], Activation("silu", limit=1.0))
            if turn > 5:  # the memory of those before is taken again
                found.append(y.flatten())
            launched()
        return torch.cat(found)

    assert_order_is_kept(chain)


def test_large_sums(launch: Launch, device: torch.device) -> None:
    """Where exp(-gate) has no number."""
    weight = weight_of(device, "none", 512, 256, BF16)
    x = some(130, 256, BF16, device) * 120
    sums = exact(x, weight)
    assert sums.min() < -100
    assert_close(linear.gated(launch, x, resident(weight, BF16), SILU), gate(sums, SILU), BF16)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_a_number(launch: Launch, device: torch.device, number: float) -> None:
    """In one token: others are what they are without it."""
    w, x = resident(weight_of(device, "none", 512, 256, BF16), BF16), some(200, 256, BF16, device)
    wanted = linear.gated(launch, x, w, SILU)
    x[70, 9] = number
    found = linear.gated(launch, x, w, SILU)
    others = torch.arange(200, device=device) != 70
    assert torch.equal(found[others], wanted[others]) and not found[70].isfinite().all()


def test_long(launch: Launch, device: torch.device) -> None:
    """Many tiles for each program, whose rings go round many times: the same again and again."""
    weight = weight_of(device, "none", 2 * 4096, 2048, BF16)
    x, w = some(1500, 2048, BF16, device), resident(weight, BF16)
    wanted = linear.gated(launch, x, w, SILU)
    assert_close(wanted, gate(exact(x, weight), SILU), BF16)
    for _ in range(20):
        assert torch.equal(linear.gated(launch, x, w, SILU), wanted)
