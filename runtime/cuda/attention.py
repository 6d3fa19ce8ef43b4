"""Attention over the paged KV cache: shapes → launches of `runtime.kernels.attention`, or of decode.cu and prefill.cu
where they fit.

Keys and values of a layer are [blocks, kv_heads, block_size, head_dim], latents [blocks, 1, block_size, rank +
rope_dim]. Tokens of a step are packed, T of them; sequences that decode one token come before the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trtx.converters.spec import Alibi
from trtx.quantize.formats import E4M3
from trtx.runtime.cuda.launch import H100_SHARED, CodeScales, Constant, Launch, power_of_two
from trtx.runtime.ops.torch_attention import alibi_bias

_MULTIPROCESSORS = 132
"""Of an H100."""

_PROGRAMS = 4 * _MULTIPROCESSORS
"""How many programs of a decode step are wanted: enough to keep every multiprocessor of an H100 busy, twice over."""

_NATIVE_ROWS = 128
"""Of queries, and of keys, in a tile of prefill.cu: as in `prefill_tiling` for heads that it knows."""

_LONG = 1024
"""Tokens that one program of a decode step should take at least where there is no lack of programs."""

_FEW = 16
"""So many programs, without splits, may each take all of a multiprocessor's registers."""


@dataclass
class AttentionStep:
    """What attention needs to know of a step: int32 tensors on the device, for T tokens of B sequences.

    Attributes:
        positions: [T].
        sequence: [T], the sequence of each token; -1: padding of a captured graph, for which nothing is written.
        starts: [B + 1], the first token of each sequence.
        lengths: [B], the KV length, this step's tokens included; 0: padding.
        tables: per KV group [B, W], the block of each `block_size` positions.
        tiles: [N, 2], prefill work: a sequence and the first of a tile's tokens among its new ones, as `tiles_of`
            lists them; (-1, 0): nothing to do.
        decodes: the first so many sequences are single tokens; some may be padding, of length 0 and without a token.
            The tokens of the others follow.
        counters: [B * heads] or more, zeros; kernels leave them so.
    """

    positions: Tensor
    sequence: Tensor
    starts: Tensor
    lengths: Tensor
    tables: list[Tensor]
    tiles: Tensor
    decodes: int
    counters: Tensor


class HeadNorm(NamedTuple):
    """A norm of each head's query or key: weight and bias [head_dim] or [heads, head_dim]; 'unit' has none."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    kind: Literal["rms", "layer", "unit"]


class Rotation(NamedTuple):
    """What is done to a layer's queries and keys before they attend.

    Attributes:
        tables: cosines and sines, fp32 [positions, dim / 2]; None: no rotation.
        dim: the first features, which are rotated.
        norm_last: the norms come after the rotation.
        query_scaling: (floor, scale); see `converters.spec.QueryScaling`.
    """

    tables: tuple[Tensor, Tensor] | None = None
    dim: int = 0
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    norm_last: bool = False
    query_scaling: tuple[float, float] | None = None

    @property
    def angles(self) -> tuple[Tensor | None, Tensor | None]:
        return self.tables or (None, None)

    def constants(self) -> dict[str, Constant]:
        """Of kernels that rotate keys."""
        norm = self.q_norm or _UNCHANGED
        return {
            "ROPE": self.dim if self.tables else 0, "NORM": norm.kind if self.q_norm else "none",
            "NORM_LAST": self.norm_last, "PER_HEAD": norm.weight is not None and norm.weight.dim() == 2,
            "EPS": float(norm.eps),
        }  # fmt: skip

    def query_constants(self) -> dict[str, Constant]:
        """Of kernels that rotate queries."""
        floor, scale = self.query_scaling or (0.0, 0.0)
        return {**self.constants(), "FLOOR": float(floor), "SCALE": float(scale)}


_UNCHANGED = HeadNorm(None, None, 0.0, "unit")
_PLAIN = Rotation()


class Slopes(NamedTuple):
    """ALiBi on the device: fp32 [heads], and the scale of biases that are rounded to bf16 first (0: they are not)."""

    slopes: Tensor
    rounded: float

    @classmethod
    def of(cls, alibi: Alibi, heads: int, device: torch.device) -> Slopes:
        """For all the heads of a model."""
        first = torch.ones(1, 1, device=device)
        if alibi.rounded:
            return cls(alibi_bias(replace(alibi, scale=1.0), heads, first).flatten(), alibi.scale)
        return cls(alibi_bias(alibi, heads, first).flatten(), 0.0)


class Tiling(NamedTuple):
    """How a kernel cuts its work: query rows and keys of a tile, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0


