"""Every family: the spec that its config gives, and its tensors, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import convert
from trtx.converters.errors import InputError, TrtxError, UnsupportedError
from trtx.converters.families import FAMILIES, find_family
from trtx.converters.spec import ModelSpec, Rope

from . import published, tiny
from .families import dense

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", {"num_key_value_heads": 4}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama 3.2, tied": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("llama", {"hidden_act": "gelu_new"}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases, tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
}


def config_of(family: str = "llama", **settings: Any) -> dict[str, Any]:
    """A transformers-4 style config.json."""
    variant = replace(tiny.VARIANTS[family], settings=tiny.SIZES)
    config = tiny.config_of(variant).to_dict() | {"architectures": [variant.model.split(":")[1]]}
    theta = config.pop("rope_parameters")["rope_theta"]
    return {**config, "rope_theta": theta, "rope_scaling": None, "torch_dtype": config.pop("dtype"), **settings}


def spec_of(config: dict[str, Any]) -> ModelSpec:
    return find_family(config, "config.json").spec(config, "config.json")


@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, settings = MODELS[name]
    expected = tiny.canonical_state(tiny.save(tmp_path / "hf", family, torch.bfloat16, **settings))
    convert(str(tmp_path / "hf"), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert set(checkpoint.shards) == set(expected)
    for tensor, values in expected.items():
        assert torch.equal(checkpoint.tensor(tensor), values), tensor


@pytest.mark.parametrize("name", MODELS)
def test_spec_says_what_the_transformers_config_says(name: str, tmp_path: Path) -> None:
    family, settings = MODELS[name]
    model = tiny.save(tmp_path / "hf", family, **settings)
    config = model.config
    spec = spec_of(json.loads((tmp_path / "hf/config.json").read_text()))
    assert (spec.family, spec.vocab_size, spec.num_layers, spec.max_positions) == (family, 96, 3, 128)
    assert (spec.hidden_size, spec.intermediate_size, spec.num_heads) == (32, 48, 4)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == spec.rope.dim == model.model.layers[0].self_attn.head_dim
    assert spec.norm.eps == config.rms_norm_eps
    assert spec.tied_embeddings == config.tie_word_embeddings
    attention = model.model.layers[0].self_attn
    assert spec.qkv_bias == (attention.q_proj.bias is not None)
    assert spec.o_bias == (attention.o_proj.bias is not None)
    assert spec.mlp_bias == (model.model.layers[0].mlp.up_proj.bias is not None)
    assert (spec.qk_norm == "head") == hasattr(attention, "q_norm")
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers]
    if family == "mistral":
        windows = [config.sliding_window] * 3
    assert list(spec.windows) == windows
    assert spec.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.activation.kind == {"silu": "silu", "gelu_new": "gelu_tanh"}[config.hidden_act]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"attention_factor": 1.25},
        {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 1.0},
    ],
)
def test_yarn_attention_factor_is_that_of_transformers(parameters: dict[str, Any]) -> None:
    config = tiny.config_of(dense.llama(rope_parameters={**YARN, **parameters}))
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    rope = spec_of({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    assert rope.scaling == "yarn"
    assert rope.attention_factor == pytest.approx(expected, rel=1e-12)
    assert (rope.beta_fast, rope.beta_slow) == (parameters.get("beta_fast", 32.0), parameters.get("beta_slow", 1.0))
    assert rope.truncate == parameters.get("truncate", True)


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (None, Rope(dim=8, theta=10000.0)),
        ({"type": "linear", "factor": 2}, Rope(dim=8, theta=10000.0, scaling="linear", factor=2.0)),
        (
            {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
            Rope(8, 10000.0, "bands", 8.0, original_max_position=64, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        (
            {"type": "yarn", "factor": 4.0},
            Rope(8, 10000.0, "yarn", 4.0, original_max_position=128, attention_factor=1.138629436111989),
        ),
    ],
)
def test_transformers_4_rope_scaling(scaling: dict[str, Any] | None, rope: Rope) -> None:
    assert spec_of(config_of(rope_scaling=scaling)).rope == rope


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    def without(family: str, *keys: str) -> ModelSpec:
        return spec_of({key: value for key, value in config_of(family).items() if key not in keys})

    assert without("llama", "num_key_value_heads", "head_dim").num_kv_heads == 4
    assert without("mistral", "sliding_window").windows == (4096,) * 3
    assert without("qwen2", "layer_types", "use_sliding_window", "sliding_window").windows == (None,) * 3
    on = config_of("qwen2", use_sliding_window=True, max_window_layers=0)
    assert spec_of({**on, "sliding_window": None, "layer_types": None}).windows == (None,) * 3
    assert without("qwen3", "head_dim").head_dim == 128
    assert without("llama", "rope_theta").rope.theta == 10000.0


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (config_of(logit_scale=0.5), UnsupportedError, ["'logit_scale'", "0.5", "llama"]),
        (config_of(rope_scaling={"type": "dynamic", "factor": 2.0}), UnsupportedError, ["rope_scaling", "'dynamic'"]),
        (config_of(rope_scaling={"rope_type": "longrope"}), InputError, ["rope_scaling", "'short_factor'", "missing"]),
        (config_of(rope_scaling={"type": "linear", "factor": 2.0, "x": 1}), UnsupportedError, ["rope_scaling", "'x'"]),
        (config_of(rope_scaling={"type": "linear"}), InputError, ["rope_scaling", "'factor'", "missing"]),
        (config_of(hidden_act="tanh"), UnsupportedError, ["'hidden_act'", "'tanh'"]),
        (config_of(hidden_size="32"), InputError, ["'hidden_size'", "'32'"]),
        (config_of(hidden_size=-32), InputError, ["'hidden_size'", "-32"]),
        (config_of(hidden_size=None), InputError, ["'hidden_size'", "missing"]),
        (config_of(tie_word_embeddings=1), InputError, ["'tie_word_embeddings'", "true or false"]),
        (config_of(num_attention_heads=5, head_dim=None), InputError, ["'hidden_size'", "multiple"]),
        (config_of(num_key_value_heads=3), InputError, ["4 attention heads", "3 key/value heads"]),
        (config_of("mistral", attention_bias=True), UnsupportedError, ["'attention_bias'", "mistral"]),
        (config_of(is_decoder=True), UnsupportedError, ["'is_decoder'"]),
        (config_of("qwen2", layer_types=["full_attention"]), InputError, ["'layer_types'", "3 layers"]),
        (config_of("qwen2", layer_types=["chunked_attention"] * 3), UnsupportedError, ["'chunked_attention'"]),
        (
            config_of("qwen2", layer_types=["sliding_attention"] * 3),
            InputError,
            ["'layer_types'", "use_sliding_window"],
        ),
        (config_of(architectures=["RwkvForCausalLM"], model_type="rwkv"), UnsupportedError, ["'RwkvForCausalLM'"]),
        (config_of(architectures=["LlamaForSequenceClassification"]), UnsupportedError, ["SequenceClassification"]),
        (config_of(model_type="mistral"), InputError, ["'architectures'", "'mistral'"]),
        (config_of(architectures=None, model_type=None), InputError, ["'architectures'", "'model_type'"]),
        (config_of(quantization_config={"quant_method": "gptq"}), UnsupportedError, ["quantization_config", "gptq"]),
    ],
)
def test_what_is_not_modelled_is_an_error(config: dict[str, Any], error: type[TrtxError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        spec_of(config)
    assert all(word in caught.value.cause for word in words), caught.value.cause
    assert caught.value.cause.startswith("config")


def test_every_row_says_what_it_is_for() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert family.models and family.features, family.name
        assert set(family.fields) <= ModelSpec.__dataclass_fields__.keys()


@pytest.mark.parametrize("entry", published.entries(), ids=lambda entry: entry["model"])
def test_published_models_have_the_published_size(entry: dict[str, Any]) -> None:
    assert all(entry[key] for key in ("source", "revision", "parameters_source"))
    spec = spec_of(entry["config"])
    assert spec.family == entry["family"]
    assert spec.parameters == pytest.approx(entry["parameters"], rel=entry["tolerance"])


def test_every_row_has_a_published_model() -> None:
    parts = {family.name for family in FAMILIES if family.section}
    assert {family.name for family in FAMILIES} - parts == {entry["family"] for entry in published.entries()}
