"""Checkpoints that are published quantized: read as the unquantized checkpoint that they stand for, in bf16.

    method  stored for weight W           dtype             shape               meaning (i: input, o: output feature)
    mxfp4   W_blocks                      uint8             [E, O, I/32, 16]    E2M1 nibbles, low: even i, bit 3: sign
            W_scales                      uint8             [E, O, I/32]        W[e, i, o] = E2M1[q] * 2^(scale - 127)
    fp8     W                             e4m3              [O, I]
            W_scale_inv, or M.scale       fp32, bf16, fp16, [⌈O/r⌉, ⌈I/c⌉]      W[o, i] = q * scale[o // r, i // c]
            for W = M.weight              e8m0 or uint8     or []: one scale
            M.activation_scale            any               any                 static scheme only; of inputs: left out

mxfp4 is gpt-oss; fp8 is DeepSeek V3, Qwen3-…-FP8 and Ministral. `quantization_config` says the method; which weights
are quantized is told by the scales that are stored, not by its lists of modules. An E8M0 byte b is 2^(b - 127).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtx.converters.artifact import Draft
from trtx.converters.checkpoint import Dtype
from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.families.rules import only
from trtx.converters.hf_config import Config
from trtx.converters.shards import Header
from trtx.quantize.formats import E2M1_VALUES, E4M3

if TYPE_CHECKING:
    from trtx.converters.sources import Source

E8M0 = torch.float8_e8m0fnu
_KEY = "quantization_config"
_AGAIN = "Download the checkpoint again."
_NIBBLES = (*E2M1_VALUES, *(-value for value in E2M1_VALUES))
_PAIRS = torch.tensor([[_NIBBLES[byte & 15], _NIBBLES[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16).view(
    torch.int32
)[:, 0]
"""The two values of a byte, as one number of 32 bits."""
_E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
"""By code. Looking values up is several times as fast as torch's conversion on the CPU."""


@dataclass(frozen=True)
class Packed:
    """The stored tensors that a weight is made of."""

    values: str
    scales: str


@dataclass(frozen=True)
class Packing:
    """Which weights of a checkpoint are quantized.

    Attributes:
        packed: weight → what is stored for it.
        hidden: stored tensors that the unquantized checkpoint does not have.
    """

    packed: Mapping[str, Packed]
    hidden: frozenset[str]

    def logical(self, names: Collection[str]) -> list[str]:
        """The tensors of the unquantized checkpoint, from the stored ones."""
        return [name for name in names if name not in self.hidden and name not in self.packed] + list(self.packed)


