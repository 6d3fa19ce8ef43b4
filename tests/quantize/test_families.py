"""Every family can be quantized: experts, latents, soft caps, sinks and all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.converters import tiny
from tests.quantize import models
from tests.runtime.models import random_model
from trtx.converters.errors import UnsupportedError
from trtx.converters.families import FAMILIES
from trtx.quantize.pipeline import quantize

MATRICES = {
    "mixtral": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    "deepseek_v3": {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "q_lora_rank": 64, "kv_lora_rank": 32, "v_head_dim": 16,
    },
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16},
}  # fmt: skip
"""Widths that formats with groups can cut."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_can_be_quantized(family, tmp_path):
    """In 8 bits, on text that reaches every expert: what was written says nearly what the source says."""
    source = tiny.checkpoint_of(random_model(tiny.FIRST[family.name], gain=1), tmp_path)
    for format, kv_cache in (("fp8", "fp8" if family.kv_cache_in_fp8 else "none"), ("int8_sq", "none")):
        settings = models.settings(tmp_path, format, kv_cache=kv_cache)
        report = quantize(source, tmp_path / format, settings)
        assert report.comparison.mean_kl < 0.1, format


@pytest.mark.parametrize("format", ["int4_awq", "nvfp4"])
@pytest.mark.parametrize("name", MATRICES)
def test_experts_in_groups_of_columns(name, format, tmp_path):
    """4 bits cost more, but an expert packed wrongly would cost everything."""
    variant = tiny.VARIANTS[name]
    model = tiny.of(replace(variant, settings={**variant.settings, **MATRICES[name]}))
    source = tiny.checkpoint_of(tiny.randomize(model, seed=0, gain=1), tmp_path)
    report = quantize(source, tmp_path / "out", models.settings(tmp_path, format))
    assert report.comparison.mean_kl < 0.3


def test_a_cache_of_latents_has_no_fp8(tmp_path):
    source = tiny.checkpoint_of(random_model("deepseek_v2-lite", gain=1), tmp_path)
    with pytest.raises(UnsupportedError, match="latents"):
        quantize(source, tmp_path / "out", models.settings(tmp_path, "fp8", kv_cache="fp8"))
