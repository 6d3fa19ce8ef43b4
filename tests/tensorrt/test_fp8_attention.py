"""`trtx build --attention fp8`: what it computes, for which GPUs it compiles, and where it is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("tensorrt_rtx")

from tests.converters import tiny
from tests.converters.families import dense
from tests.quantize.models import settings as calibration
from tests.runtime.models import logits_of, random_model
from tests.tensorrt.models import RTX, InterpretedPlan, config_of
from tests.tensorrt.test_build import settings
from tests.tensorrt.test_network import LENGTH, batches
from trtx.builder.build import build, prepare
from trtx.builder.tensorrt.modes import TARGETS, refusal_of, require
from trtx.builder.tensorrt.plan import network, serialize
from trtx.cli.app import app
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import ExitCode, InputError, UnsupportedError
from trtx.quantize.formats import DTYPES, round_e4m3
from trtx.quantize.pipeline import quantize
from trtx.runtime.ops.torch_ops import TorchOps
from trtx.runtime.slots import slot_inputs
from trtx.runtime.tensorrt_runner import bounds_of
from trtx.runtime.weights import WeightStore, kv_scales

WIDER = {
    "llama": {"head_dim": 16, "num_hidden_layers": 2},
    "mistral-window": {"head_dim": 16, "num_hidden_layers": 2},
    "bloom": {"n_head": 3, "n_layer": 2},
}
"""Causal, masked and biased attention, with heads wide enough for FP8."""
STEPS = batches(0)[:5]
"""Ragged prefill and two steps of decoding."""


class RoundedAttention(TorchOps):
    """The torch op set, attending as ModelOpt's FP8 attention does: four operands rounded to E4M3."""

    def sdpa(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        k_scale, v_scale = self.kv_scales[layer]
        scores = round_e4m3(queries, torch.ones(())) @ round_e4m3(keys, k_scale).mT * scale
        shares = round_e4m3((scores + mask).softmax(-1), torch.tensor(1 / 448))
        return shares @ round_e4m3(values, v_scale)


def variant(name: str):
    found = tiny.VARIANTS[name]
    return tiny.randomize(tiny.of(replace(found, settings={**found.settings, **WIDER[name]})), 0, gain=1.0)


@pytest.fixture(scope="module", params=WIDER)
def checkpoint(request, tmp_path_factory):
    """With the scales of an fp8 KV cache, as `trtx quantize --kv-cache fp8` finds them."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = tiny.checkpoint_of(variant(request.param), folder)
    quantize(plain, folder / "scaled", calibration(folder, "none", kv_cache="fp8"))
    return folder / "scaled"


def logits(checkpoint: Checkpoint, dtype: str = "fp32", **changes) -> list[Tensor]:
    """Logits [tokens, V] of each sequence of `STEPS`."""
    config = config_of(checkpoint.config, dtype, length=LENGTH)
    net = network(WeightStore.of_checkpoint(checkpoint), RTX, DTYPES[dtype], bounds_of(config), **changes)
    plan = InterpretedPlan(net, config)
    found: dict[int, list[Tensor]] = {}
    for batch in STEPS:
        pieces = sorted(batch, key=lambda piece: piece.tables[0])
        rows = plan.run({**slot_inputs(batch), "rows": torch.arange(sum(len(p.tokens) for p in batch)).int()}, 0)
        for piece, part in zip(pieces, rows.split([len(piece.tokens) for piece in pieces]), strict=True):
            found.setdefault(piece.tables[0][0], []).append(part)
    return [torch.cat(found[slot]) for slot in sorted(found)]


def tokens() -> list[Tensor]:
    """The sequences of `STEPS`, by slot."""
    found: dict[int, list[int]] = {}
    for batch in STEPS:
        for piece in batch:
            found.setdefault(piece.tables[0][0], []).extend(piece.tokens)
    return [torch.tensor(found[slot])[None] for slot in sorted(found)]


def errors(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """Of each token, relative to its logits' norm."""
    return torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(ours, theirs, strict=True)])


def size(found: Tensor) -> float:
    """Root mean square."""
    return found.square().mean().sqrt().item()


