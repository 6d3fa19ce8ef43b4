"""From an engine's files to the GPU, at the speed of the bus.

Several threads read pieces of the files into pinned memory and copy them from there; reading a piece and copying
another overlap. A mapped file would be paged in 4 KiB at a time, by one thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from trtx.builder.engine import Engine
from trtx.converters.errors import InputError
from trtx.converters.shards import Header
from trtx.runtime.weights import WeightStore

PIECE = 16 << 20
"""Bytes read at a time."""

THREADS = 8


def loaded_store(
    engine: Engine, device: torch.device, advance: Callable[[int], None] = lambda count: None
) -> tuple[WeightStore, bool]:
    """The engine's tensors on the GPU, and whether they are in kernel layout (random weights are not)."""
    if engine.config.random_seed is not None:
        return WeightStore.of_engine(engine, device), False
    tensors = read_tensors(engine.shards.files, device, advance)

    def take(name: str) -> Tensor:
        return tensors.pop(name)

    return WeightStore(engine.config.model, take, engine.shards.__contains__), True


def read_tensors(files: list[Path], device: torch.device, advance: Callable[[int], None]) -> dict[str, Tensor]:
    """All tensors of safetensors files, on the device.

    Raises:
        InputError: a file ends before its tensors do.
    """
    tensors: dict[str, Tensor] = {}
    pieces: list[_Piece] = []
    for file in files:
        for name, header, start in _places(file):
            tensor = tensors[name] = torch.empty(header.shape, dtype=header.dtype, device=device)
            flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
            pieces += [_Piece(file, start + at, flat[at : at + PIECE]) for at in range(0, len(flat), PIECE)]
    pinned = device.type == "cuda"
    buffers: SimpleQueue[_Buffer] = SimpleQueue()
    for _ in range(2 * THREADS):
        buffers.put(_Buffer(torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned)))
    handles = {file: os.open(file, os.O_RDONLY) for file in files}
    stream = torch.cuda.Stream(device) if pinned else None

    @torch.inference_mode()  # of this thread
    def move(piece: _Piece) -> int:
        buffer = buffers.get()
        try:
            buffer.wait()
            _read(handles[piece.file], piece, buffer.bytes)
            buffer.send(piece.target, stream)
        finally:
            buffers.put(buffer)
        return len(piece.target)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for size in pool.map(move, pieces):
                advance(size)
    finally:
        for handle in handles.values():
            os.close(handle)
    if stream is not None:
        stream.synchronize()
    return tensors


def _read(handle: int, piece: _Piece, into: Tensor) -> None:
    """Read a piece of a file.

    Raises:
        InputError: the file ends before.
    """
    view = memoryview(into.numpy().data)[: len(piece.target)]
    done = 0
    while done < len(view):
        count = os.preadv(handle, [view[done:]], piece.start + done)
        if not count:
            raise InputError(f"{piece.file}: is truncated.", "Build the engine again.")
        done += count


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file from `start` on, and where they go."""

    file: Path
    start: int
    target: Tensor


class _Buffer:
    """Pinned memory, free again when what it held has been copied."""

    def __init__(self, bytes: Tensor) -> None:
        self.bytes = bytes
        self._copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, target: Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            target.copy_(self.bytes[: len(target)])
            return
        with torch.cuda.stream(stream):
            target.copy_(self.bytes[: len(target)], non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)


def _places(file: Path) -> Iterator[tuple[str, Header, int]]:
    """Name, header and first byte of every tensor of a safetensors file.

    Format: https://huggingface.co/docs/safetensors: the length of a JSON header in 8 bytes, the header, the tensors.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    for name, entry in entries.items():
        if name != "__metadata__":
            header = Header.parse(entry["dtype"], entry["shape"], name, file)
            yield name, header, 8 + length + entry["data_offsets"][0]
