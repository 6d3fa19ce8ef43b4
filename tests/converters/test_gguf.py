"""GGUF files: equal to transformers' own reading, and to the models they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
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

GGUF_MODULES = {
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
TOP_MODULES = {"embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}


def gguf_name(canonical: str) -> str:
    module, suffix = canonical.rsplit(".", 1)
    if module in TOP_MODULES:
        return f"{TOP_MODULES[module]}.{suffix}"
    _, layer, rest = module.split(".", 2)
    return f"blk.{layer}.{GGUF_MODULES[rest]}.{suffix}"


def permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's convert_hf_to_gguf.py stores Llama's queries and keys: halves become pairs."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write(
    path: Path, model: PreTrainedModel, architecture: str, extra: Callable[[GGUFWriter], None] = lambda writer: None
) -> None:
    """A GGUF file of `model` in fp32, as llama.cpp would write it."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    extra(writer)
    for name, tensor in tiny.canonical_state(model).items():
        if architecture == "llama" and ".attn.q." in name:
            tensor = permute(tensor, config.num_attention_heads)
        if architecture == "llama" and ".attn.k." in name:
            tensor = permute(tensor, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    assert spec.rope.theta == config.rope_parameters["rope_theta"] == 100000.0
    assert np.float32(spec.norm_eps) == np.float32(config.rms_norm_eps)
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


@pytest.mark.parametrize(
    ("family", "architecture", "settings"),
    [
        ("llama", "llama", {}),
        ("llama", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", "qwen2", {"head_dim": 8}),
        ("qwen3", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
)
def test_tensors_are_those_of_the_original(
    family: str, architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny.make(family, **settings)
    write(tmp_path / "model.gguf", model, architecture)
    model.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "model.gguf"), tmp_path / "out")
    convert(str(tmp_path / "hf"), tmp_path / "oracle")
    checkpoint = Checkpoint(tmp_path / "out")
    expected = tiny.canonical_state(model)
    assert set(checkpoint.shards) == set(expected)
    assert all(torch.equal(checkpoint.tensor(name), values) for name, values in expected.items())
    assert checkpoint.spec == Checkpoint(tmp_path / "oracle").spec
    assert checkpoint.config.dtype == "fp32"


def test_mistral_is_llama_with_a_window(tmp_path: Path) -> None:
    model = tiny.make("mistral", sliding_window=16)
    write(tmp_path / "model.gguf", model, "llama", lambda writer: writer.add_sliding_window(16))
    convert(str(tmp_path / "model.gguf"), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert (checkpoint.spec.family, checkpoint.spec.windows) == ("mistral", (16, 16, 16))
    expected = tiny.canonical_state(model)
    assert all(torch.equal(checkpoint.tensor(name), values) for name, values in expected.items())


def test_llama3_frequencies_are_recognized(tmp_path: Path) -> None:
    """llama.cpp stores the divisors of the frequencies; the config they came from is found again."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = tiny.make("llama", head_dim=64, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    divisors = 500000.0 ** -(torch.arange(0, 64, 2) / 64) / scaled
    write(
        tmp_path / "model.gguf", model, "llama", lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy())
    )
    rope = check(str(tmp_path / "model.gguf")).spec.rope
    assert (rope.scaling, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 1.0, 4.0)
    assert rope.factor == pytest.approx(32.0)
    assert rope.original_max_position == 8192

    odd = divisors.sqrt().numpy()
    write(tmp_path / "odd.gguf", model, "llama", lambda writer: writer.add_tensor("rope_freqs.weight", odd))
    with pytest.raises(UnsupportedError, match="rope_freqs"):
        check(str(tmp_path / "odd.gguf"))


def test_yarn(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    write(tmp_path / "model.gguf", tiny.make("qwen2"), "qwen2", extra)
    rope = check(str(tmp_path / "model.gguf")).spec.rope
    assert (rope.scaling, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_stored_types(kind: str, tmp_path: Path) -> None:
    """A file of one type: stored floats as they are, quantized ones as the gguf package dequantizes them."""
    type_ = GGMLQuantizationType[kind]
    model = tiny.make("qwen2", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    generator = np.random.default_rng(0)

    def quantized(values: np.ndarray) -> np.ndarray:
        if kind in ("Q4_K", "Q6_K"):  # the package reads these types only: any bytes are a value, bar the scales
            shape = gguf.quant_shape_to_byte_shape(values.shape, type_)
            return generator.integers(0, 64, shape, dtype=np.uint8)
        return gguf.quantize(values, type_)

    writer_tensors = {}

    def intercept(writer: GGUFWriter) -> None:
        plain = writer.add_tensor

        def add(name: str, values: np.ndarray) -> None:
            if values.ndim == 1:
                return plain(name, values)
            writer_tensors[name] = quantized(values)
            return plain(name, writer_tensors[name], raw_dtype=type_)

        writer.add_tensor = add

    write(tmp_path / "model.gguf", model, "qwen2", intercept)
    convert(str(tmp_path / "model.gguf"), tmp_path / "out", dtype="fp32")
    checkpoint = Checkpoint(tmp_path / "out")
    for name in ("embed.weight", "layers.0.attn.q.weight", "layers.0.mlp.down.weight"):
        expected = gguf.dequantize(writer_tensors[gguf_name(name)], type_)
        assert np.array_equal(checkpoint.tensor(name).numpy(), expected), name
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

    write(tmp_path / "model.gguf", tiny.make("llama", vocab_size=len(tokens)), "llama", extra)
    assert convert(str(tmp_path / "model.gguf"), tmp_path / "out").warnings == ()
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("the than an", "12 é the.", "a</s>the"):
        assert ours.encode(text).ids == [1, *oracle(text, add_special_tokens=False)["input_ids"]], text
    assert ours.decode(ours.encode("the 1é").ids) == "the 1é"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_unknown_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("novel")
        writer.add_token_list(["a", "b"])

    write(tmp_path / "model.gguf", tiny.make("llama"), "llama", extra)
    (warning,) = convert(str(tmp_path / "model.gguf"), tmp_path / "out").warnings
    assert "'novel'" in warning
    assert not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("architecture", "extra", "error", "words"),
    [
        ("gemma9", None, UnsupportedError, "gemma9"),
        ("llama", lambda writer: writer.add_expert_count(8), UnsupportedError, "expert_count"),
        ("llama", lambda writer: writer.add_rope_dimension_count(4), UnsupportedError, "rope.dimension_count"),
        (
            "llama",
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            UnsupportedError,
            "longrope",
        ),
        (
            "llama",
            lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
            InputError,
            "blk.0.attn_sinks.weight",
        ),
        ("llama", lambda writer: writer.add_uint16("split.count", 3), UnsupportedError, "one part of several"),
    ],
)
def test_what_is_not_modelled_is_an_error(
    architecture: str, extra: Any, error: type[TrtxError], words: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.gguf", tiny.make("llama"), architecture, extra or (lambda writer: None))
    with pytest.raises(error, match=words) as caught:
        convert(str(tmp_path / "model.gguf"), tmp_path / "out")
    assert "model.gguf" in caught.value.cause


def test_another_file_with_that_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="not a GGUF file"):
        check(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_file(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, tiny.make("llama"), "llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match="not a complete GGUF"):
        check(str(path))
