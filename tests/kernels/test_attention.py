"""Attention kernels against softmax(QKᵀ)V, written out in fp32 one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import mend
from trtx.converters.spec import Alibi
from trtx.quantize.formats import FORMATS
from trtx.runtime.cuda import linear
from trtx.runtime.cuda.attention import (
    AttentionStep,
    CachedAttention,
    HeadNorm,
    Rotation,
    Slopes,
    Tiling,
    attention,
    latent_attention,
    query_tile,
    store_latents,
    tiles_of,
)
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.ops.torch_attention import alibi_bias

E4M3 = torch.float8_e4m3fn
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of ‖out - expected‖ / ‖expected‖."""

if not torch.cuda.is_available():
    mend()


@dataclass
class World:
    """Sequences of given KV lengths and numbers of new tokens, and a cache full of NaN but for their past.

    Attributes:
        known: each sequence's keys and values (or latents) [length, kv_heads, dim] in fp32, as they are read back.
        new: keys and values of the new tokens, [T, kv_heads, dim].
    """

    step: AttentionStep
    arrays: list[Tensor]
    known: list[list[Tensor]]
    new: list[Tensor]
    q_lens: list[int]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.q_lens)


def world(
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    q_lens: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    scales: tuple[float, float] = (1.0, 1.0),
    cached: torch.dtype | None = None,
    arrays: int = 2,
    spare: int = 0,
    first_seen: int = 0,
) -> World:
    """New tokens are cached already only where there is one array: latents.

    Args:
        cached: what the cache is in.
        spare: padding sequences and tokens at the end of the decodes.
        first_seen: blocks before it are given back.
    """
    cached = cached or dtype
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + dim)
    width = max(-(-length // block_size) for length in lengths) + 2
    blocks = 1 + len(lengths) * width
    order = (1 + torch.randperm(blocks - 1, generator=generator)).tolist()
    tables = torch.zeros(len(lengths) + spare, width, dtype=torch.int32)
    store = [torch.full((blocks, kv_heads, block_size, dim), float("nan")) for _ in range(arrays)]
    known: list[list[Tensor]] = []
    for index, (length, count) in enumerate(zip(lengths, q_lens, strict=True)):
        rows = [torch.randn(length, kv_heads, dim, generator=generator) for _ in range(arrays)]
        most = torch.finfo(cached).max  # beyond, torch 2.11 makes e4m3 NaN
        rows = [(row / scale).clamp(-most, most).to(cached) for row, scale in zip(rows, scales, strict=False)]
        for block in range(first_seen // block_size, -(-length // block_size)):
            tables[index, block] = order.pop()
            some = slice(block * block_size, min((block + 1) * block_size, length - (count if arrays > 1 else 0)))
            for array, row in zip(store, rows, strict=True):
                part = row[some].float().transpose(0, 1)
                array[tables[index, block], :, : part.shape[1]] = part
        known.append([row.float() * scale for row, scale in zip(rows, scales, strict=False)])
    new = [torch.cat([rows[n][-count:] for rows, count in zip(known, q_lens, strict=True)]) for n in range(arrays)]
    new = [torch.cat([rows, rows.new_full((spare, *rows.shape[1:]), float("nan"))]).to(device, dtype) for rows in new]
    decodes = next((i for i, count in enumerate(q_lens) if count > 1), len(q_lens))
    assert not spare or decodes == len(q_lens)
    positions = [length - count + i for length, count in zip(lengths, q_lens, strict=True) for i in range(count)]
    owners = [index for index, count in enumerate(q_lens) for _ in range(count)]
    starts = torch.tensor([0, *q_lens, *[1] * spare]).cumsum(0)
    tile = query_tile(heads, kv_heads, dim, dtype.itemsize)
    tiles = [*tiles_of(q_lens, lengths, decodes, tile), (-1, 0)] if decodes < len(q_lens) else []

    def ids(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    step = AttentionStep(
        positions=ids(positions + [0] * spare),
        sequence=ids(owners + [-1] * spare),
        starts=ids(starts),
        lengths=ids(lengths + [0] * spare),
        tables=[ids(tables)],
        tiles=ids(tiles).view(-1, 2),
        decodes=decodes + spare,
        counters=ids([0] * ((len(lengths) + spare) * heads)),
    )
    return World(step, [array.to(device, cached) for array in store], known, new, q_lens, lengths)


def expected_attention(
    w: World,
    q: Tensor,
    scale: float,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    value_dim: int | None = None,
) -> Tensor:
    """[T, heads, value_dim] in fp32; bias [heads, positions]."""
    outputs, first = [], 0
    for (keys, *rest), count, length in zip(w.known, w.q_lens, w.lengths, strict=True):
        values = (rest[0] if rest else keys)[..., :value_dim]
        queries = q[first : first + count].float().cpu()
        first += count
        heads = queries.shape[1]
        keys, values = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, None, :length]
        at, to = torch.arange(length - count, length)[:, None], torch.arange(length)[None, :]
        seen = to <= at
        if window:
            seen &= to >= at // window * window if chunked else to > at - window
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.cpu().view(-1, 1, 1).expand(-1, count, 1)], dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values))
    return torch.cat(outputs)


