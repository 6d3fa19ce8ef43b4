"""The roofline that steps are compared with: what they must read and compute, and how fast the machine can.

Williams et al. 2009, Roofline: an insightful visual performance model (doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from trtx.builder import cost, gpus
from trtx.builder.engine import EngineConfig
from trtx.quantize.formats import DTYPES
from trtx.runtime.bench.trace import Slice, StepTrace

_READ_BYTES = 512 << 20
"""Read to measure the bandwidth: more than the caches of most CPUs hold."""
_MATMUL = 2048
_REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What a step must do, whatever the implementation."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Ceiling:
    """How fast a machine can read memory and multiply matrices.

    Attributes:
        source: the datasheet, or that it was measured.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str

    def seconds(self, step: Cost) -> float:
        """The least time a step can take."""
        return max(step.bytes / self.bytes_per_s, step.flops / self.flops_per_s)


def step_cost(config: EngineConfig) -> Callable[[StepTrace], Cost]:
    """A function: step → its cost.

    Sequences that decode count as equally long, which is exact without sliding windows.
    """
    spec = config.model.spec
    weights = cache(partial(cost.weight_bytes, config))

    @cache
    def of_decode(context: int) -> Cost:
        return Cost(cost.decode_bytes(config, 1, context) - weights(1), cost.decode_flops(config, 1, context))

    @cache
    def of_chunk(chunk: Slice) -> Cost:
        before, tokens, rows = chunk
        read = cost.prefill_bytes(config, tokens, before) - cost.weight_bytes(config, tokens)
        return Cost(read, cost.flops(spec, tokens, before, rows))

    def of_step(step: StepTrace) -> Cost:
        decodes, chunks = step.decode_tokens, [of_chunk(chunk) for chunk in step.chunks]
        one = of_decode(step.context_tokens // decodes) if decodes else Cost(0, 0)
        read = weights(decodes + step.prefill_tokens if spec.moe else 1)
        return Cost(
            read + decodes * one.bytes + sum(chunk.bytes for chunk in chunks),
            decodes * one.flops + sum(chunk.flops for chunk in chunks),
        )

    return of_step


def ceiling(config: EngineConfig, device: torch.device) -> Ceiling:
    """The ceiling of all ranks of an engine: from the GPU's datasheet if it is in the table, else measured here.

    The peak is that of the units which multiply the weights' format, where the backend uses them.
    """
    from trtx.builder.build import MATH_UNITS

    ranks = config.mapping.ranks
    gpu = gpus.find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is not None:
        unit: str = config.compute_dtype
        if config.backend != "torch":
            unit = MATH_UNITS.get(config.model.quantization.format, unit)
        flops = gpu.tflops.get(unit, gpu.tflops[config.compute_dtype]) * 1e12
        return Ceiling(gpu.bandwidth * 1e9 * ranks, flops * ranks, f"datasheet of {gpu.name}")
    flops = matmul_rate(device, DTYPES[config.compute_dtype])
    return Ceiling(read_bandwidth(device) * ranks, flops * ranks, "measured on this machine")


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s at which matrix-vector products read a matrix that the caches do not hold; best of five."""
    matrix = torch.ones(_READ_BYTES // 4 // 4096, 4096, device=device)
    return matrix.nbytes / _seconds(lambda: matrix.mv(matrix[0]), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype`; best of five."""
    a = torch.ones(_MATMUL, _MATMUL, dtype=dtype, device=device)
    return 2 * _MATMUL**3 / _seconds(lambda: a @ a, device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_REPEATS))
