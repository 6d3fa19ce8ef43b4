"""decode.cu on a GPU, compiled there, against softmax(QKᵀ)V, written out one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.test_gemv4 import BF16, FP16, assert_order_is_kept
from tests.gpu.test_gemv4 import device as device
from tests.gpu.test_gemv4 import launch as launch
from tests.kernels.checks import poisoned as poisoned
from tests.kernels.test_attention import World, expected_attention, expected_rotation, queries, random_norm, world
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.attention import CachedAttention, DecodeShape, HeadNorm, Rotation
from trtx.runtime.cuda.launch import Launch

pytestmark = pytest.mark.gpu

TOLERANCES = {BF16: 6e-3, FP16: 1e-3}
"""Of ‖out - expected‖ / ‖expected‖ of a head: its own rounding, and that of the weights."""

ONE, SHARED = DecodeShape(1, 4, 1, 1, 1), DecodeShape(2, 2, 1, 5, 2)
"""A program for each key head of a sequence, and up to five."""


def layer_of(launch: Launch, w: World, scales: tuple[float, float] = (1.0, 1.0), **options: object) -> CachedAttention:
    settings: dict = {"k_scale": scales[0], "v_scale": scales[1], **options}
    return CachedAttention(launch, *w.arrays, w.step.tables[0], w.arrays[0].shape[-1], **settings)


def run(
    layer: CachedAttention, w: World, q: Tensor, scale: float, shape: DecodeShape | None = None,
    codes: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """[sequences, heads, dim], where memory that nothing is written to is NaN."""
    out = torch.full((len(q), q[0].numel()), float("nan"), device=q.device).to(E4M3 if codes else q.dtype)
    assert layer.fits(q, tuple(w.new), codes)
    layer.decode_natively(q, tuple(w.new), w.step, scale * layer.k_scale, out, codes, shape)
    assert not w.step.counters.any()
    return out.unflatten(1, q.shape[1:])


def check(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Each head of each sequence."""
    errors = (out.float().cpu() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (errors < TOLERANCES[dtype]).all(), errors.max()


@pytest.mark.parametrize("shape", [None, ONE, SHARED], ids=["chosen", "one", "shared"])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(8, 2, 128), (8, 2, 64), (3, 3, 80), (20, 2, 64), (2, 1, 96), (16, 1, 128), (6, 2, 32), (2, 2, 16)],
)
@pytest.mark.parametrize(
    ("dtype", "cached"), [(BF16, BF16), (FP16, FP16), (BF16, E4M3), (FP16, E4M3)],
    ids=["bf16", "fp16", "e4m3 for bf16", "e4m3 for fp16"],
)  # fmt: skip
def test_lengths(
    launch: Launch, device: torch.device, dtype: torch.dtype, cached: torch.dtype, heads: int, kv_heads: int, dim: int,
    block_size: int, shape: DecodeShape | None,
) -> None:  # fmt: skip
    """Those around the ends of tiles and blocks, and sequences that are padding, whose numbers are NaN."""
    if cached == E4M3 and dim % 32:
        pytest.skip("left to Triton")
    lengths, scales = [1, 2, 9, 16, 17, 18, 33, 66, 150, 301], (0.02, 0.03) if cached == E4M3 else (1.0, 1.0)
    w = world(
        device, dtype, lengths, [1] * len(lengths), heads, kv_heads, dim, block_size, scales, cached, spare=2
    )  # fmt: skip
    q = queries(w, dtype, device, heads, dim)
    out = run(layer_of(launch, w, scales), w, q, dim**-0.5, shape)
    check(out[:-2], expected_attention(w, q, dim**-0.5), dtype)
    assert not out[-2:].any()
    for array in w.arrays:
        assert array.float().isfinite().sum() == sum(lengths) * kv_heads * dim, "nothing else is written"


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
@pytest.mark.parametrize("warps", [1, 3, 8])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_shapes_of_launches(launch: Launch, device: torch.device, tiles: int, warps: int, splits: int) -> None:
    """Again and again into the same memory: counters are as they were."""
    w = world(device, BF16, [1, 17, 600, 333], [1] * 4, 8, 2, 64)
    q, layer = queries(w, BF16, device, 8, 64), layer_of(launch, w)
    for at_least in (1, 4):
        for _ in range(3):
            out = run(layer, w, q, 0.125, DecodeShape(tiles, warps, 1, splits, at_least))
            check(out, expected_attention(w, q, 0.125), BF16)