class Scheme(ABC):
    """A way to quantize, as `quantization_config` describes it."""

    method: str

    @abstractmethod
    def pack(self, names: Collection[str], where: str) -> Packing:
        """Pair values and scales by name.

        Raises:
            InputError: one of them is missing, or a weight is stored twice.
        """

    @abstractmethod
    def shape(self, packed: Packed, headers: Mapping[str, Header]) -> tuple[int, ...]:
        """The shape of a weight in the unquantized checkpoint.

        Raises:
            InputError: shapes do not fit together.
            UnsupportedError: a dtype that the method does not have here.
        """

    @abstractmethod
    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of a weight of this shape: the bytes stored, and the number of scales whose dtype is not known beforehand."""

    @abstractmethod
    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """The weight (of one expert): exactly, or computed in fp32 and rounded once to bf16."""

    def describe(self) -> dict[str, Any]:
        """What to know about it, as JSON values."""
        return {"method": self.method}


class Mxfp4(Scheme):
    """E2M1 values with an E8M0 scale for 32 of them; experts only."""

    method = "mxfp4"

    def __init__(self, config: Config) -> None:
        config.texts("modules_to_not_convert", None)

    def pack(self, names: Collection[str], where: str) -> Packing:
        stems = dict.fromkeys(
            name.removesuffix(end) for name in names for end in ("_blocks", "_scales") if name.endswith(end)
        )
        packed = {stem: Packed(f"{stem}_blocks", f"{stem}_scales") for stem in stems}
        for stem, parts in packed.items():
            for part, other in ((parts.values, parts.scales), (parts.scales, parts.values)):
                if part not in names:
                    raise _missing(where, part, other)
            if stem in names:
                raise InputError(f"{where}: {stem!r} is stored beside {parts.values!r}, which is the same.", _AGAIN)
        return Packing(packed, frozenset(part for parts in packed.values() for part in (parts.values, parts.scales)))

    def shape(self, packed: Packed, headers: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = headers[packed.values], headers[packed.scales]
        for name, header in ((packed.values, values), (packed.scales, scales)):
            _require_dtype(name, header, (torch.uint8,))
        if len(values.shape) != 4 or values.shape[-1] != 16:
            raise _misshapen(packed.values, values, "[experts, rows, groups, 16]")
        if scales.shape != values.shape[:-1]:
            raise _misshapen(packed.scales, scales, list(values.shape[:-1]))
        experts, rows, groups, _ = values.shape
        return experts, 32 * groups, rows

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        count = torch.Size(shape).numel()
        return count // 2 + count // 32, 0

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        weights = _look_up(_PAIRS, values).view(torch.bfloat16)  # [rows, groups, 32]
        weights *= scales.contiguous().view(E8M0).bfloat16()[..., None]  # exact: 2 significant bits and powers of two
        return weights.flatten(1).t()


class Fp8(Scheme):
    """E4M3 weights with a scale for each block, or a single one."""

    method = "fp8"

    def __init__(self, config: Config) -> None:
        only(config, "fmt", ("e4m3",), "e4m3")
        only(config, "activation_scheme", ("dynamic", "static"), "dynamic")
        only(config, "scale_fmt", ("float", "ue8m0"), "float")
        for key in ("modules_to_not_convert", "ignored_layers", "modules_to_convert"):
            config.texts(key, None)
        block = config.integers("weight_block_size", None)
        if not config.given("weight_block_size"):
            block = [128, 128]
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise config.wrong("weight_block_size", "two positive numbers, or null")
        self._block = block
        self._static = config.text("activation_scheme", "dynamic") == "static"

    def pack(self, names: Collection[str], where: str) -> Packing:
        packed: dict[str, Packed] = {}
        hidden = set()
        for name in names:
            if self._static and name.endswith(".activation_scale"):
                hidden.add(name)
                continue
            weight = name.removesuffix("_scale_inv")
            if name.endswith(".scale") and name.removesuffix("scale") + "weight" in names:
                weight = name.removesuffix("scale") + "weight"
            if weight == name:
                continue
            if weight not in names:
                raise _missing(where, weight, name)
            if weight in packed:
                raise InputError(f"{where}: {weight!r} has two scales, {packed[weight].scales!r} and {name!r}.", _AGAIN)
            packed[weight] = Packed(weight, name)
            hidden.add(name)
        return Packing(packed, frozenset(hidden))

    def shape(self, packed: Packed, headers: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = headers[packed.values], headers[packed.scales]
        _require_dtype(packed.values, values, (E4M3,))
        _require_dtype(packed.scales, scales, (torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8))
        if len(values.shape) != 2:
            raise _misshapen(packed.values, values, "two dimensions")
        if scales.shape != self._grid(values.shape):
            raise _misshapen(packed.scales, scales, list(self._grid(values.shape)))
        return values.shape

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return torch.Size(shape).numel(), torch.Size(self._grid(shape)).numel()

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        scales = (scales.contiguous().view(E8M0) if scales.dtype == torch.uint8 else scales).float()
        rows, columns = self._block or values.shape
        result = torch.empty(values.shape, dtype=torch.bfloat16)
        codes = values.contiguous().view(torch.uint8)
        for source, target, scale in zip(codes.split(rows), result.split(rows), torch.atleast_2d(scales), strict=True):
            target.copy_(_look_up(_E4M3_VALUES, source) * scale.repeat_interleave(columns)[: values.shape[1]])
        return result

    def describe(self) -> dict[str, Any]:
        return {"method": self.method, "weight_block_size": self._block}

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return () if self._block is None else tuple(-(-n // b) for n, b in zip(shape, self._block, strict=True))


_SCHEMES = {scheme.method: scheme for scheme in (Mxfp4, Fp8)}


def scheme_of(config: Mapping[str, Any], where: str) -> Scheme | None:
    """The scheme that a config.json names; None: it names none, or one that trtx does not read.

    Raises:
        InputError, UnsupportedError: a key or value of it is wrong or not modelled.
    """
    section = Config(config, where, "a language model").section(_KEY)
    method = section.text("quant_method", None)
    if method not in _SCHEMES:
        return None
    section.family = f"{method} checkpoints"
    scheme = _SCHEMES[method](section)
    section.boolean("dequantize", None)
    section.finish()
    return scheme


def unquantized(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config.json of the unquantized checkpoint; `config` itself where trtx knows no scheme of it."""
    if scheme_of(config, where) is None:
        return config
    return {key: value for key, value in config.items() if key != _KEY}


