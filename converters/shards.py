"""Safetensors shards, read by mapping and written by streaming.

Reading uses the `safetensors` library. Its writer wants all tensors of a file in memory, so writing is done here: the
header is known beforehand (every entry declares dtype and shape), then each tensor is produced, checked, hashed and
written, one at a time. Memory stays near the largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trtx.converters.artifact import Draft, write_hashed
from trtx.converters.errors import InputError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, dtype and shape, and how to produce it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Header:
    """What a shard's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @classmethod
    def parse(cls, code: str, shape: Sequence[int], name: str, file: Path) -> Header:
        """From safetensors' own words: a dtype code ('BF16') and a shape."""
        if code not in _DTYPES:
            raise InputError(f"{file}: tensor {name!r} has dtype {code}, which trtx does not read.")
        return cls(_DTYPES[code], tuple(shape), file)


class Headers(Mapping[str, Header]):
    """Tensors of one or more files, by name. A kind of file fills `_headers` and gives the tensors."""

    def __init__(self) -> None:
        self._headers: dict[str, Header] = {}

    def __getitem__(self, name: str) -> Header:
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


class Shards(Headers):
    """The tensors of one or more safetensors files, by name; nothing is read until it is asked for.

    Raises:
        InputError: a file is missing, truncated or not safetensors; a name stands in two files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._open: dict[Path, Any] = {}
        for file in files:
            handle = self._open[file] = _open(file)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in self._headers:
                    raise InputError(f"{file}: tensor {name!r} stands in {self._headers[name].file.name} too.")
                view = handle.get_slice(name)
                self._headers[name] = Header.parse(view.get_dtype(), view.get_shape(), name, file)

    @property
    def files(self) -> list[Path]:
        """The files, in the order given."""
        return list(self._open)

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from the file (page cache, not process memory). Do not write to it."""
        return self._open[self._headers[name].file].get_tensor(name)


def write_shards(
    draft: Draft,
    entries: Sequence[Entry],
    *,
    stem: str = "model",
    folder: str = "",
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `entries`, in their order, as `STEM-00001-of-0000N.safetensors` and an index.

    Args:
        folder: of the draft to write into; it is made. The index names files relative to it.
        advance: called with the bytes of each tensor once it is written.
    """
    base = Path(folder)
    (draft.path / base).mkdir(exist_ok=True)
    shards = _partition(entries, shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({entry.name: name for entry in shard})
        hasher = xxhash.xxh3_128()
        with (draft.path / base / name).open("wb") as file:
            write_hashed(file, memoryview(_header(shard)), hasher)
            for entry in shard:
                tensor = entry.produce()
                if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                    raise AssertionError(f"{entry.name}: {tensor.dtype} {tuple(tensor.shape)} is not as declared")
                write_hashed(file, tensor_bytes(tensor), hasher)
                advance(entry.bytes)
        draft.record((base / name).as_posix(), hasher.hexdigest())
    total = sum(entry.bytes for entry in entries)
    draft.write_json(str(base / INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file.", "Download the checkpoint again; a shard is missing.") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: not a complete safetensors file ({error}).", "Download or copy it again; it may be cut short."
        ) from error


def _partition(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    """The safetensors header: its length (u64 LE) and JSON, padded so that the data starts at a multiple of 64."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.bytes
        content[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
