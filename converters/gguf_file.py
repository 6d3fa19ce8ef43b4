"""GGUF files (llama.cpp): read as the Hugging Face checkpoint they were made from.

The metadata becomes a config.json, the tensors get Hugging Face's names and layout, quantized ones are dequantized one
at a time, and the vocabulary becomes a tokenizer.json. From there on a GGUF file goes the way of every checkpoint. How
an architecture's file differs from Hugging Face's stands in `trtx.converters.families.gguf`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from trtx.converters.artifact import Draft, identify
from trtx.converters.checkpoint import Dtype
from trtx.converters.errors import InputError, UnsupportedError
from trtx.converters.families import Module, find_gguf_family
from trtx.converters.shards import Header
from trtx.converters.tokenizer_files import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    NO_TOKENIZER,
    PRE_TOKENIZERS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    byte_level_bpe,
    sentencepiece_bpe,
    surround,
)

_KV_HEADS = "attention.head_count_kv"
_KEY_LENGTH, _VALUE_LENGTH = "attention.key_length", "attention.value_length"
_ROPE_DIM = "rope.dimension_count"
_CHECKED_KEYS = (_KEY_LENGTH, _VALUE_LENGTH, _ROPE_DIM, "vocab_size", "rope.scaling.finetuned")
"""Keys of every architecture that are checked against the rest, or say nothing about what is computed."""

_NONE_IF_ZERO = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")

_SCALING_KEYS = ("rope_type", "factor", "original_max_position_embeddings")
"""What a file may say of RoPE scaling where there is none."""

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
"""Tensors that belong to the config."""

_STORED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_DTYPE_NAMES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MAGIC = b"GGUF"
_CONTROL, _USER_DEFINED = 3, 4
"""Token types (`tokenizer.ggml.token_type`): special tokens, and added ones that are text."""


@dataclass(frozen=True)
class _Entry:
    """A tensor under Hugging Face's name: a stored one, or an expert of it."""

    stored: gguf.ReaderTensor
    module: Module
    expert: int | None

    @property
    def plus_one(self) -> bool:
        return self.module.layout == "plus_one" and self.stored.name.endswith(".weight")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.plus_one else _STORED.get(self.stored.tensor_type, torch.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = _shape(self.stored)
        if self.expert is not None:
            return shape[1:]
        if self.module.layout == "transposed":
            return shape[::-1]
        return (1, *shape) if self.module.layout == "row" else shape


@dataclass(frozen=True)
class _Heads:
    """The heads of a layer."""

    queries: int
    groups: int
    dim: int


class GgufSource:
    """A GGUF file; see `trtx.converters.sources.Source`.

    Raises:
        InputError: not a complete GGUF file, or its metadata contradict each other.
        UnsupportedError: an architecture, key or quantization that trtx does not read.
    """

    canonical: bool = False
    default_dtype: Dtype | None
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = _open(path)
        self._metadata = {name: _value(field) for name, field in self._reader.fields.items()}
        architecture = str(self._metadata.get("general.architecture"))
        prefix = f"{architecture}."
        self._section = {
            key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)
        }
        self._stored = {tensor.name: tensor for tensor in self._reader.tensors}
        given = {key for key, value in self._section.items() if value}
        self._family, self._row = find_gguf_family(architecture, given | self._stored.keys(), str(path))
        self._refuse_unknown_keys()
        self._heads = self._read_heads()
        self.config = self._read_config()
        self.config_name = str(path)
        self._entries = self._name_tensors()
        self.headers = {name: Header(entry.dtype, entry.shape, path) for name, entry in self._entries.items()}
        self.default_dtype = self._dominant_dtype()
        types = sorted({tensor.tensor_type.name for tensor in self._stored.values()})
        self.provenance = {"kind": "gguf", "path": str(path.absolute()), "types": types}
        self.identity = identify(path)

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        entry = self._entries[name]
        stored, data, shape = entry.stored, entry.stored.data, _shape(entry.stored)
        for chosen in (entry.expert, index):
            if chosen is not None:
                data, shape = data[chosen], shape[1:]
        if stored.tensor_type in _STORED:
            tensor = torch.from_numpy(data.reshape(-1)).view(_STORED[stored.tensor_type]).reshape(shape)
        else:
            tensor = torch.from_numpy(gguf.dequantize(data, stored.tensor_type))
        match entry.module.layout:
            case "pairs":
                return _unpaired(tensor, self._heads)
            case "grouped":
                return _grouped(tensor, self._heads)
            case "transposed":
                return tensor.t()
            case "row":
                return tensor[None]
        return tensor.float() - 1 if entry.plus_one else tensor

    def write_tokenizer(self, draft: Draft) -> list[str]:
        metadata = self._metadata
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        ids = {
            name: metadata.get(f"tokenizer.ggml.{key}_token_id")
            for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        }
        ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
        generation = {"bos_token_id": ids["bos"], "eos_token_id": _unique(ends), "pad_token_id": ids["pad"]}
        draft.write_json(GENERATION_CONFIG, {key: value for key, value in generation.items() if value is not None})
        special = {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}
        if template := metadata.get("tokenizer.chat_template"):
            (draft.path / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        draft.write_json(
            TOKENIZER_CONFIG,
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{f"{name}_token": token for name, token in special.items()},
                "clean_up_tokenization_spaces": False,
                "model_max_length": self._section.get("context_length"),
            },
        )
        try:
            self._tokenizer(tokens, special).save(str(draft.path / TOKENIZER))
        except UnsupportedError as error:
            return [NO_TOKENIZER.format(error.cause)]
        return []

    def _read_heads(self) -> _Heads:
        queries, width = (self._size(key) for key in ("attention.head_count", "embedding_length"))
        groups = self._size(_KV_HEADS, queries)
        if groups != queries and self._row.keys.get(_KV_HEADS) is None:
            raise self._unsupported(_KV_HEADS, f"with {queries} heads")
        heads = _Heads(queries, groups, self._size(_KEY_LENGTH, width // queries))
        if self._section.get(_VALUE_LENGTH, heads.dim) != heads.dim:
            raise self._unsupported(_VALUE_LENGTH, f"with a key length of {heads.dim}")
        if _KEY_LENGTH not in self._row.keys and heads.dim * queries != width:
            raise self._unsupported(_KEY_LENGTH, f"with {queries} heads of an embedding of {width}")
        return heads

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._section.get(key, default)
        if type(value) is not int or value < 1:
            raise InputError(
                f"{self._path}: metadata {key!r} is {value}; expected a whole number of at least 1.",
                "Use another file of this model.",
            )
        return value

    def _read_config(self) -> dict[str, Any]:
        """The metadata as a config.json of the family, for the family table to read."""
        row, section = self._row, self._section
        config: dict[str, Any] = {
            **row.config,
            **{flag: tensor in self._stored for flag, tensor in row.flags.items()},
            "architectures": [self._family.architectures[0]],
            "model_type": self._family.model_types[0],
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": _HEAD not in self._stored,
        }
        given: dict[str, Any] = {}
        for key, name in row.keys.items():
            if name is None or key not in section:
                continue
            value = None if section[key] == 0 and key in _NONE_IF_ZERO else section[key]
            if given.setdefault(name, value) != value:
                raise self._contradiction(key, value, f"another key says {given[name]}")
        scaling = {name.partition(".")[2]: given.pop(name) for name in [*given] if name.startswith("rope_scaling.")}
        config |= given
        if _KEY_LENGTH in row.keys:
            config["head_dim"] = self._heads.dim
        rotated = section.get(_ROPE_DIM, self._heads.dim)
        if rotated != self._heads.dim:
            if not row.partial_rope:
                raise self._unsupported(_ROPE_DIM, f"with a key length of {self._heads.dim}")
            # the next float, as the product with the head's size is truncated
            config["partial_rotary_factor"] = math.nextafter(rotated / self._heads.dim, 1)
        if scaling := self._rope_scaling(scaling, config):
            config["rope_scaling"] = scaling
        return {**config, **row.derived(config)}

    def _vocab_size(self) -> int:
        tokens = self._metadata.get("tokenizer.ggml.tokens", [])
        size = _shape(self._stored[_EMBEDDING])[0] if _EMBEDDING in self._stored else len(tokens)
        said = self._section.get("vocab_size", size)
        if said != size:
            raise self._contradiction("vocab_size", said, f"the embedding has {size} rows")
        return size

    def _refuse_unknown_keys(self) -> None:
        allowed = self._row.allowed
        for key in sorted(self._section.keys() - self._row.keys.keys() - set(_CHECKED_KEYS)):
            if self._section[key] not in allowed.get(key, ()):
                raise self._unsupported(key)

    def _name_tensors(self) -> dict[str, _Entry]:
        """Tensors by Hugging Face's names; those that have none keep theirs, which the mapping then refuses."""
        entries: dict[str, _Entry] = {}
        for name, stored in self._stored.items():
            if name == _ROPE_FREQS or name in _ROPE_FACTORS:
                continue
            owner, _, suffix = name.rpartition(".")
            parts = owner.split(".")
            numbers = [part for part in parts if part.isdecimal()]
            module = self._row.modules.get(".".join("*" if part.isdecimal() else part for part in parts))
            if module is None or suffix not in ("weight", "bias"):
                entries[name] = _Entry(stored, Module(name), None)
                continue
            theirs = module.name
            for number in numbers:
                theirs = theirs.replace("*", number, 1)
            experts = range(_shape(stored)[0]) if "#" in theirs else (None,)
            for expert in experts:
                entries[f"{theirs.replace('#', str(expert))}.{suffix}"] = _Entry(stored, module, expert)
        return entries

    def _rope_scaling(self, given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """`rope_scaling` of config.json, from the section's keys and the tensors with a value for each frequency."""
        factors = {
            name: [_shortest(value) for value in _floats(self._stored[tensor])]
            for tensor, name in _ROPE_FACTORS.items()
            if tensor in self._stored
        }
        kind = "longrope" if factors else "linear" if "factor" in given else "none"  # llama.cpp's defaults
        scaling = {"rope_type": kind, **given, **factors}
        if _ROPE_FREQS in self._stored:
            if scaling["rope_type"] != "none":
                raise self._unsupported(_ROPE_FREQS, f"with {scaling['rope_type']} scaling")
            return self._llama3_scaling(_floats(self._stored[_ROPE_FREQS]), config)
        if scaling["rope_type"] != "none":
            return scaling
        rest = {name: value for name, value in given.items() if name not in _SCALING_KEYS}
        return {"rope_type": "default", **rest} if rest else {}  # which the table refuses

    def _llama3_scaling(self, divisors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
        """Llama 3.1's frequency bands, which GGUF stores as a divisor for each frequency (its `rope_freqs` tensor)."""
        original, low, high = 8192, 1.0, 4.0  # of every Llama 3.1 and 3.2
        factor = float(divisors.max())
        half = len(divisors)
        wavelengths = 2 * math.pi * float(config.get("rope_theta", 10000.0)) ** (np.arange(half) / half)
        blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
            raise self._unsupported(_ROPE_FREQS, "as they are not those of Llama 3.1 or 3.2")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _tokenizer(self, tokens: list[str], special: Mapping[str, str]) -> Tokenizer:
        metadata = self._metadata
        kind = metadata.get("tokenizer.ggml.model")
        types = metadata.get("tokenizer.ggml.token_type", [])
        added = [
            AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=False)
            if type_ in (_CONTROL, _USER_DEFINED)
        ]
        if kind == "llama":
            scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
            space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
            tokenizer = sentencepiece_bpe(tokens, scores, special.get("unk"), space_prefix, added, str(self._path))
            adds_bos = True
        elif kind == "gpt2":
            name = metadata.get("tokenizer.ggml.pre", "no tokenizer.ggml.pre")
            if name not in PRE_TOKENIZERS:
                raise UnsupportedError(f"its pre-tokenizer {name!r} is not known")
            vocab = {token: index for index, token in enumerate(tokens)}
            merges = metadata.get("tokenizer.ggml.merges", [])
            tokenizer = byte_level_bpe(vocab, merges, PRE_TOKENIZERS[name], added, str(self._path))
            adds_bos = PRE_TOKENIZERS[name].adds_bos
        else:
            raise UnsupportedError(f"its tokenizer model {kind!r} is not known")
        before = special.get("bos") if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
        after = special.get("eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
        surround(tokenizer, before, after)
        return tokenizer

    def _dominant_dtype(self) -> Dtype:
        """The dtype of most parameters; bf16, what models are trained in, where most are quantized."""
        counts: dict[GGMLQuantizationType, int] = {}
        for tensor in self._stored.values():
            counts[tensor.tensor_type] = counts.get(tensor.tensor_type, 0) + int(tensor.n_elements)
        return _DTYPE_NAMES[_STORED.get(max(counts, key=lambda kind: counts[kind]), torch.bfloat16)]

    def _unsupported(self, key: str, why: str = "") -> UnsupportedError:
        value = f" ({self._section[key]})" if key in self._section else ""
        return UnsupportedError(
            f"{self._path}: metadata {key!r}{value} is not modelled for {self._family.name} {why}".rstrip() + ".",
            "Convert the original Hugging Face checkpoint instead, or use another model.",
        )

    def _contradiction(self, key: str, value: Any, but: str) -> InputError:
        return InputError(f"{self._path}: metadata {key!r} is {value}, but {but}.", "Use another file of this model.")


class _Reader(GGUFReader):
    """The package's reader over a plain array, whose slices cost a quarter of a `memmap`'s."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)


def _open(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
        if not _MAGIC.startswith(magic):
            raise InputError(f"{path}: not a GGUF file (it begins with {magic!r}).", "Give a model in GGUF format.")
        reader = _Reader(path, "c")  # copy-on-write, so that torch accepts the arrays
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise InputError(
            f"{path}: not a complete GGUF file ({error}).", "Download or copy it again; it may be cut short."
        ) from error
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise UnsupportedError(f"{path}: is one part of several.", "Join them first with `llama-gguf-split --merge`.")
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{path}: tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, which can't be dequantized.",
                "Use a file with another quantization.",
            ) from error
    return reader


def _value(field: gguf.ReaderField) -> Any:
    """A metadata value."""
    content = field.contents()
    return _shortest(content) if field.types == [GGUFValueType.FLOAT32] else content


def _shortest(value: Any) -> float:
    """A 32-bit float as the shortest decimal that rounds to it (1e-05, not 9.99999975e-06)."""
    return float(str(np.float32(value)))


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _floats(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def _unpaired(tensor: Tensor, heads: _Heads) -> Tensor:
    """Rows of each head from pairs (2i, 2i+1) to halves (i, i + dim/2)."""
    return tensor.unflatten(0, (-1, heads.dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)


def _grouped(tensor: Tensor, heads: _Heads) -> Tensor:
    """Rows from all queries, keys and values to the queries, the key and the value of each key/value head in turn."""
    parts = tensor.split([heads.queries * heads.dim, heads.groups * heads.dim, heads.groups * heads.dim])
    return torch.cat([part.unflatten(0, (heads.groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _unique(ids: list[int | None]) -> list[int]:
    return list(dict.fromkeys(index for index in ids if index is not None))
