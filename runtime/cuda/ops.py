"""The op set of the cuda backend: trtx's kernels, cuBLAS for large products, plain torch for what is rare.

It runs wherever its `Launch` does: on a GPU from cubins, on a CPU in Triton's interpreter (tests), and on meta tensors
while `trtx build` notes down which kernels an engine needs. No word waits for the GPU, so that a step can be captured
in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from trtx.converters.spec import Activation, ModelSpec, MoE, Rope
from trtx.quantize.weight import LinearWeight
from trtx.runtime.cuda import attention, elementwise, linear
from trtx.runtime.cuda import experts as grouped
from trtx.runtime.cuda.attention import HeadNorm, Rotation, Slopes
from trtx.runtime.cuda.deferred import Deferred, Product, as_input, value
from trtx.runtime.cuda.launch import CodeScales, Launch
from trtx.runtime.cuda.linear import Codes, CudaLinear
from trtx.runtime.cuda.step import CudaStep
from trtx.runtime.ops.base import Heads, Mlp, Value
from trtx.runtime.ops.rotary import frequencies_for
from trtx.runtime.ops.torch_ops import ResidentLinear, ResidentNorm, TorchOps


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    Attributes:
        gate_up: [experts, 2 * I, H], the gate's rows first; [experts, I, H] without a gate.
        gate_up_bias: [experts, rows of gate_up], or None.
        down: [experts, H, I].
        down_bias: [experts, H], or None.
    """

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def is_expert(name: str) -> bool:
    """Whether a linear belongs to an expert, which is kept as it is stored."""
    return ".experts." in name


def _stacked(linears: Sequence[ResidentLinear], experts: int) -> tuple[Tensor, Tensor | None]:
    """Weights [experts, O, I] and biases of linears, as many in a row as an expert has of them."""
    weight = torch.stack([part.weight for part in linears]).unflatten(0, (experts, -1)).flatten(1, 2)
    if linears[0].bias is None:
        return weight, None
    bias = torch.stack([cast(Tensor, part.bias) for part in linears])
    return weight, bias.unflatten(0, (experts, -1)).flatten(1, 2)


