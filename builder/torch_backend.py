"""The memory of the torch op set (`runtime.ops.torch_ops`), told from its code.

T tokens of a step, B sequences, S tokens of the longest one, e bytes of the compute dtype. A step holds

- for each KV group an additive mask [.., G * Q, S] of every sequence's Q queries, G heads sharing a key head (all, with
  ALiBi): at most G * T * S numbers; and gather buffers of every sequence's keys and values (or latents), padded to the
  longest: B * S rows;
- the residual stream: x and delta of the layer before, and of this one (Python keeps the caller's alive);
- queries, keys and values before and after rotation, and the attention's output;
- the scores of all heads, where no fused kernel computes them (soft caps, latents);
- then the MLP's gate, up, activation and product (of one expert at a time), or the logits and the sampler's copies.

`tests/gpu/test_ledger.py` holds this against CUDA's allocator. What the allocator wastes between blocks is left
to the reserve.
"""

from __future__ import annotations

from trtx.builder.backend import Backend
from trtx.builder.cost import ITEMSIZE, resident_bytes
from trtx.builder.shard import Shard
from trtx.builder.sizing import Sizing
from trtx.converters.spec import Kind, ModelSpec, Module
from trtx.quantize.formats import DTYPES
from trtx.runtime.kv_layout import KVLayout

_MIB = 1 << 20

CONTEXT = {"cpu": 512 * _MIB, "cuda": 768 * _MIB}
"""Interpreter and libraries on a CPU; CUDA context and loaded kernels on a GPU (733 MB on an H200, torch 2.11)."""

CUBLAS_WORKSPACE = 64 * _MIB
"""cuBLAS takes 32 MiB on Hopper and newer, cuBLASLt as much again."""

NCCL = 512 * _MIB
"""Channels and buffers of one communicator."""

ROUNDING_BYTES = {
    "none": 0, "fp8": 10, "fp8_wo": 0, "fp8_pc_pt": 10, "int8_wo": 0, "int8_sq": 13, "int4_awq": 8, "w4a8_awq": 14,
    "nvfp4_wo": 0, "nvfp4": 30, "mxfp4": 0, "mxfp8": 16,
}  # fmt: skip
"""Temporary bytes an input number takes while a format rounds it (`Format.activation`), besides the result."""

SAMPLER_BYTES = 56
"""Bytes a logit takes in `runtime.sampler`: fp32 logits, log-probabilities, values and ids in falling order,
probabilities and their running sums, in fp32 and fp64."""


class TorchBackend(Backend):
    """Plain torch. Weights are dequantized to the compute dtype when they are loaded."""

    name, devices = "torch", ("cpu", "cuda")

    def weight_bytes(self, sizing: Sizing, shard: Shard) -> int:
        size, quantization = ITEMSIZE[sizing.compute_dtype], sizing.model.quantization
        total = 0
        for module in shard.modules():
            total += module.parameters * _resident_itemsize(module, shard.spec, size)
            if module.kind is Kind.LINEAR:
                stored = quantization.stored(module, DTYPES[sizing.model.dtype])
                total += sum(stored[suffix].bytes for suffix in quantization.format_of(module).input_tensors)
        return total

    def streamed_bytes(self, sizing: Sizing, tokens: int) -> int:
        return resident_bytes(sizing.model.spec, sizing.compute_dtype, tokens)

    def activation_bytes(self, sizing: Sizing, shard: Shard) -> int:
        spec, tp = shard.spec, shard.mapping.tp
        size, tokens = ITEMSIZE[sizing.compute_dtype], sizing.max_num_tokens
        hidden = spec.hidden_size
        queries = spec.num_heads * spec.head_dim // tp
        rounding = ROUNDING_BYTES[sizing.model.quantization.format]

        residual = 6 * tokens * hidden * size
        norm = 2 * tokens * max(hidden, queries) * 4  # fp32 copies
        attention, attending = _attention(sizing, shard)
        rotation = 2 * tokens * queries * size
        inner = max(_inner_sizes(spec)) // tp
        mlp = tokens * inner * max(4 * size, 3 * size + rounding) + _routing(sizing)
        rounding_input = tokens * max(hidden, queries) * (size + rounding) if rounding else 0
        scaled = 2 * size if spec.logit_softcap or spec.logit_scale != 1 else 0
        per_logit = size + scaled + SAMPLER_BYTES
        logits = sizing.max_batch_size * spec.vocab_size * per_logit if shard.is_last else 0

        layer = attention + max(norm, rotation, attending, mlp, rounding_input)
        held, building = _step_bytes(sizing, shard)
        return held + max(residual + max(layer, logits), building)

    def table_bytes(self, sizing: Sizing) -> int:
        rows = sizing.max_seq_len + sizing.max_num_tokens  # the table, and what a step gathers from it
        rotated = sum(rope.dim for rope in sizing.model.spec.ropes)
        return 2 * rows * rotated * ITEMSIZE[sizing.compute_dtype]

    def workspace_bytes(self, sizing: Sizing) -> int:
        device = sizing.target.device
        cublas = CUBLAS_WORKSPACE if device == "cuda" else 0
        return CONTEXT[device] + cublas + (NCCL if sizing.mapping.ranks > 1 else 0)

    def math_dtype(self, sizing: Sizing) -> str:
        return sizing.compute_dtype


