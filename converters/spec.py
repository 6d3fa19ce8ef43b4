"""`ModelSpec`: everything that tells one decoder from another, as frozen data.

The spec is the only thing about a model that the decoder, the builder and the quantizer see. It is written into a
checkpoint's `config.json` and an engine's `engine.json` and read back strictly: an unknown or missing field is an
error.

`ModelSpec.modules()` lists every weight the decoder reads, with canonical names:

    embed                      [vocab, hidden]            embedding
    layers.I.attn_norm         [hidden]                   norm
    layers.I.attn.q|k|v        [heads*head_dim, hidden]   linear (+ bias)
    layers.I.attn.q_norm|k_norm [head_dim]                norm
    layers.I.attn.o            [hidden, heads*head_dim]   linear (+ bias)
    layers.I.mlp_norm          [hidden]                   norm
    layers.I.mlp.gate|up       [intermediate, hidden]     linear (+ bias)
    layers.I.mlp.down          [hidden, intermediate]     linear (+ bias)
    final_norm                 [hidden]                   norm
    lm_head                    [vocab, hidden]            linear, absent when tied to `embed`

The tensors of a module are named `MODULE.weight`, `MODULE.bias` and, quantized, as its format says.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, TypeVar

from trtx.converters.errors import InputError

T = TypeVar("T")

FUSIONS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.gate_up": ("mlp.gate", "mlp.up")}
"""Linears of a layer that read one input, by the name of the fused module."""


class Kind(Enum):
    """What a module is, which decides how it may be stored."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    NORM = "norm"


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
    def parameters(self) -> int:
        """Number of parameters, the bias included."""
        count = 1
        for size in self.shape:
            count *= size
        return count + (self.shape[0] if self.bias else 0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) over the first `dim` features of a head.

    Attributes:
        dim: rotated features; `head_dim` unless the family rotates only part.
        theta: base of the frequencies.
        scaling: 'none'; 'linear' (positions divided by `factor`); 'llama3' (Llama 3.1's frequency bands);
            'yarn' (Peng et al. 2023, arXiv:2309.00071).
        factor: context extension factor.
        original_max_position: the context length before extension ('llama3', 'yarn').
        low_freq_factor, high_freq_factor: band limits of 'llama3'.
        beta_fast, beta_slow, attention_factor, truncate: of 'yarn'; `attention_factor` multiplies cos and sin.
    """

    dim: int
    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer, as data.

    Attributes:
        family: the row of the family table it came from; for reports only, nothing computes with it.
        windows: per layer, how many latest positions (itself included) a token attends to; None: all.
        qk_norm: RMSNorm over each head's query and key before RoPE.
        max_positions: the longest sequence the model was made for.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    max_positions: int
    windows: tuple[int | None, ...]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config: {self.num_heads} attention heads can't share {self.num_kv_heads} key/value heads evenly.",
                "Check num_attention_heads and num_key_value_heads.",
            )
        if len(self.windows) != self.num_layers:
            raise InputError(f"config: {len(self.windows)} attention windows for {self.num_layers} layers.")

    @cached_property
    def _modules(self) -> tuple[Module, ...]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        found = [Module("embed", Kind.EMBEDDING, (self.vocab_size, hidden), Split.ROWS)]
        for index in range(self.num_layers):
            layer = f"layers.{index}"
            found += [
                Module(f"{layer}.attn_norm", Kind.NORM, (hidden,)),
                Module(f"{layer}.attn.q", Kind.LINEAR, (q_width, hidden), Split.ROWS, self.qkv_bias),
                Module(f"{layer}.attn.k", Kind.LINEAR, (kv_width, hidden), Split.ROWS, self.qkv_bias),
                Module(f"{layer}.attn.v", Kind.LINEAR, (kv_width, hidden), Split.ROWS, self.qkv_bias),
                Module(f"{layer}.attn.o", Kind.LINEAR, (hidden, q_width), Split.COLUMNS, self.o_bias),
                Module(f"{layer}.mlp_norm", Kind.NORM, (hidden,)),
                Module(f"{layer}.mlp.gate", Kind.LINEAR, (inner, hidden), Split.ROWS, self.mlp_bias),
                Module(f"{layer}.mlp.up", Kind.LINEAR, (inner, hidden), Split.ROWS, self.mlp_bias),
                Module(f"{layer}.mlp.down", Kind.LINEAR, (hidden, inner), Split.COLUMNS, self.mlp_bias),
            ]
            if self.qk_norm:
                found += [Module(f"{layer}.attn.{n}_norm", Kind.NORM, (self.head_dim,)) for n in ("q", "k")]
        found.append(Module("final_norm", Kind.NORM, (hidden,)))
        if not self.tied_embeddings:
            found.append(Module("lm_head", Kind.LINEAR, (self.vocab_size, hidden), Split.ROWS))
        return tuple(found)

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
