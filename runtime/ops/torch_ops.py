"""The reference op set: plain torch on any device, the oracle of every other.

Quantized weights are dequantized when they are loaded; their activations are rounded as the format says, so what is
computed is what the stored tensors mean. The KV cache is paged: per layer `keys` and `values` are
[blocks, block_size, kv_heads, head_dim].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import ModelSpec, Rope
from trtx.quantize.formats import E4M3, round_e4m3, to_e4m3
from trtx.quantize.weight import LinearWeight
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVGroup, KVLayout, kv_groups, layer_places
from trtx.runtime.ops.base import Ops

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

_FEW_ROWS = range(6, 33)
"""Rows at which MKL multiplies an fp32 weight faster as W xᵀ than as x Wᵀ: by up to 1.8 (measured on AVX-512)."""


@dataclass(frozen=True)
class ResidentLinear:
    """A linear ready to be multiplied with.

    Attributes:
        weight: [O, I], dequantized.
        activation: what the format does to the input; None: nothing.
        rows: output features of each fused part.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor] | None
    rows: tuple[int, ...]


class TorchKVCache:
    """The paged KV cache of one rank.

    Args:
        scales: per layer the (key, value) scales of an fp8 cache; None for a cache in `dtype`.
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.scales = scales
        shape = (layout.slots, blocks, layout.block_size, layout.kv_heads, layout.head_dim)
        # Codes of an fp8 cache are kept as bytes: torch can't gather E4M3.
        stored = torch.uint8 if dtype == E4M3 else dtype
        self.keys = torch.zeros(shape, dtype=stored, device=device)
        self.values = torch.zeros(shape, dtype=stored, device=device)

    def clear(self, blocks: Tensor) -> None:
        """Zero `blocks` [N] of every layer."""
        self.keys.index_fill_(1, blocks, 0)
        self.values.index_fill_(1, blocks, 0)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k, v [T, kv_heads, head_dim] at `positions` [T] (block * block_size + offset)."""
        _, slot = self.layout.places[layer]
        for cache, new, which in ((self.keys, k, 0), (self.values, v, 1)):
            cache[slot].flatten(0, 1).index_copy_(0, positions, self._encode(new, layer, which))

    def read(self, layer: int, blocks: Tensor, dtype: torch.dtype, scratch: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Keys and values of `blocks` [B, N] → two of [B, N * block_size, kv_heads, head_dim] in `dtype`.

        Args:
            scratch: two buffers of that size in the stored dtype, overwritten.
        """
        _, slot = self.layout.places[layer]
        found = []
        for cache, buffer, which in ((self.keys, scratch[0], 0), (self.values, scratch[1], 1)):
            torch.index_select(cache[slot].flatten(1), 0, blocks.flatten(), out=buffer.view(blocks.numel(), -1))
            found.append(self._decode(buffer, layer, which, dtype))
        return found

    def scratch(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers for `read`: allocated once a step, since fresh pages cost more than the copy."""
        batch, count = blocks.shape
        shape = (batch, count * self.layout.block_size, self.layout.kv_heads, self.layout.head_dim)
        return self.keys.new_empty(shape), self.keys.new_empty(shape)

    def _encode(self, x: Tensor, layer: int, which: int) -> Tensor:
        if self.scales is None:
            return x.to(self.dtype)
        return to_e4m3(x, self.scales[layer][which]).view(torch.uint8)

    def _decode(self, stored: Tensor, layer: int, which: int, dtype: torch.dtype) -> Tensor:
        if self.scales is None:
            return stored.to(dtype)
        return (stored.view(E4M3).float() * self.scales[layer][which]).to(dtype)


@dataclass
class _Bucket:
    """Consecutive sequences of a step that attend in one call: decodes together, each prefill chunk alone.

    Attributes:
        tokens: their tokens among the step's T.
        batch: number of sequences, all with the same number of tokens Q.
        mask: additive, [B, 1, G * Q, S]: G query heads share a key head and are folded into the rows.
        blocks: [B, N] of the cache, or None without a cache (the keys are the step's own).
    """

    tokens: slice
    batch: int
    mask: Tensor
    blocks: Tensor | None
    scratch: tuple[Tensor, Tensor] | None = None


@dataclass
class TorchStep:
    """A batch on the device.

    Attributes:
        token_ids, positions: [T].
        rows: [R], the tokens that want logits.
        writes: per KV group, where each token's keys and values go, [T]; empty without a cache.
        buckets: per KV group.
    """

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    cache: TorchKVCache | None
    places: dict[int, tuple[int, int]]
    writes: list[Tensor]
    buckets: list[list[_Bucket]]
    rotations: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)


