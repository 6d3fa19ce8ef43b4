"""Backends: how an op set holds a model, as far as building has to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trtx.builder.engine import ParallelMapping
from trtx.builder.shard import Shard
from trtx.builder.sizing import Sizing
from trtx.converters.errors import UnsupportedError
from trtx.runtime.kv_layout import KVLayout

if TYPE_CHECKING:
    from trtx.converters.artifact import Draft
    from trtx.converters.convert import Progress
    from trtx.converters.shards import Entry
    from trtx.converters.spec import Module
    from trtx.runtime.weights import WeightStore


class Backend(ABC):
    """What the ledger and the planner ask an op set's backend. All sizes are bytes on one rank.

    Attributes:
        compiles: an engine holds what `compile` writes instead of its weights.
        fp8_attention: attention can multiply in FP8.
        padding_blocks: KV blocks that belong to no sequence and take room: 1 where block 0 does.
    """

    name: str
    devices: tuple[str, ...]
    compiles: bool = False
    fp8_attention: bool = False
    padding_blocks: int = 1

    def fit(self, sizing: Sizing) -> Sizing:
        """The dimensions as this backend holds them.

        Raises:
            UnsupportedError, MissingPackageError: it can't be built, with the reason.
        """
        return sizing

    def obstacle(self, mapping: ParallelMapping) -> str:
        """Why engines of this backend can't be split like this, whatever the model; empty when they can."""
        return ""

    def versions(self) -> dict[str, str]:
        """Libraries beside torch that make the engine, for its fingerprint."""
        return {}

    def linear_entries(self, store: WeightStore, name: str, modules: list[Module], sizing: Sizing) -> Iterator[Entry]:
        """What an engine stores of linears that are used as one, called `name`."""
        from trtx.builder.build import joined

        return joined(store, name, modules)

    def add_kernels(  # noqa: B027 - most have none
        self, store: WeightStore | None, sizing: Sizing, draft: Draft, compiling: Progress, measuring: Progress
    ) -> None:
        """Write compiled kernels beside the weights of rank 0, if the backend has any.

        Args:
            store: the weights; None: random ones.
            compiling, measuring: show how many are compiled, and what is measured to choose among a library's.
        """

    def compile(self, store: WeightStore, sizing: Sizing, draft: Draft, advance: Callable[[int], None]) -> None:
        """Write the compiled engine of every rank.

        Args:
            advance: called with the bytes of each weight taken in, and with as many again while it compiles.
        """
        raise AssertionError(f"{self.name} compiles nothing")

    def kv_layout(self, sizing: Sizing, shard: Shard) -> KVLayout:
        """How the KV cache of a rank is laid out."""
        from trtx.builder.cost import ITEMSIZE

        return shard.kv_layout(sizing.kv_block_size, ITEMSIZE[sizing.kv_dtype])

    @abstractmethod
    def weight_bytes(self, sizing: Sizing, shard: Shard) -> int:
        """Weights once loaded."""

    @abstractmethod
    def streamed_bytes(self, sizing: Sizing, tokens: int) -> int:
        """Weights that a step of `tokens` tokens reads, of the whole model on all ranks."""

    @abstractmethod
    def activation_bytes(self, sizing: Sizing, shard: Shard) -> int:
        """The most that one step allocates."""

    @abstractmethod
    def table_bytes(self, sizing: Sizing) -> int:
        """Tables of constants: cosines and sines of the rotary embedding."""

    @abstractmethod
    def workspace_bytes(self, sizing: Sizing) -> int:
        """What libraries take for themselves: CUDA context, cuBLAS and NCCL buffers, captured graphs."""

    @abstractmethod
    def math_dtype(self, sizing: Sizing) -> str:
        """The dtype whose peak FLOP/s bound the linears."""


def choose_backend(name: str, device: str) -> Backend:
    """The backend called `name` ('auto': the best one for the device).

    Raises:
        UnsupportedError: no such backend, or it does not run on the device.
    """
    from trtx.builder.cuda.backend import CudaBackend
    from trtx.builder.tensorrt.backend import TensorRTBackend
    from trtx.builder.tensorrt.library import FLAVORS
    from trtx.builder.torch_backend import TorchBackend

    known: dict[str, Backend] = {"torch": TorchBackend(), "cuda": CudaBackend()}
    known.update((flavor.backend, TensorRTBackend(flavor)) for flavor in FLAVORS.values())
    if name == "auto":
        return known["cuda" if device == "cuda" else "torch"]
    if name not in known:
        raise UnsupportedError(f"--backend {name}: no such backend.", f"Use auto or {', '.join(known)}.")
    if device not in known[name].devices:
        wanted = "Name a GPU with --gpu" if known[name].devices == ("cuda",) else "Use --gpu cpu"
        raise UnsupportedError(f"--backend {name}: does not run on {device}.", f"{wanted}.")
    return known[name]