def _resident_itemsize(module: Module, spec: ModelSpec, size: int) -> int:
    """Bytes of a number of a module: some are always held in fp32."""
    in_fp32 = module.kind is Kind.VECTOR or module.name.endswith(".router")
    in_fp32 |= module.kind is Kind.NORM and spec.norm_of(module.name).offset != 0
    return 4 if in_fp32 else size


def _inner_sizes(spec: ModelSpec) -> list[int]:
    """Widths of the MLPs and experts."""
    dense = [spec.intermediate_size] if spec.moe is None or len(spec.moe.layers) < spec.num_layers else []
    return dense + ([spec.moe.intermediate_size, spec.moe.shared_size] if spec.moe else [])


def _routing(sizing: Sizing) -> int:
    """Bytes that experts take beside their own MLP: scores, the inputs and outputs of one expert, the sum."""
    spec, tokens = sizing.model.spec, sizing.max_num_tokens
    if spec.moe is None:
        return 0
    return tokens * (4 * 4 * spec.moe.experts + 3 * spec.hidden_size * ITEMSIZE[sizing.compute_dtype])


def _attention(sizing: Sizing, shard: Shard) -> tuple[int, int]:
    """Bytes of queries, keys, values and the output; and what attending to them takes for a moment."""
    spec, tp = shard.spec, shard.mapping.tp
    size, tokens = ITEMSIZE[sizing.compute_dtype], sizing.max_num_tokens
    heads = spec.num_heads // tp
    queries, keys, out = heads * spec.head_dim, spec.num_kv_heads * spec.head_dim // tp, heads * spec.value_dim
    held = tokens * (2 * queries + 3 * keys + out) * size
    if spec.latent:
        held = tokens * (2 * queries + 2 * heads * spec.cached_dim + out) * size
    folding = 2 * tokens * heads * (spec.cached_dim if spec.latent else spec.head_dim) * size
    scores = heads * tokens * _padded(sizing)
    if spec.attention_softcap or spec.latent:  # computed apart, since no fused kernel takes them
        folding += scores * (3 * size + 8)
    if spec.sinks:
        folding += scores * size + 2 * _gathered(sizing, _layout(sizing, shard)) * size
    return held, folding + _decoding(sizing, shard)


def _step_bytes(sizing: Sizing, shard: Shard) -> tuple[int, int]:
    """Masks and gather buffers: what a step holds to its end, and what building a mask takes for a moment."""
    layout, spec = _layout(sizing, shard), shard.spec
    tokens, length, size = sizing.max_num_tokens, _padded(sizing), ITEMSIZE[sizing.compute_dtype]
    heads = spec.num_heads // shard.mapping.tp
    rows = heads if spec.alibi else heads // layout.kv_heads
    mask = rows * tokens * length * size
    scratch = layout.arrays * _gathered(sizing, layout) * layout.itemsize
    building = tokens * length * (8 + 1 + size)  # distances (int64), what is hidden, the mask
    if spec.alibi:
        building += rows * tokens * length * 4
    return len(layout.groups) * (mask + scratch), building


def _decoding(sizing: Sizing, shard: Shard) -> int:
    """Bytes to turn gathered keys and values into the compute dtype."""
    if sizing.kv_dtype == sizing.compute_dtype:
        return 0
    size = ITEMSIZE[sizing.compute_dtype]
    scaled = 8 if sizing.kv_dtype == "fp8" else 0  # two fp32 copies of one of the two at a time
    layout = _layout(sizing, shard)
    return _gathered(sizing, layout) * (layout.arrays * size + scaled)


def _gathered(sizing: Sizing, layout: KVLayout) -> int:
    """Numbers in the keys (or values, or latents) of a full batch, in one layer."""
    return sizing.max_batch_size * _padded(sizing) * layout.kv_heads * layout.head_dim


def _layout(sizing: Sizing, shard: Shard) -> KVLayout:
    return shard.kv_layout(sizing.kv_block_size, ITEMSIZE[sizing.kv_dtype])


def _padded(sizing: Sizing) -> int:
    """The longest sequence in whole blocks."""
    return -(-sizing.max_seq_len // sizing.kv_block_size) * sizing.kv_block_size
