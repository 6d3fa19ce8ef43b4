"""The decoder's vocabulary as layers of a TensorRT network.

A step is T packed tokens of B sequences, sequence b in slot b of linear KV caches [B, kv_heads, S, head_dim]. Linears,
norms and cache updates work on packed tokens. For attention, queries are gathered into rows that end together:

    query_index [B, Q]   the token in each place, the last of each sequence in column Q - 1; 0 where there is none
    query_place [T]      where each token stands in [B * Q]

Causal attention is TensorRT's own (LOWER_RIGHT, with each sequence's length); windows, chunks and ALiBi are given as a
mask; soft caps and sinks are spelt out in plain layers. A slot without a sequence has no tokens and a length of 1.

Attention in FP8 rounds its four operands to E4M3: q with a scale of 1 before it is multiplied by the attention's own,
k and v with those of an fp8 KV cache (the cache itself stays as it is), probabilities with 1/448.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtx.builder.shard import Rank
from trtx.builder.tensorrt.linears import Linear
from trtx.builder.tensorrt.network import Network, Value
from trtx.converters.errors import UnsupportedError
from trtx.converters.spec import Activation, ModelSpec, MoE, Norm, Rope
from trtx.quantize.formats import E4M3, E4M3_MAX
from trtx.quantize.weight import LinearWeight
from trtx.runtime.ops.base import Mlp, Ops
from trtx.runtime.ops.rotary import frequencies_for
from trtx.runtime.ops.torch_attention import alibi_bias

_ACTIVATIONS = {"gelu": "GELU_ERF", "gelu_tanh": "GELU_TANH", "relu": "RELU"}


FP8_HEAD = 16
"""The least features of a head for which TensorRT-RTX 1.7 compiles attention in FP8."""


@dataclass(frozen=True)
class NormWeight:
    """A norm's constants."""

    name: str
    weight: Tensor
    bias: Tensor | None
    norm: Norm


@dataclass(frozen=True)
class TensorRTStep:
    """The inputs of the network; see the module.

    Attributes:
        token_ids, positions: [T] int32.
        rows: [R] int32, the tokens that want logits.
        query_index, query_place: see above, int32.
        starts: [B + 1] int32, where each sequence's tokens begin, and T.
        written: [B] int32, tokens of each slot that are in the cache.
        lengths: [B] int32, tokens of each slot after this step; 1 for an empty slot.
        caches: per layer keys and values.
    """

    token_ids: Value
    positions: Value
    rows: Value
    query_index: Value
    query_place: Value
    starts: Value
    written: Value
    lengths: Value
    caches: list[tuple[Value, Value]]


def spells_out(spec: ModelSpec) -> bool:
    """Whether attention is built of plain layers: TensorRT's own has no soft cap and no sinks."""
    return spec.sinks or spec.attention_softcap is not None


def require_model(spec: ModelSpec, dtype: torch.dtype, fp8_attention: bool = False) -> None:
    """Refuse what has no layers here, or none that TensorRT compiles.

    Raises:
        UnsupportedError: latent attention, experts chosen in a way that is not spelt out, or heads of an odd size;
            attention in FP8 of a kind that has none.
    """
    odd = spec.head_dim % 8 and dtype != torch.float32 and not spells_out(spec)
    reasons = {
        "latent attention (MLA): TensorRT's attention takes keys and values of one shape": spec.latent,
        "experts chosen by SparseMixer": spec.moe and spec.moe.scores == "sparsemixer",
        "experts chosen by group": spec.moe and (spec.moe.groups > 1 or spec.moe.correction),
        f"heads of {spec.head_dim} features, where TensorRT's attention takes multiples of 8 in 16 bits": odd,
    }
    for reason, there in reasons.items():
        if there:
            raise UnsupportedError(
                f"The TensorRT backends do not build {spec.family}: it has {reason}.", "Use --backend torch."
            )
    if fp8_attention and (spells_out(spec) or spec.head_dim < FP8_HEAD):
        reason = (
            "soft caps or sinks, which TensorRT's own attention lacks"
            if spells_out(spec)
            else f"heads of {spec.head_dim} features, where TensorRT's takes {FP8_HEAD} and more in FP8"
        )
        raise UnsupportedError(f"--attention fp8: {spec.family} has {reason}.", "Leave it out.")