def dequantized(source: Source) -> Source:
    """The unquantized checkpoint that a source stands for; the source itself where trtx knows no scheme of it."""
    scheme = scheme_of(source.config, source.config_name)
    if scheme is None:
        return source
    return PrequantizedSource(source, scheme)


class PrequantizedSource:
    """A quantized checkpoint as the unquantized one; see `trtx.converters.sources.Source`.

    One weight, or one expert of it, is dequantized at a time. The last is kept: parts of it are asked for in a row.

    Raises:
        InputError: values without scales or the other way round, or shapes that do not fit together.
        UnsupportedError: a dtype that the scheme does not have here.
    """

    canonical: bool = False
    default_dtype: Dtype | None = "bf16"
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    def __init__(self, source: Source, scheme: Scheme) -> None:
        stored, where = source.headers, source.config_name
        packing = scheme.pack(stored.keys(), where)
        if not packing.packed:
            raise InputError(
                f"{where}: {_KEY!r} says {scheme.method}, but no tensor is stored that way.",
                f"If the weights are not quantized, remove {_KEY!r} from the file.",
            )
        self.config = unquantized(source.config, source.config_name)
        self.config_name = where
        self.provenance = {**source.provenance, "dequantized": scheme.describe()}
        self.identity = source.identity
        headers = {}
        for name in packing.logical(stored.keys()):
            if parts := packing.packed.get(name):
                headers[name] = Header(torch.bfloat16, scheme.shape(parts, stored), stored[parts.values].file)
            elif stored[name].dtype == E4M3:
                raise InputError(f"{stored[name].file}: tensor {name!r} is float8_e4m3fn and has no scale.", _AGAIN)
            else:
                headers[name] = stored[name]
        self.headers = headers
        self._source = source
        self._scheme = scheme
        self._packed = packing.packed
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        if name not in self._packed:
            return self._source.tensor(name, index)
        if index is None and len(self.headers[name].shape) > 2:
            return torch.stack([self.tensor(name, expert) for expert in range(self.headers[name].shape[0])])
        if self._last is None or self._last[0] != (name, index):
            self._last = None
            self._last = (name, index), self._dequantize(name, index)
        return self._last[1]

    def write_tokenizer(self, draft: Draft) -> list[str]:
        return self._source.write_tokenizer(draft)

    def _dequantize(self, name: str, index: int | None) -> Tensor:
        parts = self._packed[name]
        values, scales = (self._source.tensor(part, index) for part in (parts.values, parts.scales))
        weight = self._scheme.dequantize(values, scales)
        if not torch.stack(weight.aminmax()).isfinite().all():
            raise InputError(f"Tensor {name!r} holds NaN or infinity once dequantized.", _AGAIN)
        return weight


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def _missing(where: str, missing: str, other: str) -> InputError:
    return InputError(f"{where}: tensor {other!r} is stored, but {missing!r} is missing.", _AGAIN)


def _misshapen(name: str, header: Header, expected: object) -> InputError:
    return InputError(f"{header.file}: tensor {name!r} has {list(header.shape)}, expected {expected}.", _AGAIN)


def _require_dtype(name: str, header: Header, dtypes: tuple[torch.dtype, ...]) -> None:
    if header.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (header.dtype, *dtypes)]
        raise UnsupportedError(
            f"{header.file}: tensor {name!r} is {names[0]}; trtx reads {', '.join(names[1:])} there.",
            "Convert the unquantized model, then use `trtx quantize`.",
        )
