"""Attention in plain torch: soft caps, sinks, ALiBi."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtx.converters.spec import Alibi


def with_sinks(keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key of zeros with a value of zeros, which each head's mask gives its sink as score.

    Args:
        sinks: [heads]; the mask's rows are [kv_heads, G * Q].
    """
    batch, kv_heads = keys.shape[:2]
    rows = mask.shape[2]
    each = sinks.view(kv_heads, -1, 1).expand(-1, -1, rows * kv_heads // len(sinks)).reshape(1, kv_heads, rows, 1)
    mask = torch.cat([mask.expand(batch, kv_heads, -1, -1), each.to(mask.dtype).expand(batch, -1, -1, -1)], dim=-1)
    return F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1)), mask


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    """Scaled dot-product attention, with a soft cap on the scores (Gemma 2, arXiv:2408.00118) where there is one.

    Shapes as in `TorchOps.sdpa`.
    """
    if cap is None:
        return F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    scores = torch.matmul(queries, keys.transpose(-1, -2)) * scale
    capped = torch.tanh(scores / cap) * cap + mask
    return torch.matmul(capped.float().softmax(-1).to(values.dtype), values)


def alibi_bias(alibi: Alibi, heads: int, positions: Tensor) -> Tensor:
    """What is added to the scores of keys at `positions` [B, S] → [B, heads, S], fp32."""
    power = 1 << (heads.bit_length() - 1)
    exponents = [alibi.max_bias * i / power for i in range(1, power + 1)]
    exponents += [alibi.max_bias * i / (2 * power) for i in range(1, 2 * (heads - power), 2)]
    slopes = torch.tensor([2.0**-exponent for exponent in exponents], device=positions.device)
    if alibi.rounded:
        return (slopes.bfloat16()[:, None] * positions[:, None].bfloat16()).float() * alibi.scale
    return slopes[:, None] * positions[:, None] * alibi.scale
