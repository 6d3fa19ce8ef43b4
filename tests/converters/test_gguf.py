"""GGUF files: equal to transformers' own reading, and to the models they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer

from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import check, convert
from trtx.converters.errors import InputError, TrtxError, UnsupportedError
from trtx.converters.gguf_file import GgufSource
from trtx.converters.spec import Rope

from . import tiny

TEXTS = [
    "The capital of France is",
    "Hello world! 123",
    "  multiple   spaces,\ttabs\n\n\nand newlines  ",
    "def f(x):\n    return x ** 2  # it's 3.14, isn't it?\n",
    "Café déjà vu, naïve cafe\u0301; 東京の天気 🙂👩‍👩‍👧",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "1234567890 1,000,000.00",
    "",
    "\x00\x7f control, zero\u200bwidth",
]


Add = Callable[[GGUFWriter], None]


def nothing(writer: GGUFWriter) -> None:
    """Add nothing to a file."""


@dataclass(frozen=True)
class Case:
    """A tiny model and the file that llama.cpp's converter makes of it.

    Attributes:
        architecture: llama.cpp's name.
        variant: of `tiny.VARIANTS`.
        settings: added to the variant's. Widths are multiples of 32, so that they can be quantized; sizes that
            transformers does not read from GGUF are those that it takes instead.
        metadata: of the architecture's section, beyond `parameters`; None: the converter does not write it.
        read: transformers reads such a file.
        dropped: the beginning of Hugging Face's names that the converter drops.
    """

    architecture: str
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    read: bool = True
    dropped: str = ""

    def model(self) -> PreTrainedModel:
        variant = tiny.VARIANTS[self.variant]
        settings = {**variant.settings, **self.settings}
        return tiny.randomize(tiny.of(replace(variant, settings=settings)), 1, 1.0)


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
GPT2: dict[str, Any] = {"n_embd": 64, "n_positions": 1024}
FALCON: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 256, "max_position_embeddings": 2048, "rope_theta": 10000.0,
}  # fmt: skip
FALCON_KEYS: dict[str, Any] = {
    "feed_forward_length": 256, "rope.freq_base": None, "tensor_data_layout": "jploski",
}  # fmt: skip
GEMMA_2: dict[str, Any] = {
    **WIDE, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 20, "num_hidden_layers": 4,
}  # fmt: skip
GEMMA_2_KEYS: dict[str, Any] = {
    "rope.freq_base": None, "attention.sliding_window": 20, "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}  # fmt: skip
GEMMA_3_KEYS: dict[str, Any] = {
    "attention.sliding_window": 20, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
}  # fmt: skip

CASES = {
    "llama": Case("llama", "llama", WIDE, {"vocab_size": 96, "rope.dimension_count": 16}),
    "llama, biases, tied": Case(
        "llama", "llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, read=False
    ),
    "llama, wide heads": Case("llama", "llama", {**WIDE, "head_dim": 32}, {"rope.dimension_count": 32}),
    "llama, linear": Case(
        "llama",
        "llama",
        {**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama, linear by default": Case(
        "llama",
        "llama",
        {**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}},
        {"rope.scaling.factor": 4.0},
    ),
    "mistral": Case("llama", "mistral-window", WIDE, {"attention.sliding_window": 20}),
    "mixtral": Case("llama", "mixtral", WIDE, read=False),
    "mixtral, base by default": Case(
        "llama", "mixtral", {**WIDE, "rope_theta": 10000.0}, {"rope.freq_base": None}, read=False
    ),
    "qwen2": Case("qwen2", "qwen2", WIDE),
    "qwen2, tied": Case("qwen2", "qwen2", {**WIDE, "tie_word_embeddings": True}),
    "qwen2, yarn": Case(
        "qwen2",
        "qwen2",
        {
            **WIDE,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
    "qwen2moe": Case(
        "qwen2moe",
        "qwen2_moe",
        {**WIDE, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3": Case("qwen3", "qwen3", {**WIDE, "head_dim": 128}),
    "qwen3, biases": Case("qwen3", "qwen3-bias", WIDE, read=False),
    "qwen3moe": Case("qwen3moe", "qwen3_moe", {**WIDE, "moe_intermediate_size": 768, "head_dim": 32}),
    "phi3": Case(
        "phi3",
        "phi3",
        {**WIDE, "original_max_position_embeddings": 128},
        {"rope.scaling.original_context_length": 128, "rope.dimension_count": 16, "attention.sliding_window": 0},
    ),
    "phi3, window, partial rope": Case(
        "phi3",
        "phi3-window",
        {**WIDE, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 128},
        {"rope.scaling.original_context_length": 128, "rope.dimension_count": 12, "attention.sliding_window": 20},
    ),
    "gemma": Case("gemma", "gemma", {**WIDE, "head_dim": 32}, {"rope.freq_base": None}, read=False),
    "gemma2": Case(
        "gemma2",
        "gemma2",
        GEMMA_2,
        GEMMA_2_KEYS,
    ),
    "gemma2, 27b": Case(
        "gemma2",
        "gemma2",
        {**GEMMA_2, "query_pre_attn_scalar": 16, "num_hidden_layers": 46, "vocab_size": 32},
        GEMMA_2_KEYS,
        read=False,  # it does, in half a minute
    ),
    "gemma3": Case(
        "gemma3",
        "gemma3_text",
        {**GEMMA_2, "num_hidden_layers": 7, "sliding_window_pattern": 6},
        GEMMA_3_KEYS,
    ),
    "gemma3, another pattern": Case(
        "gemma3",
        "gemma3_text",
        {**GEMMA_2, "sliding_window_pattern": 3, "final_logit_softcapping": 3.0},
        {**GEMMA_3_KEYS, "attention.sliding_window_pattern": 3, "final_logit_softcapping": 3.0},
    ),
    "gemma3, no windows": Case(
        "gemma3",
        "gemma3_text",
        {**GEMMA_2, "sliding_window_pattern": 1},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "gpt2": Case("gpt2", "gpt2", GPT2, {"feed_forward_length": 256}),
    "gpt2, untied": Case("gpt2", "gpt2", {**GPT2, "tie_word_embeddings": False}, {"feed_forward_length": 256}),
    "bloom": Case(
        "bloom",
        "bloom",
        {"hidden_size": 96},
        {"context_length": 2048, "feed_forward_length": 384, "attention.head_count_kv": 6},
        dropped="transformer.",
    ),
    "falcon, 7b": Case("falcon", "falcon", {**FALCON, "num_attention_heads": 4, "num_kv_heads": 1}, FALCON_KEYS),
    "falcon, 40b": Case("falcon", "falcon-40b", FALCON, FALCON_KEYS, read=False),
    "falcon, 11b": Case("falcon", "falcon-11b", FALCON, FALCON_KEYS, read=False),
    "falcon, biases": Case("falcon", "falcon-11b", {**FALCON, "bias": True}, FALCON_KEYS, read=False),
    "starcoder2": Case("starcoder2", "starcoder2", WIDE),
    "starcoder2, untied": Case("starcoder2", "starcoder2", {**WIDE, "tie_word_embeddings": False}),
    "starcoder2, no biases": Case("starcoder2", "starcoder2", {**WIDE, "use_bias": False}, read=False),
    "nemotron": Case(
        "nemotron",
        "nemotron",
        {**WIDE, "head_dim": 16},
        {"rope.dimension_count": 8, "attention.layer_norm_epsilon": 1e-5, "rope.scaling.type": "none"},
    ),
    "nemotron, biases": Case(
        "nemotron",
        "nemotron",
        {**WIDE, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
        {"rope.dimension_count": 8, "attention.layer_norm_epsilon": 1e-5},
        read=False,
    ),
}
"""transformers 5.17 reads biases only where its config class has them by default, takes Mixtral for Llama without MLPs,
does not know Gemma 1, and takes one key/value head for granted in Falcon."""

READ = [name for name, case in CASES.items() if case.read]


def permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores Llama's queries and keys: halves become pairs."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def ungroup(tensor: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """As llama.cpp stores Bloom's and Falcon's fused projections: all queries, all keys, all values."""
    grouped = tensor.unflatten(0, (groups, heads // groups + 2, -1))
    return torch.cat([part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])])


def laid_out(architecture: str, config: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of a transformers model as llama.cpp's converter stores it, under Hugging Face's names.

    See `modify_tensors` of the classes in conversion/*.py of ggml-org/llama.cpp.
    """
    module, _, kind = name.rpartition(".")
    if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        return {name: permute(tensor, heads)}
    if architecture in ("gemma", "gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
        return {name: tensor + 1}
    if architecture == "gpt2" and kind == "weight" and module.endswith(("c_attn", "c_proj", "c_fc")):
        return {name: tensor.t()}
    if module.endswith("query_key_value"):
        groups = config.num_attention_heads if architecture == "bloom" else config.num_kv_heads
        return {name: ungroup(tensor, config.num_attention_heads, groups)}
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return {f"{module}.gate_proj.weight": gate, f"{module}.up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": tensor}
    return {name: tensor.squeeze(0) if name.endswith("shared_expert_gate.weight") else tensor}


def parameters(config: Any) -> dict[str, Any]:
    """The section that llama.cpp's converter writes of every config (`TextModel.set_gguf_parameters`)."""
    names = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_epsilon"),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    }
    if "Falcon" in type(config).__name__:  # its `head_dim` is a property, which the converter does not see
        names = {key: found for key, found in names.items() if found != ("head_dim",)}
    values = {
        key: next((getattr(config, n) for n in found if hasattr(config, n)), None) for key, found in names.items()
    }
    rope = getattr(config, "rope_parameters", None) or {}
    values["rope.freq_base"] = rope.get("full_attention", rope).get("rope_theta")
    values["rope.freq_base_swa"] = rope.get("sliding_attention", {}).get("rope_theta")
    return values


def write(
    path: Path,
    case: Case,
    extra: Add = nothing,
    metadata: dict[str, Any] | None = None,
    type_: GGMLQuantizationType = GGMLQuantizationType.F32,
    quantize: Callable[[np.ndarray, GGMLQuantizationType], np.ndarray] = gguf.quantize,
) -> dict[str, np.ndarray]:
    """A GGUF file as llama.cpp's converter writes it, with its own table of names; returns the tensors as stored.

    Args:
        metadata: added to the case's.
        type_: of the matrices; vectors and routers are fp32.
    """
    model = case.model()
    config = model.config
    writer = GGUFWriter(path, case.architecture)
    writer.add_name("tiny")  # 'mistral' makes transformers 5.17 look for a llama.cpp architecture of that name
    for key, value in (parameters(config) | case.metadata | (metadata or {})).items():
        if value is not None:
            add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(f"{case.architecture}.{key}", value)
    extra(writer)
    if "tokenizer.ggml.tokens" not in writer.kv_data[0]:
        writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
        writer.add_pad_token_id(0)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stored: dict[str, np.ndarray] = {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, values in laid_out(case.architecture, config, theirs, tensor.float()).items():
            ours = names.get_name(name.removeprefix(case.dropped), try_suffixes=(".weight", ".bias"))
            assert ours, name
            kind = GGMLQuantizationType.F32 if values.ndim == 1 or "ffn_gate_inp" in ours else type_
            stored[ours] = quantize(values.contiguous().numpy(), kind)
            writer.add_tensor(ours, stored[ours], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# A real model


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 converted in fp32."""
    out = tmp_path_factory.mktemp("smollm2") / "fp32"
    convert(str(smollm2_gguf), out, dtype="fp32")
    return out


@pytest.mark.slow
def test_smollm2_equals_the_reading_of_transformers(smollm2: Path, smollm2_gguf: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    expected = tiny.canonical_state(model)
    checkpoint = Checkpoint(smollm2)
    assert set(checkpoint.shards) == set(expected)
    for name, values in expected.items():
        assert torch.equal(checkpoint.tensor(name), values), name
    spec, config = checkpoint.spec, model.config
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert spec.rope is not None
    assert spec.rope.theta == config.rope_parameters["rope_theta"] == 100000.0
    assert np.float32(spec.norm.eps) == np.float32(config.rms_norm_eps)
    assert spec.max_positions == config.max_position_embeddings == 8192


@pytest.mark.slow
def test_smollm2_tokenizer_equals_that_of_transformers(smollm2: Path, smollm2_gguf: Path) -> None:
    """On texts where the file's pre-tokenizer (`smollm`) makes no difference: transformers ignores it."""
    oracle = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == oracle(text, add_special_tokens=False)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_smollm2_tokenizer_splits_digits(smollm2: Path) -> None:
    """Ids published for the original tokenizer, whose pre-tokenizer cuts digits off first."""
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert ours.encode("Hello world! 123").ids == [19556, 905, 17, 216, 33, 34, 35]
    assert ours.encode("  1").tokens == ["ĠĠ", "1"]
    assert ours.encode(" ½").tokens[0] == "Ġ"


@pytest.mark.slow
def test_smollm2_files(smollm2: Path) -> None:
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
def test_smollm2_is_bf16_by_default(smollm2: Path, smollm2_gguf: Path) -> None:
    report = check(str(smollm2_gguf))
    assert report.dtype == "bf16"
    assert report.parameters == Checkpoint(smollm2).spec.parameters == 134_515_008
    assert report.converts


# ---------------------------------------------------------------------------------------------------------------------
# Every architecture


@pytest.mark.parametrize("name", CASES)
def test_is_the_original(name: str, tmp_path: Path) -> None:
    """Spec and tensors are those of the model that the file was made from."""
    case = CASES[name]
    write(tmp_path / "model.gguf", case)
    case.model().save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "model.gguf"), tmp_path / "out")
    convert(str(tmp_path / "hf"), tmp_path / "original")
    ours, original = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "original")
    assert ours.spec == original.spec
    assert ours.config.dtype == "fp32"
    assert set(ours.shards) == set(original.shards)
    for tensor in original.shards:
        assert torch.allclose(ours.tensor(tensor), original.tensor(tensor), rtol=0, atol=2e-7), tensor  # (w + 1) - 1


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", READ)
def test_is_what_transformers_reads(name: str, kind: str, tmp_path: Path) -> None:
    """Bit for bit the tensors that transformers reads, put into a model that it can save."""
    case = CASES[name]
    write(tmp_path / "model.gguf", case, type_=GGMLQuantizationType[kind])
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model = case.model()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "model.gguf"), tmp_path / "out", dtype="fp32")
    convert(str(tmp_path / "hf"), tmp_path / "oracle")
    ours, oracle = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "oracle")
    assert set(ours.shards) == set(oracle.shards)
    for tensor in oracle.shards:
        assert torch.equal(ours.tensor(tensor), oracle.tensor(tensor)), tensor