class TensorRTOps(Ops):
    """Adds layers to `net`.

    Args:
        rank: whose network it is.
        dtype: what the network computes in.
        max_positions: the longest sequence that will come.
        fp8_attention: per layer the (key, value) scales of attention in FP8; None: it is in `dtype`.
        expert_layers: the GPU has TensorRT's own layer for experts.
    """

    def __init__(
        self,
        net: Network,
        rank: Rank,
        dtype: torch.dtype,
        max_positions: int,
        fp8_attention: Sequence[tuple[Tensor, Tensor]] | None = None,
        expert_layers: bool = False,
    ) -> None:
        require_model(rank.part, dtype, fp8_attention is not None)
        self.net = net
        self.rank = rank
        self.spec = rank.part
        self.dtype = dtype
        self.max_positions = max_positions
        self.fp8_attention = fp8_attention
        self.expert_layers = expert_layers
        self.updated: dict[int, tuple[Value, Value]] = {}
        """Per layer the caches after the step: outputs of the network."""

    # Weights.

    def load_table(self, name: str, tensor: Tensor) -> Value:
        return self.net.constant(name, tensor.to(self.dtype))

    def load_norm(self, name: str, weight: Tensor, bias: Tensor | None, norm: Norm) -> NormWeight:
        weight = weight.float() + norm.offset if norm.offset else weight.to(self.dtype)
        return NormWeight(name, weight, None if bias is None else bias.to(weight.dtype), norm)

    def load_vector(self, name: str, tensor: Tensor) -> Value:
        return self.net.constant(name, tensor)

    def load_linear(self, weight: LinearWeight) -> Linear:
        return Linear(self.net, weight, self.dtype)

    def load_matrix(self, name: str, tensor: Tensor) -> Value:
        return self.net.constant(name, tensor.to(self.dtype))

    def load_router(self, weight: LinearWeight) -> Linear:
        return Linear(self.net, weight, torch.float32)

    def tie(self, table: Value) -> Value:
        return table

    # Core words.

    def embed(self, step: TensorRTStep, table: Value, scale: float = 1.0) -> Value:
        rows = self.net.gather(table, step.token_ids) if self.rank.tp == 1 else self._held_rows(step, table)
        return rows if scale == 1 else self.mul(rows, scale)

    def _held_rows(self, step: TensorRTStep, table: Value) -> Value:
        """Rows for the ids that this rank holds, zeros for the others."""
        net = self.net
        ids = net.binary(step.token_ids, net.number(self.rank.first_token, step.token_ids), "SUB")
        first, last = net.number(0, ids), net.number(self.spec.vocab_size - 1, ids)
        nearest = net.binary(net.binary(ids, first, "MAX"), last, "MIN")
        rows = net.gather(table, nearest)
        return net.select(net.shape(net.binary(ids, nearest, "EQUAL"), (-1, 1)), rows, net.number(0.0, rows))

    def embed_positions(self, step: TensorRTStep, table: Value) -> Value:
        return self.net.gather(table, step.positions)

    def norm(self, x: Value, weight: NormWeight) -> Value:
        net = self.net
        with net.scope(weight.name):
            gain = weight.weight.reshape((1,) * (len(x.shape) - weight.weight.dim()) + tuple(weight.weight.shape))
            exact = net.cast(x, weight.weight.dtype)
            if weight.norm.kind == "layer":
                normal = self._centred(exact, weight.norm.eps)
            else:
                normal = self.unit_norm(exact, weight.norm.eps)
            y = net.binary(normal, net.constant(f"{weight.name}.weight", gain), "PROD")
            if weight.bias is not None:
                bias = net.constant(f"{weight.name}.bias", weight.bias.reshape(gain.shape))
                y = net.binary(y, bias, "SUM")
            return net.cast(y, self.dtype)

    def _centred(self, x: Value, eps: float) -> Value:
        """x with mean 0 and variance 1."""
        exact = self.net.cast(x, torch.float32)
        centred = self.net.binary(exact, self.net.mean(exact), "SUB")
        return self.net.cast(self._normalized(centred, eps), self.net.dtype_of(x))

    def unit_norm(self, x: Value, eps: float) -> Value:
        return self.net.cast(self._normalized(self.net.cast(x, torch.float32), eps), self.net.dtype_of(x))

    def _normalized(self, x: Value, eps: float) -> Value:
        net = self.net
        size = net.binary(net.mean(net.binary(x, x, "PROD")), net.number(eps, x), "SUM")
        return net.binary(x, net.unary(net.unary(size, "SQRT"), "RECIP"), "PROD")

    def linear(self, x: Value, weight: Linear | Value) -> Value:
        if isinstance(weight, Linear):
            return weight(x)
        with self.net.scope("tied"):
            return self.net.matmul(x, weight, transposed=True)

    def split(self, y: Value, weight: Linear) -> Sequence[Value]:
        if len(weight.rows) == 1:
            return [y]
        with self.net.scope(weight.name):
            starts = [sum(weight.rows[:index]) for index in range(len(weight.rows))]
            return [self.net.columns(y, start, count) for start, count in zip(starts, weight.rows, strict=True)]

    def add(self, a: Value, b: Value | float) -> Value:
        return self.net.binary(a, self._operand(a, b), "SUM")

    def mul(self, a: Value, b: Value | float) -> Value:
        return self.net.binary(a, self._operand(a, b), "PROD")

    def _operand(self, a: Value, b: Value | float) -> Value:
        return self.net.number(b, a) if isinstance(b, (int, float)) else b

    def clamp(self, x: Value, low: float | None, high: float | None) -> Value:
        if low is not None:
            x = self.net.binary(x, self.net.number(low, x), "MAX")
        return x if high is None else self.net.binary(x, self.net.number(high, x), "MIN")

    def tanh(self, x: Value) -> Value:
        return self.net.activation(x, "TANH")

    def sigmoid(self, x: Value) -> Value:
        return self.net.activation(x, "SIGMOID")

    def activation(self, x: Value, kind: str) -> Value:
        if kind == "silu":
            return self.mul(x, self.sigmoid(x))
        if kind == "quick_gelu":
            return self.mul(x, self.sigmoid(self.mul(x, 1.702)))
        if kind == "relu2":
            y = self.net.activation(x, "RELU")
            return self.mul(y, y)
        return self.net.activation(x, _ACTIVATIONS[kind])

    def heads(self, x: Value, head_dim: int) -> Value:
        return self.net.shape(x, (0, x.shape[1] // head_dim, head_dim))

    def rope(self, x: Value, rope: Rope, step: TensorRTStep) -> Value:
        net = self.net
        cos, sin = self._tables(rope)
        ids = net.once("rope ids", lambda: net.shape(net.cast(step.positions, torch.int64), (1, -1)))
        heads, width = x.shape[1], x.shape[2]
        turned = net.rotary(net.shape(x, (1, heads, -1, width), first=(1, 0, 2)), cos, sin, ids, rope.dim)
        return net.shape(net.shape(turned, (heads, -1, width)), (), then=(1, 0, 2))

    def _tables(self, rope: Rope) -> tuple[Value, Value]:
        frequencies, factor = frequencies_for(rope, self.max_positions)
        angles = torch.outer(torch.arange(self.max_positions).float(), frequencies)
        kind = "local" if rope is self.spec.local_rope else "global"
        cos, sin = ((part * factor).to(self.dtype) for part in (angles.cos(), angles.sin()))
        return self.net.constant(f"rope.{kind}.cos", cos), self.net.constant(f"rope.{kind}.sin", sin)

    def scale_queries(self, q: Value, floor: float, scale: float, step: TensorRTStep) -> Value:
        net = self.net

        def factors() -> Value:
            position = net.shape(net.cast(step.positions, torch.float32), (-1, 1, 1))
            steps = net.unary(self.mul(self.add(position, 1.0), 1 / floor), "FLOOR")
            return self.add(self.mul(net.unary(self.add(steps, 1.0), "LOG"), scale), 1.0)

        scaled = net.binary(net.cast(q, torch.float32), net.once("query scaling", factors), "PROD")
        return net.cast(scaled, self.dtype)

    def attention(
        self, q: Value, k: Value, v: Value, layer: int, step: TensorRTStep, sinks: Value | None = None
    ) -> Value:
        net, spec = self.net, self.spec
        heads = q.shape[1]
        with net.scope(f"layers.{layer}.attn"):
            before = step.caches[layer]
            keys = net.update_cache(before[0], k, step.written, step.starts)
            values = net.update_cache(before[1], v, step.written, step.starts)
            self.updated[layer] = keys, values
            scaled = self.mul(q, spec.attention_scale_of(layer))
            queries = net.shape(net.gather(scaled, step.query_index), (), then=(0, 2, 1, 3))
            if self.fp8_attention is not None:
                out = self._attention_in_fp8(queries, keys, values, layer, step)
            elif spells_out(spec):
                out = self._spelt_out(queries, keys, values, layer, step, sinks)
            else:
                out = net.attention(queries, keys, values, step.lengths, self._mask(layer, step))
            placed = net.shape(out, (-1, heads * spec.head_dim), first=(0, 2, 1, 3))
            return net.gather(placed, step.query_place)

    def _attention_in_fp8(self, queries: Value, keys: Value, values: Value, layer: int, step: TensorRTStep) -> Value:
        """Queries, keys, values and probabilities on E4M3's grid; checkpoints hold no scale for queries: it is 1."""
        net = self.net
        assert self.fp8_attention is not None

        def rounded(x: Value, name: str, scale: Tensor) -> Value:
            constant = net.constant(f"layers.{layer}.attn.{name}", scale.float())
            return net.dequantize(net.quantize(x, constant, E4M3), constant, self.dtype)

        key, value = self.fp8_attention[layer]
        q = rounded(queries, "q_scale", torch.tensor(self.spec.attention_scale_of(layer)))
        k, v = rounded(keys, "k_scale", key), rounded(values, "v_scale", value)
        largest = net.constant("attention.p_scale", torch.tensor(1 / E4M3_MAX))
        return net.attention(q, k, v, step.lengths, self._mask(layer, step), largest)

    def _mask(self, layer: int, step: TensorRTStep, always: bool = False) -> Value | None:
        """What the queries of a layer see, [B, 1 or N, Q, S]; None: all up to themselves."""
        net, spec, window = self.net, self.spec, self.spec.windows[layer]
        if window is None and spec.alibi is None and not always:
            return None

        def visible() -> Value:
            queries = net.shape(net.gather(step.positions, step.query_index), (0, 1, -1, 1))
            keys = net.constant("mask.keys", torch.arange(self.max_positions, dtype=torch.int32)[None, None, None])
            seen = net.unary(net.binary(keys, queries, "GREATER"), "NOT")
            if window is None:
                return seen
            size = net.number(window, queries)
            if spec.chunked:
                first = net.binary(net.binary(queries, size, "FLOOR_DIV"), size, "PROD")
                return net.binary(seen, net.unary(net.binary(first, keys, "GREATER"), "NOT"), "AND")
            return net.binary(seen, net.binary(keys, net.binary(queries, size, "SUB"), "GREATER"), "AND")

        def biased() -> Value:
            assert spec.alibi is not None
            positions = torch.arange(self.max_positions)[None]
            bias = alibi_bias(spec.alibi, self.rank.spec.num_heads, positions)[:, self.rank.heads, None].to(self.dtype)
            low = torch.full((1, 1, 1, 1), torch.finfo(self.dtype).min, dtype=self.dtype)
            return net.select(seen, net.constant("mask.alibi", bias), net.constant("mask.hidden", low))

        seen = net.once(f"mask {window}", visible)
        return seen if spec.alibi is None else net.once(f"mask alibi {window}", biased)

    def _spelt_out(
        self, queries: Value, keys: Value, values: Value, layer: int, step: TensorRTStep, sinks: Value | None
    ) -> Value:
        """Attention in plain layers: scores [B, N, Q, S] in fp32."""
        net, spec = self.net, self.spec
        heads, kv_heads, width = queries.shape[1], keys.shape[1], queries.shape[3]
        folded = net.shape(queries, (0, kv_heads, -1, width))
        scores = net.cast(net.matmul(folded, keys, transposed=True), torch.float32)
        scores = net.shape(scores, (0, heads, -1, self.max_positions))
        if spec.attention_softcap is not None:
            scores = self.soft_cap(scores, spec.attention_softcap)
        low = net.number(torch.finfo(torch.float32).min, scores)
        mask = self._mask(layer, step, always=True)
        hidden = net.select(mask, scores, low)
        if sinks is not None:
            own = net.shape(sinks, (1, heads, 1, 1))
            nothing = self.mul(net.columns(scores, 0, 1), 0.0)
            hidden = net.concatenate([hidden, net.binary(nothing, own, "SUM")])
        shares = net.softmax(hidden)
        if sinks is not None:
            shares = net.columns(shares, 0, self.max_positions)
        shares = net.shape(net.cast(shares, self.dtype), (0, kv_heads, -1, self.max_positions))
        return net.shape(net.matmul(shares, values), (0, heads, -1, width))

    def latent_attention(
        self, q: Value, latent: Value, k_rope: Value, k_up: Value, v_up: Value, layer: int, step: TensorRTStep
    ) -> Value:
        raise AssertionError("refused when the op set was made")

    def route(self, x: Value, router: Linear, correction: Value | None, moe: MoE) -> tuple[Value, Value]:
        net = self.net
        with net.scope(router.name):
            scores = router(net.cast(x, torch.float32))
            if moe.scores != "top_softmax":
                scores = net.softmax(scores) if moe.scores == "softmax" else self.sigmoid(scores)
            weights, chosen = net.largest(scores, moe.top_k)
            if moe.scores == "top_softmax":
                weights = net.softmax(weights)
            if moe.normalize:
                weights = net.binary(weights, net.total(weights, 1, keep=True), "DIV")
            return chosen, weights if moe.scale == 1 else self.mul(weights, moe.scale)

    def experts(
        self, x: Value, routing: tuple[Value, Value], experts: Sequence[Mlp], activation: Activation, weighs_input: bool
    ) -> Value:
        """In plain layers, which know no routing, every token passes every expert, most of which then count nothing."""
        if self.expert_layers and not weighs_input and activation == Activation() and not _quantized(experts):
            return self._chosen_experts(x, routing, experts)
        net, (chosen, weights) = self.net, routing
        top_k = weights.shape[1]
        ids = net.constant(f"experts {len(experts)}", torch.arange(len(experts), dtype=torch.int32)[None, None])
        sent = net.cast(net.binary(net.shape(chosen, (0, top_k, 1)), ids, "EQUAL"), torch.float32)
        shares = net.total(net.binary(sent, net.shape(weights, (0, top_k, 1)), "PROD"), 1)  # [T, experts]
        parts = []
        for index, expert in enumerate(experts):
            share = net.cast(net.columns(shares, index, 1), self.dtype)
            if weighs_input:
                parts.append(self.mlp(self.mul(x, share), expert, activation))
            else:
                parts.append(self.mul(self.mlp(x, expert, activation), share))
        total = parts[0]
        for part in parts[1:]:
            total = self.add(total, part)
        return total

    def _chosen_experts(self, x: Value, routing: tuple[Value, Value], experts: Sequence[Mlp]) -> Value:
        """As a layer that computes the chosen ones only; each token is a sequence to it, which it is made for."""
        net, (chosen, weights), name = self.net, routing, experts[0].down.name.rsplit(".", 2)[0]
        top_k, width = weights.shape[1], x.shape[1]

        def stacked(suffix: str) -> list[Value]:
            parts = [_gate_up_down(expert, suffix) for expert in experts]
            return [
                net.constant(f"{name}.{which}.{suffix}", torch.stack(held).to(self.dtype))
                for which, held in zip(("gate", "up", "down"), zip(*parts, strict=True), strict=True)
            ]

        with net.scope(name):
            scores = net.shape(net.cast(weights, self.dtype), (-1, 1, top_k))
            biases = stacked("bias") if "bias" in experts[0].down.tensors else []
            tokens = net.shape(x, (-1, 1, width))
            y = net.experts(tokens, net.shape(chosen, (-1, 1, top_k)), scores, stacked("weight"), biases)
            return net.shape(y, (-1, width))

    def rows(self, x: Value, step: TensorRTStep) -> Value:
        return self.net.gather(x, step.rows)

    # Collectives.

    def all_reduce(self, x: Value) -> Value:
        tp = self.rank.tp
        return x if tp == 1 else self.net.collective(x, "ALL_REDUCE", tp)

    def all_gather(self, x: Value) -> Value:
        """Of logits; without the padding of the vocabulary."""
        net, tp, width, whole = self.net, self.rank.tp, x.shape[1], self.rank.spec.vocab_size
        if tp == 1:
            return x
        below = net.shape(net.collective(x, "ALL_GATHER", tp), (tp, -1, width), then=(1, 0, 2))
        beside = net.shape(below, (-1, tp * width))
        return beside if tp * width == whole else net.columns(beside, 0, whole)


def _quantized(experts: Sequence[Mlp]) -> bool:
    return any(linear.tensors.keys() - {"weight", "bias"} for mlp in experts for linear in (*mlp.gate_up, mlp.down))


def _gate_up_down(expert: Mlp, suffix: str) -> list[Tensor]:
    """One tensor of each of an expert's linears; weights [I, O]."""
    joined = torch.cat([linear.tensors[suffix] for linear in expert.gate_up])
    parts = [*joined.chunk(2), expert.down.tensors[suffix]]
    return [part.t() if suffix == "weight" else part for part in parts]