def queries(w: World, dtype: torch.dtype, device: torch.device, heads: int = 4, dim: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(len(w.step.positions), heads, dim, generator=generator).to(device, dtype)


def run(launch: Launch, w: World, q: Tensor, scales: tuple[float, float] = (1.0, 1.0), **options: object) -> Tensor:
    """The kernel's answer, [T, heads, dim], where torch gives memory full of NaN."""
    settings = {
        "rotation": Rotation(), "scale": q.shape[-1] ** -0.5, "window": None, "chunked": False, "softcap": None,
        "sinks": None, "alibi": None,
    } | options  # fmt: skip
    table = w.step.tables[0]
    out = attention(launch, q, *w.new, *w.arrays, w.step, table, **settings, k_scale=scales[0], v_scale=scales[1])
    assert not w.step.counters.any()
    return out.view(len(q), q.shape[1], -1)


def check(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (out.float().cpu() - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], error


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN."""
    empty = torch.empty

    def nan(*args: object, **kwargs: object) -> Tensor:
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", nan)


DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).split(".")[1])


def expected_rotation(
    x: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    rope_dim: int,
    norm: HeadNorm | None,
    norm_after_rope: bool,
) -> Tensor:
    """x [T, heads, dim] in fp32, normalized and rotated."""

    def normed(y: Tensor) -> Tensor:
        assert norm is not None
        y = y - y.mean(-1, keepdim=True) if norm.kind == "layer" else y
        y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        y = y if norm.weight is None else y * norm.weight.float()
        return y if norm.bias is None else y + norm.bias.float()

    y = x.float()
    if norm and not norm_after_rope:
        y = normed(y)
    if rotation:
        cos, sin = (table[positions.long(), None] for table in rotation)
        first, second, rest = y.split([rope_dim // 2, rope_dim // 2, y.shape[-1] - rope_dim], dim=-1)
        y = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return normed(y) if norm and norm_after_rope else y


def random_norm(device: torch.device, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> HeadNorm:
    weight = (1 + torch.randn(shape) / 4).to(device, dtype)
    return HeadNorm(weight, torch.randn(shape).to(device, dtype) if kind == "layer" else None, 1e-5, kind)


class TestRotation:
    def run(
        self,
        launch: Launch,
        device: torch.device,
        dtype: torch.dtype,
        dim: int = 64,
        rope_dim: int | None = 64,
        norms: tuple[HeadNorm, HeadNorm] = (None, None),
        last: bool = False,
        scaling: tuple[float, float] | None = None,
        cached: torch.dtype | None = None,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        torch.manual_seed(0)
        w = world(device, dtype, [70, 33, 30], [1, 1, 4], 6, 3, dim, cached=cached, scales=scales)
        q, *w.new = torch.randn(6, 12 * dim).to(device, dtype).unflatten(1, (12, dim)).split([6, 3, 3], dim=1)
        angles = torch.rand(80, (rope_dim or 0) // 2, device=device) * 7
        tables = (angles.cos() * 1.1, angles.sin() * 1.1) if rope_dim else None
        rotation = Rotation(tables, rope_dim or 0, *norms, last, scaling)
        out = run(launch, w, q, scales, rotation=rotation, scale=0.1)

        at = w.step.positions
        rotated = expected_rotation(q, at, tables, rope_dim or 0, norms[0], last)
        if scaling:
            floor, scale = scaling
            rotated = rotated * (1 + scale * torch.log1p(torch.floor((at.float() + 1) / floor)))[:, None, None]
        key, value = expected_rotation(w.new[0], at, tables, rope_dim or 0, norms[1], last), w.new[1].float()
        table, size = w.step.tables[0], w.arrays[0].shape[2]
        for n, (array, expected, scale) in enumerate(zip(w.arrays, (key, value), scales, strict=True)):
            rows = [array[table[w.step.sequence[t], at[t] // size], :, at[t] % size].float() * scale for t in range(6)]
            if cached:
                expected = (expected / scale).clamp(-448, 448).to(cached).float() * scale
            check(torch.stack(rows), expected.cpu(), torch.bfloat16 if cached else dtype)
            assert array.float().isfinite().sum() == sum(w.lengths) * 3 * dim, "nothing else is written"
            for known, some in zip(w.known, expected.cpu().split(w.q_lens), strict=True):
                known[n][-len(some) :] = some
        check(out, expected_attention(w, rotated, 0.1), dtype)

    @DTYPES
    @pytest.mark.parametrize(("dim", "rope_dim"), [(64, 64), (80, 32), (128, None)])
    def test_rotation(
        self, launch: Launch, device: torch.device, dtype: torch.dtype, dim: int, rope_dim: int | None
    ) -> None:
        self.run(launch, device, dtype, dim, rope_dim)

    @pytest.mark.parametrize("kind", ["rms", "layer"])
    @pytest.mark.parametrize("per_head", [False, True])
    def test_norm(self, launch: Launch, device: torch.device, kind: str, per_head: bool) -> None:
        shapes = [(6, 80), (3, 80)] if per_head else [(80,), (80,)]
        norms = [random_norm(device, kind, shape, torch.bfloat16) for shape in shapes]
        self.run(launch, device, torch.bfloat16, 80, 48, (norms[0], norms[1]))

    def test_unit_norm_after_the_rotation(self, launch: Launch, device: torch.device) -> None:
        unit = HeadNorm(None, None, 1e-5, "unit")
        self.run(launch, device, torch.float32, norms=(unit, unit), last=True)

    def test_query_scaling(self, launch: Launch, device: torch.device) -> None:
        self.run(launch, device, torch.float32, rope_dim=None, scaling=(8.0, 0.1))

    def test_e4m3_cache(self, launch: Launch, device: torch.device) -> None:
        self.run(launch, device, torch.float16, cached=E4M3, scales=(0.01, 0.004))

    def test_padding_is_not_stored(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [30], [4])
        w.step.sequence.fill_(-1)
        CachedAttention(launch, *w.arrays, w.step.tables[0], 64).store(*w.new, w.step)
        assert all(array.isfinite().sum() == 26 * 2 * 64 for array in w.arrays)


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(3, 3, 80), (9, 3, 64), (20, 1, 96), (2, 1, 256), (6, 2, 8)]
)


class TestDecode:
    @DTYPES
    @pytest.mark.parametrize("block_size", [8, 32])
    def test_all_dtypes(self, launch: Launch, device: torch.device, dtype: torch.dtype, block_size: int) -> None:
        w = world(device, dtype, [1, 37, 150], [1, 1, 1], block_size=block_size)
        q = queries(w, dtype, device)
        check(run(launch, w, q), expected_attention(w, q, 64**-0.5), dtype)

    @SHAPES
    def test_shapes(self, launch: Launch, device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
        w = world(device, torch.float16, [70, 3], [1, 1], heads, kv_heads, dim)
        q = queries(w, torch.float16, device, heads, dim)
        check(run(launch, w, q), expected_attention(w, q, dim**-0.5), torch.float16)

    def test_more_shares_than_are_added_at_once(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [900], [1], 8, 1, 16)
        q = queries(w, torch.float32, device, 8, 16)
        check(run(launch, w, q, scale=1.0), expected_attention(w, q, 1.0), torch.float32)

    @pytest.mark.parametrize("long", [32, 64, 256])
    def test_of_many_sequences_only_long_ones_are_split(
        self, launch: Launch, device: torch.device, monkeypatch: pytest.MonkeyPatch, long: int
    ) -> None:
        for name, value in {"_MULTIPROCESSORS": 1, "_PROGRAMS": 4, "_LONG": long}.items():
            monkeypatch.setattr(f"trtx.runtime.cuda.attention.{name}", value)
        w = world(device, torch.float32, [5, 140, 64], [1, 1, 1])
        q = queries(w, torch.float32, device)
        check(run(launch, w, q), expected_attention(w, q, 64**-0.5), torch.float32)

    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("window", [5, 48])
    def test_window(self, launch: Launch, device: torch.device, window: int, chunked: bool) -> None:
        first = 96 if chunked and window == 48 else 100 // window * window if chunked else 101 - window
        w = world(device, torch.float32, [101], [1], first_seen=first)
        q = queries(w, torch.float32, device)
        out = run(launch, w, q, window=window, chunked=chunked)
        check(out, expected_attention(w, q, 64**-0.5, window, chunked), torch.float32)

    def test_soft_cap_and_sinks(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [90, 1], [1, 1])
        q, sinks = 4 * queries(w, torch.float32, device), torch.tensor([-1.0, 3.0, 0.5, 20.0], device=device)
        out = run(launch, w, q, scale=1.0, softcap=5.0, sinks=sinks)
        check(out, expected_attention(w, q, 1.0, softcap=5.0, sinks=sinks), torch.float32)

    @pytest.mark.parametrize("alibi", [Alibi(scale=0.3), Alibi(scale=0.3, rounded=True)], ids=["exact", "rounded"])
    def test_alibi(self, launch: Launch, device: torch.device, alibi: Alibi) -> None:
        w = world(device, torch.float32, [300, 20], [1, 1], heads=6)
        q = queries(w, torch.float32, device, heads=6)
        bias = alibi_bias(alibi, 6, torch.arange(300)[None])[0]
        out = run(launch, w, q, alibi=Slopes.of(alibi, 6, device))
        check(out, expected_attention(w, q, 64**-0.5, bias=bias), torch.float32)

    def test_e4m3_cache(self, launch: Launch, device: torch.device) -> None:
        scales = (0.02, 0.05)
        w = world(device, torch.bfloat16, [33, 100], [1, 1], scales=scales, cached=E4M3)
        q = queries(w, torch.bfloat16, device)
        check(run(launch, w, q, scales), expected_attention(w, q, 64**-0.5), torch.bfloat16)

    def test_padding_gives_zeros(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [40], [1], spare=2)
        out = run(launch, w, queries(w, torch.float32, device))
        assert not out[1:].any()
        assert all(array.isfinite().sum() == 40 * 2 * 64 for array in w.arrays)


class TestPrefill:
    @DTYPES
    @pytest.mark.parametrize("block_size", [8, 64])
    def test_all_dtypes(self, launch: Launch, device: torch.device, dtype: torch.dtype, block_size: int) -> None:
        w = world(device, dtype, [20, 150, 70, 5], [1, 80, 30, 5], block_size=block_size)
        q = queries(w, dtype, device)
        check(run(launch, w, q), expected_attention(w, q, 64**-0.5), dtype)

    @SHAPES
    def test_shapes(self, launch: Launch, device: torch.device, heads: int, kv_heads: int, dim: int) -> None:
        w = world(device, torch.float16, [70, 37], [40, 37], heads, kv_heads, dim)
        q = queries(w, torch.float16, device, heads, dim)
        check(run(launch, w, q), expected_attention(w, q, dim**-0.5), torch.float16)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("window", [5, 48, 140])
    def test_window(self, launch: Launch, device: torch.device, dtype: torch.dtype, window: int, chunked: bool) -> None:
        w = world(device, dtype, [400, 64], [150, 64], 2, 2, 16)
        q = queries(w, dtype, device, 2, 16)
        out = run(launch, w, q, window=window, chunked=chunked)
        check(out, expected_attention(w, q, 0.25, window, chunked), dtype)

    def test_blocks_behind_the_window_are_not_seen(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [200], [60], first_seen=140 - 24 + 1)
        q = queries(w, torch.float32, device)
        check(run(launch, w, q, window=24), expected_attention(w, q, 64**-0.5, 24), torch.float32)

    def test_soft_cap_and_sinks(self, launch: Launch, device: torch.device) -> None:
        w = world(device, torch.float32, [90, 6], [50, 6])
        q, sinks = 4 * queries(w, torch.float32, device), torch.tensor([-1.0, 3.0, 0.5, 20.0], device=device)
        out = run(launch, w, q, scale=1.0, softcap=5.0, sinks=sinks)
        check(out, expected_attention(w, q, 1.0, softcap=5.0, sinks=sinks), torch.float32)

    @pytest.mark.parametrize("alibi", [Alibi(scale=0.3), Alibi(scale=0.3, rounded=True)], ids=["exact", "rounded"])
    def test_alibi(self, launch: Launch, device: torch.device, alibi: Alibi) -> None:
        w = world(device, torch.float32, [100, 20], [40, 20], heads=6)
        q = queries(w, torch.float32, device, heads=6)
        bias = alibi_bias(alibi, 6, torch.arange(100)[None])[0]
        out = run(launch, w, q, alibi=Slopes.of(alibi, 6, device))
        check(out, expected_attention(w, q, 64**-0.5, bias=bias), torch.float32)

    def test_e4m3_cache(self, launch: Launch, device: torch.device) -> None:
        scales = (0.02, 0.05)
        w = world(device, torch.bfloat16, [33, 100], [33, 20], scales=scales, cached=E4M3)
        q = queries(w, torch.bfloat16, device)
        check(run(launch, w, q, scales), expected_attention(w, q, 64**-0.5), torch.bfloat16)


@pytest.mark.parametrize("form", ["fp8", "w4a8_awq"])
class TestCodes:
    """They are what `quantize` gives of the numbers in bf16."""

    def reader(self, form: str, width: int, device: torch.device) -> linear.CudaLinear:
        """A linear that takes them; of numbers near 1 on, they are the largest there are."""
        torch.manual_seed(0)
        tensors = {"weight": torch.zeros(16, width).to(E4M3), "weight_scale": torch.ones(())}
        tensors["input_scale"] = torch.tensor(0.0021)
        if form == "w4a8_awq":
            tensors["pre_quant_scale"] = torch.rand(width) + 0.5
        tensors = {suffix: tensor.to(device) for suffix, tensor in tensors.items()}
        return linear.resident("o", FORMATS[form], tensors, (16,), torch.bfloat16)

    @pytest.mark.parametrize("splits", [1, 3])
    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 80), (20, 1, 16)])
    def test_decode(
        self, launch: Launch, device: torch.device, form: str, heads: int, kv_heads: int, dim: int, splits: int
    ) -> None:
        """Also what several programs found together, and of sequences that are padding."""
        w = world(device, torch.bfloat16, [1, 37, 150], [1, 1, 1], heads, kv_heads, dim, spare=1)
        q, reader = queries(w, torch.bfloat16, device, heads, dim), self.reader(form, heads * dim, device)
        layer = CachedAttention(launch, *w.arrays, w.step.tables[0], dim)
        plain = torch.empty(4, heads * dim, dtype=q.dtype, device=device)
        codes = torch.empty(4, heads * dim, dtype=E4M3, device=device)
        for out, scales in ((plain, None), (codes, (reader.scales, reader.smooth))):
            layer.decode(q, w.new, w.step, dim**-0.5, out, Tiling(16, 32, 4, 1), splits, scales)
        assert torch.equal(codes.float(), linear.quantize(launch, plain, reader)[0].float())
        assert codes[:3].float().any(1).all() and not codes[3].float().any()

    @pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 80), (4, 4, 16)])
    def test_prefill_beside_decodes(
        self, launch: Launch, device: torch.device, form: str, heads: int, kv_heads: int, dim: int
    ) -> None:
        w = world(device, torch.bfloat16, [40, 60, 33], [1, 50, 33], heads, kv_heads, dim)
        q, reader = queries(w, torch.bfloat16, device, heads, dim), self.reader(form, heads * dim, device)
        plain, codes = (run(launch, w, q, codes=given) for given in (None, (reader.scales, reader.smooth)))
        wanted, _ = linear.quantize(launch, plain.flatten(1), reader)
        assert codes.dtype == E4M3 and torch.equal(codes.flatten(1).float(), wanted.float())
        assert plain.dtype == q.dtype and wanted.float().abs().max() == 448


class TestLatentAttention:
    @pytest.mark.parametrize(("heads", "rank", "rope"), [(4, 64, 16), (20, 40, 8), (3, 128, 64)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_latents_are_keys_and_values(
        self, launch: Launch, device: torch.device, dtype: torch.dtype, heads: int, rank: int, rope: int
    ) -> None:
        w = world(device, dtype, [40, 50, 35], [1, 1, 9], heads, 1, rank + rope, arrays=1)
        q = queries(w, dtype, device, heads, rank + rope)
        out = latent_attention(launch, q, w.arrays[0], w.step, w.step.tables[0], scale=0.1, rank=rank)
        assert out.shape == (11, heads, rank)
        check(out, expected_attention(w, q, 0.1, value_dim=rank), dtype)

    @DTYPES
    def test_latents_are_stored(self, launch: Launch, device: torch.device, dtype: torch.dtype) -> None:
        w = world(device, dtype, [70, 1, 30], [1, 1, 4], 4, 1, 40 + 8, arrays=1)
        w.step.sequence[1] = -1
        (latents,) = w.arrays
        latents.fill_(float("nan"))
        latent, k_rope = torch.randn(6, 1, 60).to(device, dtype).split([52, 8], dim=-1)
        store_latents(launch, latent[:, 0, :40], k_rope, w.step, w.step.tables[0], latents)
        at, size, table = w.step.positions, latents.shape[2], w.step.tables[0]
        known = [0, 2, 3, 4, 5]
        rows = torch.stack([latents[table[w.step.sequence[t], at[t] // size], 0, at[t] % size] for t in known])
        assert torch.equal(rows, torch.cat([latent[known, 0, :40], k_rope[known, 0]], dim=-1))
        assert latents.isfinite().sum() == rows.numel(), "nothing else is written"