def test_computes_with_four_rounded_operands(checkpoint):
    """fp32 all else: but where a rounding error decides a code, logits are those of the torch op set so rounded.

    And within 12% of the torch op set that rounds nothing (root mean square over the tokens); in bf16 within 1.3 times
    what the four roundings alone cost.
    """
    opened = Checkpoint(checkpoint)
    store = WeightStore.of_checkpoint(opened)
    ours = logits(opened, fp8_attention=True)

    scales = kv_scales(store, torch.device("cpu"))
    rounded = RoundedAttention(opened.spec, torch.float32, max_positions=LENGTH, kv_scales=scales)
    exact = TorchOps(opened.spec, torch.float32, max_positions=LENGTH)
    theirs = [logits_of(opened, ids, rounded)[0] for ids in tokens()]
    plain = [logits_of(opened, ids, exact)[0] for ids in tokens()]
    assert (errors(ours, theirs) < 1e-5).float().mean() > 0.9
    assert 5e-3 < size(errors(ours, plain)) < 0.12
    assert size(errors(logits(opened, "bf16", fp8_attention=True), plain)) < 1.3 * size(errors(theirs, plain))
    assert errors(logits(opened), plain).max() < 1e-5, "without it nothing is rounded"


@pytest.mark.parametrize(("gpu", "sm", "dtype"), [("rtx-4090", "8.9", "fp16"), ("rtx-5090", "12.0", "bf16")])
def test_builds_for_a_gpu_that_is_not_here(checkpoint, gpu, sm, dtype, tmp_path):
    wanted = settings(gpu=gpu, dtype=dtype, kv_cache_dtype=dtype, attention="fp8")
    assert prepare(checkpoint, wanted).notes == []
    assert build(checkpoint, tmp_path / "engine", wanted).fingerprint.sm == sm
    facts = json.loads((tmp_path / "engine/manifest.json").read_text())
    assert facts["settings"]["attention"] == "fp8"
    assert facts["about"]["bindings"]["keys.*"].endswith("half" if dtype == "fp16" else dtype), "of the KV cache"


def test_table_says_what_tensorrt_builds(tmp_path):
    opened = Checkpoint(tiny.checkpoint_of(tiny.of(dense.llama(head_dim=16, num_hidden_layers=1)), tmp_path))
    config = config_of(opened.config, "fp16", length=LENGTH)
    bounds, store = bounds_of(config), WeightStore.of_checkpoint(opened)
    for sm in TARGETS["tensorrt-rtx"]:
        net = network(store, RTX, torch.float16, bounds, fp8_attention=True)
        if refusal_of(RTX, sm, "fp8 attention"):
            with pytest.raises(UnsupportedError, match="refuses the engine"):
                serialize(net, opened.spec, bounds, sm)
            with pytest.raises(UnsupportedError, match=r"fp8 attention on .* FP8 needs an Ada"):
                require(RTX, sm, "none", "fp16", "fp16", fp8_attention=True)
        else:
            assert serialize(net, opened.spec, bounds, sm).nbytes
            require(RTX, sm, "none", "fp16", "fp16", fp8_attention=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "a10"}, "Ada"),
        ({"backend": "torch", "gpu": "cpu"}, "torch backend has no attention in FP8"),
        ({"backend": "torch", "gpu": "rtx-5090"}, "torch backend has no attention in FP8"),
    ],
)
def test_is_refused_where_it_is_not(changes, words, tmp_path):
    plain = tiny.checkpoint_of(variant("llama"), tmp_path)
    with pytest.raises(UnsupportedError, match=words) as caught:
        prepare(plain, settings(attention="fp8", **changes))
    assert "Leave" in caught.value.remedy


@pytest.mark.parametrize(("name", "words"), [("llama", "heads of 8 features"), ("gpt_oss", "soft caps or sinks")])
def test_models_that_have_none_are_refused(name, words, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        prepare(tiny.checkpoint_of(random_model(name), tmp_path), settings(attention="fp8"))


def test_unknown_value(tmp_path):
    with pytest.raises(InputError, match="--attention is 'int8'"):
        prepare(tiny.checkpoint_of(variant("llama"), tmp_path), settings(attention="int8"))


def test_without_scales_the_user_is_told(tmp_path):
    """By the command too, which says what attention is computed in."""
    plain = tiny.checkpoint_of(variant("llama"), tmp_path)
    arguments = ["--backend", "tensorrt-rtx", "--gpu", "rtx-5090", "--attention", "fp8", "--plan-only"]
    done = CliRunner().invoke(app, ["build", str(plain), *arguments, "--json"])
    assert done.exit_code == ExitCode.OK, done.output
    found = json.loads(done.stdout)
    assert found["attention_dtype"] == "fp8"
    assert "no scales for attention in FP8" in found["notes"][0]
    assert "attention in fp8" in CliRunner().invoke(app, ["build", str(plain), *arguments]).stdout
