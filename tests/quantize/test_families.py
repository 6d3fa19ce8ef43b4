"""Every family can be quantized: experts, latents, soft caps, sinks and all."""

from __future__ import annotations

import pytest

from tests.converters import tiny
from tests.quantize import models
from tests.runtime.models import random_model
from trtx.converters.errors import UnsupportedError
from trtx.converters.families import FAMILIES
from trtx.quantize.pipeline import quantize

FIRST = {variant.family: name for name, variant in reversed(tiny.VARIANTS.items())}
"""A variant of each family."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_can_be_quantized(family, tmp_path):
    """In 8 bits, on text that reaches every expert: what was written says nearly what the source says."""
    source = tiny.checkpoint_of(random_model(FIRST[family.name], gain=1), tmp_path)
    for format, kv_cache in (("fp8", "fp8" if family.kv_cache_in_fp8 else "none"), ("int8_sq", "none")):
        settings = models.settings(tmp_path, format, kv_cache=kv_cache)
        report = quantize(source, tmp_path / format, settings)
        assert report.comparison.mean_kl < 0.1, format


def test_a_cache_of_latents_has_no_fp8(tmp_path):
    source = tiny.checkpoint_of(random_model("deepseek_v2-lite", gain=1), tmp_path)
    with pytest.raises(UnsupportedError, match="latents"):
        quantize(source, tmp_path / "out", models.settings(tmp_path, "fp8", kv_cache="fp8"))