def norms_of(device: torch.device, kind: str, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[HeadNorm]:
    """Of queries and keys; 'rms per head' has weights for each."""
    if kind == "unit":
        return [HeadNorm(None, None, 1e-5, "unit")] * 2
    return [random_norm(device, "rms", (count, dim) if kind == "rms per head" else (dim,), dtype) for count in heads]


@pytest.mark.parametrize("cached", [BF16, E4M3], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("norm", [None, "rms", "rms per head", "unit"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("dim", "rope"), [(128, 128), (64, 64), (128, 64), (64, 24), (96, 48), (128, 0)])
def test_rotation(
    launch: Launch, device: torch.device, dim: int, rope: int, last: bool, norm: str | None, cached: torch.dtype
) -> None:
    """Queries and keys; the latter are in the cache then."""
    torch.manual_seed(0)
    scales = (0.03, 0.02) if cached == E4M3 else (1.0, 1.0)
    w = world(device, BF16, [70, 33, 1, 40], [1] * 4, 12, 3, dim, scales=scales, cached=cached)
    q, *w.new = torch.randn(4, 18 * dim).to(device, BF16).unflatten(1, (18, dim)).split([12, 3, 3], dim=1)
    angles = torch.rand(80, rope // 2, device=device) * 7
    tables = (angles.cos() * 1.1, angles.sin() * 1.1) if rope else None
    norms = norms_of(device, norm, (12, 3), dim, torch.float32 if rope == 128 else BF16) if norm else [None, None]
    rotation = Rotation(tables, rope, *norms, last, (8.0, 0.1) if rope == 64 else None)
    out = run(layer_of(launch, w, scales, rotation=rotation), w, q, 0.1)

    at, table, size = w.step.positions, w.step.tables[0], w.arrays[0].shape[2]
    rotated = expected_rotation(q, at, tables, rope, norms[0], last)
    if rope == 64:
        rotated = rotated * (1 + 0.1 * torch.log1p(torch.floor((at.float() + 1) / 8.0)))[:, None, None]
    key, value = expected_rotation(w.new[0], at, tables, rope, norms[1], last), w.new[1].float()
    for n, (array, wanted, scale) in enumerate(zip(w.arrays, (key, value), scales, strict=True)):
        rows = torch.stack([array[table[i, at[i] // size], :, at[i] % size].float() * scale for i in range(4)])
        limits = torch.finfo(cached)
        apart = (rows - wanted).abs() / (limits.eps * (wanted.abs() + scale * limits.tiny))
        assert apart.max() < 0.51, "as near as the cache's dtype has a number"
        assert array.float().isfinite().sum() == sum(w.lengths) * 3 * dim, "nothing else is written"
        for known, row in zip(w.known, rows.cpu(), strict=True):
            known[n][-1] = row
    check(out, expected_attention(w, rotated.to(BF16), 0.1), BF16)


@pytest.mark.parametrize("shape", [ONE, SHARED], ids=["one", "shared"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("window", [1, 5, 32, 48, 1000])
def test_window(launch: Launch, device: torch.device, window: int, chunked: bool, shape: DecodeShape) -> None:
    for length in (97, 101, 300):
        first = (length - 1) // window * window if chunked else max(length - window, 0)
        w = world(device, FP16, [length], [1], first_seen=first)
        q = queries(w, FP16, device)
        out = run(layer_of(launch, w, window=window, chunked=chunked), w, q, 0.125, shape)
        check(out, expected_attention(w, q, 0.125, window, chunked), FP16)


@pytest.mark.parametrize("shape", [ONE, SHARED], ids=["one", "shared"])
def test_soft_cap_and_sinks(launch: Launch, device: torch.device, shape: DecodeShape) -> None:
    w = world(device, FP16, [90, 1, 400], [1] * 3)
    q, sinks = 4 * queries(w, FP16, device), torch.tensor([-1.0, 3.0, 0.5, 20.0], device=device)
    out = run(layer_of(launch, w, softcap=5.0, sinks=sinks), w, q, 1.0, shape)
    wanted = expected_attention(w, q, 1.0, softcap=5.0, sinks=sinks)
    check(out[:, :3], wanted[:, :3], FP16)
    assert (out.cpu().float() - wanted)[:, 3].abs().max() < 1e-6, "next to nothing"


@pytest.mark.parametrize("shape", [ONE, SHARED], ids=["one", "shared"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_codes(launch: Launch, device: torch.device, smoothed: bool, shape: DecodeShape) -> None:
    """They are those of the numbers in q's dtype; the largest where these are too large."""
    w = world(device, BF16, [1, 37, 150], [1] * 3, 6, 2, 80, spare=1)
    q, layer = queries(w, BF16, device, 6, 80), layer_of(launch, w)
    scales = torch.tensor([1 / 0.0021, 0.0021], device=device)
    smooth = torch.rand(480, device=device) + 0.5 if smoothed else None
    plain, codes = (run(layer, w, q, 80**-0.5, shape, given) for given in (None, (scales, smooth)))
    wanted = plain.float() * (1 if smooth is None else smooth.view(6, 80)) * scales[0]
    assert torch.equal(codes.float(), wanted.clamp(-448, 448).to(E4M3).float())
    assert codes[:3].float().any(2).all() and not codes[3].float().any() and wanted.max() > 448


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_a_number(launch: Launch, device: torch.device, number: float) -> None:
    """In a value of one sequence: others are what they are without it."""
    w = world(device, BF16, [50, 70, 20], [1] * 3)
    q, layer = queries(w, BF16, device), layer_of(launch, w)
    wanted = run(layer, w, q, 0.125)
    w.arrays[1][w.step.tables[0][1, 2], 0, 3, 5] = number
    out = run(layer, w, q, 0.125)
    assert not out[1, :2, 5].isfinite().any()
    out[1, :2, 5] = wanted[1, :2, 5]
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("shape", [None, SHARED], ids=["chosen", "shared"])
def test_launched_dependently(launch: Launch, device: torch.device, shape: DecodeShape | None) -> None:
    """Each reads queries, keys and values that the one before wrote: the same whether it starts early or not."""
    w = world(device, BF16, [300, 20, 150, 77], [1] * 4, 4, 4, 64)
    layers = [
        layer_of(launch, replace(w, arrays=[array.nan_to_num() for array in w.arrays])) for _ in range(6)
    ]  # fmt: skip

    def attend(layer: CachedAttention, x: Tensor, out: Tensor) -> None:
        layer.decode_natively(x, (x, x), w.step, 0.125, out, None, shape)

    assert_layers_keep_order(layers, queries(w, BF16, device), attend)


def assert_layers_keep_order(
    layers: list[CachedAttention], first: Tensor, attend: Callable[[CachedAttention, Tensor, Tensor], None]
) -> None:  # fmt: skip
    """Of layers that attend by what the one before wrote, beginning with `first`."""

    def chain(launched: Callable[[], None]) -> Tensor:
        x = first
        for layer in layers:
            y = torch.empty_like(x)
            attend(layer, x, y.flatten(1))
            launched()
            x = y
        return x

    assert_order_is_kept(chain, 20)
