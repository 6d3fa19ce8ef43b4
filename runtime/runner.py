"""The device part: takes a batch description, returns tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from trtx.builder.engine import Engine
from trtx.converters.errors import MismatchError
from trtx.quantize.formats import DTYPES, E4M3
from trtx.runtime import weights
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.torch_ops import TorchKVCache, TorchOps
from trtx.runtime.sampler import Row, Sampled, sample


class Runner(Protocol):
    """What an executor drives. One backend, one rank group."""

    layout: KVLayout
    """How the runner's KV cache is laid out."""

    def run(self, batch: Sequence[SequenceSlice], rows: Sequence[Row]) -> list[Sampled]:
        """Compute a step: put the batch into the KV cache and choose a token for each slice that wants logits.

        Args:
            batch: slices of a single token first.
            rows: one for each wanted row of logits, in the order of the batch.
        """
        ...


class TorchRunner:
    """Runs an engine of the `torch` backend on one device.

    Args:
        device: 'cpu', 'cuda' or 'cuda:N'; what the engine was built for unless given.

    Raises:
        MismatchError: the engine was built for a device that is not here.
    """

    def __init__(
        self, engine: Engine, device: str | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        config, limits = engine.config, engine.config.limits
        self.device = _device(engine, device)
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


def _device(engine: Engine, asked: str | None) -> torch.device:
    built_for = engine.config.fingerprint.device
    device = torch.device(asked or built_for)
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
    return device
