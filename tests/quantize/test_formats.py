"""What the stored tensors mean, by the formulas of the format table written out again in numpy."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.converters import tiny
from tests.quantize import models
from trtx.builder.torch_backend import ROUNDING_BYTES
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import InputError
from trtx.quantize.formats import FORMATS, round_e4m3
from trtx.quantize.pipeline import MAX_PPL_INCREASE, QuantizeSettings, quantize

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
LINEARS = ("layers.0.attn.k", "layers.1.attn.o", "layers.1.mlp.up", "layers.0.mlp.down")


PACK_ERRORS = {
    "none": 0, "fp8": 0.03, "fp8_wo": 0.03, "fp8_pc_pt": 0.03, "int8_wo": 0.01, "int8_sq": 0.015, "int4_awq": 0.2,
    "w4a8_awq": 0.2, "nvfp4_wo": 0.1, "nvfp4": 0.1, "mxfp4": 0.13, "mxfp8": 0.03,
}  # fmt: skip
"""The most that `pack` may change a random weight by, relative to its norm."""


@pytest.fixture(scope="module", params=["fp8", "fp8_wo", "fp8_pc_pt", "int8_sq", "int4_awq", "nvfp4"])
def stored(request, tmp_path_factory):
    """The checkpoint in each format, and its tensors as safetensors reads them."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny.checkpoint_of(models.make("qwen2"), folder)
    out = folder / "out"
    quantize(checkpoint, out, models.settings(folder, request.param, kv_cache="fp8"))
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        return Checkpoint(checkpoint), Checkpoint(out), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def e4m3(x):
    """Nearest E4M3 value, ties to even, saturating: from the list of all values."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    return np.sign(x) * _nearest(np.abs(x.astype(np.float64)), values)


def e2m1(x):
    """Nearest E2M1 value, ties to even codes."""
    return np.sign(x) * _nearest(np.abs(x.astype(np.float64)), E2M1[:8].astype(np.float64))


def _nearest(x, values):
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    is_tie, is_even = (x - low) == (high - x), (above - 1) % 2 == 0
    return np.where((x - low < high - x) | (is_tie & is_even), low, high)


def weight_formula(form, t):
    codes = t["weight"]
    if form == "none":
        return codes.numpy()
    scale = t["weight_scale"].float().numpy()
    if form == "fp8":
        return codes.float().numpy() * scale
    if form in ("fp8_wo", "fp8_pc_pt", "int8_wo", "int8_sq"):
        return codes.float().numpy() * scale[:, None]
    if form == "mxfp8":
        return codes.float().numpy() * np.repeat(np.ldexp(np.float32(1), scale.astype(int) - 127), 32, axis=1)
    packed = codes.numpy()
    if form == "w4a8_awq":
        whole = t["weight_scale_2"].numpy()
        return (e4m3(weight_formula("int4_awq", t) / whole) * whole).astype(np.float32)
    if form == "int4_awq":
        nibbles = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
        nibbles[0::2], nibbles[1::2] = packed & 15, packed >> 4
        values = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)
        return values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)
    values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.float32)
    values[:, 0::2], values[:, 1::2] = E2M1[packed & 15], E2M1[packed >> 4]
    if form == "mxfp4":
        return values * np.repeat(np.ldexp(np.float32(1), scale.astype(int) - 127), 32, axis=1)
    return values * np.repeat(scale * t["weight_scale_2"].item(), 16, axis=1)


def activation_formula(form, t, x):
    step = t["input_scale"].item() if "input_scale" in t else None
    if "pre_quant_scale" in t:
        x = x * t["pre_quant_scale"].numpy()
    if form in ("fp8", "w4a8_awq"):
        return e4m3(np.clip(x / np.float32(step), -448, 448)) * step
    if form == "fp8_pc_pt":
        largest = np.abs(x).max(-1, keepdims=True)
        own = np.where(largest == 0, 1, largest) / np.float32(448)
        return e4m3(x / own) * own
    if form == "int8_sq":
        return np.clip(np.round(x / step), -128, 127) * step
    if form == "mxfp8":
        blocks = x.reshape(len(x), -1, 32).astype(np.float64)
        largest = np.abs(blocks).max(-1, keepdims=True)
        power = np.exp2(np.ceil(np.log2(np.where(largest == 0, 1, largest) / 448)))
        return (e4m3(blocks / power) * power).reshape(x.shape)
    if form != "nvfp4":
        return x
    blocks = x.reshape(x.shape[0], -1, 16)
    scale = e4m3(np.minimum(np.abs(blocks).max(-1, keepdims=True) / (6 * np.float32(step)), 448)) * step
    return (e2m1(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


@pytest.mark.parametrize("name", LINEARS)
def test_stored_tensors_mean_what_the_formula_says(stored, name):
    source, written, tensors = stored
    form = written.quantization.format
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    x = torch.randn(64, source.tensor(f"{name}.weight").shape[1], generator=torch.Generator().manual_seed(0)) * 3

    weight = FORMATS[form].weight(own, torch.float32).numpy()
    activation = FORMATS[form].activation(x, own).numpy()

    np.testing.assert_array_equal(weight, weight_formula(form, own))
    expected = activation_formula(form, own, x.numpy())
    assert np.mean(np.isclose(activation, expected, rtol=1e-5, atol=1e-7)) > 0.999  # the rest: rounded at a tie
    smooth = own["pre_quant_scale"].numpy() if "pre_quant_scale" in own else 1
    original = source.tensor(f"{name}.weight").numpy() / smooth
    assert np.linalg.norm(weight - original) < 0.15 * np.linalg.norm(original)


def test_linears_that_read_one_input_can_be_fused(stored):
    _, written, tensors = stored
    shared = FORMATS[written.quantization.format].input_tensors
    per_tensor = ("weight_scale",) if written.quantization.format == "fp8" else ()
    per_tensor = ("weight_scale_2",) if written.quantization.format == "nvfp4" else per_tensor
    for group in (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")):
        for suffix in (*shared, *per_tensor):
            first, *others = (tensors[f"layers.0.{name}.{suffix}"] for name in group)
            assert all(torch.equal(first, other) for other in others), suffix


def test_everything_else_is_copied_bit_for_bit(stored):
    source, _, tensors = stored
    for name in source.shards:
        if name.endswith((".bias", "norm.weight")) or name.startswith(("embed", "lm_head")):
            assert torch.equal(tensors[name], source.tensor(name)), name


def test_kv_cache_scales(stored):
    _, _, tensors = stored
    scale = tensors["layers.1.attn.k_scale"]
    assert scale.shape == () and scale > 0
    k = torch.randn(100) * 448 * scale
    expected = e4m3(np.clip((k / scale).numpy(), -448, 448)) * scale.item()
    np.testing.assert_allclose(round_e4m3(k, scale).numpy(), expected, rtol=1e-6)


def packed(form, weight, pre_quant_scale, input_scale):
    """A weight in a format, with the tensors that calibration would add."""
    group = FORMATS[form].group_size(weight.shape[1])
    given = {"pre_quant_scale": pre_quant_scale, "input_scale": torch.tensor(input_scale)}
    given = {suffix: given[suffix] for suffix in FORMATS[form].input_tensors}
    smooth = weight / pre_quant_scale if "pre_quant_scale" in given else weight
    return {**FORMATS[form].pack(smooth, group), **given}


@pytest.mark.parametrize("form", FORMATS)
def test_pack_fills_the_table(form):
    """Dtypes and shapes are those of `stored`; weight and input are what the formula says; little is lost."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 256, generator=generator), torch.randn(64, 256, generator=generator) * 3
    weight[:, 128:160] = 0
    weight[1] = 0
    x[:2, :64] = 0
    smooth = torch.rand(256, generator=generator) + 0.5
    tensors = packed(form, weight, smooth, input_scale=0.01 if form == "nvfp4" else 0.05)

    expected = FORMATS[form].stored(48, 256, FORMATS[form].group_size(256), torch.float32)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
        k: (s.dtype, s.shape) for k, s in expected.items()
    }
    meant = FORMATS[form].weight(tensors, torch.float32)
    np.testing.assert_array_equal(meant.numpy(), weight_formula(form, tensors))
    if "pre_quant_scale" in tensors:
        meant = meant * smooth
    assert (meant - weight).norm() <= PACK_ERRORS[form] * weight.norm()
    rounded = FORMATS[form].activation(x, tensors)
    assert np.mean(np.isclose(rounded, activation_formula(form, tensors, x.numpy()), rtol=1e-5, atol=1e-7)) > 0.999
    assert torch.equal(rounded, x) != FORMATS[form].changes_input


