"""The device part: takes a batch description, returns tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trtx.builder.engine import Engine
from trtx.builder.gpus import available_memory, find
from trtx.converters.errors import DoesNotFitError, InputError, MismatchError
from trtx.quantize.formats import DTYPES, E4M3
from trtx.runtime import weights
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_kv_cache import TorchKVCache
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.sampler import Row, Sampled, sample


class Runner(ABC):
    """What an executor drives. One backend, one rank group."""

    layout: KVLayout
    """How the runner's KV cache is laid out."""
    notes: list[str]
    """How this machine differs from the one that the engine was built for."""
    overlaps: bool = False
    """Whether a step may be launched before the one before is collected; tokens may then be `PENDING`."""

    @abstractmethod
    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Any:
        """Start a step: put the batch into the KV cache and choose a token for each slice that wants logits.

        Args:
            batch: slices of a single token first.
            rows: one for each wanted row of logits, in the order of the batch.
            steps: of a batch of single tokens, for whose rows the likeliest token is chosen: so many steps, each with
                the tokens that the one before has chosen. More than one only where `overlaps`.

        Returns:
            What `collect` wants to see. Launches are collected in the order of their launches.
        """

    @abstractmethod
    def collect(self, ticket: Any) -> list[list[Sampled]]:
        """What each step of a launch has chosen, a token for each row; waits for it."""


class PlainRunner(Runner):
    """Computes a step when it is launched."""

    @abstractmethod
    def run(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> list[Sampled]:
        """Compute a step; see `launch`."""

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> list[Sampled]:
        assert steps == 1
        return self.run(batch, rows)

    def collect(self, ticket: list[Sampled]) -> list[list[Sampled]]:
        return [ticket]


def runner_of(engine: Engine, device: str | None, advance: Callable[[int], None]) -> Runner:
    """The runner of an engine's backend; see `TorchRunner` for arguments and errors."""
    if engine.config.backend == "torch":
        return TorchRunner(engine, device, advance)
    if engine.config.backend == "cuda":
        from trtx.runtime.cuda.runner import CudaRunner

        return CudaRunner(engine, device, advance)
    from trtx.runtime.tensorrt_runner import open_runner

    return open_runner(engine, device)


class TorchRunner(PlainRunner):
    """Runs an engine of the `torch` backend on one device.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; what the engine was built for unless given.

    Attributes:
        notes: what differs from what the engine was built for, and how to mend it; nothing that keeps it from running.

    Raises:
        InputError: `device` is none.
        MismatchError: the engine was built for a device that is not here.
        DoesNotFitError: the device has less memory free than the engine's ledger asks for.
    """

    def __init__(
        self, engine: Engine, device: str | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        config, limits = engine.config, engine.config.limits
        self.device = device_of(engine, device)
        self.notes = differences(engine, self.device)
        require_memory(engine, self.device)
        dtype = DTYPES[config.compute_dtype]
        store = weights.WeightStore.of_engine(engine, self.device)
        fp8 = limits.kv_dtype == "fp8"
        kv_dtype = E4M3 if fp8 else DTYPES[limits.kv_dtype]
        scales = weights.kv_scales(store, self.device) if fp8 else None
        self.layout = KVLayout.of(config.model.spec, limits.kv_block_size, kv_dtype.itemsize)
        self.ops = TorchOps(config.model.spec, dtype, self.device, limits.max_seq_len)
        with torch.inference_mode():
            self.decoder = weights.load(store, self.ops, advance)
            self.cache = TorchKVCache(self.layout, limits.kv_blocks, kv_dtype, self.device, scales)

    @torch.inference_mode()
    def run(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> list[Sampled]:
        logits = self.decoder.forward(self.ops.step(batch, self.cache))
        return sample(logits.float(), rows) if rows else []


def device_of(engine: Engine, asked: str | None) -> torch.device:
    """The device that an engine runs on: the one asked for, or what it was built for.

    Raises:
        InputError: no such device.
        MismatchError: the engine was built for another kind of device, or for one that is not here.
    """
    built_for = engine.config.fingerprint.device
    device: torch.device | None
    try:
        device = torch.device(asked or built_for)
    except RuntimeError:  # torch's own text lists two dozen kinds
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{asked!r} is no device that engines run on.", "Give cpu, cuda or cuda:N.")
    if device.type != built_for:
        raise MismatchError(
            f"{engine.path}: built for {built_for}, and {device.type} was asked for.",
            f"Build it again: trtx build CKPT OUT --gpu {'auto' if device.type == 'cuda' else 'cpu'}",
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MismatchError(
            f"{engine.path}: built for {engine.config.fingerprint.gpu}, and torch sees no CUDA GPU here.",
            "Run it on a machine with a GPU, or build again with --gpu cpu.",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"There is no {device} here; torch sees {torch.cuda.device_count()} GPUs.", "Give a smaller number."
        )
    return device


def differences(engine: Engine, device: torch.device) -> list[str]:
    """How this GPU differs from the one the engine was dimensioned for; for people, one sentence each."""
    if device.type != "cuda":
        return []
    built_for, name = engine.config.fingerprint.gpu, torch.cuda.get_device_name(device)
    row = find(name)
    if row is not None and row.name == built_for:
        return []
    return [
        f"{engine.path}: built for {built_for}, runs on {name}: its limits may be too small or too large here. "
        "Build again with --gpu auto to fit them."
    ]


def require_memory(engine: Engine, device: torch.device) -> None:
    # On a CPU the rest is small beside what the kernel can reclaim.
    purposes = ["weights", "kv_cache"]
    if device.type == "cuda":
        purposes += ["activations", "rope_tables"]
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    needed = sum(engine.config.ledger[purpose] for purpose in purposes)
    if needed > available:
        raise DoesNotFitError(
            f"{engine.path}: needs {needed / 1e9:.1f} GB ({', '.join(purposes)}); {device} has "
            f"{available / 1e9:.1f} GB free, {(needed - available) / 1e9:.1f} GB too little.",
            "Free memory that other processes hold, or build again here: trtx build fits the engine to what is free.",
        )