class TorchOps(Ops):
    """Plain torch on one device.

    Args:
        dtype: what activations and dequantized weights are in.
        max_positions: the longest sequence that will come; the model's own limit unless given.
        kv_scales: per layer the (key, value) scales of an fp8 KV cache: without a paged cache (accuracy evaluation),
            keys and values are rounded as the cache would.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_positions: int | None = None,
        kv_scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        self.max_positions = max_positions or spec.max_positions
        self.kv_scales = kv_scales
        self._tables: dict[Rope, tuple[Tensor, Tensor]] = {}

    # Weights.

    def load_tensor(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def load_linear(self, weight: LinearWeight) -> ResidentLinear:
        tensors = {suffix: tensor.to(self.device) for suffix, tensor in weight.tensors.items()}
        form = weight.format
        kept = {suffix: tensors[suffix] for suffix in form.input_tensors}
        bias = tensors.get("bias")
        return ResidentLinear(
            weight=form.weight(tensors, self.dtype),
            bias=None if bias is None else bias.to(self.dtype),
            activation=(lambda x: form.activation(x, kept)) if kept else None,
            rows=weight.rows,
        )

    def tie(self, table: Tensor) -> ResidentLinear:
        return ResidentLinear(table, bias=None, activation=None, rows=(len(table),))

    # Steps.

    def step(self, batch: Sequence[SequenceSlice], cache: TorchKVCache) -> TorchStep:
        """Put a batch on the device. Decodes (one token) come before prefill chunks."""
        size = cache.layout.block_size
        decodes = sum(len(piece.tokens) == 1 for piece in batch)
        assert all(len(piece.tokens) == 1 for piece in batch[:decodes]), "decodes come first"
        ends = list(accumulate(len(piece.tokens) for piece in batch))
        rows = [row for piece, end in zip(batch, ends, strict=True) for row in range(end - piece.logits, end)]
        # What is left of an earlier sequence may not be finite, and a mask does not keep that out (0 * NaN is NaN).
        # Only the last block of a slice is not written whole.
        entered = [
            table[piece.end // size]
            for piece in batch
            for table in piece.tables
            if piece.end % size and piece.start <= piece.end // size * size
        ]
        if entered:
            cache.clear(self._ids(entered))
        writes, buckets = [], []
        for index, group in enumerate(cache.layout.groups):
            places = [
                piece.tables[index][position // size] * size + position % size
                for piece in batch
                for position in range(piece.start, piece.end)
            ]
            writes.append(self._ids(places))
            parts = [(0, batch[:decodes])] if decodes else []
            parts += [(ends[i] - len(batch[i].tokens), batch[i : i + 1]) for i in range(decodes, len(batch))]
            buckets.append([self._bucket(start, pieces, index, group, cache) for start, pieces in parts])
        return TorchStep(
            token_ids=self._ids([token for piece in batch for token in piece.tokens]),
            positions=self._ids([position for piece in batch for position in range(piece.start, piece.end)]),
            rows=self._ids(rows),
            cache=cache,
            places=cache.layout.places,
            writes=writes,
            buckets=buckets,
        )

    def uncached_step(self, token_ids: Tensor) -> TorchStep:
        """Whole sequences of equal length, token_ids [B, S], without a KV cache; every position wants logits."""
        batch, length = token_ids.shape
        positions = torch.arange(length, device=self.device)
        groups = kv_groups(self.spec.windows)
        buckets = []
        for group in groups:
            mask = self._mask(positions[None], positions[None], group.window)
            buckets.append([_Bucket(slice(0, batch * length), batch, mask, None)])
        return TorchStep(
            token_ids=token_ids.to(self.device).flatten(),
            positions=positions.repeat(batch),
            rows=torch.arange(batch * length, device=self.device),
            cache=None,
            places=layer_places(groups),
            writes=[],
            buckets=buckets,
        )

    def _bucket(
        self, start: int, pieces: Sequence[SequenceSlice], index: int, group: KVGroup, cache: TorchKVCache
    ) -> _Bucket:
        size, count = cache.layout.block_size, len(pieces[0].tokens)
        longest = max(piece.end for piece in pieces)
        width = -(-longest // size)
        tables = [list(piece.tables[index][: -(-piece.end // size)]) for piece in pieces]
        blocks = self._ids([table + [0] * (width - len(table)) for table in tables]).view(len(pieces), width)
        queries = self._ids([p for piece in pieces for p in range(piece.start, piece.end)]).view(len(pieces), count)
        keys = torch.arange(width * size, device=self.device)[None]
        mask = self._mask(queries, keys, group.window)
        return _Bucket(slice(start, start + len(pieces) * count), len(pieces), mask, blocks, cache.scratch(blocks))

    def _mask(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """Additive mask [B, 1, G * Q, S]: a query at [B, Q] sees keys at [B or 1, S] up to itself, within the window.

        Repeated for the G query heads that share a key head.
        """
        distance = queries[:, :, None] - keys[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        sharing = self.spec.num_heads // self.spec.num_kv_heads
        return mask.masked_fill_(hidden, float("-inf"))[:, None].repeat(1, 1, sharing, 1)

    def _ids(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    # Core words.

    def embed(self, step: TorchStep, table: Tensor) -> Tensor:
        return F.embedding(step.token_ids, table)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.device.type == "cuda":
            return F.rms_norm(x, weight.shape, weight, eps)
        # On a CPU torch expands rms_norm into more passes over x than this takes.
        scale = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x * scale).to(x.dtype) * weight

    def linear(self, x: Tensor, weight: ResidentLinear) -> Tensor:
        if weight.activation is not None:
            x = weight.activation(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and len(x) in _FEW_ROWS:
            y = torch.mm(weight.weight, x.t()).t().contiguous()
            return y if weight.bias is None else y + weight.bias
        return F.linear(x, weight.weight, weight.bias)

    def split(self, y: Tensor, weight: ResidentLinear) -> Sequence[Tensor]:
        return y.split(weight.rows, dim=-1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def activation(self, x: Tensor, kind: str) -> Tensor:
        return _ACTIVATIONS[kind](x)

    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.unflatten(-1, (-1, head_dim))

    def rope(self, x: Tensor, rope: Rope, step: TorchStep) -> Tensor:
        if rope not in step.rotations:
            cos, sin = self._rope_table(rope)
            step.rotations[rope] = cos[step.positions].unsqueeze(1), sin[step.positions].unsqueeze(1)
        cos, sin = step.rotations[rope]
        if rope.dim == x.shape[-1]:
            return torch.addcmul(x * cos, x.roll(rope.dim // 2, dims=-1), sin)
        return torch.cat([self.rope(x[..., : rope.dim], rope, step), x[..., rope.dim :]], dim=-1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: TorchStep) -> Tensor:
        group, _ = step.places[layer]
        if step.cache is not None:
            step.cache.write(layer, step.writes[group], k, v)
        elif self.kv_scales is not None:
            k, v = (round_e4m3(x, scale) for x, scale in zip((k, v), self.kv_scales[layer], strict=True))
        outputs = [self._attend(q, k, v, layer, bucket, step.cache) for bucket in step.buckets[group]]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, bucket: _Bucket, cache: TorchKVCache | None
    ) -> Tensor:
        """One bucket: query heads that share a key head become rows, so keys are never repeated."""
        kv_heads, head_dim = k.shape[1:]
        if cache is not None and bucket.blocks is not None and bucket.scratch is not None:
            keys, values = cache.read(layer, bucket.blocks, q.dtype, bucket.scratch)
        else:
            keys, values = (x[bucket.tokens].unflatten(0, (bucket.batch, -1)) for x in (k, v))
        sharing = q.shape[1] // kv_heads
        queries = q[bucket.tokens].view(bucket.batch, -1, kv_heads, sharing, head_dim)
        folded = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = self.sdpa(layer, folded, keys.transpose(1, 2), values.transpose(1, 2), bucket.mask)
        return out.unflatten(2, (sharing, -1)).permute(0, 3, 1, 2, 4).reshape(-1, q.shape[1] * head_dim)

    def sdpa(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, kv_heads, G * Q, head_dim], [B, kv_heads, S, head_dim] twice, additive mask → like the queries."""
        return F.scaled_dot_product_attention(queries, keys, values, mask)

    def rows(self, x: Tensor, step: TorchStep) -> Tensor:
        return x if len(step.rows) == len(x) else x[step.rows]

    def _rope_table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin [max_positions, dim], both halves; sin is negated in the first half, as `rope` needs it."""
        if rope not in self._tables:
            angles = torch.outer(torch.arange(self.max_positions).float(), inverse_frequencies(rope))
            cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
            halves = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._tables[rope] = halves[0].to(self.device, self.dtype), halves[1].to(self.device, self.dtype)
        return self._tables[rope]


def inverse_frequencies(rope: Rope) -> Tensor:
    """Radians a position for each pair of features, [dim / 2], fp32, with the scaling of `rope` applied."""
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.int64).float()
    base = 1.0 / rope.theta ** (pairs / rope.dim)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "llama3":
        return _llama3_frequencies(base, rope)
    if rope.scaling == "yarn":
        return _yarn_frequencies(base, rope)
    return base


def _llama3_frequencies(base: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    ratio = rope.original_max_position / wavelength
    blend = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn_frequencies(base: Tensor, rope: Rope) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn rarely are interpolated, those that turn often kept."""

    def pair_turning(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2).float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return base / rope.factor * interpolated + base * (1 - interpolated)
