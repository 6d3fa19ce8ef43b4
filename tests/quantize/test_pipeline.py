"""The whole of `trtx quantize` apart from what the formats mean: plan, gate, report, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.converters import tiny
from tests.quantize import models
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import convert
from trtx.converters.errors import InputError, OutputError, QualityError, UnsupportedError
from trtx.quantize.pipeline import QUALITY, GateError, QuantizeSettings, quantize
from trtx.runtime.weights import WeightStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model():
    return models.make()


@pytest.fixture(scope="module")
def checkpoint(model, folder):
    return tiny.checkpoint_of(model, folder)


def test_perplexity_kl_and_agreement_are_those_of_transformers(model, checkpoint, tmp_path):
    """With the KV cache alone quantized, transformers and our reading of the source differ by rounding only."""
    report = quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "none", kv_cache="fp8"))
    ids = models.tokens(2)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    assert report.comparison.source_perplexity == pytest.approx(loss.exp().item(), rel=1e-4)
    assert report.comparison.positions == 4 * (models.LENGTH - 1)
    assert 0 < report.comparison.mean_kl < 0.1
    assert 0.8 < report.comparison.top1_agreement <= 1
    assert len(report.comparison.layer_errors) == 2
    assert all(0 < error < 0.2 for error in report.comparison.layer_errors)


def test_what_is_excluded_costs_nothing(checkpoint, tmp_path):
    """A layer left out has no error, so that errors name the layers to leave out."""
    settings = models.settings(tmp_path, "int4_awq", excluded=("lm_head", "layers.0.*"))
    report = quantize(checkpoint, tmp_path / "out", settings)
    assert report.comparison.layer_errors[0] == 0 < report.comparison.layer_errors[1]
    written = Checkpoint(tmp_path / "out")
    assert written.tensor("layers.0.attn.q.weight").dtype == torch.float32
    assert written.tensor("layers.1.attn.q.weight").dtype == torch.uint8


def test_part_of_a_fused_group_can_be_excluded(checkpoint, tmp_path):
    quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "fp8", excluded=("lm_head", "*.attn.v")))
    written = Checkpoint(tmp_path / "out")
    assert written.tensor("layers.0.attn.v.weight").dtype == torch.float32
    assert written.tensor("layers.0.attn.k.weight").dtype == torch.float8_e4m3fn


def test_the_output_projection_can_be_quantized(checkpoint, tmp_path):
    quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "int8_sq", excluded=()))
    assert Checkpoint(tmp_path / "out").tensor("lm_head.weight").dtype == torch.int8


@pytest.mark.parametrize("format", ["fp8", "fp8_wo", "fp8_pc_pt", "int8_sq", "int4_awq", "nvfp4"])
def test_a_weight_row_of_zeros(format, tmp_path):
    model = models.make()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    source = tiny.checkpoint_of(model, tmp_path)
    quantize(source, tmp_path / "out", models.settings(tmp_path, format))
    weight = WeightStore.of_checkpoint(Checkpoint(tmp_path / "out"))
    module = next(m for m in weight.config.spec.modules() if m.name == "layers.0.attn.q")
    assert not weight.linear(module).dense(torch.float32)[3].any()


def test_gate(checkpoint, tmp_path):
    strict = models.settings(tmp_path, "nvfp4", max_ppl_increase=-50.0)
    with pytest.raises(GateError, match=r"perplexity rose by .*the gate is -50%. Nothing was kept") as raised:
        quantize(checkpoint, tmp_path / "out", strict)
    assert not (tmp_path / "out").exists()
    assert not raised.value.report.passed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    with pytest.raises(QualityError, match="It was kept"):
        quantize(checkpoint, tmp_path / "out", strict, keep=True)
    quality = json.loads((tmp_path / "out" / QUALITY).read_text())
    assert quality["passed"] is False
    assert Checkpoint(tmp_path / "out").quantization.format == "nvfp4"


def test_quality_json_and_manifest(checkpoint, tmp_path):
    report = quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "int4_awq"))
    quality = json.loads((tmp_path / "out" / QUALITY).read_text())
    assert quality == json.loads(json.dumps(report.to_json()))
    assert quality["passed"] is True
    assert quality["quantization"]["group_size"] == 64
    assert quality["calibration"] == {"source": str(tmp_path / "calib.jsonl"), "windows": 4, "length": models.LENGTH}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["format"] == "int4_awq"
    assert len(manifest["inputs"]) == 3
    assert "nvidia-modelopt" in manifest["versions"]


@pytest.mark.parametrize(("intermediate", "group_size"), [(256, 128), (192, 64), (160, 32)])
def test_group_size_is_the_largest_that_divides_every_width(intermediate, group_size, tmp_path):
    source = tiny.checkpoint_of(models.make(intermediate_size=intermediate), tmp_path)
    report = quantize(source, tmp_path / "out", models.settings(tmp_path, "int4_awq"))
    assert report.quantization.group_size == group_size


def test_a_width_that_no_group_divides(tmp_path):
    source = tiny.checkpoint_of(models.make(intermediate_size=200), tmp_path)
    with pytest.raises(UnsupportedError, match=r"layers.0.mlp.down: int4_awq .* 128 × 200") as raised:
        quantize(source, tmp_path / "out", models.settings(tmp_path, "int4_awq"))
    assert "--exclude 'layers.0.mlp.down'" in raised.value.remedy
    settings = models.settings(tmp_path, "int4_awq", excluded=("lm_head", "*.mlp.down"))
    assert quantize(source, tmp_path / "out", settings).quantization.group_size == 128


def test_a_quantized_checkpoint_is_refused(checkpoint, tmp_path):
    quantize(checkpoint, tmp_path / "once", models.settings(tmp_path, "fp8"))
    with pytest.raises(InputError, match="is quantized already"):
        quantize(tmp_path / "once", tmp_path / "twice", models.settings(tmp_path, "fp8"))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"format": "int3"}, "Unknown format 'int3'"),
        ({"format": "none"}, "Nothing is left to quantize"),
        ({"excluded": ("*",)}, "Nothing is left to quantize"),
        ({"excluded": ("q_proj",)}, "--exclude 'q_proj' matches no linear"),
        ({"max_ppl_increase": float("nan")}, "max_ppl_increase is nan"),
    ],
)
def test_bad_settings(changes, cause, checkpoint, tmp_path):
    fields = {"format": "fp8", **changes}
    with pytest.raises(InputError, match=cause):
        quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, **fields))


def test_the_gates_text_is_never_the_calibration_text(checkpoint, tmp_path):
    settings = models.settings(tmp_path, "fp8")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(settings.calib_data.read_bytes())
    with pytest.raises(InputError, match="is the calibration text too"):
        quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "fp8", eval_data=copy))


@pytest.mark.parametrize("missing", [("calib_data", "eval_data"), ("calib_data",), ("eval_data",)])
def test_a_model_without_a_tokenizer_needs_token_ids(missing, checkpoint, tmp_path):
    settings = models.settings(tmp_path, "fp8", **dict.fromkeys(missing))
    with pytest.raises(InputError, match=r"has no tokenizer.json") as raised:
        quantize(checkpoint, tmp_path / "out", settings)
    assert "input_ids" in raised.value.remedy


def test_random_weights_are_calibrated_on_random_tokens(folder, checkpoint, tmp_path):
    convert(f"random:{folder / 'hf' / 'config.json'}", tmp_path / "random")
    report = quantize(tmp_path / "random", tmp_path / "out", QuantizeSettings("fp8", max_ppl_increase=models.ANYTHING))
    assert report.random_weights
    assert report.calibration["source"] == "random tokens"


@pytest.mark.parametrize(
    ("tensor", "value", "cause"),
    [
        ("layers.1.mlp.up.weight", float("nan"), "layers.1.mlp.up: its weight has infinite or undefined values"),
        ("layers.1.mlp_norm.weight", float("inf"), "layers.1.mlp.gate: its input on the calibration text has infinite"),
    ],
)
def test_undefined_weights_are_named(tensor, value, cause, model, tmp_path):
    source = tiny.checkpoint_of(model, tmp_path)
    shard = next(source.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors[tensor].view(-1)[0] = value
    save_file(tensors, shard)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["files"][shard.name]["bytes"] = shard.stat().st_size
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=cause):
        quantize(source, tmp_path / "out", models.settings(tmp_path, "fp8"))
    assert not (tmp_path / "out").exists()


def test_a_linear_that_saw_no_input_is_an_error(checkpoint, tmp_path, monkeypatch):
    from trtx.quantize.calibrate import CalibrationModel

    monkeypatch.setattr(CalibrationModel, "observe", lambda self, batch: None)
    with pytest.raises(InputError, match=r"layers.0.attn.k: saw no input during calibration"):
        quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "fp8"))


def test_an_existing_target_is_refused_before_any_work(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("trtx.quantize.pipeline.Checkpoint", None)
    with pytest.raises(OutputError, match="exists already"):
        quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "fp8"))


def test_progress(checkpoint, tmp_path):
    from contextlib import contextmanager

    done = {}

    @contextmanager
    def progress(description, total, unit):
        done[description] = [0, total]

        def advance(count):
            done[description][0] += count

        yield advance

    quantize(checkpoint, tmp_path / "out", models.settings(tmp_path, "int4_awq"), progress=progress)
    assert done["Calibrating int4_awq"] == [4, 4]
    assert len(done) == 3
    assert all(count == total for count, total in done.values())
