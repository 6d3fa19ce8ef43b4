"""The decoder's vocabulary.

A value is whatever the op set computes with (a torch tensor, later a TensorRT tensor); the decoder only passes values
from word to word. Activations are packed: the tokens of all sequences of a step stand in one dimension, T. A `step`
(prepared by the op set from a batch) carries token ids, positions, rows that want logits and what attention needs.

Words are core or fused. A fused word has a default expansion into core words, which is also its test twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtx.converters.spec import Activation, MoE, Norm, QueryScaling, Rope

if TYPE_CHECKING:
    from torch import Tensor

    from trtx.quantize.weight import LinearWeight

Value = Any
Step = Any


@dataclass(frozen=True)
class Mlp:
    """The resident weights of an MLP: gate and up (or up alone) read one input."""

    gate_up: Value
    down: Value


@dataclass(frozen=True)
class Heads:
    """What is done to the projections of one layer before they attend.

    Attributes:
        size: features of a head.
        q_norm, k_norm: over each head; None: none.
        rope: None: none.
        unit_eps: of an RMSNorm without a weight behind RoPE; None: none.
        scaling: of queries by their position, in layers without RoPE.
        sinks: [heads] logits that take part in the softmax and have no value; None: none.
    """

    size: int
    q_norm: Value = None
    k_norm: Value = None
    rope: Rope | None = None
    unit_eps: float | None = None
    scaling: QueryScaling | None = None
    sinks: Value = None


class Ops(ABC):
    """One rank's op set."""

    # Weights, made resident once.

    @abstractmethod
    def load_table(self, name: str, tensor: Tensor) -> Value:
        """An embedding table."""

    @abstractmethod
    def load_norm(self, name: str, weight: Tensor, bias: Tensor | None, norm: Norm) -> Value:
        """A norm, with all that `norm` needs to know of it."""

    @abstractmethod
    def load_vector(self, name: str, tensor: Tensor) -> Value:
        """Numbers of their own meaning, in fp32."""

    @abstractmethod
    def load_linear(self, weight: LinearWeight) -> Value:
        """A linear's weight (or several fused), as this op set keeps it."""

    @abstractmethod
    def load_matrix(self, name: str, tensor: Tensor) -> Value:
        """A matrix that is multiplied into others."""

    @abstractmethod
    def load_router(self, weight: LinearWeight) -> Value:
        """The weight of a router, as `route` takes it."""

    @abstractmethod
    def tie(self, table: Value) -> Value:
        """The output projection that shares the embedding `table`, as `linear` takes it."""

    def load_experts(self, experts: Sequence[Mlp]) -> Value:
        """The experts of a layer, as `experts` takes them."""
        return experts

    # Core words.

    @abstractmethod
    def embed(self, step: Step, table: Value, scale: float = 1.0) -> Value:
        """Rows of `table` [V, H] for the step's token ids → [T, H]; zeros for ids that another rank holds.

        Args:
            scale: of the rows, rounded to the compute dtype first.
        """

    @abstractmethod
    def embed_positions(self, step: Step, table: Value) -> Value:
        """Rows of `table` [max_positions, H] for the step's positions → [T, H]."""

    @abstractmethod
    def norm(self, x: Value, weight: Value) -> Value:
        """Normalize over the last dimension of x; a weight of two dimensions has a row for each head."""

    @abstractmethod
    def unit_norm(self, x: Value, eps: float) -> Value:
        """RMSNorm over the last dimension, without a weight."""

    @abstractmethod
    def linear(self, x: Value, weight: Value) -> Value:
        """[…, I] → […, O], in the way the weight's format says."""

    @abstractmethod
    def split(self, y: Value, weight: Value) -> Sequence[Value]:
        """The output of a linear, cut along its last dimension into the parts that were fused in `weight`."""

    @abstractmethod
    def add(self, a: Value, b: Value | float) -> Value:
        """a + b."""

    @abstractmethod
    def mul(self, a: Value, b: Value | float) -> Value:
        """a * b; where b is a value, its last dimension may be 1."""

    @abstractmethod
    def clamp(self, x: Value, low: float | None, high: float | None) -> Value:
        """x cut off at both ends, or at one."""

    @abstractmethod
    def tanh(self, x: Value) -> Value:
        """The hyperbolic tangent, element by element."""

    @abstractmethod
    def sigmoid(self, x: Value) -> Value:
        """1 / (1 + exp(-x)), element by element."""

    @abstractmethod
    def activation(self, x: Value, kind: str) -> Value:
        """A kind of `converters.spec.Activation`, element by element."""

    @abstractmethod
    def heads(self, x: Value, head_dim: int) -> Value:
        """[T, heads * head_dim] → [T, heads, head_dim]."""

    @abstractmethod
    def rope(self, x: Value, rope: Rope, step: Step) -> Value:
        """Rotate the first `rope.dim` features of each head of x [T, heads, head_dim] by the step's positions."""

    @abstractmethod
    def scale_queries(self, q: Value, floor: float, scale: float, step: Step) -> Value:
        """q [T, heads, head_dim] times a factor of its position; see `converters.spec.QueryScaling`."""

    @abstractmethod
    def attention(self, q: Value, k: Value, v: Value, layer: int, step: Step, sinks: Value | None = None) -> Value:
        """Append k, v [T, kv_heads, head_dim] to the cache of `layer` and attend with q [T, heads, head_dim].

        Causal; scale, window, ALiBi and soft cap are those the spec says for the layer → [T, heads * head_dim].

        Args:
            sinks: [heads] logits that take part in the softmax and have no value.
        """

    @abstractmethod
    def latent_attention(
        self, q: Value, latent: Value, k_rope: Value, k_up: Value, v_up: Value, layer: int, step: Step
    ) -> Value:
        """Append the latent to the cache of `layer` and attend with q to the keys and values it stands for.

        Args:
            q: [T, heads, head_dim], of which the first rope_dim features are rotated.
            latent: [T, rank].
            k_rope: [T, 1, rope_dim], rotated; the first features of every head's key.
            k_up, v_up: matrices [heads * (head_dim - rope_dim), rank] and [heads * value_dim, rank].

        Returns:
            [T, heads * value_dim].
        """

    @abstractmethod
    def route(self, x: Value, router: Value, correction: Value | None, moe: MoE) -> tuple[Value, Value]:
        """The experts of each token of x [T, H] and their weights: ids and fp32, [T, top_k] each; computed in fp32."""

    @abstractmethod
    def experts(
        self, x: Value, routing: tuple[Value, Value], experts: Value, activation: Activation, weighs_input: bool
    ) -> Value:
        """Send each token of x [T, H] through its experts → the weighted sum [T, H], summed over ranks by the caller.

        Args:
            experts: what `load_experts` made of them.
            weighs_input: the weights multiply what goes into an expert instead.
        """

    @abstractmethod
    def rows(self, x: Value, step: Step) -> Value:
        """The rows of x [T, H] that want logits → [R, H]."""

    # Collectives: the identity on one rank.

    def all_reduce(self, x: Value) -> Value:
        """The sum of x over the ranks."""
        return x

    def all_gather(self, x: Value) -> Value:
        """The ranks' x side by side along the last dimension."""
        return x

    # Fused words.

    def linears(self, x: Value, group: Value) -> list[Value]:
        """Several linears that read the same input; `group` is what `load_linear` made of each, or of all fused."""
        return [part for weight in group for part in self.split(self.linear(x, weight), weight)]

    def project(self, x: Value, weight: Value) -> Value:
        """`linear`, whose output goes to the residual stream: an op set may put it off until it is added there."""
        return self.linear(x, weight)

    def attend(self, q: Value, k: Value, v: Value, layer: int, step: Step, heads: Heads) -> Value:
        """From projections [T, heads * size] of queries, keys and values to `attention`'s output."""
        q, k, v = (self.heads(part, heads.size) for part in (q, k, v))
        if heads.q_norm is not None:
            q, k = self.norm(q, heads.q_norm), self.norm(k, heads.k_norm)
        if heads.rope:
            q, k = self.rope(q, heads.rope, step), self.rope(k, heads.rope, step)
        if heads.unit_eps is not None:
            q, k = self.unit_norm(q, heads.unit_eps), self.unit_norm(k, heads.unit_eps)
        if heads.scaling:
            q = self.scale_queries(q, heads.scaling.floor, heads.scaling.scale, step)
        return self.attention(q, k, v, layer, step, heads.sinks)

    def add_norm(self, x: Value, delta: Value | None, weight: Value) -> tuple[Value, Value]:
        """The residual stream x + delta, and its norm. No delta yet (the first layer): x itself."""
        if delta is not None:
            x = self.add(x, delta)
        return x, self.norm(x, weight)

    def mlp(self, x: Value, weights: Mlp, activation: Activation) -> Value:
        """[T, H] → [T, H], summed over ranks by the caller; see `converters.spec.Activation`."""
        *gates, up = self.linears(x, weights.gate_up)
        if not gates:
            return self.project(self.activation(up, activation.kind), weights.down)
        (gate,) = gates
        if activation.limit is not None:
            gate = self.clamp(gate, None, activation.limit)
            up = self.clamp(up, -activation.limit, activation.limit)
        if activation.offset:
            up = self.add(up, activation.offset)
        return self.project(self.mul(self.activation(gate, activation.kind), up), weights.down)

    def soft_cap(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap)."""
        return self.mul(self.tanh(self.mul(x, 1 / cap)), cap)
