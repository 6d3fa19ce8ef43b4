"""The decoder's vocabulary.

A value is whatever the op set computes with (a torch tensor, later a TensorRT tensor); the decoder only passes values
from word to word. Activations are packed: the tokens of all sequences of a step stand in one dimension, T. A `step`
(prepared by the op set from a batch) carries token ids, positions, rows that want logits and what attention needs.

Words are core or fused. A fused word has a default expansion into core words, which is also its test twin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trtx.converters.spec import Rope

if TYPE_CHECKING:
    from torch import Tensor

    from trtx.quantize.weight import LinearWeight

Value = Any
Step = Any


class Ops(ABC):
    """One rank's op set."""

    # Weights, made resident once.

    @abstractmethod
    def load_tensor(self, name: str, tensor: Tensor) -> Value:
        """A norm's weight or the embedding table, as this op set keeps it."""

    @abstractmethod
    def load_linear(self, weight: LinearWeight) -> Value:
        """A linear's weight (or several fused), as this op set keeps it."""

    @abstractmethod
    def tie(self, table: Value) -> Value:
        """The output projection that shares the embedding `table`, as `linear` takes it."""

    # Core words.

    @abstractmethod
    def embed(self, step: Step, table: Value) -> Value:
        """Rows of `table` [V, H] for the step's token ids → [T, H]; zeros for ids that another rank holds."""

    @abstractmethod
    def norm(self, x: Value, weight: Value, eps: float) -> Value:
        """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last dimension, statistics in fp32."""

    @abstractmethod
    def linear(self, x: Value, weight: Value) -> Value:
        """[…, I] → […, O], in the way the weight's format says."""

    @abstractmethod
    def split(self, y: Value, weight: Value) -> Sequence[Value]:
        """The output of a linear, cut along its last dimension into the parts that were fused in `weight`."""

    @abstractmethod
    def add(self, a: Value, b: Value) -> Value:
        """a + b."""

    @abstractmethod
    def mul(self, a: Value, b: Value) -> Value:
        """a * b."""

    @abstractmethod
    def activation(self, x: Value, kind: str) -> Value:
        """'silu', 'gelu', 'gelu_tanh' or 'relu', element by element."""

    @abstractmethod
    def heads(self, x: Value, head_dim: int) -> Value:
        """[T, heads * head_dim] → [T, heads, head_dim]."""

    @abstractmethod
    def rope(self, x: Value, rope: Rope, step: Step) -> Value:
        """Rotate the first `rope.dim` features of each head of x [T, heads, head_dim] by the step's positions."""

    @abstractmethod
    def attention(self, q: Value, k: Value, v: Value, layer: int, step: Step) -> Value:
        """Append k, v [T, kv_heads, head_dim] to the cache of `layer` and attend with q [T, heads, head_dim].

        Causal, within the layer's window, scaled by head_dim**-0.5 → [T, heads * head_dim].
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

    def add_norm(self, x: Value, delta: Value | None, weight: Value, eps: float) -> tuple[Value, Value]:
        """The residual stream x + delta, and its norm. No delta yet (the first layer): x itself."""
        if delta is not None:
            x = self.add(x, delta)
        return x, self.norm(x, weight, eps)

    def gated_mlp(self, x: Value, gate_up: Value, down: Value, kind: str) -> Value:
        """down(activation(gate(x)) * up(x)), summed over ranks by the caller."""
        gate, up = self.linears(x, gate_up)
        return self.linear(self.mul(self.activation(gate, kind), up), down)