def prefill_tiling(head_dim: int, itemsize: int, shared: int = H100_SHARED, programs: int = 1) -> Tiling:
    """For queries of `itemsize` bytes a number, and programs that may have `shared` bytes of shared memory.

    Few programs have a multiprocessor each, and five stages: block tables are loaded ahead of keys and values, and
    those two tiles ahead. Of many, two share one: while one computes its softmax, the other multiplies (measured on an
    H100: 482 TFLOP/s at 8192 tokens against 429).
    """
    width = power_of_two(head_dim)
    if itemsize == 4:
        return Tiling(16, 16, 4, 1) if width > 64 else Tiling(32, 32, 4, 1)
    if shared < H100_SHARED:
        if width > 256:
            return Tiling(16, 16, 4, 2)
        return Tiling(64, 32, 4, 2) if width > 128 else Tiling(64, 64, 4, 5)
    if width > 256:
        return Tiling(64, 32, 8, 2)
    if width > 128:
        return Tiling(128, 64, 8, 2)
    return Tiling(128, 64, 8, 2, 128) if programs >= _PROGRAMS // 2 else Tiling(128, 128, 8, 5)


def decode_tiling(
    sharing: int, head_dim: int, itemsize: int, shared: int = H100_SHARED, programs: int = _PROGRAMS
) -> Tiling:
    """For `sharing` query heads a key head, of `itemsize` bytes a number.

    What programs load before the kernel before has ended costs next to nothing, so few of them take as much at once as
    registers hold. Of more, each is a warp: so many fit side by side that their loads fill the memory's queue, and a
    multiprocessor is not left half empty at the end. (Llama-3.1-8B in bf16 on an H100: one sequence of 140 tokens takes
    5 µs with tiles of 256 keys and 10 with 64; eight of 640 take 12.6 with one warp and 15.2 with four, 256 of 137 take
    59 and 70.)

    Args:
        programs: that share the GPU's multiprocessors, without splits.
    """
    width = power_of_two(head_dim)
    rows = min(max(16, power_of_two(sharing)), 64)
    if itemsize == 4:
        return Tiling(16, 16, 4, 1) if width > 128 else Tiling(16, 32, 4, 1)
    if width > 256:
        return Tiling(16, 16, 4, 3) if shared < H100_SHARED else Tiling(min(rows, 32), 32, 8, 5)
    if programs <= _FEW and rows == 16 and shared >= H100_SHARED:
        return Tiling(rows, min(256, (1 << 15) // width), 8, 2)
    if rows == 16 and width <= 128:
        return Tiling(rows, 32, 1, 3)
    stages = 2 if programs < _MULTIPROCESSORS else 5
    return Tiling(rows, 32, 4, stages) if width > 128 else Tiling(rows, 64, 4, stages)


class DecodeShape(NamedTuple):
    """How decode.cu is launched: see there.

    Attributes:
        splits: programs that share the keys of a sequence.
        at_least: tiles in a share; fewer shares than programs are made of short sequences.
    """

    tiles: int
    warps: int
    blocks: int
    splits: int
    at_least: int


def decode_shape(programs: int, longest: int, row_bytes: int, sharing: int) -> DecodeShape:
    """For `programs` without splits, sequences of up to `longest` tokens whose keys have `row_bytes`, and `sharing`
    query heads a key head.

    Few programs are split until each multiprocessor has one, which takes all of its registers; of many, several share
    one, so that some load while others begin or end, and only long sequences are split.
    """
    if programs > _MULTIPROCESSORS // 2:
        tiles = 2 if row_bytes <= 128 and sharing <= 8 else 1
        return DecodeShape(tiles, 4, 3 if sharing <= 8 else 2, min(4, -(-longest // _LONG)), _LONG // (16 * tiles))
    tiles, warps = (2, 8) if sharing <= 8 else (1, 4)
    splits = min(_MULTIPROCESSORS // programs, -(-longest // (16 * tiles * warps)))
    return DecodeShape(tiles, warps, 1 if sharing <= 8 else 2, splits, warps)


class PrefillShape(NamedTuple):
    """How prefill.cu is launched: see there.

    Attributes:
        slots: tiles of keys or values in shared memory.
        turns: its warpgroups multiply in turns.
        programs: at most; 0: as many as the GPU has multiprocessors.
    """

    slots: int = 5
    turns: bool = True
    programs: int = 0


def query_tile(heads: int, kv_heads: int, head_dim: int, itemsize: int, shared: int = H100_SHARED) -> int:
    """How many new tokens of a sequence a prefill tile has; see `tiles_of`. For latents: kv_heads = 1, rank + rope."""
    rows = prefill_tiling(head_dim, itemsize, shared).rows
    return rows // min(heads // kv_heads, rows)


def tiles_of(q_lens: Sequence[int], lengths: Sequence[int], first: int, tile: int) -> list[tuple[int, int]]:
    """The prefill tiles of a step: (sequence, first of its new tokens); those that see more keys come later.

    Args:
        q_lens: new tokens of each sequence; those before `first` decode.
        lengths: of each sequence, with its new tokens.
        tile: `query_tile` of the model.
    """
    tiles = [(index, row) for index in range(first, len(q_lens)) for row in range(0, q_lens[index], tile)]
    return sorted(tiles, key=lambda it: lengths[it[0]] - q_lens[it[0]] + it[1])


def store_latents(
    launch: Launch, latent: Tensor, k_rope: Tensor, step: AttentionStep, table: Tensor, latents: Tensor
) -> None:
    """Put latent [T, rank] and k_rope [T, 1, rope_dim] of each token side by side into the cache."""
    rank, tail = latent.shape[-1], k_rope.shape[-1]
    constants: dict[str, Constant] = {
        "DIM": rank, "TAIL": tail, "STRIDE": latent.stride(0), "TAIL_STRIDE": k_rope.stride(0),
        "WIDTH": table.shape[1], "BLOCK_SIZE": latents.shape[2],
        "BLOCK_DIM": power_of_two(rank), "BLOCK_TAIL": power_of_two(tail),
    }  # fmt: skip
    args = latent, k_rope, step.positions, step.sequence, table, latents
    launch("attention.store_latents", (len(latent),), args, constants, warps=1, stages=1, pdl=True)


def attention(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: AttentionStep,
    table: Tensor,
    *,
    rotation: Rotation,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    sinks: Tensor | None,
    alibi: Slopes | None,
    k_scale: float,
    v_scale: float,
    codes: CodeScales | None = None,
) -> Tensor:
    """Cache keys and values of a step, and let q attend to what is cached of its sequences, up to itself → [T, H * D].

    Tokens that belong to no sequence get zeros, or whatever stood there where they are no decodes.

    Args:
        q, k, v: [T, H, D] and [T, KH, D], views whose tokens may be a stride apart; normalized and rotated here.
        table: of the layer's KV group.
        scale: of the scores.
        window: positions that a token sees; chunked: from the last multiple of it on.
        sinks: fp32 [H].
        k_scale, v_scale: of an e4m3 cache.
        codes: of a linear that multiplies e4m3 codes: those are returned.
    """
    layer = CachedAttention(
        launch, keys, values, table, q.shape[-1], rotation, window, chunked, softcap, sinks, alibi, k_scale, v_scale
    )
    if len(step.tiles):
        layer.store(k, v, step)
    return layer.attend(q, (k, v), step, scale * k_scale, codes)


def latent_attention(
    launch: Launch,
    q: Tensor,
    latents: Tensor,
    step: AttentionStep,
    table: Tensor,
    *,
    scale: float,
    rank: int,
) -> Tensor:
    """q [T, H, rank + rope_dim] attends to latents, whose first `rank` numbers are the value too → [T, H, rank]."""
    layer = CachedAttention(launch, latents, None, table, rank)
    return layer.attend(q, None, step, scale).view(len(q), q.shape[1], rank)


@dataclass(frozen=True)
class CachedAttention:
    """Attention to what is cached for one layer; see `attention`.

    Attributes:
        values: None for latents.
        dim: features of a value.
    """

    launch: Launch
    keys: Tensor
    values: Tensor | None
    table: Tensor
    dim: int
    rotation: Rotation = _PLAIN
    window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi: Slopes | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    def store(self, k: Tensor, v: Tensor, step: AttentionStep) -> None:
        """Put k and v [T, KH, D] into the cache, but for decodes, which do so themselves."""
        tokens, heads, dim = k.shape
        width = power_of_two(dim)
        block = max(1, min(1024 // width, power_of_two(heads)))
        norm, (cos, sin) = self.rotation.k_norm or _UNCHANGED, self.rotation.angles
        args = (
            k, v, cos, sin, norm.weight, norm.bias, step.positions, step.sequence, step.decodes, self.table, self.keys,
            self.values, float(self.k_scale), float(self.v_scale),
        )  # fmt: skip
        constants: dict[str, Constant] = self.rotation.constants() | {
            "KV_HEADS": heads, "DIM": dim, "K_STRIDE": k.stride(0), "V_STRIDE": v.stride(0),
            "WIDTH": self.table.shape[1], "BLOCK_SIZE": self.keys.shape[2], "BLOCK_HEADS": block, "BLOCK_DIM": width,
        }  # fmt: skip
        grid = (tokens, 2 * -(-heads // block))
        self.launch("attention.store", grid, args, constants, warps=4, stages=1, pdl=True)

    def attend(
        self,
        q: Tensor,
        new: tuple[Tensor, Tensor] | None,
        step: AttentionStep,
        scale: float,
        codes: CodeScales | None = None,
    ) -> Tensor:
        """Decodes by one kernel, then the other tokens by another, [T, H * dim].

        The first writes `decodes` rows; where fewer decode, the second writes some of them again.

        Args:
            new: keys and values that decodes put into the cache; None: it holds them already.
            codes: see `attention`.
        """
        tokens, heads, _ = q.shape
        out = torch.empty((tokens, heads * self.dim), dtype=E4M3 if codes else q.dtype, device=q.device)
        if step.decodes:
            self.decode(q, new, step, scale, out, codes=codes)
        if len(step.tiles):
            self.prefill(q, step, scale, out, codes=codes)
        return out

    def decode(
        self,
        q: Tensor,
        new: tuple[Tensor, Tensor] | None,
        step: AttentionStep,
        scale: float,
        out: Tensor,
        tiling: Tiling | None = None,
        splits: int | None = None,
        codes: CodeScales | None = None,
    ) -> None:
        """The first `step.decodes` tokens."""
        if new and not (tiling or splits) and self.fits(q, new, codes):
            self.decode_natively(q, new, step, scale, out, codes)
            return
        alone = step.decodes * self.keys.shape[1] if new else _PROGRAMS
        tiling = tiling or decode_tiling(self._sharing(q), self._row, q.element_size(), self.launch.shared_bytes, alone)
        group, chunks = self._groups(q, tiling)
        programs = step.decodes * self.keys.shape[1] * chunks
        chosen, at_least = self._splits(programs, tiling)
        splits = splits or chosen
        partials = extremes = None
        if splits > 1:
            shape = (programs, splits, group)
            partials = torch.empty((*shape, self.dim), dtype=torch.float32, device=q.device)
            extremes = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
        k, v = new or (None, None)
        k_norm = self.rotation.k_norm or _UNCHANGED
        args = (
            q, k, v, *self._query_args(), k_norm.weight, k_norm.bias, self.keys, self.values, self.table, step.lengths,
            self.sinks, self.alibi and self.alibi.slopes, out, *(codes or (None, None)), partials, extremes,
            step.counters, float(scale), float(self.k_scale), float(self.v_scale),
        )  # fmt: skip
        rows = power_of_two(group)
        at_once = max(1, min(16, 64 * 32 * tiling.warps // (rows * power_of_two(self.dim))))
        constants = self._constants(q, tiling) | {
            "K_STRIDE": 0 if k is None else k.stride(0), "V_STRIDE": 0 if v is None else v.stride(0),
            "SPLIT": splits > 1, "AT_LEAST": at_least, "BLOCK_G": rows, "AT_ONCE": at_once,
        }  # fmt: skip
        grid = (step.decodes, programs // step.decodes, splits)
        self.launch("attention.decode", grid, args, constants, tiling.warps, tiling.stages, pdl=True)

    def fits(self, q: Tensor, new: tuple[Tensor, Tensor], codes: CodeScales | None) -> bool:
        """Whether decode.cu is there and knows all that is asked for; arguments as in `decode`."""
        keys, (k, v), rotation, dim = self.keys, new, self.rotation, self.dim
        smooth = codes[1] if codes else None
        norms = [norm for norm in (rotation.q_norm, rotation.k_norm) if norm]
        weights = {norm.weight.dtype for norm in norms if norm.weight is not None}
        return (
            self.launch.native and self.values is not None and self.alibi is None
            and q.dtype in (torch.bfloat16, torch.float16) and keys.dtype in (q.dtype, E4M3)
            and self._sharing(q) <= 16 and dim % 16 == 0 and dim <= 128 and dim * keys.itemsize % 32 == 0
            and keys.shape[2] % 8 == 0 and (rotation.tables is None or rotation.dim % 8 == 0)
            and all(x.dtype == q.dtype and x.stride(0) % 8 == x.storage_offset() % 8 == 0 for x in (q, k, v))
            and len(norms) in (0, 2) and all(norm.kind != "layer" and norm.bias is None for norm in norms)
            and weights in (set(), {q.dtype}, {torch.float32})
            and (smooth is None or smooth.dtype == torch.float32)
        )  # fmt: skip

    def decode_natively(
        self,
        q: Tensor,
        new: tuple[Tensor, Tensor],
        step: AttentionStep,
        scale: float,
        out: Tensor,
        codes: CodeScales | None = None,
        shape: DecodeShape | None = None,
    ) -> None:
        """`decode` by decode.cu, where that `fits`."""
        k, v = new
        kv_heads, sharing, block_size = self.keys.shape[1], self._sharing(q), self.keys.shape[2]
        programs, width = step.decodes * kv_heads, self.table.shape[1]
        shape = shape or decode_shape(programs, width * block_size, self.dim * self.keys.itemsize, sharing)
        partials = extremes = None
        if shape.splits > 1:
            dims = (programs, shape.splits, sharing)
            partials = torch.empty((*dims, self.dim), dtype=torch.float32, device=q.device)
            extremes = torch.empty((*dims, 2), dtype=torch.float32, device=q.device)
        q_norm, k_norm = self.rotation.q_norm or _UNCHANGED, self.rotation.k_norm or _UNCHANGED
        args = (
            q, k, v, *self.rotation.angles, q_norm.weight, k_norm.weight, self.keys, self.values, self.table,
            step.lengths, self.sinks, out, *(codes or (None, None)), partials, extremes, step.counters,
            float(scale), float(self.k_scale), float(self.v_scale),
        )  # fmt: skip
        constants = self.rotation.query_constants() | {
            "KV_HEADS": kv_heads, "SHARING": sharing, "DIM": self.dim, "BYTES": self.keys.itemsize,
            "HALF": q.dtype == torch.float16, "Q_STRIDE": q.stride(0), "K_STRIDE": k.stride(0),
            "V_STRIDE": v.stride(0), "NORM_BYTES": 2 if q_norm.weight is None else q_norm.weight.itemsize,
            "WIDTH": width, "BLOCK_SIZE": block_size, "WINDOW": self.window or 0,
            "CHUNKED": self.chunked and self.window is not None, "CAP": float(self.softcap or 0),
            "SPLIT": shape.splits > 1, "AT_LEAST": shape.at_least, "CODES": codes is not None,
            "TILES": shape.tiles, "BLOCKS": shape.blocks,
        }  # fmt: skip
        grid = (kv_heads, step.decodes, shape.splits)
        self.launch("cu.decode", grid, args, constants, shape.warps, stages=1, pdl=True)

    def prefill(
        self,
        q: Tensor,
        step: AttentionStep,
        scale: float,
        out: Tensor,
        tiling: Tiling | None = None,
        codes: CodeScales | None = None,
    ) -> None:
        """The tokens of `step.tiles`."""
        if tiling is None and self.fits_prefill(q, codes):
            self.prefill_natively(q, step, scale, out, codes)
            return
        if tiling is None:
            programs = self.keys.shape[1] * len(step.tiles)
            tiling = prefill_tiling(self._row, q.element_size(), self.launch.shared_bytes, programs)
        group, chunks = self._groups(q, tiling)
        args = (
            q, *self._query_args(), self.keys, self.values, self.table, step.lengths, step.starts, step.tiles,
            self.sinks, self.alibi and self.alibi.slopes, out, *(codes or (None, None)), float(scale),
            float(self.v_scale),
        )  # fmt: skip
        constants = self._constants(q, tiling) | {"TOKENS": tiling.rows // group}
        grid = (self.keys.shape[1] * chunks, len(step.tiles))
        limit = tiling.registers
        self.launch("attention.prefill", grid, args, constants, tiling.warps, tiling.stages, pdl=True, registers=limit)

    def fits_prefill(self, q: Tensor, codes: CodeScales | None) -> bool:
        """Whether prefill.cu is there and knows all that is asked for; arguments as in `prefill`."""
        keys, rotation, dim, norm = self.keys, self.rotation, self.dim, self.rotation.q_norm
        smooth, weight = codes[1] if codes else None, norm.weight if norm else None
        return (
            self.launch.native and self.launch.hopper and self.values is not None and self.window is None
            and not self.softcap and self.sinks is None and self.alibi is None
            and q.dtype in (torch.bfloat16, torch.float16) and keys.dtype == q.dtype and dim in (64, 128)
            and self._sharing(q) <= _NATIVE_ROWS and keys.shape[2] in (8, 16, 32, 64, 128)
            and (rotation.tables is None or rotation.dim == dim)
            and q.stride(0) % 8 == q.storage_offset() % 8 == 0
            and (norm is None or (norm.kind != "layer" and norm.bias is None))
            and (weight is None or weight.dtype in (q.dtype, torch.float32))
            and (smooth is None or smooth.dtype == torch.float32)
        )  # fmt: skip

    def prefill_natively(
        self,
        q: Tensor,
        step: AttentionStep,
        scale: float,
        out: Tensor,
        codes: CodeScales | None = None,
        shape: PrefillShape | None = None,
    ) -> None:
        """`prefill` by prefill.cu, where that `fits_prefill`."""
        kv_heads, shape = self.keys.shape[1], shape or PrefillShape(turns=self.dim == 128)
        tiling = prefill_tiling(self.dim, q.element_size(), self.launch.shared_bytes)
        assert tiling.rows == _NATIVE_ROWS, "step.tiles are made for these"
        norm = self.rotation.q_norm or _UNCHANGED
        args = (
            q, *self.rotation.angles, norm.weight, self.keys, self.values, self.table, step.lengths, step.starts,
            step.tiles, out, *(codes or (None, None)), float(scale), float(self.v_scale), len(step.tiles),
        )  # fmt: skip
        tile = 2 * _NATIVE_ROWS * self.dim
        constants = self.rotation.query_constants() | {
            "KV_HEADS": kv_heads, "SHARING": self._sharing(q), "DIM": self.dim, "HALF": q.dtype == torch.float16,
            "Q_STRIDE": q.stride(0), "NORM_BYTES": 2 if norm.weight is None else norm.weight.itemsize,
            "WIDTH": self.table.shape[1], "BLOCK_SIZE": self.keys.shape[2], "CODES": codes is not None,
            "SLOTS": shape.slots, "TURNS": shape.turns,
            "SHARED": (shape.slots + 2) * tile + 2048,
        }  # fmt: skip
        grid = (min(shape.programs or self.launch.multiprocessors, kv_heads * len(step.tiles)),)
        self.launch("cu.prefill", grid, args, constants, 12, stages=1, pdl=True)

    @property
    def _row(self) -> int:
        return self.keys.shape[-1]

    def _sharing(self, q: Tensor) -> int:
        return q.shape[1] // self.keys.shape[1]

    def _query_args(self) -> tuple[Tensor | None, ...]:
        norm = self.rotation.q_norm or _UNCHANGED
        return (*self.rotation.angles, norm.weight, norm.bias)

    def _groups(self, q: Tensor, tiling: Tiling) -> tuple[int, int]:
        """Query heads in a program, and programs for the query heads of a key head."""
        group = min(self._sharing(q), tiling.rows)
        return group, -(-self._sharing(q) // group)

    def _splits(self, programs: int, tiling: Tiling) -> tuple[int, int]:
        """Programs that share the keys of a sequence, and how many tiles a share has at least.

        Few sequences are split so that all multiprocessors are busy; of many, only the long ones, which others would
        have to wait for.
        """
        longest = self.table.shape[1] * self.keys.shape[2]
        if programs >= _MULTIPROCESSORS:
            return min(4, -(-longest // _LONG)), _LONG // tiling.keys
        return min(power_of_two(_PROGRAMS // programs + 1) // 2, -(-longest // tiling.keys)), 1

    def _constants(self, q: Tensor, tiling: Tiling) -> dict[str, Constant]:
        group, chunks = self._groups(q, tiling)
        tail = self._row - self.dim
        return self.rotation.query_constants() | {
            "KV_HEADS": self.keys.shape[1], "SHARING": self._sharing(q), "DIM": self.dim, "TAIL": tail,
            "Q_STRIDE": q.stride(0), "WIDTH": self.table.shape[1], "BLOCK_SIZE": self.keys.shape[2],
            "WINDOW": self.window or 0, "CHUNKED": self.chunked and self.window is not None,
            "CAP": float(self.softcap or 0), "ROUNDED": float(self.alibi.rounded if self.alibi else 0),
            "GROUP": group, "CHUNKS": chunks, "BLOCK_M": tiling.rows, "BLOCK_N": tiling.keys,
            "BLOCK_DIM": max(16, power_of_two(self.dim)), "BLOCK_TAIL": max(16, power_of_two(tail)) if tail else 0,
        }  # fmt: skip
