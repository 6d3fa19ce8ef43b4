"""A real model, quantized with every default."""

import pytest

from trtx.converters.convert import convert
from trtx.quantize.pipeline import QuantizeSettings, quantize


@pytest.mark.slow
def test_int8_passes_its_gate(smollm2_gguf, tmp_path):
    """What `make demo` does."""
    convert(str(smollm2_gguf), tmp_path / "checkpoint")
    report = quantize(tmp_path / "checkpoint", tmp_path / "int8", QuantizeSettings("int8_sq"))
    assert report.passed
    assert 25 < report.comparison.source_perplexity < 50
    assert report.comparison.top1_agreement > 0.8
    assert report.bytes < 0.65 * report.source_bytes
