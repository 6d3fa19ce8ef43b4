"""What was written computes what ModelOpt's own fake quantization of the transformers model computes."""

import copy

import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from tests.converters import tiny
from tests.quantize import models
from trtx.converters.checkpoint import Checkpoint
from trtx.quantize.modelopt import SMOOTHQUANT_ALPHA
from trtx.quantize.pipeline import quantize
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.weights import WeightStore, kv_scales, load

FAMILIES = ("llama", "qwen2")
TOLERANCES = {"fp8": 1e-2, "fp8_wo": 1e-4, "fp8_pc_pt": 1e-2, "int8_sq": 1e-2, "int4_awq": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> PreTrainedModel:
    return models.make(request.param)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    return tiny.checkpoint_of(model, tmp_path_factory.mktemp("model"))


def logits_as_written(path, token_ids):
    """Logits [B * S, V] of a checkpoint on the torch op set in fp32."""
    checkpoint = Checkpoint(path)
    store, device = WeightStore.of_checkpoint(checkpoint), torch.device("cpu")
    scales = kv_scales(store, device) if checkpoint.quantization.kv_cache == "fp8" else None
    with torch.inference_mode():
        ops = TorchOps(checkpoint.spec, torch.float32, device, kv_scales=scales)
        return load(store, ops).forward(ops.uncached_step(token_ids))


def logits_of_modelopt(model, quantization, batches, token_ids):
    """Logits [B * S, V] of the transformers model, fake-quantized by ModelOpt's presets, fused groups joined."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    presets = {
        "fp8": mtq.FP8_DEFAULT_CFG, "fp8_wo": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "fp8_pc_pt": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG,
    }  # fmt: skip
    nothing = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    config = copy.deepcopy(presets.get(quantization.format, nothing))
    if quantization.format == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": SMOOTHQUANT_ALPHA}
    if quantization.format == "fp8_wo":
        config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    for entry in config["quant_cfg"]:
        if quantization.group_size and entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = quantization.group_size
    if quantization.kv_cache == "fp8":
        config["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    quantized = copy.deepcopy(model)
    with torch.no_grad():
        mtq.quantize(quantized, config, lambda m: [m(batch) for batch in batches])
        if quantization.format != "none":
            for layer in quantized.model.layers:
                attn, mlp = layer.self_attn, layer.mlp
                preprocess_linear_fusion([attn.q_proj, attn.k_proj, attn.v_proj])
                preprocess_linear_fusion([mlp.gate_proj, mlp.up_proj])
        return quantized(token_ids).logits.flatten(0, 1)


@pytest.mark.parametrize(
    ("format", "kv_cache"),
    [
        ("none", "fp8"),
        ("fp8", "none"),
        ("fp8", "fp8"),
        ("fp8_wo", "none"),
        ("fp8_pc_pt", "none"),
        ("int8_sq", "none"),
        ("int4_awq", "none"),
        ("int4_awq", "fp8"),
    ],
)
def test_written_equals_fake_quantized(model, checkpoint, tmp_path, format, kv_cache):
    report = quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, format, kv_cache=kv_cache))
    token_ids = models.tokens(7, windows=32)
    tolerance = 1e-2 if kv_cache == "fp8" else TOLERANCES[format]

    found = logits_as_written(tmp_path / "out", token_ids)

    batches = models.tokens(1).split(2)
    expected = logits_of_modelopt(model, report.quantization, batches, token_ids)
    plain = model(token_ids).logits.flatten(0, 1).detach()
    error = (found - expected).norm() / expected.norm()
    lost = (plain - expected).norm() / expected.norm()
    assert error < tolerance < lost
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99
