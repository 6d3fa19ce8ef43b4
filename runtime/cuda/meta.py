"""An engine's steps without its weights, on meta tensors: for those who want to know what they launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trtx.converters.checkpoint import CheckpointConfig
from trtx.runtime import weights
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.steps import Steps
from trtx.runtime.weights import WeightStore

META = torch.device("meta")


@torch.inference_mode()
def meta_steps(
    model: CheckpointConfig,
    ops: CudaOps,
    cache: CudaKVCache,
    limits: tuple[int, int, int],
    scale: Callable[[str], Tensor] | None = None,
) -> Steps:
    """The steps of a model.

    Args:
        limits: sequences, tokens of a step, length.
        scale: gives the scales that linears have to agree in to be fused, by name; else they all agree.
    """
    expected = model.expected()

    def tensor(name: str) -> Tensor:
        stored = expected[name]
        if stored.rows or name.endswith(".weight"):
            return torch.empty(stored.shape, dtype=stored.dtype, device=META)
        return torch.ones(stored.shape, dtype=stored.dtype) if scale is None else scale(name)

    return Steps(weights.load(WeightStore(model, tensor, expected.__contains__), ops), ops, cache, *limits)
