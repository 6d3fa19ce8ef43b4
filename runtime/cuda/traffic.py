"""What the kernels of a step read and write: the step is run on meta tensors, and what each launch is given is counted.

    matrix products   weight, input and output once, also where several tiles read them again from a cache
    attention         of the KV cache what the queries see, read once a sequence: not the whole cache, not by tile; what
                      goes in and out of every token; not what programs that share a sequence leave for each other
    storing           of the KV cache what the new tokens write, and what goes in
    embedding         the rows that are looked up, as of the tables of angles
    experts           of E that a token uses k of, the share that n tokens with random routing use: 1 - (1 - k/E)ⁿ
    others            every tensor once

Block tables and counters are left out, and what torch computes beside matrix products. Steps that are padded to a
captured graph are counted with their padding, but for the KV cache and the attention of prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trtx.builder.engine import EngineConfig
from trtx.converters.spec import Activation, ModelSpec, Rope
from trtx.quantize.formats import DTYPES, E4M3
from trtx.runtime.batch import SequenceSlice
from trtx.runtime.cuda.deferred import Deferred
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import H100_SHARED, LIBRARY, Arguments, Constants, How, Launch, TensorMap
from trtx.runtime.cuda.meta import META, meta_steps
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.step import CudaStep
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.ops.base import Heads

_PRODUCTS = {
    f"aten::{name}"
    for name in ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "_scaled_mm", "_grouped_mm")
}


class Traffic:
    """Counts the bytes of an engine's steps, without a GPU and without its weights.

    Args:
        config: of the backend `cuda`.
        shared_bytes: see `Launch`.
    """

    def __init__(self, config: EngineConfig, shared_bytes: int = H100_SHARED) -> None:
        model, limits = config.model, config.limits
        spec = model.spec
        made_for = config.fingerprint
        self._count = _Count(spec, made_for.sm, shared_bytes, native="nvrtc" in made_for.versions)
        ops = _Ops(spec, DTYPES[config.compute_dtype], META, limits.max_seq_len, self._count, laid_out=False)
        kv_dtype = E4M3 if limits.kv_dtype == "fp8" else DTYPES[limits.kv_dtype]
        self._layout = KVLayout.of(spec, limits.kv_block_size, kv_dtype.itemsize)
        cache = CudaKVCache(self._layout, 2, kv_dtype, META)
        sizes = limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len
        self._steps = meta_steps(model, ops, cache, sizes)
        self._count.cache = {_storage(array) for array in cache.arrays(0)}

    @torch.inference_mode()
    def of_step(self, batch: Sequence[tuple[int, int, int]]) -> Mapping[str, int]:
        """Bytes by kernel (as in `Variant`, or `LIBRARY`), all launches of a step together.

        Args:
            batch: of each slice the tokens before it, its tokens, and how many of them want logits; single ones first.
        """
        size = self._layout.block_size
        slices = [
            SequenceSlice([0] * tokens, before, ([0] * -(-(before + tokens) // size),) * len(self._layout.groups), rows)
            for before, tokens, rows in batch
        ]
        self._count.begin(slices)
        with _Products(self._count.bytes):
            self._steps.logits(slices)
        return dict(self._count.bytes)


def _storage(tensor: Tensor) -> int:
    """The same for all views of one piece of memory."""
    return tensor.untyped_storage()._cdata


class _Count(Launch):
    """Launches nothing and counts bytes by kernel.

    Attributes:
        cache: storages of the KV cache.
        tables: those of which a row a token is read.
        share: of storages of which a part is read.
        uncounted: those of block tables and counters.
    """

    def __init__(self, spec: ModelSpec, sm: str, shared_bytes: int, native: bool) -> None:
        self.dependent, self.shared_bytes, self.native = float(sm) >= 9.0, shared_bytes, native
        self.hopper = sm == "9.0"
        self._spec = spec
        self.bytes: Counter[str] = Counter()
        self.cache: set[int] = set()
        self.tables: set[int] = set()
        self.share: dict[int, float] = {}
        self.uncounted: set[int] = set()
        self._slices: Sequence[SequenceSlice] = ()
        self._layer = self._tokens = self._decodes = 0

    def begin(self, slices: Sequence[SequenceSlice]) -> None:
        """Count a step of these slices."""
        self.bytes.clear()
        self._slices = slices

    def attends(self, layer: int, step: CudaStep) -> None:
        """The launches that follow are those of a layer's attention."""
        attention = step.attention
        self._layer, self._tokens, self._decodes = layer, len(step.token_ids), attention.decodes
        self.uncounted.update(map(_storage, [*attention.tables, attention.counters]))

    def start(self, kernel: str, grid: tuple[int, ...], args: Arguments, constants: Constants, how: How) -> None:
        tensors = (arg.tensor if isinstance(arg, TensorMap) else arg for arg in args)
        given = [arg for arg in tensors if isinstance(arg, Tensor) and _storage(arg) not in self.uncounted]
        if any(_storage(tensor) in self.cache for tensor in given):
            self.bytes[kernel] += self._with_cache(kernel, grid[0], given)
        elif kernel == "elementwise.embed":
            self.bytes[kernel] += sum(min(len(tensor), grid[0]) * _row(tensor) for tensor in given)
        else:
            self.bytes[kernel] += int(sum(self.share.get(_storage(tensor), 1) * tensor.nbytes for tensor in given))

    def _with_cache(self, kernel: str, programs: int, given: Sequence[Tensor]) -> int:
        """Bytes of a kernel that works on the KV cache: `*.decode`, `*.prefill`, or one that stores.

        Args:
            programs: along the grid's first axis: of one that stores, a token each.
        """
        alone = [piece for piece in self._slices if len(piece.tokens) == 1]
        others = [piece for piece in self._slices if len(piece.tokens) > 1]
        fresh = sum(len(piece.tokens) for piece in others)
        tokens, cached = programs, len(alone) + fresh
        if kernel in ("attention.decode", "cu.decode"):
            tokens, cached = self._decodes, self._seen(alone)
        elif kernel in ("attention.prefill", "cu.prefill"):
            tokens, cached = fresh, self._seen(others)
        elif kernel == "attention.store":
            tokens, cached = fresh, fresh
        total = 0
        for tensor in given:
            if _storage(tensor) in self.cache:
                total += cached * tensor[0].nbytes // tensor.shape[2]
            elif _storage(tensor) in self.tables or (len(tensor) == self._tokens and tensor.dim() < 4):
                total += tokens * _row(tensor)
        return total

    def _seen(self, slices: Any) -> int:
        """Cached tokens that slices attend to in this layer, each once a slice."""
        return sum(len(piece.tokens) - 1 + self._spec.seen_from(self._layer, piece.start) for piece in slices)


