"""Backends: how an op set holds a model, as far as building has to know."""

from __future__ import annotations

from abc import ABC, abstractmethod

from trtx.builder.shard import Shard
from trtx.builder.sizing import Sizing
from trtx.converters.errors import UnsupportedError


class Backend(ABC):
    """What the ledger and the planner ask an op set's backend. All sizes are bytes on one rank."""

    name: str
    devices: tuple[str, ...]

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
    from trtx.builder.torch_backend import TorchBackend

    known: dict[str, Backend] = {"torch": TorchBackend()}
    if name == "auto":
        return next(backend for backend in known.values() if device in backend.devices)
    if name not in known:
        raise UnsupportedError(f"--backend {name}: no such backend.", f"Use auto or {', '.join(known)}.")
    if device not in known[name].devices:
        raise UnsupportedError(f"--backend {name}: does not run on {device}.", f"Use --gpu {known[name].devices[0]}.")
    return known[name]