class CudaOps(TorchOps):
    """trtx's kernels on one device.

    Args:
        launch: starts them.
        laid_out: linears come in kernel layout, as an engine stores them; else they are brought into it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        max_positions: int,
        launch: Launch,
        laid_out: bool = True,
    ) -> None:
        super().__init__(spec, dtype, device, max_positions)
        self.launch = launch
        self.laid_out = laid_out
        self._rotations: dict[Rope, tuple[Tensor, Tensor]] = {}
        self._alibi = Slopes.of(spec.alibi, spec.num_heads, self.device) if spec.alibi else None

    # Weights.

    def load_linear(self, weight: LinearWeight) -> Any:
        if is_expert(weight.name):
            return super().load_linear(weight)
        tensors = {suffix: tensor.to(self.device) for suffix, tensor in weight.tensors.items()}
        if not self.laid_out:
            moved = LinearWeight(weight.name, weight.format, tensors, weight.parts, weight.split)
            tensors = linear.kernel_layout(moved, self.dtype)
        return linear.resident(weight.name, weight.format, tensors, weight.rows, self.dtype)

    def load_experts(self, experts: Sequence[Mlp]) -> Experts:
        """Stacked, layer by layer: for a moment the experts of one layer are there twice."""
        gate_up = [part for mlp in experts for part in mlp.gate_up]
        down = [mlp.down for mlp in experts]
        return Experts(*_stacked(gate_up, len(experts)), *_stacked(down, len(experts)))

    def tie(self, table: Tensor) -> Any:
        return linear.dense("lm_head", table, (len(table),))

    # Words with kernels.

    def embed(self, step: Any, table: Tensor, scale: float = 1.0) -> Tensor:
        return elementwise.embed(self.launch, step.token_ids, table, scale)

    def embed_positions(self, step: Any, table: Tensor) -> Tensor:
        return elementwise.embed(self.launch, step.positions, table)

    def norm(self, x: Value, weight: ResidentNorm) -> Tensor:
        return elementwise.norm(self.launch, value(x), weight)

    def add_norm(self, x: Value, delta: Value | None, weight: ResidentNorm) -> tuple[Tensor, Value]:
        x = value(x)
        if isinstance(delta, Product):
            x, delta = delta.added(x), None
        if delta is not None:
            return elementwise.add_norm(self.launch, x, delta, weight)
        return x, Deferred(x, partial(elementwise.norm, self.launch, x, weight))

    def add(self, a: Value, b: Value | float) -> Tensor:
        return b.added(value(a)) if isinstance(b, Product) else super().add(value(a), b)

    def mul(self, a: Value, b: Value | float) -> Tensor:
        return super().mul(value(a), b)

    def activation(self, x: Value, kind: str) -> Tensor:
        return elementwise.activation(self.launch, value(x), kind)

    def linear(self, x: Value, weight: CudaLinear | ResidentLinear) -> Tensor:
        if isinstance(weight, ResidentLinear):
            return super().linear(value(x), weight)
        return linear.linear(self.launch, as_input(x, weight), weight)

    def project(self, x: Tensor | Codes | Deferred, weight: CudaLinear) -> Product:
        return Product(self.launch, as_input(x, weight), weight)

    def split(self, y: Tensor, weight: Any) -> Sequence[Tensor]:
        return y.split(weight.rows, dim=-1)

    def mlp(self, x: Value, weights: Mlp, activation: Activation) -> Value:
        first, *others = weights.gate_up
        if others or len(first.rows) != 2:
            return super().mlp(x, weights, activation)
        y = linear.gated(self.launch, as_input(x, first), first, activation, weights.down)
        return self.project(y, weights.down)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, step: CudaStep, heads: Heads) -> Deferred:
        cache, spec = step.cache, self.spec
        keys, values = cache.arrays(layer)
        table = step.attention.tables[cache.group(layer)]
        k_scale, v_scale = cache.scales(layer)
        q, k, v = (part.unflatten(-1, (-1, heads.size)) for part in (q, k, v))
        rotation = Rotation(
            tables=self.rotation(heads.rope) if heads.rope else None,
            dim=heads.rope.dim if heads.rope else 0,
            q_norm=_head_norm(heads.q_norm, heads.unit_eps),
            k_norm=_head_norm(heads.k_norm, heads.unit_eps),
            norm_last=heads.unit_eps is not None,
            query_scaling=(heads.scaling.floor, heads.scaling.scale) if heads.scaling else None,
        )

        def compute(codes: CodeScales | None) -> Tensor:
            return attention.attention(
                self.launch,
                q,
                k,
                v,
                keys,
                values,
                step.attention,
                table,
                rotation=rotation,
                scale=spec.attention_scale_of(layer),
                window=spec.windows[layer],
                chunked=spec.chunked,
                softcap=spec.attention_softcap,
                sinks=heads.sinks,
                alibi=self._alibi,
                k_scale=k_scale,
                v_scale=v_scale,
                codes=codes,
            )

        return Deferred(q, compute)

    def rope(self, x: Tensor, rope: Rope, step: Any) -> Tensor:
        """For latents; elsewhere `attend` rotates."""
        cos, sin = (table[step.positions].unsqueeze(1) for table in self.rotation(rope))
        first, second = x[..., : rope.dim].float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        return turned if rope.dim == x.shape[-1] else torch.cat([turned, x[..., rope.dim :]], dim=-1)

    def attend_to_latents(self, q: Tensor, latent: Tensor, k_rope: Tensor, layer: int, step: Any) -> Tensor:
        (latents,) = step.cache.arrays(layer)
        table = step.attention.tables[step.cache.group(layer)]
        attention.store_latents(self.launch, latent, k_rope, step.attention, table, latents)
        scale, rank = self.spec.attention_scale_of(layer), latent.shape[-1]
        return attention.latent_attention(self.launch, q, latents, step.attention, table, scale=scale, rank=rank)

    def route(self, x: Value, router: ResidentLinear, correction: Tensor | None, moe: MoE) -> tuple[Tensor, Tensor]:
        return grouped.route(self.launch, value(x), router, correction, moe)

    def experts(
        self, x: Value, routing: tuple[Tensor, Tensor], experts: Any, activation: Activation, weighs_input: bool
    ) -> Tensor:
        """Weights of quantized experts are dequantized when they are loaded, and their inputs are not rounded."""
        biases = experts.gate_up_bias, experts.down_bias
        return grouped.experts(
            self.launch, value(x), *routing, experts.gate_up, experts.down, biases, activation, weighs_input
        )

    def rows(self, x: Value, step: Any) -> Value:
        return x if step.rows is None else value(x).index_select(0, step.rows)

    def rotation(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, [max_positions, rope.dim / 2] in fp32."""
        if rope not in self._rotations:
            frequencies, factor = frequencies_for(rope, self.max_positions)
            angles = torch.outer(torch.arange(self.max_positions).float(), frequencies)
            cos, sin = ((part * factor).to(self.device) for part in (angles.cos(), angles.sin()))
            self._rotations[rope] = cos, sin
        return self._rotations[rope]


def _head_norm(norm: ResidentNorm | None, unit_eps: float | None) -> HeadNorm | None:
    """What is done to each head: a norm with a weight, or one without."""
    if norm is not None:
        return HeadNorm(norm.weight, norm.bias, norm.norm.eps, norm.norm.kind)
    return None if unit_eps is None else HeadNorm(None, None, unit_eps, "unit")
