"""How much a quantized checkpoint lost: both checkpoints, as they stand on the disk, run on the same text.

Both are computed in fp32 on the torch op set, so that what differs is the quantization alone. Weights stay as stored
and are dequantized one linear at a time: memory is near the size of the two checkpoints and the activations of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import QualityError
from trtx.quantize.weight import LinearWeight
from trtx.runtime.decoder import Decoder
from trtx.runtime.ops.base import Value
from trtx.runtime.ops.torch_ops import TorchOps, TorchStep
from trtx.runtime.weights import WeightStore, kv_scales, load

_LOGIT_ROWS = 512
"""Positions whose logits are held at a time."""


@dataclass(frozen=True)
class Comparison:
    """A quantized checkpoint beside its source.

    Attributes:
        source_perplexity, perplexity: exp of the mean negative log likelihood of each window's next tokens.
        mean_kl: Kullback-Leibler divergence of the quantized from the source's distribution, mean over positions, nats.
        top1_agreement: fraction of positions where both hold the same token likeliest.
        positions: how many were compared.
        layer_errors: per layer, ‖quantized − source‖ / ‖source‖ of what the layer adds to the residual stream, both
            given the source's input; on the first window.
    """

    source_perplexity: float
    perplexity: float
    mean_kl: float
    top1_agreement: float
    positions: int
    layer_errors: tuple[float, ...]

    @property
    def ppl_increase(self) -> float:
        """Rise of the perplexity, in percent of the source's."""
        return 100 * (self.perplexity / self.source_perplexity - 1)

    def worst_layers(self, count: int) -> list[tuple[int, float]]:
        """(layer, error), the largest error first."""
        return sorted(enumerate(self.layer_errors), key=lambda item: -item[1])[:count]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "ppl_increase": self.ppl_increase}


def compare(
    source: Checkpoint,
    quantized: Checkpoint,
    batches: Sequence[Tensor],
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> Comparison:
    """Run both checkpoints on `batches`.

    Args:
        batches: token ids [B, S] each.
        advance: called with 1 after each batch.

    Raises:
        QualityError: logits of the quantized checkpoint are not finite.
    """
    with torch.inference_mode():
        longest = max(batch.shape[1] for batch in batches)
        pair = _resident(source, device, longest), _resident(quantized, device, longest)
        totals = _Totals()
        for batch in batches:
            hidden = [_hidden(decoder, batch) for decoder in pair]
            for exact, approximate, next_tokens in _logits(pair, hidden, batch):
                totals.add(exact, approximate, next_tokens)
            advance(1)
        if not math.isfinite(totals.kl):
            raise QualityError(f"{quantized.path}: computes infinite or undefined logits.", "Use another format.")
        return Comparison(
            source_perplexity=math.exp(totals.source_loss / totals.positions),
            perplexity=math.exp(totals.loss / totals.positions),
            mean_kl=totals.kl / totals.positions,
            top1_agreement=totals.agreeing / totals.positions,
            positions=totals.positions,
            layer_errors=tuple(_layer_errors(*pair, batches[0][:1])),
        )


class _AsStored(TorchOps):
    """Linears stay as stored, on the CPU, and are dequantized each time they are used."""

    def load_linear(self, weight: LinearWeight) -> Value:
        return weight

    def linear(self, x: Tensor, weight: Value) -> Tensor:
        stored = isinstance(weight, LinearWeight)  # a tied output projection is not
        return super().linear(x, super().load_linear(weight) if stored else weight)


@dataclass
class _Totals:
    """Sums over positions."""

    source_loss: float = 0.0
    loss: float = 0.0
    kl: float = 0.0
    agreeing: int = 0
    positions: int = 0

    def add(self, source: Tensor, quantized: Tensor, next_tokens: Tensor) -> None:
        """Logits [R, V] of both, and the tokens [R] that follow."""
        p, q = F.log_softmax(source, -1), F.log_softmax(quantized, -1)
        self.source_loss += F.nll_loss(p, next_tokens, reduction="sum").item()
        self.loss += F.nll_loss(q, next_tokens, reduction="sum").item()
        self.kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        self.agreeing += int((source.argmax(-1) == quantized.argmax(-1)).sum())
        self.positions += len(next_tokens)


def _resident(checkpoint: Checkpoint, device: torch.device | str, max_positions: int) -> Decoder:
    store, device = WeightStore.of_checkpoint(checkpoint), torch.device(device)
    scales = kv_scales(store, device) if checkpoint.quantization.kv_cache == "fp8" else None
    return load(store, _AsStored(checkpoint.spec, torch.float32, device, max_positions, scales))


def _step(decoder: Decoder, batch: Tensor) -> TorchStep:
    step: TorchStep = decoder.ops.uncached_step(batch)  # type: ignore[attr-defined]
    return step


def _hidden(decoder: Decoder, batch: Tensor) -> Tensor:
    """The residual stream after the last layer, [T, H]."""
    x, delta = decoder.body(_step(decoder, batch))
    return x if delta is None else x + delta


def _logits(
    pair: Sequence[Decoder], hidden: Sequence[Tensor], batch: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits [R, V] of both and the next tokens [R], a few positions at a time; no window's last position."""
    step = _step(pair[0], batch)
    places = torch.arange(batch.numel(), device=step.rows.device).view(batch.shape)
    for rows in places[:, :-1].flatten().split(_LOGIT_ROWS):
        exact, approximate = (decoder.head(x[rows], None) for decoder, x in zip(pair, hidden, strict=True))
        yield exact, approximate, step.token_ids[rows + 1]


def _layer_errors(source: Decoder, quantized: Decoder, batch: Tensor) -> Iterator[float]:
    step = _step(source, batch)
    x, delta = source.embed(step), None
    for index in range(source.spec.num_layers):
        approximate, change = quantized.layer(index, x, delta, step)
        before = x if delta is None else x + delta
        x, delta = source.layer(index, x, delta, step)
        exact = x + delta - before
        yield float((approximate + change - before - exact).norm() / exact.norm())