@pytest.mark.parametrize("largest, exponent", [(448.0, 0), (448.001, 1), (0.875, -9), (0.8751, -8), (0.0, -127)])
def test_mxfp8_scales_are_the_least_that_saturate_nothing(largest, exponent):
    """Also where log2 in fp32 would round to a whole number."""
    weight = torch.zeros(1, 32)
    weight[0, 7] = -largest
    packed = FORMATS["mxfp8"].pack(weight, 32)
    assert packed["weight_scale"].item() == 127 + exponent
    assert FORMATS["mxfp8"].weight(packed, torch.float32)[0, 7] == pytest.approx(-largest, rel=0.07)


def test_packing_equals_modelopts():
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor.mxfp4_tensor import MXFP4QTensor
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    theirs, scale = MXFP4QTensor.quantize(weight.clone(), 32)
    ours = FORMATS["mxfp4"].pack(weight, 32)
    assert torch.equal(ours["weight"], theirs._quantized_data)
    assert torch.equal(ours["weight_scale"].flatten(), scale.flatten())
    theirs, scale = MXFP8QTensor.quantize(weight.clone())
    ours = FORMATS["mxfp8"].pack(weight, 32)
    assert torch.equal(ours["weight"].float(), theirs._quantized_data.float())
    assert torch.equal(ours["weight_scale"], scale)
    theirs, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
    ours = FORMATS["nvfp4_wo"].pack(weight, 16)
    assert torch.equal(ours["weight"], theirs._quantized_data)
    assert torch.equal(ours["weight_scale"].float(), scale.float())
    assert torch.equal(ours["weight_scale_2"], scale_2)
    ours = FORMATS["w4a8_awq"].pack(weight, 128)
    assert torch.equal(ours["weight"], pack_int4_in_uint8(weight, ours["weight_scale"], 128))


def test_formats_that_quantize_does_not_make_are_refused():
    assert FORMATS.keys() - MAX_PPL_INCREASE.keys() == {"int8_wo", "w4a8_awq", "nvfp4_wo", "mxfp4", "mxfp8"}
    for form in FORMATS.keys() - MAX_PPL_INCREASE.keys():
        with pytest.raises(InputError, match=form):
            QuantizeSettings(form)
    assert ROUNDING_BYTES.keys() == FORMATS.keys()


def test_nvfp4_equals_modelopts_own_reading():
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), 16)
    tensors = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    expected = packed.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: 16}, dtype=torch.float32)
    assert torch.equal(FORMATS["nvfp4"].weight(tensors, torch.float32), expected)
