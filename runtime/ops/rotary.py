"""The frequencies of rotary position embedding, with every scaling of `converters.spec.Rope`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtx.converters.spec import Rope


def frequencies_for(rope: Rope, max_positions: int) -> tuple[Tensor, float]:
    """Frequencies of an engine whose sequences have up to `max_positions` tokens, and the factor of cos and sin."""
    long = rope.scaling == "longrope" and max_positions > rope.original_max_position
    factor = rope.attention_factor
    if long and rope.long_attention_factor is not None:
        factor = rope.long_attention_factor
    return inverse_frequencies(rope, long), factor


def inverse_frequencies(rope: Rope, long: bool = False) -> Tensor:
    """Radians a position for each pair of features, [dim / 2], fp32, with the scaling of `rope` applied.

    Args:
        long: use the long factors of 'longrope'.
    """
    pairs = torch.arange(0, rope.dim, 2, dtype=torch.int64).float()
    base = 1.0 / rope.theta ** (pairs / rope.dim)
    if rope.scaling == "linear":
        return base / rope.factor
    if rope.scaling == "bands":
        return _banded_frequencies(base, rope)
    if rope.scaling == "yarn":
        return _yarn_frequencies(base, rope)
    if rope.scaling == "longrope":
        return base / torch.tensor(rope.long_factors if long else rope.short_factors)
    return base


def _banded_frequencies(base: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    ratio = rope.original_max_position / wavelength
    blend = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn_frequencies(base: Tensor, rope: Rope) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn rarely are interpolated, those that turn often kept."""

    def pair_turning(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2).float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return base / rope.factor * interpolated + base * (1 - interpolated)
