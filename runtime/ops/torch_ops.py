"""The reference op set: plain torch on any device, the oracle of every other.

Quantized weights are dequantized when they are loaded; their activations are rounded as the format says, so what is
computed is what the stored tensors mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import Activation, ModelSpec, MoE, Norm, Rope
from trtx.quantize.formats import round_e4m3
from trtx.quantize.weight import LinearWeight
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVGroup, kv_groups, layer_places
from trtx.runtime.ops.base import Mlp, Ops
from trtx.runtime.ops.rotary import frequencies_for
from trtx.runtime.ops.torch_attention import alibi_bias, attend, with_sinks
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_moe import choose, weigh

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
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


@dataclass(frozen=True)
class ResidentNorm:
    """A norm ready to be applied: in fp32 where the offset was added, which would be rounded away in fewer bits."""

    weight: Tensor
    bias: Tensor | None
    norm: Norm


@dataclass
class _Bucket:
    """Consecutive sequences of a step that attend in one call: decodes together, each prefill chunk alone.

    Attributes:
        tokens: their tokens among the step's T.
        batch: number of sequences, all with the same number of tokens Q.
        mask: additive, [B, 1 or kv_heads, G * Q, S]: G query heads share a key head and are folded into the rows.
        blocks: [B, N] of the cache, or None without a cache (the keys are the step's own).
    """

    tokens: slice
    batch: int
    mask: Tensor
    blocks: Tensor | None
    scratch: Sequence[Tensor] = ()


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

    def load_table(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def load_norm(self, name: str, weight: Tensor, bias: Tensor | None, norm: Norm) -> ResidentNorm:
        weight = weight.to(self.device)
        weight = weight.float() + norm.offset if norm.offset else weight.to(self.dtype)
        return ResidentNorm(weight, None if bias is None else bias.to(self.device, weight.dtype), norm)

    def load_vector(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def load_linear(self, weight: LinearWeight) -> ResidentLinear:
        tensors = {suffix: tensor.to(self.device) for suffix, tensor in weight.tensors.items()}
        form = weight.format
        kept = {suffix: tensors[suffix] for suffix in form.input_tensors}
        bias = tensors.get("bias")
        return ResidentLinear(
            weight=form.weight(tensors, self.dtype),
            bias=None if bias is None else bias.to(self.dtype),
            activation=(lambda x: form.activation(x, kept)) if form.changes_input else None,
            rows=weight.rows,
        )

    def load_matrix(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def load_router(self, weight: LinearWeight) -> ResidentLinear:
        bias = None if weight.bias is None else weight.bias.to(self.device, torch.float32)
        return ResidentLinear(weight.dense(torch.float32).to(self.device), bias, None, weight.rows)

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
        groups = kv_groups(self.spec.windows, self.spec.chunked)
        buckets = []
        for group in groups:
            mask = self._mask(positions[None], positions[None], group)
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
        mask = self._mask(queries, keys, group)
        return _Bucket(slice(start, start + len(pieces) * count), len(pieces), mask, blocks, cache.scratch(blocks))

    def _mask(self, queries: Tensor, keys: Tensor, group: KVGroup) -> Tensor:
        """Additive mask [B, 1 or kv_heads, G * Q, S]: queries at [B, Q] see keys at [B or 1, S] up to themselves.

        Not beyond the group's window, and with the bias of each of the G query heads that share a key head.
        """
        distance = queries[:, :, None] - keys[:, None, :]
        hidden = distance < 0
        if group.window is not None:
            reach = (queries % group.window + 1)[:, :, None] if group.chunked else group.window
            hidden |= distance >= reach
        sharing = self.spec.num_heads // self.spec.cached_heads
        if self.spec.alibi is None:
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            return mask.masked_fill_(hidden, float("-inf"))[:, None].repeat(1, 1, sharing, 1)
        bias = alibi_bias(self.spec.alibi, self.spec.num_heads, keys)[:, :, None, :]
        mask = torch.where(hidden[:, None], float("-inf"), bias).to(self.dtype)
        return mask.unflatten(1, (-1, sharing)).flatten(2, 3)

    def _ids(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)

    # Core words.

    def embed(self, step: TorchStep, table: Tensor, scale: float = 1.0) -> Tensor:
        rows = F.embedding(step.token_ids, table)
        return rows if scale == 1 else rows * torch.tensor(scale, dtype=self.dtype, device=self.device)

    def embed_positions(self, step: TorchStep, table: Tensor) -> Tensor:
        return F.embedding(step.positions, table)

    def norm(self, x: Tensor, weight: ResidentNorm) -> Tensor:
        norm = weight.norm
        if norm.kind == "layer":
            return _layer_norm(x, weight)
        if x.device.type == "cuda" and weight.weight.dtype == x.dtype:
            return F.rms_norm(x, weight.weight.shape, weight.weight, norm.eps)
        normal = self.unit_norm(x if weight.weight.dtype == x.dtype else x.float(), norm.eps)
        return (normal * weight.weight).to(x.dtype)

    def unit_norm(self, x: Tensor, eps: float) -> Tensor:
        # On a CPU torch expands rms_norm into more passes over x than this takes.
        scale = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return (x * scale).to(x.dtype)

    def linear(self, x: Tensor, weight: ResidentLinear) -> Tensor:
        if weight.activation is not None:
            x = weight.activation(x)
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and len(x) in _FEW_ROWS:
            y = torch.mm(weight.weight, x.t()).t().contiguous()
            return y if weight.bias is None else y + weight.bias
        return F.linear(x, weight.weight, weight.bias)

    def split(self, y: Tensor, weight: ResidentLinear) -> Sequence[Tensor]:
        return y.split(weight.rows, dim=-1)

    def add(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a * b

    def clamp(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        return x.clamp(low, high)

    def tanh(self, x: Tensor) -> Tensor:
        return x.tanh()

    def sigmoid(self, x: Tensor) -> Tensor:
        return x.sigmoid()

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

    def scale_queries(self, q: Tensor, floor: float, scale: float, step: TorchStep) -> Tensor:
        factor = 1 + scale * torch.log1p(torch.floor((step.positions.float() + 1) / floor))
        return (q * factor[:, None, None]).to(q.dtype)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: TorchStep, sinks: Tensor | None = None
    ) -> Tensor:
        if step.cache is None and self.kv_scales is not None:
            k, v = (round_e4m3(x, scale) for x, scale in zip((k, v), self.kv_scales[layer], strict=True))
        return self._attend(q, (k, v), layer, step, sinks).flatten(1)

    def latent_attention(
        self,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        k_up: Tensor,
        v_up: Tensor,
        layer: int,
        step: TorchStep,
    ) -> Tensor:
        """In its absorbed form: k_up is multiplied into the queries, so that latents serve as keys and as values."""
        heads, rotated, rank = q.shape[1], k_rope.shape[-1], latent.shape[-1]
        rope, rest = q.split([rotated, q.shape[-1] - rotated], dim=-1)
        absorbed = torch.einsum("thd,hdr->thr", rest, k_up.view(heads, -1, rank))
        attended = self.attend_to_latents(torch.cat([absorbed, rope], dim=-1), latent, k_rope, layer, step)
        return torch.einsum("thr,hdr->thd", attended, v_up.view(heads, -1, rank)).flatten(1)

    def attend_to_latents(self, q: Tensor, latent: Tensor, k_rope: Tensor, layer: int, step: TorchStep) -> Tensor:
        """Cache latents and attend to them with absorbed queries q [T, heads, rank + rope_dim] → [T, heads, rank]."""
        row = torch.cat([latent[:, None], k_rope], dim=-1)
        return self._attend(q, (row,), layer, step, None)

    def _attend(self, q: Tensor, new: tuple[Tensor, ...], layer: int, step: TorchStep, sinks: Tensor | None) -> Tensor:
        """Cache keys and values, or latents, `new`, and attend to all there are → [T, heads, features of a value]."""
        group, _ = step.places[layer]
        if step.cache is not None:
            step.cache.write(layer, step.writes[group], *new)
        outputs = [self._attend_bucket(q, new, layer, bucket, step.cache, sinks) for bucket in step.buckets[group]]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_bucket(
        self,
        q: Tensor,
        new: tuple[Tensor, ...],
        layer: int,
        bucket: _Bucket,
        cache: TorchKVCache | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Query heads that share a key head become rows, so keys are never repeated."""
        if cache is not None and bucket.blocks is not None:
            arrays = cache.read(layer, bucket.blocks, q.dtype, bucket.scratch)
        else:
            arrays = [x[bucket.tokens].unflatten(0, (bucket.batch, -1)) for x in new]
        keys = arrays[0].transpose(1, 2)
        values = arrays[-1].transpose(1, 2)
        if self.spec.latent:
            values = values[..., : self.spec.latent.rank]
        heads, kv_heads = q.shape[1], keys.shape[1]
        queries = q[bucket.tokens].view(bucket.batch, -1, kv_heads, heads // kv_heads, q.shape[-1])
        folded = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = bucket.mask
        if sinks is not None:
            keys, values, mask = with_sinks(keys, values, mask, sinks)
        out = self.sdpa(layer, folded, keys, values, mask, self.spec.attention_scale_of(layer))
        return out.unflatten(2, (heads // kv_heads, -1)).permute(0, 3, 1, 2, 4).reshape(-1, heads, values.shape[-1])

    def sdpa(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        """[B, kv_heads, G * Q, D], [B, kv_heads, S, D], [B, kv_heads, S, E] and a mask → [B, kv_heads, G * Q, E]."""
        return attend(queries, keys, values, mask, scale, self.spec.attention_softcap)

    def route(self, x: Tensor, router: ResidentLinear, correction: Tensor | None, moe: MoE) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), router.weight, router.bias)
        chosen = choose(logits, correction, moe)
        return chosen, weigh(logits, chosen, moe)

    def experts(
        self,
        x: Tensor,
        routing: tuple[Tensor, Tensor],
        experts: Sequence[Mlp],
        activation: Activation,
        weighs_input: bool,
    ) -> Tensor:
        """Tokens are sorted by expert, so that each expert that is used multiplies its own once."""
        chosen, weights = routing
        order = chosen.flatten().argsort(stable=True)
        tokens, sorted_weights = order // chosen.shape[1], weights.flatten()[order, None]
        counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
        out = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(counts):
            if not count:
                continue
            mine = slice(start, start + count)
            start += count
            inputs, weight = x[tokens[mine]], sorted_weights[mine]
            if weighs_input:
                y = self.mlp((inputs * weight).to(x.dtype), experts[expert], activation)
            else:
                y = (self.mlp(inputs, experts[expert], activation) * weight).to(x.dtype)
            out.index_add_(0, tokens[mine], y)
        return out

    def rows(self, x: Tensor, step: TorchStep) -> Tensor:
        return x if len(step.rows) == len(x) else x[step.rows]

    def _rope_table(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin [max_positions, dim], both halves; sin is negated in the first half, as `rope` needs it."""
        if rope not in self._tables:
            frequencies, factor = frequencies_for(rope, self.max_positions)
            angles = torch.outer(torch.arange(self.max_positions).float(), frequencies)
            cos, sin = angles.cos() * factor, angles.sin() * factor
            halves = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._tables[rope] = halves[0].to(self.device, self.dtype), halves[1].to(self.device, self.dtype)
        return self._tables[rope]


def _layer_norm(x: Tensor, weight: ResidentNorm) -> Tensor:
    size = (x.shape[-1],)
    if weight.weight.dim() == 1:
        exact = x.to(weight.weight.dtype)
        return F.layer_norm(exact, size, weight.weight, weight.bias, weight.norm.eps).to(x.dtype)
    return F.layer_norm(x, size, eps=weight.norm.eps) * weight.weight
