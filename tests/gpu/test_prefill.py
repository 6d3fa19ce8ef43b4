"""prefill.cu on an H100, compiled there, against softmax(QKᵀ)V, written out one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.test_decode import TOLERANCES, assert_layers_keep_order, layer_of
from tests.gpu.test_gemv4 import BF16, FP16, Native
from tests.gpu.test_gemv4 import device as device
from tests.kernels.checks import poisoned as poisoned
from tests.kernels.test_attention import World, expected_attention, expected_rotation, queries, random_norm, world
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.attention import CachedAttention, HeadNorm, PrefillShape, Rotation
from trtx.runtime.cuda.launch import Launch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def launch() -> Launch:
    native = Native()
    if not native.hopper:
        pytest.skip("for compute capability 9.0 alone")
    return native


def stored_world(device: torch.device, dtype: torch.dtype, *args: object) -> World:
    """A world whose new tokens are in the cache."""
    w = world(device, dtype, *args)
    size, (table,) = w.arrays[0].shape[2], w.step.tables
    at, owner = w.step.positions.long(), w.step.sequence.long()
    for array, new in zip(w.arrays, w.new, strict=True):
        array[table[owner, at // size].long(), :, at % size] = new
    return w


def run(
    layer: CachedAttention, w: World, q: Tensor, scale: float, shape: PrefillShape | None = None,
    codes: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """[T, heads, dim], where memory that nothing is written to is NaN."""
    out = torch.full((len(q), q[0].numel()), float("nan"), device=q.device).to(E4M3 if codes else q.dtype)
    assert layer.fits_prefill(q, codes)
    layer.prefill_natively(q, w.step, scale, out, codes, shape)
    return out.unflatten(1, q.shape[1:])


def check(out: Tensor, wanted: Tensor, w: World, dtype: torch.dtype) -> None:
    """Each head of each token of prompts; nothing is written for decodes."""
    first = w.step.decodes
    errors = (out.float().cpu() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (errors[first:] < TOLERANCES[dtype]).all(), errors[first:].max()
    assert out[:first].float().isnan().all()


STEPS = [
    ([40], [40]),
    ([50, 300, 77, 600], [1, 1, 77, 130]),
    ([129, 5, 128, 256], [129, 5, 128, 2]),
    ([700, 33, 2], [260, 33, 2]),
]
"""Lengths and new tokens: around the ends of tiles and pages, with a past or none, behind decodes."""


@pytest.mark.parametrize(
    ("block_size", "shape"),
    [(16, None), (32, None), (64, None), (32, PrefillShape(2, True, 1)), (32, PrefillShape(3, False, 5))],
    ids=str,
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (3, 3, 64), (7, 1, 128), (16, 1, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lengths(
    launch: Launch, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, block_size: int,
    shape: PrefillShape | None,
) -> None:  # fmt: skip
    for lengths, counts in STEPS:
        w = stored_world(device, dtype, lengths, counts, heads, kv_heads, dim, block_size)
        q = queries(w, dtype, device, heads, dim)
        out = run(layer_of(launch, w), w, q, dim**-0.5, shape)
        check(out, expected_attention(w, q, dim**-0.5), w, dtype)


@pytest.mark.parametrize("norm", [None, "rms", "rms per head", "unit"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("dim", "rope"), [(128, 128), (64, 64), (128, 0)])
def test_rotation(launch: Launch, device: torch.device, dim: int, rope: int, last: bool, norm: str | None) -> None:
    """Of queries that stand among keys and values, by more works than programs."""
    torch.manual_seed(0)
    w = stored_world(device, BF16, [70, 200], [1, 150], 12, 3, dim)
    q = torch.randn(151, 18 * dim).to(device, BF16).unflatten(1, (18, dim))[:, :12]
    angles = torch.rand(210, rope // 2, device=device) * 7
    tables = (angles.cos() * 1.1, angles.sin() * 1.1) if rope else None
    made = HeadNorm(None, None, 1e-5, "unit") if norm == "unit" else None
    if norm and not made:
        shape = (12, dim) if norm == "rms per head" else (dim,)
        made = random_norm(device, "rms", shape, torch.float32 if rope == 64 else BF16)
    rotation = Rotation(tables, rope, made, made, last, (8.0, 0.1) if rope == 64 else None)
    out = run(layer_of(launch, w, rotation=rotation), w, q, 0.1, PrefillShape(programs=2))

    at = w.step.positions
    rotated = expected_rotation(q, at, tables, rope, made, last)
    if rope == 64:
        rotated = rotated * (1 + 0.1 * torch.log1p(torch.floor((at.float() + 1) / 8.0)))[:, None, None]
    check(out, expected_attention(w, rotated.to(BF16), 0.1), w, BF16)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
def test_codes(launch: Launch, device: torch.device, dim: int, smoothed: bool) -> None:
    """They are those of the numbers in q's dtype; the largest where these are too large."""
    w = stored_world(device, BF16, [37, 150], [37, 20], 6, 2, dim)
    q, layer = queries(w, BF16, device, 6, dim), layer_of(launch, w)
    scales = torch.tensor([1 / 0.0021, 0.0021], device=device)
    smooth = torch.rand(6 * dim, device=device) + 0.5 if smoothed else None
    plain, codes = (run(layer, w, q, dim**-0.5, None, given) for given in (None, (scales, smooth)))
    wanted = plain.float() * (1 if smooth is None else smooth.view(6, dim)) * scales[0]
    assert torch.equal(codes.float(), wanted.clamp(-448, 448).to(E4M3).float())
    assert codes.float().any(2).all() and wanted.max() > 448


def test_long(launch: Launch, device: torch.device) -> None:
    """Many works for each program, whose rings go round many times: the same again and again."""
    w = stored_world(device, BF16, [2048, 1500, 3000], [2048, 700, 1000], 32, 8, 128, 32)
    q, layer = queries(w, BF16, device, 32, 128), layer_of(launch, w)
    wanted = run(layer, w, q, 0.09)
    check(wanted, expected_attention(w, q, 0.09), w, BF16)
    for _ in range(20):
        assert torch.equal(run(layer, w, q, 0.09), wanted)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_not_a_number(launch: Launch, device: torch.device, number: float) -> None:
    """In a value of one sequence: others are what they are without it."""
    w = stored_world(device, BF16, [150, 170], [150, 170], 4, 2, 64)
    q, layer = queries(w, BF16, device, 4, 64), layer_of(launch, w)
    wanted = run(layer, w, q, 0.125)
    w.arrays[1][w.step.tables[0][1, 9], 0, 3, 5] = number  # position 147, in the last tile of keys
    out = run(layer, w, q, 0.125)
    assert not out[150 + 147 :, :2, 5].isfinite().any()
    assert torch.equal(out[:150], wanted[:150]) and torch.equal(out[:, 2:], wanted[:, 2:])


def test_launched_dependently(launch: Launch, device: torch.device) -> None:
    """Each reads queries that the one before wrote: the same whether it starts early or not."""
    w = stored_world(device, BF16, [300, 200], [300, 150], 4, 4, 64)
    layers = [layer_of(launch, replace(w, arrays=[array.clone() for array in w.arrays])) for _ in range(6)]

    def attend(layer: CachedAttention, x: Tensor, out: Tensor) -> None:
        layer.prefill_natively(x, w.step, 0.125, out)

    assert_layers_keep_order(layers, queries(w, BF16, device, 4, 64), attend)
