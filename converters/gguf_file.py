"""GGUF files (llama.cpp): read as the Hugging Face checkpoint they were made from.

The metadata becomes a config.json, the tensors get Hugging Face's names and layout, quantized ones are dequantized one
at a time, and the vocabulary becomes a tokenizer.json. From there on a GGUF file goes the way of every checkpoint.

llama.cpp stores Llama's query and key rows in pairs (2i, 2i+1), as its RoPE rotates them; Hugging Face rotates halves
(i, i + head_dim/2). `_unpermute` undoes that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from trtx.converters.families import find_gguf_family
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

_MODULES = {
    "token_embd": "model.embed_tokens",
    "blk.*.attn_norm": "model.layers.*.input_layernorm",
    "blk.*.attn_q": "model.layers.*.self_attn.q_proj",
    "blk.*.attn_k": "model.layers.*.self_attn.k_proj",
    "blk.*.attn_v": "model.layers.*.self_attn.v_proj",
    "blk.*.attn_q_norm": "model.layers.*.self_attn.q_norm",
    "blk.*.attn_k_norm": "model.layers.*.self_attn.k_norm",
    "blk.*.attn_output": "model.layers.*.self_attn.o_proj",
    "blk.*.ffn_norm": "model.layers.*.post_attention_layernorm",
    "blk.*.ffn_gate": "model.layers.*.mlp.gate_proj",
    "blk.*.ffn_up": "model.layers.*.mlp.up_proj",
    "blk.*.ffn_down": "model.layers.*.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Module names of llama.cpp and of transformers; `*` stands for the layer."""

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""Keys of an architecture's section and of config.json that mean the same."""

_ROPE_KEYS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
_OTHER_KEYS = ("attention.value_length", "rope.dimension_count", "rope.scaling.finetuned", "tensor_data_layout")
"""Keys that are checked against the rest, or say nothing about what is computed."""

_ROPE_FREQS = "rope_freqs.weight"
_STORED = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_DTYPE_NAMES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MAGIC = b"GGUF"
_CONTROL, _USER_DEFINED = 3, 4
"""Token types (`tokenizer.ggml.token_type`): special tokens, and added ones that are text."""


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
        self._architecture = str(self._metadata.get("general.architecture"))
        slides = f"{self._architecture}.attention.sliding_window" in self._metadata
        self._family = find_gguf_family(self._architecture, str(path), slides)
        self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors if tensor.name != _ROPE_FREQS}
        self.config = self._read_config()
        self.config_name = str(path)
        self.headers = {name: self._header(tensor) for name, tensor in self._tensors.items()}
        self.default_dtype = self._dominant_dtype()
        types = sorted({tensor.tensor_type.name for tensor in self._tensors.values()})
        self.provenance = {"kind": "gguf", "path": str(path.absolute()), "types": types}
        self.identity = identify(path)

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        stored, shape = self._tensors[name], self.headers[name].shape
        data = stored.data if index is None else stored.data[index]
        if stored.tensor_type in _STORED:
            flat = torch.from_numpy(data.reshape(-1)).view(_STORED[stored.tensor_type])
            tensor = flat.reshape(shape if index is None else shape[1:])
        else:
            tensor = torch.from_numpy(gguf.dequantize(data, stored.tensor_type))
        heads = self._paired_heads(stored.name)
        return _unpermute(tensor, heads) if heads else tensor

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
                "model_max_length": self.config["max_position_embeddings"],
            },
        )
        try:
            self._tokenizer(tokens, special).save(str(draft.path / TOKENIZER))
        except UnsupportedError as error:
            return [NO_TOKENIZER.format(error.cause)]
        return []

    def _read_config(self) -> dict[str, Any]:
        """The metadata as a config.json of the family, for the family table to read."""
        section = self._section()
        config = {
            "architectures": [self._family.architectures[0]],
            "model_type": self._family.model_types[0],
            "vocab_size": len(self._metadata.get("tokenizer.ggml.tokens", [])),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.o_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            **{hf: section[key] for key, hf in _KEYS.items() if key in section},
        }
        scaling = {hf: section[key] for key, hf in _ROPE_KEYS.items() if key in section}
        if scaling.get("rope_type", "none") != "none":
            config["rope_scaling"] = scaling
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_FREQS:
                config["rope_scaling"] = self._llama3_scaling(tensor.data, config)
        width = config.setdefault("head_dim", section.get("rope.dimension_count"))
        for key in ("attention.value_length", "rope.dimension_count"):
            if section.get(key, width) != width:
                raise self._unsupported(key, section[key], f"with a key length of {width}")
        return config

    def _section(self) -> dict[str, Any]:
        """The keys of the architecture, without its name in front."""
        prefix = f"{self._architecture}."
        section = {key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)}
        for key in section.keys() - _KEYS.keys() - _ROPE_KEYS.keys() - set(_OTHER_KEYS):
            raise self._unsupported(key, section[key])
        return section

    def _llama3_scaling(self, divisors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
        """Llama 3.1's frequency bands, which GGUF stores as a divisor for each frequency (its `rope_freqs` tensor)."""
        original, low, high = 8192, 1.0, 4.0  # of every Llama 3.1 and 3.2
        factor = float(divisors.max())
        half = len(divisors)
        wavelengths = 2 * math.pi * float(config.get("rope_theta", 10000.0)) ** (np.arange(half) / half)
        blend = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
            raise self._unsupported(_ROPE_FREQS, "frequencies", "as they are not those of Llama 3.1 or 3.2")
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

    def _header(self, tensor: gguf.ReaderTensor) -> Header:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return Header(_STORED.get(tensor.tensor_type, torch.float32), shape, self._path)

    def _dominant_dtype(self) -> Dtype:
        """The dtype of most parameters; bf16, what models are trained in, where most are quantized."""
        counts: dict[GGMLQuantizationType, int] = {}
        for tensor in self._tensors.values():
            counts[tensor.tensor_type] = counts.get(tensor.tensor_type, 0) + int(tensor.n_elements)
        return _DTYPE_NAMES[_STORED.get(max(counts, key=lambda kind: counts[kind]), torch.bfloat16)]

    def _paired_heads(self, name: str) -> int:
        """Heads whose rows are stored in pairs; 0 for every tensor but Llama's queries and keys."""
        if not self._family.gguf_pairs_rows:
            return 0
        if ".attn_q." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".attn_k." in name else 0

    def _unsupported(self, key: str, value: Any, why: str = "") -> UnsupportedError:
        return UnsupportedError(
            f"{self._path}: metadata {key!r} ({value}) is not modelled for {self._family.name} {why}".rstrip() + ".",
            "Convert the original Hugging Face checkpoint instead, or use another model.",
        )


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
    """A metadata value; a 32-bit float as the shortest decimal that rounds to it (1e-05, not 9.99999975e-06)."""
    content = field.contents()
    return float(str(np.float32(content))) if field.types == [GGUFValueType.FLOAT32] else content


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; its own for one that has none, which the mapping then refuses."""
    module, _, suffix = name.rpartition(".")
    parts = module.split(".")
    layer = parts[1] if parts[0] == "blk" and len(parts) > 1 else ""
    pattern = ".".join(["blk", "*", *parts[2:]]) if layer else module
    return f"{_MODULES[pattern].replace('*', layer)}.{suffix}" if pattern in _MODULES else name


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from pairs (2i, 2i+1) to halves (i, i + head_dim/2)."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _unique(ids: list[int | None]) -> list[int]:
    return list(dict.fromkeys(index for index in ids if index is not None))
