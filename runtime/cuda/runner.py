"""Runs an engine of the `cuda` backend: what `runtime.runner` asks for, over `runtime.cuda.steps`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from trtx.builder.engine import Engine
from trtx.converters.errors import MismatchError, MissingPackageError
from trtx.quantize.formats import DTYPES, E4M3
from trtx.runtime import weights
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.cubins import CubinLaunch
from trtx.runtime.cuda.cublaslt import TABLE, Products
from trtx.runtime.cuda.graphs import Graphs
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.load import loaded_store
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.steps import Steps, Ticket
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.runner import Runner, device_of, differences, require_memory
from trtx.runtime.sampler import Row, Sampled


class CudaRunner(Runner):
    """Drives an engine of the `cuda` backend on one GPU.

    Args:
        device: 'cuda' or 'cuda:N'; what the engine was built for unless given.

    Raises:
        InputError, MismatchError, DoesNotFitError: as `runtime.runner.TorchRunner`; also where the GPU's compute
            capability is not the one that the kernels were compiled for.
    """

    overlaps = True

    def __init__(
        self, engine: Engine, device: str | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        config, limits, spec = engine.config, engine.config.limits, engine.config.model.spec
        self.device = device_of(engine, device)
        require_capability(engine, self.device)
        self.notes = differences(engine, self.device)
        require_memory(engine, self.device)
        torch.cuda.set_device(self.device.index or 0)
        dtype = DTYPES[config.compute_dtype]
        dependent = torch.cuda.get_device_capability(self.device) >= (9, 0)
        launch = CubinLaunch(engine.kernels, self.device, dependent)
        try:
            launch.products = Products(self.device, engine.kernels / TABLE)
        except MissingPackageError as error:
            self.notes.append(f"{error} Large products are left to torch, and may be slower.")
        if launch.products and launch.products.note:
            self.notes.append(launch.products.note)
        fp8 = limits.kv_dtype == "fp8"
        kv_dtype = E4M3 if fp8 else DTYPES[limits.kv_dtype]
        self.layout = KVLayout.of(spec, limits.kv_block_size, kv_dtype.itemsize)
        with torch.inference_mode():
            store, laid_out = loaded_store(engine, self.device, advance)
            scales = None
            if fp8:
                scales = [(k.item(), v.item()) for k, v in weights.kv_scales(store, torch.device("cpu"))]
            ops = CudaOps(spec, dtype, self.device, limits.max_seq_len, launch, laid_out)
            decoder = weights.load(store, ops)
            cache = CudaKVCache(self.layout, limits.kv_blocks, kv_dtype, self.device, scales)
            self._steps = Steps(decoder, ops, cache, limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len)
            self._steps.capture(Graphs())
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the first calls took, beside their graphs

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Ticket:
        return self._steps.launch(batch, rows, steps)

    def collect(self, ticket: Ticket) -> list[list[Sampled]]:
        return self._steps.collect(ticket)


def require_capability(engine: Engine, device: torch.device) -> None:
    """Refuse a GPU that the engine's kernels were not compiled for.

    Raises:
        MismatchError: says both compute capabilities.
    """
    here = ".".join(map(str, torch.cuda.get_device_capability(device)))
    made = engine.config.fingerprint.sm
    if made != here:
        raise MismatchError(
            f"{engine.path}: its kernels were compiled for compute capability {made}; {device} "
            f"({torch.cuda.get_device_name(device)}) has {here}.",
            "Build it again for this GPU: trtx build CKPT OUT --gpu auto",
        )
