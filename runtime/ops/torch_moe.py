"""Routing in plain torch: which experts a token goes to, and with which weights."""

from __future__ import annotations

import torch
from torch import Tensor

from trtx.converters.spec import MoE


def choose(logits: Tensor, correction: Tensor | None, moe: MoE) -> Tensor:
    """The experts [T, top_k] with the largest scores, from the best groups.

    Args:
        logits: [T, experts], fp32.
        correction: [experts], added to the scores.
    """
    scores = _scores(logits, moe)
    if correction is not None:
        scores = scores + correction
    if moe.groups > 1:
        grouped = scores.unflatten(-1, (moe.groups, -1))
        best = grouped.topk(1 if moe.group_score == "max" else 2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(moe.top_groups, dim=-1).indices, True)
        scores = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    return scores.topk(moe.top_k, dim=-1).indices


def weigh(logits: Tensor, chosen: Tensor, moe: MoE) -> Tensor:
    """The weights [T, top_k] of the chosen experts."""
    if moe.scores == "sparsemixer":
        return _sparsemixer(logits, chosen, moe.jitter)
    weights = _scores(logits, moe).gather(-1, chosen)
    if moe.scores == "top_softmax":
        weights = weights.softmax(-1)
    if moe.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * moe.scale


def _scores(logits: Tensor, moe: MoE) -> Tensor:
    if moe.scores == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if moe.scores == "sigmoid" else logits


def _sparsemixer(logits: Tensor, chosen: Tensor, jitter: float) -> Tensor:
    """Each expert in turn weighs its softmax among those not chosen before it and not far below it.

    Far is a distance, relative to the larger of its own logit and the other's magnitude, of more than 2 * jitter.
    """
    weights, left = [], logits
    for expert in chosen.split(1, dim=-1):
        best = left.gather(-1, expert)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, expert))
        left = left.scatter(-1, expert, float("-inf"))
    return torch.cat(weights, -1)