def test_experts_apart(tmp_path: Path) -> None:
    """Files from before April 2024 hold a tensor for each expert."""
    plain = GGUFWriter.add_tensor

    def apart(self: GGUFWriter, name: str, values: np.ndarray, **more: Any) -> None:
        for expert, part in enumerate(values if "_exps" in name else [values]):
            plain(self, name.replace("_exps", f".{expert}"), part, **more)

    write(tmp_path / "model.gguf", CASES["mixtral"])
    convert(str(tmp_path / "model.gguf"), tmp_path / "stacked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "add_tensor", apart)
        write(tmp_path / "apart.gguf", CASES["mixtral"])
    convert(str(tmp_path / "apart.gguf"), tmp_path / "apart")
    stacked, found = Checkpoint(tmp_path / "stacked"), Checkpoint(tmp_path / "apart")
    assert set(found.shards) == set(stacked.shards)
    assert all(torch.equal(found.tensor(name), stacked.tensor(name)) for name in stacked.shards)


def test_experts_are_dequantized_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = write(tmp_path / "model.gguf", CASES["qwen3moe"], type_=GGMLQuantizationType.Q8_0)
    expected = gguf.dequantize(stored["blk.0.ffn_up_exps.weight"][5], GGMLQuantizationType.Q8_0)
    source = GgufSource(tmp_path / "model.gguf")
    sizes = []

    def dequantize(data: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
        sizes.append(data.shape)
        return plain(data, type_)

    plain = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", dequantize)
    found = source.tensor("model.layers.0.mlp.experts.5.up_proj.weight")
    assert np.array_equal(found.numpy(), expected)
    assert sizes == [stored["blk.0.ffn_up_exps.weight"].shape[1:]]


def ropes(case: Case, folder: Path) -> tuple[Rope, Rope]:
    """Of the file model.gguf, and of the model that it was made from."""
    case.model().save_pretrained(folder / "hf")
    ours, original = (check(str(folder / name)).spec.rope for name in ("model.gguf", "hf"))
    assert ours is not None
    assert original is not None
    return ours, original


def test_llama3_frequencies_are_recognized(tmp_path: Path) -> None:
    """llama.cpp stores the divisors of the frequencies; the config they came from is found again."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    case = Case("llama", "llama", {"head_dim": 64, "rope_parameters": scaling})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](case.model().config, "cpu")
    divisors = 500000.0 ** -(torch.arange(0, 64, 2) / 64) / scaled
    write(tmp_path / "model.gguf", case, lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy()))
    ours, original = ropes(case, tmp_path)
    assert replace(ours, factor=round(ours.factor, 4)) == original

    odd = divisors.sqrt().numpy()
    write(tmp_path / "odd.gguf", case, lambda writer: writer.add_tensor("rope_freqs.weight", odd))
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        check(str(tmp_path / "odd.gguf"))


def test_longrope(tmp_path: Path) -> None:
    """Phi's factors are two tensors; the attention factor that goes with them is a key."""
    case = Case("phi3", "phi3-longrope")
    config = case.model().config
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, "cpu")

    def extra(writer: GGUFWriter) -> None:
        for kind in ("long", "short"):
            values = np.array(config.rope_parameters[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", values)

    metadata = {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": attention_factor}
    write(tmp_path / "model.gguf", case, extra, metadata)
    ours, original = ropes(case, tmp_path)
    assert ours.attention_factor == pytest.approx(attention_factor, rel=1e-7)
    assert replace(ours, attention_factor=original.attention_factor) == original


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_stored_types(kind: str, tmp_path: Path) -> None:
    """A file of one type: stored floats as they are, quantized ones as the gguf package dequantizes them."""
    type_ = GGMLQuantizationType[kind]
    generator = np.random.default_rng(0)

    def quantize(values: np.ndarray, type_: GGMLQuantizationType) -> np.ndarray:
        if type_.name in ("Q4_K", "Q6_K"):  # the package reads these types only: any bytes are a value, bar the scales
            shape = gguf.quant_shape_to_byte_shape(values.shape, type_)
            return generator.integers(0, 64, shape, dtype=np.uint8)
        return gguf.quantize(values, type_)

    case = Case("qwen2", "qwen2", {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1})
    stored = write(tmp_path / "model.gguf", case, type_=type_, quantize=quantize)
    convert(str(tmp_path / "model.gguf"), tmp_path / "out", dtype="fp32")
    checkpoint = Checkpoint(tmp_path / "out")
    for ours, theirs in {"embed": "token_embd", "attn.q": "blk.0.attn_q", "mlp.down": "blk.0.ffn_down"}.items():
        name = ours if ours == "embed" else f"layers.0.{ours}"
        expected = gguf.dequantize(stored[f"{theirs}.weight"], type_)
        assert np.array_equal(checkpoint.tensor(f"{name}.weight").numpy(), expected), name
    assert check(str(tmp_path / "model.gguf")).dtype == {"F16": "fp16"}.get(kind, "bf16")


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    words = ["▁", "▁the", "▁th", "e", "t", "h", "th", "▁t", "he", "a", "▁a", "an", "n", "▁an", "1", "2", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(words))]

    def extra(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    write(tmp_path / "model.gguf", Case("llama", "llama", {"vocab_size": len(tokens)}), extra)
    assert convert(str(tmp_path / "model.gguf"), tmp_path / "out").warnings == ()
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("the than an", "12 é the.", "a</s>the"):
        assert ours.encode(text).ids == [1, *oracle(text, add_special_tokens=False)["input_ids"]], text
    assert ours.decode(ours.encode("the 1é").ids) == "the 1é"


def test_starcoder_cuts_digits_apart(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("starcoder")
        writer.add_token_list(["1", "2", "12", "a", "b", "ab"])
        writer.add_token_merges(["1 2", "a b"])

    write(tmp_path / "model.gguf", Case("starcoder2", "starcoder2", {"vocab_size": 6}), extra)
    assert convert(str(tmp_path / "model.gguf"), tmp_path / "out").warnings == ()
    assert Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("ab12").tokens == ["ab", "1", "2"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_unknown_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("novel")

    write(tmp_path / "model.gguf", CASES["llama"], extra)
    (warning,) = convert(str(tmp_path / "model.gguf"), tmp_path / "out").warnings
    assert "'novel'" in warning
    assert not (tmp_path / "out/tokenizer.json").exists()


def unknown(name: str, *shape: int) -> Add:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("case", "metadata", "extra", "error", "words"),
    [
        ("llama", {"pooling_type": 1}, nothing, UnsupportedError, "pooling_type"),
        ("llama", {"rope.dimension_count": 4}, nothing, UnsupportedError, "rope.dimension_count"),
        ("llama", {"attention.value_length": 8}, nothing, UnsupportedError, "attention.value_length"),
        ("bloom", {"attention.key_length": 8}, nothing, UnsupportedError, "attention.key_length"),
        ("llama", {"tensor_data_layout": "jploski"}, nothing, UnsupportedError, "tensor_data_layout"),
        ("llama", {"rope.scaling.type": "dynamic"}, nothing, UnsupportedError, "dynamic"),
        ("llama", {"rope.scaling.attn_factor": 2.0}, nothing, UnsupportedError, "attn_factor"),
        ("phi3", {"rope.scaling.attn_factor": 2.0}, nothing, UnsupportedError, "attention_factor"),
        ("gemma2", {"attention.sliding_window_pattern": 3}, nothing, UnsupportedError, "sliding_window_pattern"),
        ("qwen2", {"attention.sliding_window": 20}, nothing, UnsupportedError, "sliding_window"),
        ("qwen3moe", {"expert_gating_func": 2}, nothing, UnsupportedError, "expert_gating_func"),
        ("llama", {"attention.head_count": 0}, nothing, InputError, "attention.head_count"),
        ("llama", {"embedding_length": None}, nothing, InputError, "embedding_length"),
        ("llama", {"vocab_size": 97}, nothing, InputError, "vocab_size"),
        ("nemotron", {"attention.layer_norm_epsilon": 1e-3}, nothing, InputError, "layer_norm_epsilon"),
        ("bloom", {"attention.head_count_kv": 3}, nothing, UnsupportedError, "attention.head_count_kv"),
        ("qwen2moe", {"expert_count": 5}, nothing, InputError, "experts.5"),
        (
            "llama",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            unknown("rope_freqs.weight", 8),
            UnsupportedError,
            "rope_freqs",
        ),
        ("gemma2", {"block_count": None}, nothing, InputError, "num_hidden_layers"),
        ("llama", {}, unknown("blk.0.attn_sinks.weight", 4), InputError, "blk.0.attn_sinks.weight"),
        ("llama", {}, unknown("blk.0.attn_q.scale", 1), InputError, "blk.0.attn_q.scale"),
        ("phi3", {}, unknown("rope_factors_long.weight", 8), InputError, "short_factor"),
        ("llama", {}, lambda writer: writer.add_uint16("split.count", 3), UnsupportedError, "one part of several"),
    ],
)
def test_what_is_not_modelled_is_an_error(
    case: str, metadata: dict[str, Any], extra: Add, error: type[TrtxError], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.gguf", CASES[case], extra, metadata)
    with pytest.raises(error, match=words) as caught:
        convert(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert "model.gguf" in caught.value.cause


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "gemma9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="'gemma9'") as caught:
        check(str(tmp_path / "model.gguf"))
    assert "qwen3moe" in caught.value.remedy


def test_another_file_with_that_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a GGUF file"):
        check(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_file(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, CASES["llama"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match="not a complete GGUF"):
        check(str(path))
