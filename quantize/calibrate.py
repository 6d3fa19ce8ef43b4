"""The calibrate op set: the decoder with its linears and attentions as modules that a quantizer can watch.

ModelOpt quantizes a tree of `nn.Module`s. Here every linear that is to be quantized is an `nn.Linear` under its
canonical name ('layers.0.attn.q') and every attention an `Attention` ('layers.0.attn'); all else is plain torch, and
the decoder's text is `runtime.decoder`. Everything computes in fp32: scales that are taken from bf16 weights are
rounded twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trtx.converters.errors import InputError
from trtx.converters.spec import Activation, ModelSpec
from trtx.quantize.weight import LinearWeight
from trtx.runtime.decoder import Decoder
from trtx.runtime.ops.base import Mlp, Ops, Value
from trtx.runtime.ops.torch_attention import attend
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.weights import WeightStore, fused_groups, load


class Attention(nn.Module):
    """Scaled dot-product attention as a module: what quantizers of the KV cache are put on."""

    def __init__(self, softcap: float | None) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Shapes as in `TorchOps.sdpa`."""
        return attend(queries, keys, values, mask, scale, self.softcap)


class CalibrateOps(TorchOps):
    """Plain torch in fp32, linears one by one, as modules of `tree`.

    Args:
        watched: canonical names of the linears that become part of the tree. The others are computed with only.
        max_positions: the longest sequence that will come.
    """

    def __init__(
        self, spec: ModelSpec, watched: Collection[str], device: torch.device | str, max_positions: int
    ) -> None:
        super().__init__(spec, torch.float32, device, max_positions)
        self.watched = frozenset(watched)
        self.tree = nn.Module()
        self.attentions = [Attention(spec.attention_softcap) for _ in range(spec.num_layers)]
        for index, attention in enumerate(self.attentions):
            _place(self.tree, f"layers.{index}.attn", attention)

    def load_linear(self, weight: LinearWeight) -> Value:
        dense = weight.dense(torch.float32).to(self.device).split(weight.rows)
        bias = weight.bias
        biases = [None] * len(dense) if bias is None else bias.to(self.device, torch.float32).split(weight.rows)
        return tuple(
            self._module(name, part, part_bias)
            for (name, _), part, part_bias in zip(weight.parts, dense, biases, strict=True)
        )

    def tie(self, table: Tensor) -> Value:
        return (self._module("lm_head", table, None),)

    def _module(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        if not _finite(weight):
            raise InputError(
                f"{name}: its weight has infinite or undefined values.", "Download the checkpoint again and convert it."
            )
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        # Calibration scales weights in place, and these may be mapped from the checkpoint.
        linear.weight = nn.Parameter(weight.clone() if name in self.watched else weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        if name in self.watched:
            _place(self.tree, name, linear)
        return linear

    def linear(self, x: Tensor, weight: Value) -> Tensor:
        (linear,) = weight
        return linear(x)

    def linears(self, x: Tensor, group: Value) -> list[Tensor]:
        return [linear(x) for weight in group for linear in weight]

    def sdpa(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        return self.attentions[layer](queries, keys, values, mask, scale)

    def experts(
        self,
        x: Tensor,
        routing: tuple[Tensor, Tensor],
        experts: Sequence[Mlp],
        activation: Activation,
        weighs_input: bool,
    ) -> Tensor:
        """An expert that no token of the batch chose sees them all, or it might never be calibrated."""
        used = set(routing[0].unique().tolist())
        for index, expert in enumerate(experts):
            if index not in used:
                self.mlp(x, expert, activation)
        return super().experts(x, routing, experts, activation, weighs_input)

    # Fused words, as core words: every linear has to be seen.
    add_norm = Ops.add_norm
    mlp = Ops.mlp


class CalibrationModel:
    """A decoder on the calibrate op set.

    Memory: the weights in fp32 (4 bytes a parameter), on `device`, and the activations of one batch.

    Attributes:
        tree: the module tree to quantize.
        watched: canonical names of the linears in it.
    """

    def __init__(
        self, store: WeightStore, watched: Collection[str], device: torch.device | str, max_positions: int
    ) -> None:
        self.watched = frozenset(watched)
        self.config = store.config
        self.ops = CalibrateOps(store.config.spec, self.watched, device, max_positions)
        with torch.no_grad():
            self.decoder: Decoder = load(store, self.ops)
        self.tree = self.ops.tree

    def sharing_input(self) -> Iterator[list[nn.Linear]]:
        """The watched linears of every fused group: they read one input."""
        for _, modules in fused_groups(self.config):
            names = [module.name for module in modules if module.name in self.watched]
            if len(names) > 1:
                yield [self.linear(name) for name in names]

    def linear(self, name: str) -> nn.Linear:
        """The watched linear of that canonical name."""
        linear = self.tree.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    @torch.no_grad()
    def observe(self, token_ids: Tensor) -> None:
        """Run token_ids [B, S] through every watched linear; logits are computed only if lm_head is watched."""
        step, decoder = self.ops.uncached_step(token_ids), self.decoder
        x, delta = decoder.body(step)
        if "lm_head" in self.watched:
            decoder.head(x, delta)

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """While the block runs, collect the names of the modules that are used, and refuse inputs that are not finite.

        Raises:
            InputError: an input of a watched linear or an attention is infinite or undefined.
        """
        used: set[str] = set()

        def watch(name: str, inputs: tuple[Tensor, ...]) -> None:
            used.add(name)
            if not all(map(_finite, inputs[:3])):  # an attention's mask, the fourth, has infinities
                raise InputError(
                    f"{name}: its input on the calibration text has infinite or undefined values.",
                    "Download the checkpoint again and convert it.",
                )

        names = [*self.watched, *(f"layers.{index}.attn" for index in range(self.ops.spec.num_layers))]
        hooks = [
            self.tree.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs))
            for name in names
        ]
        try:
            yield used
        finally:
            for hook in hooks:
                hook.remove()


def _finite(x: Tensor) -> bool:
    """Whether all values are finite: infinities and NaN carry over into the sum, which needs no memory."""
    return math.isfinite(x.sum())


def _place(tree: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` into `tree` under a dotted name, with plain modules between."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(tree, part):
            tree.add_module(part, nn.Module())
        tree = getattr(tree, part)
    tree.add_module(last, module)