def _row(tensor: Tensor) -> int:
    """Bytes of a row, or of a number."""
    return tensor.nbytes // max(1, len(tensor))


class _Ops(CudaOps):
    """Says which layer attends, and which tensors are read in part."""

    launch: _Count

    def rotation(self, rope: Rope) -> tuple[Tensor, Tensor]:
        tables = super().rotation(rope)
        self.launch.tables.update(map(_storage, tables))
        return tables

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: CudaStep, heads: Heads) -> Deferred:
        self.launch.attends(layer, step)
        return super().attend(q, k, v, layer, step, heads)

    def attend_to_latents(self, q: Tensor, latent: Tensor, k_rope: Tensor, layer: int, step: Any) -> Tensor:
        self.launch.attends(layer, step)
        return super().attend_to_latents(q, latent, k_rope, layer, step)

    def experts(
        self, x: Tensor, routing: tuple[Tensor, Tensor], experts: Any, activation: Activation, weighs_input: bool
    ) -> Tensor:
        count, (tokens, used) = len(experts.down), routing[0].shape
        share = 1 - (1 - used / count) ** tokens
        tensors = experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias
        self.launch.share.update((_storage(tensor), share) for tensor in tensors if tensor is not None)
        return super().experts(x, routing, experts, activation, weighs_input)


class _Products(TorchDispatchMode):
    """Counts the tensors of matrix products that torch is asked for."""

    def __init__(self, bytes: Counter[str]) -> None:
        super().__init__()
        self._bytes = bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _PRODUCTS:
            self._bytes[LIBRARY] += sum(
                leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)
            )
        return result
