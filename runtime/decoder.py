"""The decoder, written once, for one rank, over the vocabulary of `runtime.ops.base`.

`embed`, `layer` and `head` can be called apart: pipeline stages, layer-wise calibration and weight streaming need it.
The residual stream is carried as a pair (x, delta): `delta` is the last block's output, not yet added, so that an op
set can fuse the addition with the norm that follows, across layers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtx.converters.spec import ModelSpec
from trtx.runtime.ops.base import Ops, Step, Value


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer, looked up once."""

    attn_norm: Value
    qkv: Value
    q_norm: Value
    k_norm: Value
    o: Value
    mlp_norm: Value
    gate_up: Value
    down: Value


class Decoder:
    """A decoder-only transformer.

    Args:
        spec: the architecture.
        weights: by canonical name: what the op set made of norms, embedding, linears and fused groups
            ('layers.I.attn.qkv', 'layers.I.mlp.gate_up'). See `runtime.weights.load`.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Any], ops: Ops) -> None:
        self.spec = spec
        self.ops = ops
        self.embedding = weights["embed"]
        self.final_norm = weights["final_norm"]
        self.lm_head = weights["lm_head"]
        self.layers = [_layer(weights, f"layers.{index}") for index in range(spec.num_layers)]

    def forward(self, step: Step) -> Value:
        """Logits [R, V] of the step's rows that want them."""
        x, delta = self.embed(step), None
        for index in range(self.spec.num_layers):
            x, delta = self.layer(index, x, delta, step)
        return self.head(x, delta, step)

    def embed(self, step: Step) -> Value:
        """Token ids → [T, H]."""
        return self.ops.all_reduce(self.ops.embed(step, self.embedding))

    def layer(self, index: int, x: Value, delta: Value | None, step: Step) -> tuple[Value, Value]:
        """One layer on the residual stream x + delta, [T, H] each; returns the new pair."""
        ops, spec, w = self.ops, self.spec, self.layers[index]

        x, h = ops.add_norm(x, delta, w.attn_norm, spec.norm_eps)
        q, k, v = (ops.heads(part, spec.head_dim) for part in ops.linears(h, w.qkv))
        if spec.qk_norm:
            q, k = ops.norm(q, w.q_norm, spec.norm_eps), ops.norm(k, w.k_norm, spec.norm_eps)
        q, k = ops.rope(q, spec.rope, step), ops.rope(k, spec.rope, step)
        attended = ops.attention(q, k, v, index, step)
        delta = ops.all_reduce(ops.linear(attended, w.o))

        x, h = ops.add_norm(x, delta, w.mlp_norm, spec.norm_eps)
        return x, ops.all_reduce(ops.gated_mlp(h, w.gate_up, w.down, spec.activation))

    def head(self, x: Value, delta: Value, step: Step) -> Value:
        """The residual stream → logits [R, V]."""
        ops = self.ops
        _, h = ops.add_norm(ops.rows(x, step), ops.rows(delta, step), self.final_norm, self.spec.norm_eps)
        return ops.all_gather(ops.linear(h, self.lm_head))


def _layer(weights: Mapping[str, Any], name: str) -> _Layer:
    return _Layer(
        attn_norm=weights[f"{name}.attn_norm"],
        qkv=weights[f"{name}.attn.qkv"],
        q_norm=weights.get(f"{name}.attn.q_norm"),
        k_norm=weights.get(f"{name}.attn.k_norm"),
        o=weights[f"{name}.attn.o"],
        mlp_norm=weights[f"{name}.mlp_norm"],
        gate_up=weights[f"{name}.mlp.gate_up"],
        down=weights[f"{name}.mlp.down"],
    )
