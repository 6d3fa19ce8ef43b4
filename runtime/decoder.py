"""The decoder, written once, for one rank, over the vocabulary of `runtime.ops.base`.

`embed`, `layer` and `head` can be called apart: pipeline stages, layer-wise calibration and weight streaming need it.
The residual stream is carried as a pair (x, delta): `delta` is the last block's output, not yet added, so that an op
set can fuse the addition with the norm that follows, across layers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtx.converters.spec import ModelSpec
from trtx.runtime.ops.base import Heads, Mlp, Ops, Step, Value


class Decoder:
    """A decoder-only transformer.

    Args:
        spec: the architecture.
        weights: by canonical name: what the op set made of each module, fused linears by the group's name
            ('layers.I.attn.qkv', 'layers.I.mlp.gate_up'). See `runtime.weights.load`.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Any], ops: Ops) -> None:
        self.spec = spec
        self.ops = ops
        self.top = _Weights()
        self.layers = [_Weights() for _ in range(spec.num_layers)]
        for name, weight in weights.items():
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                self.layers[int(layer)][rest] = weight
            else:
                self.top[name] = weight
        for index, found in enumerate(self.layers):
            _gather_mlps(spec, found, index, ops)
        self.heads = [_heads(spec, found, index) for index, found in enumerate(self.layers)]

    def forward(self, step: Step) -> Value:
        """Logits [R, V] of the step's rows that want them."""
        return self.head(*self.body(step, narrow=True))

    def body(self, step: Step, narrow: bool = False) -> tuple[Value, Value | None]:
        """All layers: the residual stream as a pair, of the step's tokens, or of the rows that want logits."""
        x, delta = self.embed(step), None
        for index in range(self.spec.num_layers):
            x, delta = self.layer(index, x, delta, step, narrow and index == self.spec.num_layers - 1)
        return x, delta

    def embed(self, step: Step) -> Value:
        """Token ids → [T, H]."""
        ops, spec, w = self.ops, self.spec, self.top
        x = ops.all_reduce(ops.embed(step, w["embed"], spec.embedding_scale))
        if "embed_in" in w:
            x = ops.linear(x, w["embed_in"])
        if spec.learned_positions:
            x = ops.add(x, ops.embed_positions(step, w["positions"]))
        return ops.norm(x, w["embed_norm"]) if spec.embedding_norm else x

    def layer(
        self, index: int, x: Value, delta: Value | None, step: Step, narrow: bool = False
    ) -> tuple[Value, Value | None]:
        """One layer on the residual stream x + delta, [T, H] each; returns the new pair.

        Args:
            narrow: go on with the rows that want logits, [R, H], once keys and values of all are cached: behind the
                last layer nobody reads others.
        """
        ops, w = self.ops, self.layers[index]

        x, h = self._enter(x, delta, w["attn_norm"])
        attended = self.attention(index, h, step, narrow)
        x = ops.rows(x, step) if narrow else x
        if self.spec.parallel != "no":
            if w["mlp_norm"] is not None:
                h = ops.norm(x, w["mlp_norm"])
            elif narrow:
                h = ops.rows(h, step)
            return self._leave(x, ops.all_reduce(ops.add(attended, self.mlp(index, h))), None, None)
        x, delta = self._leave(x, ops.all_reduce(attended), w["attn_norm"], w["attn_out_norm"])

        x, h = self._enter(x, delta, w["mlp_norm"])
        return self._leave(x, ops.all_reduce(self.mlp(index, h)), w["mlp_norm"], w["mlp_out_norm"])

    def attention(self, index: int, h: Value, step: Step, narrow: bool = False) -> Value:
        """[T, H] → [T, H], or [R, H] if `narrow`; to be summed over the ranks."""
        attended = self._attended(index, h, step)
        return self.ops.project(self.ops.rows(attended, step) if narrow else attended, self.layers[index]["attn.o"])

    def _attended(self, index: int, h: Value, step: Step) -> Value:
        """[T, H] → what the heads give, [T, heads * value_dim]."""
        ops, spec, w = self.ops, self.spec, self.layers[index]
        if spec.latent:
            return self._latent_attended(index, h, step)
        q, k, v = ops.linears(h, w["attn.qkv"])
        if spec.qkv_clip is not None:
            q, k, v = (ops.clamp(part, -spec.qkv_clip, spec.qkv_clip) for part in (q, k, v))
        if spec.qk_norm == "width":
            q, k = ops.norm(q, w["attn.q_norm"]), ops.norm(k, w["attn.k_norm"])
        return ops.attend(q, k, v, index, step, self.heads[index])

    def _latent_attended(self, index: int, h: Value, step: Step) -> Value:
        ops, spec, w = self.ops, self.spec, self.layers[index]
        *compressed, latent, k_rope = ops.linears(h, w["attn.qkv_a"])
        if compressed:
            q = ops.linear(ops.norm(compressed[0], w["attn.q_a_norm"]), w["attn.q_b"])
        else:
            (q,) = ops.linears(h, w["attn.qkv"])
        q, k_rope = ops.heads(q, spec.head_dim), ops.heads(k_rope, spec.rotated_dim)
        if rope := spec.rope_of(index):
            q, k_rope = ops.rope(q, rope, step), ops.rope(k_rope, rope, step)
        latent = ops.norm(latent, w["attn.latent_norm"])
        return ops.latent_attention(q, latent, k_rope, w["attn.k_up"], w["attn.v_up"], index, step)

    def mlp(self, index: int, h: Value) -> Value:
        """[T, H] → [T, H], to be summed over the ranks."""
        ops, activation, moe, w = self.ops, self.spec.activation, self.spec.moe, self.layers[index]
        if moe is None or not self.spec.has_experts(index):
            return ops.mlp(h, w["mlp"], activation)
        routing = ops.route(h, w["mlp.router"], w["mlp.router_correction"], moe)
        y = ops.experts(h, routing, w["mlp.experts"], activation, moe.weighs_input)
        if moe.shared_size:
            shared = ops.mlp(h, w["mlp.shared"], activation)
            if moe.shared_gate:
                shared = ops.mul(shared, ops.sigmoid(ops.linear(h, w["mlp.shared_gate"])))
            y = ops.add(y, shared)
        return y

    def head(self, x: Value, delta: Value | None) -> Value:
        """The residual stream, [R, H] → logits [R, V]."""
        ops, spec, w = self.ops, self.spec, self.top
        _, h = self._enter(x, delta, w["final_norm"])
        if "embed_out" in w:
            h = ops.linear(h, w["embed_out"])
        logits = ops.all_gather(ops.linear(h, w["lm_head"]))
        if spec.logit_scale != 1:
            logits = ops.mul(logits, spec.logit_scale)
        return logits if spec.logit_softcap is None else ops.soft_cap(logits, spec.logit_softcap)

    def _enter(self, x: Value, delta: Value | None, norm: Value | None) -> tuple[Value, Value]:
        """The residual stream, and what a block reads of it."""
        if norm is not None and self.spec.norm_placement != "residual":
            x, h = self.ops.add_norm(x, delta, norm)
            return (h, h) if self.spec.normed_residual else (x, h)
        if delta is not None:
            x = self.ops.add(x, delta)
        return x, x

    def _leave(self, x: Value, y: Value, norm: Value | None, out_norm: Value | None) -> tuple[Value, Value | None]:
        """The pair after a block's output y.

        Args:
            norm: of the residual stream.
            out_norm: of y.
        """
        if self.spec.norm_placement == "residual":
            return self.ops.norm(self.ops.add(x, y), norm), None
        if out_norm is not None:
            y = self.ops.norm(y, out_norm)
        return x, y if self.spec.residual_scale == 1 else self.ops.mul(y, self.spec.residual_scale)


