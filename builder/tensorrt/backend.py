"""The backends `tensorrt` and `tensorrt-rtx`, as building sees them.

Memory, told from the network: weights are held once, by the engine that both contexts share. KV caches are linear, a
slot of max_seq_len for each sequence. What TensorRT takes for activations is known only once it has planned them, on
the GPU; the ledger's figure is an estimate: the widest layer's inputs and outputs, queries padded to the longest chunk,
and the scores of all heads where they are spelt out in layers.

Building holds the weights once more in TensorRT, and the plan: about three times the plan's size at the peak. Ranks are
built one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from trtx.builder.backend import Backend
from trtx.builder.cost import ITEMSIZE
from trtx.builder.engine import ParallelMapping
from trtx.builder.shard import Rank, Shard
from trtx.builder.sizing import Sizing
from trtx.builder.tensorrt.caches import TimingCache
from trtx.builder.tensorrt.library import Flavor, load, targets
from trtx.converters.spec import Kind
from trtx.quantize.formats import DTYPES
from trtx.runtime.kv_layout import KVLayout

if TYPE_CHECKING:
    from trtx.converters.artifact import Draft
    from trtx.runtime.weights import WeightStore

_MIB = 1 << 20
CONTEXT = 512 * _MIB
"""CUDA context and TensorRT's runtime."""

EXPERT_LAYERS = ("10.0", "10.3")
"""Compute capabilities for which `tensorrt` has a layer of experts, by its header (not tried)."""


class TensorRTBackend(Backend):
    """A network of native layers, compiled for one compute capability."""

    devices, compiles, fp8_attention, padding_blocks = ("cuda",), True, True, 0

    def __init__(self, flavor: Flavor) -> None:
        self.flavor = flavor
        self.name = flavor.backend

    def fit(self, sizing: Sizing) -> Sizing:
        from trtx.builder.tensorrt.modes import require
        from trtx.builder.tensorrt.ops import require_model

        load(self.flavor)
        require_model(sizing.model.spec, DTYPES[sizing.compute_dtype], sizing.fp8_attention)
        assert sizing.target.gpu is not None
        form, sm = sizing.model.quantization.format, sizing.target.gpu.sm
        require(self.flavor, sm, form, sizing.compute_dtype, sizing.kv_dtype, sizing.fp8_attention)
        return replace(sizing, kv_block_size=sizing.max_seq_len)

    def obstacle(self, mapping: ParallelMapping) -> str:
        return "TensorRT engines have no pipeline stages" if mapping.pp > 1 else ""

    def versions(self) -> dict[str, str]:
        return {self.flavor.module: load(self.flavor).__version__}

    def compile(self, store: WeightStore, sizing: Sizing, draft: Draft, advance: Callable[[int], None]) -> None:
        ranks = [Rank(store.config.spec, sizing.mapping.tp, index) for index in range(sizing.mapping.tp)]
        for rank in ranks:
            self._compile_rank(rank, store, sizing, draft, lambda count: advance(count // len(ranks)))

    def _compile_rank(
        self, rank: Rank, store: WeightStore, sizing: Sizing, draft: Draft, advance: Callable[[int], None]
    ) -> None:
        from trtx.builder.engine import PLAN
        from trtx.builder.tensorrt.plan import Bounds, network, serialize

        assert sizing.target.gpu is not None
        bounds = Bounds(sizing.max_batch_size, sizing.max_num_tokens, sizing.max_seq_len)
        dtype, sm = DTYPES[sizing.compute_dtype], sizing.target.gpu.sm
        net = network(
            store,
            self.flavor,
            dtype,
            bounds,
            advance,
            rank,
            fp8_attention=sizing.fp8_attention,
            expert_layers=self.flavor.backend == "tensorrt" and sm in EXPERT_LAYERS,
        )
        plan = serialize(net, rank.part, bounds, sm, store.config.bytes, advance, self._timings())
        if rank.index == 0:
            draft.describe(network_layers=net.definition.num_layers, bindings=net.bindings())
        folder = draft.path / f"rank{rank.index}"
        folder.mkdir()
        (folder / PLAN).write_bytes(plan)

    def _timings(self) -> TimingCache | None:
        """Of the GPU that is here, where TensorRT builds for no other."""
        import torch

        if targets(self.flavor) or not torch.cuda.is_available():
            return None
        return TimingCache(self.flavor, torch.cuda.get_device_name())

    def kv_layout(self, sizing: Sizing, shard: Shard) -> KVLayout:
        spec, heads = shard.spec, shard.spec.num_kv_heads // shard.mapping.tp
        itemsize = ITEMSIZE[sizing.kv_dtype]
        return KVLayout.linear(len(shard.layers), sizing.max_seq_len, heads, spec.head_dim, itemsize)

    def weight_bytes(self, sizing: Sizing, shard: Shard) -> int:
        size, quantization = ITEMSIZE[sizing.compute_dtype], sizing.model.quantization
        total = 0
        for module in shard.modules():
            stored = quantization.stored(module, DTYPES[sizing.compute_dtype])
            total += sum(tensor.bytes for tensor in stored.values())
            if module.kind is Kind.NORM and shard.spec.norm_of(module.name).offset:
                total += module.parameters * (4 - size)
        return total

    def streamed_bytes(self, sizing: Sizing, tokens: int) -> int:
        from trtx.builder.cost import weight_bytes

        return weight_bytes(replace(sizing.model, dtype=cast(Any, sizing.compute_dtype)), tokens)

    def activation_bytes(self, sizing: Sizing, shard: Shard) -> int:
        from trtx.builder.tensorrt.ops import spells_out

        spec, tp = shard.spec, shard.mapping.tp
        size, tokens, batch = ITEMSIZE[sizing.compute_dtype], sizing.max_num_tokens, sizing.max_batch_size
        heads = spec.num_heads // tp
        chunk = min(tokens, sizing.max_seq_len)
        padded = batch * chunk * heads * spec.head_dim * size
        scores = batch * heads * chunk * sizing.max_seq_len * 8 if spells_out(spec) else 0
        masks = 0 if all(w is None for w in spec.windows) and not spec.alibi else batch * chunk * sizing.max_seq_len
        layer = tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size // tp) * size
        return 3 * padded + scores + masks * (heads * size if spec.alibi else 1) + layer + 4 * batch * spec.vocab_size

    def table_bytes(self, sizing: Sizing) -> int:
        rotated = sum(rope.dim for rope in sizing.model.spec.ropes)
        return sizing.max_seq_len * rotated * ITEMSIZE[sizing.compute_dtype]

    def workspace_bytes(self, sizing: Sizing) -> int:
        return CONTEXT

    def math_dtype(self, sizing: Sizing) -> str:
        from trtx.builder.build import MATH_UNITS

        return MATH_UNITS.get(sizing.model.quantization.format, sizing.compute_dtype)
