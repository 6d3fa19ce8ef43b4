"""Which kernels an engine needs: its steps are run on meta tensors, and what they would launch is noted down.

So an engine holds exactly the kernels that the op set asks for; there is no second list to keep in step with it.
"""

from __future__ import annotations

import torch

from trtx.builder.cuda.kernels import SHARED_BYTES
from trtx.builder.cuda.nvrtc import has_hopper, nvrtc_version
from trtx.builder.sizing import Sizing
from trtx.quantize.formats import DTYPES, E4M3
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import RecordLaunch, Variant
from trtx.runtime.cuda.meta import META, meta_steps
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.shapes import batch_sizes
from trtx.runtime.cuda.step import Shape
from trtx.runtime.cuda.steps import Steps
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.sampler import Row
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore


def required_kernels(sizing: Sizing, layout: KVLayout, checkpoint: WeightStore | None = None) -> list[Variant]:
    """The kernels of an engine of these dimensions, in the order of their first use; arguments as of `recorded`."""
    launch, steps = recorded(sizing, layout, checkpoint)
    with torch.inference_mode():
        mixed = steps.shapes.mixed
        tokens = max((shape.tokens for shape in mixed), default=0)
        decodes = max((shape.decodes for shape in mixed), default=0)
        for kind, shape in steps.shapes:
            # Of mixed ones the widest: kernels are chosen by tokens or by decodes, not by both.
            if kind != "mixed" or shape.tokens == tokens or shape.decodes == decodes:
                steps.compute(kind, shape)
        for kind in ("decodes", "mixed"):
            steps.publish(kind, 1)
        for count in _counts(sizing.max_num_tokens):
            most = min(count, sizing.max_batch_size)
            for rows in sorted({1, min(2, most), most}):
                for tiles in sorted({1, count}):
                    steps.compute("mixed", Shape(count, rows, rows, tiles, rows))
        most = sizing.max_num_tokens
        for decodes in batch_sizes(min(most, sizing.max_batch_size)):  # how many tokens there are, says what they give
            steps.compute("mixed", Shape(most, decodes, decodes, 1, decodes))
        _choose(steps, sizing)
    return list(launch.variants)


def recorded(sizing: Sizing, layout: KVLayout, checkpoint: WeightStore | None = None) -> tuple[RecordLaunch, Steps]:
    """An engine's steps on meta tensors, and what notes down the kernels that they launch.

    Args:
        checkpoint: the weights. Those that linears have to agree in to be fused are read; random ones do.
    """
    assert sizing.target.gpu is not None
    sm = sizing.target.gpu.sm
    launch = RecordLaunch(float(sm) >= 9.0, SHARED_BYTES[sm], native=bool(nvrtc_version()), hopper=has_hopper(sm))
    dtype = DTYPES[sizing.compute_dtype]
    ops = CudaOps(sizing.model.spec, dtype, META, sizing.max_seq_len, launch, laid_out=False)
    kv_dtype = E4M3 if sizing.kv_dtype == "fp8" else DTYPES[sizing.kv_dtype]
    cache = CudaKVCache(layout, 2, kv_dtype, META)
    limits = sizing.max_batch_size, sizing.max_num_tokens, sizing.max_seq_len
    return launch, meta_steps(sizing.model, ops, cache, limits, checkpoint.tensor if checkpoint else None)


def _counts(most: int) -> list[int]:
    """Numbers of tokens, such that every kernel's choice by their number comes up: powers of two, and one more."""
    counts = {1, most}
    power = 1
    while power < most:
        counts |= {power, min(power + 1, most)}
        power *= 2
    return sorted(counts)


def _choose(steps: Steps, sizing: Sizing) -> None:
    """Draw from logits in every way there is."""
    for count in _counts(sizing.max_batch_size):
        logits = torch.empty(count, sizing.model.spec.vocab_size, dtype=DTYPES[sizing.compute_dtype], device=META)
        for top_k in (0, 5):
            for top_p in (1.0, 0.5):
                for penalty in (0.0, 1.0):
                    params = SamplingParams(top_k=top_k, top_p=top_p, presence_penalty=penalty)
                    steps.choose(logits, [Row(params, [0, 0], 1, 0, 0)] * count)
