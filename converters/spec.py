"""`ModelSpec`: everything that tells one decoder from another, as frozen data.

The spec is the only thing about a model that the decoder, the builder and the quantizer see. It is written into a
checkpoint's `config.json` and an engine's `engine.json` and read back strictly: an unknown or missing field is an
error.

`ModelSpec.modules()` lists every weight the decoder reads, with canonical names. I is a layer, J an expert:

    embed                          [vocab, width]              embedding; width is hidden but where `embed_in` is there
    positions                      [max_positions, hidden]     embedding, learned
    embed_in, embed_out            [hidden, width], and back   linear, where the embedding is narrower than the model
    embed_norm, final_norm         [hidden]                    norm
    layers.I.attn_norm, mlp_norm   [hidden]                    norm of the residual stream
    layers.I.attn_out_norm, mlp_out_norm  [hidden]             norm of a block's output
    layers.I.attn.q|k|v            [heads*head_dim, hidden]    linear
    layers.I.attn.q_norm|k_norm    [head_dim], [heads, head_dim] or [heads*head_dim]  norm
    layers.I.attn.sinks            [heads]                     vector
    layers.I.attn.o                [hidden, heads*head_dim]    linear
    layers.I.mlp.gate|up           [intermediate, hidden]      linear; no gate where the MLP has none
    layers.I.mlp.down              [hidden, intermediate]      linear
    lm_head                        [vocab, width]              linear, absent when tied to `embed`

Latent attention (MLA) has these in place of q, k and v; the rotated features of a head come first in it:

    layers.I.attn.q                [heads*head_dim, hidden]    linear, or, with a compressed query:
    layers.I.attn.q_a, q_a_norm, q_b  [rank, hidden], [rank], [heads*head_dim, rank]
    layers.I.attn.latent, latent_norm  [kv_rank, hidden], [kv_rank]
    layers.I.attn.k_rope           [rope_dim, hidden]          linear: the rotated part of the key, shared by all heads
    layers.I.attn.k_up, v_up       [heads*(head_dim - rope_dim), kv_rank], [heads*v_dim, kv_rank]  matrix

A layer with experts has these in place of the MLP's:

    layers.I.mlp.router            [experts, hidden]           matrix
    layers.I.mlp.router_correction [experts]                   vector
    layers.I.mlp.experts.J.gate|up|down, layers.I.mlp.shared.gate|up|down  as above, with widths of their own
    layers.I.mlp.shared_gate       [1, hidden]                 matrix

The tensors of a module are named `MODULE.weight`, `MODULE.bias` and, quantized, as its format says.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, TypeVar

from trtx.converters.errors import InputError

T = TypeVar("T")

FUSIONS = {"qkv": ("q", "k", "v"), "qkv_a": ("q_a", "latent", "k_rope"), "gate_up": ("gate", "up")}
"""Linears that read one input, by the last part of their names and of the fused module's."""

_LATENT_NORMS = (".q_a_norm", ".latent_norm")
"""Ends of the names of norms that have `Latent.norm_eps`, and otherwise nothing of `ModelSpec.norm`."""


class Kind(Enum):
    """What a module is, which decides how it may be stored."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    MATRIX = "matrix"
    """A linear map that is never quantized: it is small, or it is multiplied into others."""
    NORM = "norm"
    VECTOR = "vector"
    """Numbers of their own meaning, always stored in fp32."""


class Split(Enum):
    """How tensor parallelism partitions a module's weight."""

    NONE = "replicated"
    ROWS = "rows"
    """Output features (or vocabulary rows) are split; the input is whole on every rank."""
    COLUMNS = "columns"
    """Input features are split; the ranks' outputs are summed (all-reduce)."""