class _Weights(dict[str, Any]):
    """Weights by name; None for what the model does not have."""

    def __missing__(self, name: str) -> None:
        return None


def _heads(spec: ModelSpec, layer: _Weights, index: int) -> Heads:
    """What a layer does to its queries and keys."""
    rope, normed = spec.rope_of(index), spec.qk_norm in ("head", "heads")
    return Heads(
        size=spec.head_dim,
        q_norm=layer["attn.q_norm"] if normed else None,
        k_norm=layer["attn.k_norm"] if normed else None,
        rope=rope,
        unit_eps=spec.norm.eps if rope and spec.qk_norm == "unit" else None,
        scaling=None if rope else spec.query_scaling,
        sinks=layer["attn.sinks"],
    )


def _gather_mlps(spec: ModelSpec, layer: _Weights, index: int, ops: Ops) -> None:
    """Make one value of the weights of each MLP and expert of a layer."""

    def take(name: str) -> Mlp:
        return Mlp(layer.pop(f"{name}.gate_up"), layer.pop(f"{name}.down"))

    if spec.moe is None or not spec.has_experts(index):
        layer["mlp"] = take("mlp")
        return
    layer["mlp.experts"] = ops.load_experts([take(f"mlp.experts.{expert}") for expert in range(spec.moe.experts)])
    if spec.moe.shared_size:
        layer["mlp.shared"] = take("mlp.shared")
