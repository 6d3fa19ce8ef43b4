"""The backend `cuda`, as building sees it.

T tokens of a step, e bytes of the compute dtype, H the hidden size. A step of the op set (`runtime.cuda.ops`) holds

- the residual stream: x and delta of the layer before, and of this one, and the norm of x;
- queries, keys and values as projected, the rotated queries, attention's output, and partial outputs in fp32 where the
  keys of a sequence are shared out over several programs;
- the MLP's gate and up and their product, or the logits, and what the sampler makes of them;
- of formats that cuBLAS does not multiply, a weight in the compute dtype; codes in fp32 where torch rounds the input.

Steps that are captured in graphs keep the memory of the largest for themselves: it comes on top, and so do the logits
of each, but for mixed ones, which share theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trtx.builder.backend import Backend
from trtx.builder.cost import ITEMSIZE, weight_bytes
from trtx.builder.cuda.kernels import SHARED_BYTES, compile_kernels, triton_version
from trtx.builder.cuda.nvrtc import nvrtc_version
from trtx.builder.shard import Shard
from trtx.builder.sizing import Sizing
from trtx.builder.torch_backend import CONTEXT, CUBLAS_WORKSPACE, SAMPLER_BYTES
from trtx.converters.convert import Progress
from trtx.converters.errors import UnsupportedError
from trtx.converters.shards import Entry
from trtx.converters.spec import Kind, Module
from trtx.quantize.formats import DTYPES
from trtx.quantize.weight import LinearWeight

if TYPE_CHECKING:
    from trtx.converters.artifact import Draft
    from trtx.runtime.cuda.shapes import Shapes
    from trtx.runtime.weights import WeightStore

_MIB = 1 << 20

LOADED = 32 * _MIB
"""Loaded kernels, and what graphs take that does not grow."""

GRAPH_LAYER = 150_000
"""Bytes that a layer takes in a captured graph: engines of 8 and of 32 layers with 35 graphs differed by 4.9 MB a layer
on an H100."""


class CudaBackend(Backend):
    """trtx's own kernels, compiled ahead of time."""

    name, devices = "cuda", ("cuda",)

    def fit(self, sizing: Sizing) -> Sizing:
        assert sizing.target.gpu is not None
        triton_version()
        if sizing.target.gpu.sm not in SHARED_BYTES:
            raise UnsupportedError(
                f"--backend cuda: no kernels for compute capability {sizing.target.gpu.sm} ({sizing.target.name}).",
                "Use --backend torch.",
            )
        if reason := obstacle(sizing.target.gpu.sm, sizing.model.quantization.format, sizing.kv_dtype):
            raise UnsupportedError(f"--backend cuda --gpu {sizing.target.name}: {reason}.", "Use --backend torch.")
        return sizing

    def versions(self) -> dict[str, str]:
        nvrtc = nvrtc_version()
        return {"triton": triton_version(), **({"nvrtc": nvrtc} if nvrtc else {})}

    def add_kernels(
        self, store: WeightStore | None, sizing: Sizing, draft: Draft, compiling: Progress, measuring: Progress
    ) -> None:
        from trtx.builder.cuda.trace import required_kernels
        from trtx.builder.cuda.tune import add_algorithms
        from trtx.builder.engine import KERNELS

        assert sizing.target.gpu is not None
        folder = draft.path / "rank0" / KERNELS
        layout = self.kv_layout(sizing, Shard(sizing.model.spec, sizing.mapping, 0))
        variants = required_kernels(sizing, layout, store)
        with compiling(len(variants)) as advance:
            compile_kernels(variants, sizing.target.gpu.sm, folder, advance)
        add_algorithms(store, sizing, folder, measuring)
        draft.describe(kernels=len(variants))

    def linear_entries(self, store: WeightStore, name: str, modules: list[Module], sizing: Sizing) -> Iterator[Entry]:
        from trtx.builder.build import joined
        from trtx.runtime.cuda.linear import kernel_layout
        from trtx.runtime.cuda.ops import is_expert

        if is_expert(name):
            yield from joined(store, name, modules)
            return

        stored = list(joined(store, name, modules))
        form = store.config.quantization.format_of(modules[0])
        parts = tuple((module.name, module.shape[0]) for module in modules)
        dtype = DTYPES[sizing.compute_dtype]

        def laid_out(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return kernel_layout(LinearWeight(name, form, tensors, parts, modules[0].split), dtype)

        @cache
        def produced() -> dict[str, Tensor]:
            return laid_out({_suffix(entry): entry.produce() for entry in stored})

        shapes = laid_out({_suffix(e): torch.empty(e.shape, dtype=e.dtype, device="meta") for e in stored})
        left = set(shapes)

        def take(suffix: str) -> Tensor:
            tensor = produced()[suffix]
            left.discard(suffix)
            if not left:
                produced.cache_clear()
            return tensor

        for suffix, shape in shapes.items():
            yield Entry(f"{name}.{suffix}", shape.dtype, tuple(shape.shape), partial(take, suffix))

    def weight_bytes(self, sizing: Sizing, shard: Shard) -> int:
        from trtx.runtime.cuda.ops import is_expert

        size, quantization = ITEMSIZE[sizing.compute_dtype], sizing.model.quantization
        total = 0
        for module in shard.modules():
            whole = module.name.endswith(".router") or is_expert(module.name)  # dequantized when loaded
            if module.kind is Kind.LINEAR and not whole:
                stored = quantization.stored(module, DTYPES[sizing.compute_dtype])
                total += sum(tensor.bytes for tensor in stored.values())
            else:
                in_fp32 = module.kind is Kind.VECTOR or module.name.endswith(".router")
                in_fp32 |= module.kind is Kind.NORM and shard.spec.norm_of(module.name).offset != 0
                total += module.parameters * (4 if in_fp32 else size)
        return total

    def streamed_bytes(self, sizing: Sizing, tokens: int) -> int:
        return weight_bytes(sizing.model, tokens)

    def activation_bytes(self, sizing: Sizing, shard: Shard) -> int:
        shapes = _shapes(sizing)
        captured = max(shape.tokens for _, shape in shapes)
        steps = sum(self._step_bytes(sizing, shard, tokens) for tokens in (sizing.max_num_tokens, captured))
        kept = sum(shape.rows or shape.tokens for shape in (*shapes.decodes, *shapes.chunks)) + sizing.max_batch_size
        return steps + kept * shard.spec.vocab_size * ITEMSIZE[sizing.compute_dtype]

    def table_bytes(self, sizing: Sizing) -> int:
        return 4 * sizing.max_seq_len * sum(rope.dim for rope in sizing.model.spec.ropes)

    def workspace_bytes(self, sizing: Sizing) -> int:
        from trtx.runtime.cuda.cublaslt import WORKSPACE

        graphs = GRAPH_LAYER * sizing.model.spec.num_layers * _shapes(sizing).graphs
        return CONTEXT["cuda"] + 2 * CUBLAS_WORKSPACE + WORKSPACE + LOADED + graphs

    def math_dtype(self, sizing: Sizing) -> str:
        from trtx.builder.build import MATH_UNITS

        unit = MATH_UNITS.get(sizing.model.quantization.format, sizing.compute_dtype)
        gpu = sizing.target.gpu
        return unit if gpu is not None and unit in gpu.tflops else sizing.compute_dtype

    def _step_bytes(self, sizing: Sizing, shard: Shard, tokens: int) -> int:
        from trtx.runtime.cuda.linear import is_dequantized, is_rounded_by_torch

        spec, size = shard.spec, ITEMSIZE[sizing.compute_dtype]
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        residual = 5 * tokens * spec.hidden_size * size
        attention = tokens * (3 * queries + 2 * keys) * size
        inner = max(spec.intermediate_size, (spec.moe.intermediate_size * spec.moe.top_k) if spec.moe else 0)
        mlp = tokens * (3 * inner + spec.hidden_size) * size
        rows = min(tokens, sizing.max_batch_size)
        logits = rows * spec.vocab_size * (size + SAMPLER_BYTES)
        form = sizing.model.quantization.format
        widest = spec.hidden_size * max(2 * spec.intermediate_size, queries + 2 * keys)
        rounded = tokens * max(inner, spec.hidden_size) * 10 if is_rounded_by_torch(form) else 0
        dequantized = widest * size if is_dequantized(form) else 0
        return residual + max(attention, mlp, logits) + rounded + dequantized


def obstacle(sm: str, form: str, kv_dtype: str) -> str:
    """Why kernels for a weight format can't be compiled for a compute capability; empty where they can."""
    in_e4m3 = form in ("fp8", "fp8_wo", "fp8_pc_pt", "w4a8_awq", "nvfp4", "nvfp4_wo", "mxfp8") or kv_dtype == "fp8"
    if in_e4m3 and float(sm) < 8.9:
        return f"compute capability {sm} has no FP8 numbers"
    if sm == "10.0" and form in ("fp8", "int8_sq", "w4a8_awq"):
        return f"Triton 3.6 does not compile the kernels of {form} for compute capability 10.0"
    return ""


def _shapes(sizing: Sizing) -> Shapes:
    """Those that an engine's steps are padded to; how many tiles they have does not matter to memory."""
    from trtx.runtime.cuda.shapes import Shapes

    return Shapes.of(sizing.max_batch_size, sizing.max_num_tokens, tile=1)


def _suffix(entry: Entry) -> str:
    return entry.name.rpartition(".")[2]