@dataclass(frozen=True)
class Module:
    """One module of the decoder: its canonical name, the shape of its weight and how it is partitioned."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    split: Split = Split.NONE
    bias: bool = False

    @property
    def is_expert(self) -> bool:
        """Whether only the tokens that were sent to it pass through it."""
        return ".experts." in self.name

    @property
    def parameters(self) -> int:
        """Number of parameters, the bias included."""
        count = 1
        for size in self.shape:
            count *= size
        return count + (self.shape[0] if self.bias else 0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over the first `dim` features of a head.

    Feature i is rotated together with feature i + dim/2. Families that rotate neighbours (2i, 2i+1) get their query
    and key rows in another order when they are converted, which changes no product of the two.

    Attributes:
        dim: rotated features; `head_dim` unless the family rotates only part.
        theta: base of the frequencies.
        scaling: 'none'; 'linear' (positions divided by `factor`); 'bands' (Llama 3.1's);
            'yarn' (Peng et al. 2023, arXiv:2309.00071); 'longrope' (Ding et al. 2024, arXiv:2402.13753).
        factor: context extension factor.
        original_max_position: the context length before extension ('bands', 'yarn', 'longrope').
        low_freq_factor, high_freq_factor: limits of 'bands'.
        beta_fast, beta_slow, truncate: of 'yarn'.
        attention_factor: multiplies cos and sin ('yarn', 'longrope').
        short_factors, long_factors: divisors of each frequency ('longrope'); the long ones serve an engine whose
            sequences may be longer than `original_max_position`.
        long_attention_factor: in place of `attention_factor` with the long factors; None: the same.
    """

    dim: int
    theta: float = 10000.0
    scaling: Literal["none", "linear", "bands", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    long_attention_factor: float | None = None


@dataclass(frozen=True)
class Norm:
    """How activations are normalized, with statistics in fp32.

    Attributes:
        kind: 'rms' (Zhang & Sennrich 2019, arXiv:1910.07467) or 'layer' (Ba et al. 2016, arXiv:1607.06450).
        offset: added to the stored weight (Gemma and Nemotron store weight - 1).
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Activation:
    """What an MLP does between its linears: kind(up(x)), or gated kind(gate(x)) * (up(x) + offset).

    Attributes:
        kind: 'relu2' is relu squared; 'quick_gelu' is x * sigmoid(1.702 x).
        limit: gate is cut off above it, up on both sides.
    """

    kind: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"] = "silu"
    gated: bool = True
    limit: float | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (Press et al. 2021, arXiv:2108.12409): slope * key position is added to a score.

    The slopes of n heads, n a power of two, are 2**(-max_bias * i / n), i = 1 … n; other numbers of heads take those
    of the power below, then every other one of the power above.

    Attributes:
        scale: of the bias.
        rounded: slope and bias are rounded to bf16, as the model was trained.
    """

    max_bias: float = 8.0
    scale: float = 1.0
    rounded: bool = False


@dataclass(frozen=True)
class QueryScaling:
    """Queries at position p, on layers without RoPE, are multiplied by 1 + scale * ln(1 + floor((p + 1) / floor))."""

    floor: float
    scale: float


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are made from one cached latent.

    Attributes:
        query_rank: width of the compressed query; None: queries come straight from the hidden state.
        rank: width of the latent.
        value_dim: features of a head's value.
        norm_eps: of the norms on latent and compressed query.
        bias: of the linears that compress.
    """

    query_rank: int | None
    rank: int
    value_dim: int
    norm_eps: float
    bias: bool = False


@dataclass(frozen=True)
class MoE:
    """A mixture of experts in place of the MLP.

    The router's logits become scores; the `top_k` experts with the largest score (+ correction) are used, each with a
    weight made from its score.

    Attributes:
        layers: which have experts; the others have an MLP of `ModelSpec.intermediate_size`.
        scores: 'softmax' over all experts; 'sigmoid'; 'top_softmax': softmax over the chosen; 'sparsemixer' (Liu et al.
            2023, arXiv:2310.00811), with `jitter` as its threshold.
        normalize: weights are divided by their sum.
        scale: of the weights.
        groups, top_groups: only experts of the `top_groups` best of `groups` equal groups can be chosen.
        group_score: the largest score in a group, or the sum of its two largest.
        correction: a bias for each expert that counts for the choice, not for the weight.
        weighs_input: weights multiply what goes into an expert, not what comes out.
        shared_size: width of an MLP that every token passes too; 0: none.
        shared_gate: its output is multiplied by the sigmoid of a linear of the input.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    intermediate_size: int
    scores: Literal["softmax", "sigmoid", "top_softmax", "sparsemixer"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction: bool = False
    jitter: float = 0.0
    weighs_input: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer, as data.

    Attributes:
        family: the row of the family table it came from; for reports only, nothing computes with it.
        head_dim: of queries and keys; of values too but with `latent`.
        max_positions: the longest sequence the model was made for.
        rope: None: no rotation.
        local_rope: in place of `rope` on layers with a window.
        nope_layers: layers that do not rotate.
        windows: per layer, how many latest positions (itself included) a token attends to; None: all.
        chunked: windows are chunks: a token at p attends from p // window * window on.
        qk_norm: of each head's query and key before RoPE, with one weight for all heads ('head') or one each ('heads');
            of all heads together ('width'); without weights, after RoPE, on layers with RoPE ('unit').
        qkv_clip: queries, keys and values are cut off at ±qkv_clip.
        attention_scale: of the scores; None: head_dim**-0.5.
        layer_scaled: scores of layer i are divided by i + 1 as well.
        attention_softcap, logit_softcap: x becomes cap * tanh(x / cap).
        sinks: each head has a logit that takes part in the softmax and has no value.
        norm_placement: 'pre': block(norm(x)) is added to x; 'post': norm(block(x)); 'sandwich': norm(block(norm(x)));
            'residual': block(x) is added and the sum is normalized.
        parallel: attention and MLP read the same x: through one norm ('shared_norm') or two ('own_norms').
        normed_residual: a block's output is added to what its norm gave, not to what went into the norm.
        residual_scale: of what is added to the residual stream.
        embedding_size: width of the embedding where it is not `hidden_size`.
        embedding_scale: of the embedding; rounded to the compute dtype first.
        learned_positions: a row of a table is added for each position.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: Norm
    rope: Rope | None
    max_positions: int
    windows: tuple[int | None, ...]
    activation: Activation = Activation()
    local_rope: Rope | None = None
    nope_layers: tuple[int, ...] = ()
    chunked: bool = False
    alibi: Alibi | None = None
    query_scaling: QueryScaling | None = None
    latent: Latent | None = None
    moe: MoE | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["none", "head", "heads", "width", "unit"] = "none"
    qkv_clip: float | None = None
    attention_scale: float | None = None
    layer_scaled: bool = False
    attention_softcap: float | None = None
    sinks: bool = False
    norm_placement: Literal["pre", "post", "sandwich", "residual"] = "pre"
    parallel: Literal["no", "shared_norm", "own_norms"] = "no"
    normed_residual: bool = False
    residual_scale: float = 1.0
    embedding_size: int | None = None
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    learned_positions: bool = False
    final_norm: bool = True
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config: {self.num_heads} attention heads can't share {self.num_kv_heads} key/value heads evenly.",
                "Check num_attention_heads and num_key_value_heads.",
            )
        if len(self.windows) != self.num_layers:
            raise InputError(f"config: {len(self.windows)} attention windows for {self.num_layers} layers.")
        moe = self.moe
        if moe and (moe.top_k > moe.experts or moe.experts % moe.groups or moe.top_groups > moe.groups):
            raise InputError(
                f"config: the best {moe.top_k} of {moe.experts} experts can't be chosen from the best "
                f"{moe.top_groups} of {moe.groups} equal groups.",
                "Check the numbers of experts, groups and experts a token.",
            )

    # What follows for one layer.

    def rope_of(self, layer: int) -> Rope | None:
        """How a layer rotates queries and keys; None: it does not."""
        if layer in self.nope_layers:
            return None
        return self.local_rope if self.local_rope and self.windows[layer] else self.rope

    @property
    def ropes(self) -> set[Rope]:
        """Every way in which layers rotate."""
        return {rope for rope in (self.rope, self.local_rope) if rope}

    def norm_of(self, name: str) -> Norm:
        """How the norm of that canonical name computes: as the model's do, but for those of MLA's compressed parts."""
        return Norm(self.latent.norm_eps) if self.latent and name.endswith(_LATENT_NORMS) else self.norm

    def attention_scale_of(self, layer: int) -> float:
        """What a layer's scores are multiplied by."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.layer_scaled else scale

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of an MLP."""
        return self.moe is not None and layer in self.moe.layers

    def seen_from(self, layer: int, position: int) -> int:
        """How many positions a token attends to, itself included."""
        window = self.windows[layer]
        if window is None:
            return position + 1
        return position % window + 1 if self.chunked else min(position + 1, window)

    # What is cached for a token, in each layer.

    @property
    def value_dim(self) -> int:
        """Features of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def cached_heads(self) -> int:
        """Rows that the KV cache holds: one a key/value head, or the latent alone."""
        return 1 if self.latent else self.num_kv_heads

    @property
    def cached_dim(self) -> int:
        """Numbers in such a row."""
        return self.latent.rank + self.rotated_dim if self.latent else self.head_dim

    @property
    def cached_arrays(self) -> int:
        """Keys and values, or latents, from which both are made."""
        return 1 if self.latent else 2

    @property
    def rotated_dim(self) -> int:
        """Rotated features of a head."""
        return self.rope.dim if self.rope else 0

    # Modules.

    @cached_property
    def _modules(self) -> tuple[Module, ...]:
        return tuple(self._list_modules())

    def _list_modules(self) -> Iterator[Module]:
        hidden, width = self.hidden_size, self.embedding_size or self.hidden_size
        yield Module("embed", Kind.EMBEDDING, (self.vocab_size, width), Split.ROWS)
        if width != hidden:
            yield Module("embed_in", Kind.LINEAR, (hidden, width))
        if self.learned_positions:
            yield Module("positions", Kind.EMBEDDING, (self.max_positions, hidden))
        if self.embedding_norm:
            yield self._norm("embed_norm")
        for index in range(self.num_layers):
            yield from self._layer_modules(index)
        if self.final_norm:
            yield self._norm("final_norm")
        if width != hidden:
            yield Module("embed_out", Kind.LINEAR, (width, hidden))
        if not self.tied_embeddings:
            yield Module("lm_head", Kind.LINEAR, (self.vocab_size, width), Split.ROWS, self.head_bias)

    def _layer_modules(self, index: int) -> Iterator[Module]:
        layer, placement = f"layers.{index}", self.norm_placement
        before, behind = placement != "post", placement in ("post", "sandwich")
        if before:
            yield self._norm(f"{layer}.attn_norm")
        yield from self._latent_modules(f"{layer}.attn") if self.latent else self._qkv_modules(f"{layer}.attn")
        if self.sinks:
            yield Module(f"{layer}.attn.sinks", Kind.VECTOR, (self.num_heads,), Split.ROWS)
        values = self.num_heads * self.value_dim
        yield Module(f"{layer}.attn.o", Kind.LINEAR, (self.hidden_size, values), Split.COLUMNS, self.o_bias)
        if behind:
            yield self._norm(f"{layer}.attn_out_norm")
        if before and self.parallel != "shared_norm":
            yield self._norm(f"{layer}.mlp_norm")
        if self.has_experts(index):
            yield from self._expert_modules(f"{layer}.mlp")
        else:
            yield from self._mlp_modules(f"{layer}.mlp", self.intermediate_size, self.mlp_bias)
        if behind:
            yield self._norm(f"{layer}.mlp_out_norm")

    def _qkv_modules(self, attn: str) -> Iterator[Module]:
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        for name, count in heads.items():
            shape = (count * self.head_dim, self.hidden_size)
            yield Module(f"{attn}.{name}", Kind.LINEAR, shape, Split.ROWS, self.qkv_bias)
        for name in ("q", "k"):
            if self.qk_norm == "head":
                yield self._norm(f"{attn}.{name}_norm", self.head_dim)
            elif self.qk_norm == "heads":
                shape = (heads[name], self.head_dim)
                yield Module(f"{attn}.{name}_norm", Kind.NORM, shape, Split.ROWS)
            elif self.qk_norm == "width":
                yield Module(f"{attn}.{name}_norm", Kind.NORM, (heads[name] * self.head_dim,), Split.ROWS)

    def _latent_modules(self, attn: str) -> Iterator[Module]:
        assert self.latent is not None
        hidden, latent, rotated = self.hidden_size, self.latent, self.rotated_dim
        queries = self.num_heads * self.head_dim
        if latent.query_rank is None:
            yield Module(f"{attn}.q", Kind.LINEAR, (queries, hidden), Split.ROWS)
        else:
            yield Module(f"{attn}.q_a", Kind.LINEAR, (latent.query_rank, hidden), bias=latent.bias)
            yield Module(f"{attn}.q_a_norm", Kind.NORM, (latent.query_rank,))
            yield Module(f"{attn}.q_b", Kind.LINEAR, (queries, latent.query_rank), Split.ROWS)
        yield Module(f"{attn}.latent", Kind.LINEAR, (latent.rank, hidden), bias=latent.bias)
        yield Module(f"{attn}.k_rope", Kind.LINEAR, (rotated, hidden), bias=latent.bias)
        yield Module(f"{attn}.latent_norm", Kind.NORM, (latent.rank,))
        keys, values = self.num_heads * (self.head_dim - rotated), self.num_heads * latent.value_dim
        yield Module(f"{attn}.k_up", Kind.MATRIX, (keys, latent.rank), Split.ROWS)
        yield Module(f"{attn}.v_up", Kind.MATRIX, (values, latent.rank), Split.ROWS)

    def _mlp_modules(self, mlp: str, inner: int, bias: bool) -> Iterator[Module]:
        for name in ("gate", "up") if self.activation.gated else ("up",):
            yield Module(f"{mlp}.{name}", Kind.LINEAR, (inner, self.hidden_size), Split.ROWS, bias)
        yield Module(f"{mlp}.down", Kind.LINEAR, (self.hidden_size, inner), Split.COLUMNS, bias)

    def _expert_modules(self, mlp: str) -> Iterator[Module]:
        assert self.moe is not None
        moe = self.moe
        yield Module(f"{mlp}.router", Kind.MATRIX, (moe.experts, self.hidden_size), bias=moe.router_bias)
        if moe.correction:
            yield Module(f"{mlp}.router_correction", Kind.VECTOR, (moe.experts,))
        for expert in range(moe.experts):
            yield from self._mlp_modules(f"{mlp}.experts.{expert}", moe.intermediate_size, moe.expert_bias)
        if moe.shared_size:
            yield from self._mlp_modules(f"{mlp}.shared", moe.shared_size, self.mlp_bias)
        if moe.shared_gate:
            yield Module(f"{mlp}.shared_gate", Kind.MATRIX, (1, self.hidden_size))

    def _norm(self, name: str, size: int | None = None) -> Module:
        return Module(name, Kind.NORM, (size or self.hidden_size,), bias=self.norm.bias)

    def modules(self) -> tuple[Module, ...]:
        """Every module of the decoder, in the order it is used."""
        return self._modules

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(module.parameters for module in self.modules())

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json(ModelSpec, …)` reads it back."""
        return dataclasses.asdict(self)


def from_json(cls: type[T], content: Any, where: str) -> T:
    """Build a (nested) frozen dataclass from JSON values, strictly.

    Every key must be a field, every field without a default must be there, and every value must have the field's type.

    Args:
        where: what to call the content in an error, e.g. the file's path.

    Raises:
        InputError: names the offending key.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected an object, found {type(content).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if unknown := sorted(content.keys() - fields.keys()):
        raise InputError(f"{where}: unknown key {unknown[0]!r}.", f"Known keys: {', '.join(fields)}.")
    values = {}
    for name, spec in fields.items():
        if name in content:
            values[name] = _value(hints[name], content[name], f"{where}: {name}")
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: missing key {name!r}.")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _value(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {value!r}.", f"Known values: {', '.join(map(str, arguments))}.")
        return value
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        return origin(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is hint:
        return value
    raise InputError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}.", "Give a value of that type.")
