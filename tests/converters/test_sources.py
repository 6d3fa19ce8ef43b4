"""Sources: folders, the hub without a network, random weights; and every kind of damage."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers.models.qwen2 import Qwen2Tokenizer

from trtx.converters.artifact import Manifest
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.convert import check, convert
from trtx.converters.errors import InputError, NetworkError, OutputError, TrtxError, UnsupportedError
from trtx.converters.random_weights import random_tensor

from . import tiny

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny Llama, fp32."""
    tiny.save(tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def edit_tensors(folder: Path, drop: str | None = None, **tensors: torch.Tensor) -> None:
    state = load_file(folder / WEIGHTS)
    state.pop(drop or "", None)
    save_file({**state, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def as_bin(folder: Path, state: Any = None) -> Path:
    state = load_file(folder / WEIGHTS) if state is None else state
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    opened = Checkpoint(checkpoint)
    return {name: opened.tensor(name) for name in opened.shards}


def assert_converts_to(folder: Path, expected: dict[str, torch.Tensor], out: Path) -> None:
    convert(str(folder), out)
    found = tensors_of(out)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = tiny.make("llama")
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert_converts_to(tmp_path / "hf", tiny.canonical_state(model), tmp_path / "out")


def test_single_bin(folder: Path, tmp_path: Path) -> None:
    expected = {tiny.canonical(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    as_bin(folder)
    assert_converts_to(folder, expected, tmp_path / "out")


def test_sharded_bin(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, name in enumerate(state):
        weight_map[name] = f"pytorch_model-{number % 2}.bin"
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_converts_to(folder, {tiny.canonical(name): t for name, t in state.items()}, tmp_path / "out")


def test_output_is_sharded(folder: Path, tmp_path: Path) -> None:
    expected = {tiny.canonical(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    convert(str(folder), tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype(folder: Path, tmp_path: Path, name: Any, dtype: torch.dtype) -> None:
    convert(str(folder), tmp_path / "out", dtype=name)
    assert Checkpoint(tmp_path / "out").config.dtype == name
    source = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(tensors_of(tmp_path / "out")["embed.weight"], source.to(dtype))


def test_stored_dtype_wins_over_the_config(folder: Path) -> None:
    edit_config(folder, dtype="float16")
    assert check(str(folder)).dtype == "fp32"


def test_ignored_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    report = check(str(folder))
    assert report.converts
    assert report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


@pytest.mark.parametrize("same", [True, False])
def test_stored_head_of_a_tied_model(tmp_path: Path, same: bool) -> None:
    """As in transformers: an identical one is dropped, another one unties the model."""
    model = tiny.save(tmp_path / "hf", tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.detach()
    edit_tensors(tmp_path / "hf", **{"lm_head.weight": embedding.clone() if same else embedding + 1})
    result = convert(str(tmp_path / "hf"), tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.spec.tied_embeddings == same
    assert bool(result.warnings and "lm_head.weight differs" in result.warnings[0]) == (not same)
    if not same:
        assert torch.equal(checkpoint.tensor("lm_head.weight"), embedding + 1)
    assert "compares" in check(str(tmp_path / "hf")).notes[0]


def test_check_reports_sizes(folder: Path) -> None:
    report = check(str(folder))
    parameters = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert report.converts
    assert (report.parameters, report.bytes, report.tensors) == (parameters, 4 * parameters, 30)
    assert json.loads(json.dumps(report.to_json()))["converts"] is True


def test_manifest_says_where_it_came_from(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.about["provenance"] == {"kind": "folder", "path": str(folder)}
    assert manifest.settings["dtype"] == "auto"
    assert manifest.inputs[0]["path"] == str(folder)
    assert manifest.verify(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer files


def test_tokenizer_files_are_copied(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(f'{{"from": "{name}"}}')
    (folder / "unrelated.txt").write_text("")
    assert convert(str(folder), tmp_path / "out").warnings == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == f'{{"from": "{name}"}}'
    assert not (tmp_path / "out/unrelated.txt").exists()


def test_generation_config_falls_back_on_the_config(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=[7, 9], bos_token_id=1, pad_token_id=None)
    convert(str(folder), tmp_path / "out")
    content = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert content == {"eos_token_id": [7, 9], "bos_token_id": 1}


@pytest.mark.parametrize("name", ["tokenizer.model", None])
def test_without_tokenizer_json_there_is_a_warning(folder: Path, tmp_path: Path, name: str | None) -> None:
    if name:
        (folder / name).write_bytes(b"sentencepiece")
    (warning,) = convert(str(folder), tmp_path / "out").warnings
    assert "no tokenizer.json" in warning
    assert (name or "no tokenizer") in warning


def test_tokenizer_is_rebuilt_from_vocabulary_and_merges(folder: Path, tmp_path: Path) -> None:
    alphabet = sorted({chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 324)]})
    merges = ["t h", "th e", "Ġ the", "Ġ a", "1 2", "' s"]
    pieces = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {str(len(vocab)): {"content": "<|im_start|>", "special": True, "normalized": False}}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert convert(str(folder), tmp_path / "out").warnings == ()
    ours = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    oracle = Qwen2Tokenizer.from_pretrained(folder)
    for text in ("the theatre's 1234", " a\n\n the", "<|im_start|>the", "naïve cafe\u0301 東京"):
        assert ours.encode(text).ids == oracle(text)["input_ids"], text


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def test_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: check("org/model"), lambda: convert("org/model", tmp_path / "out")):
        with pytest.raises(NetworkError, match="org/model") as caught:
            call()
        assert "HF_HUB_OFFLINE" in caught.value.remedy


def response() -> Any:
    """What the hub's errors want to see of an HTTP response; its class differs between the hub library's versions."""
    return MagicMock(status_code=403, headers={})


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (GatedRepoError("gated", response=response()), "https://huggingface.co/org/model"),
        (RepositoryNotFoundError("none", response=response()), "name"),
        (RevisionNotFoundError("none", response=response()), "branch"),
        (ConnectionError("no route"), "network"),
    ],
)
def test_hub_refusals_have_remedies(error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(NetworkError) as caught:
        check("org/model", revision="v2")
    assert remedy in caught.value.remedy


class FakeHub:
    """`snapshot_download` from a folder, noting which files were asked for."""

    def __init__(self, origin: Path, cache: Path) -> None:
        self.origin, self.snapshot = origin, cache / "0123abcd"
        self.asked: list[str] = []

    def __call__(self, model: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (self.origin / name).is_file():
                self.asked.append(name)
                (self.snapshot / name).write_bytes((self.origin / name).read_bytes())
        return str(self.snapshot)


def test_hub_downloads_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    model.save_pretrained(tmp_path / "origin", max_shard_size="20KB")
    (tmp_path / "origin/pytorch_model.bin").write_bytes(b"not this one")
    hub = FakeHub(tmp_path / "origin", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    convert("org/model", tmp_path / "out", revision="main")
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny.canonical_state(model).items())
    assert not [name for name in hub.asked if name.endswith(".bin")]
    provenance = Checkpoint(tmp_path / "out").config.provenance
    assert provenance == {"kind": "hub", "id": "org/model", "revision": "0123abcd"}


def test_hub_check_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "origin")
    hub = FakeHub(tmp_path / "origin", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)

    def read_headers(model: str, revision: str) -> SimpleNamespace:
        assert (model, revision) == ("org/model", "0123abcd")
        with safe_open(tmp_path / "origin" / WEIGHTS, "pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {n: SimpleNamespace(dtype=v.get_dtype(), shape=v.get_shape()) for n, v in views.items()}
        return SimpleNamespace(files_metadata={WEIGHTS: SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", read_headers)
    report = check("org/model")
    assert (report.converts, report.dtype, report.tensors) == (True, "bf16", 30)
    assert WEIGHTS not in hub.asked


def test_only_hub_ids_have_revisions(folder: Path) -> None:
    with pytest.raises(InputError, match="no revisions"):
        check(str(folder), revision="main")


# ---------------------------------------------------------------------------------------------------------------------
# Random weights


def test_random_weights(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert(f"random:{config}", tmp_path / out, seed=seed)
    a, b, c = (tensors_of(tmp_path / out) for out in "abc")
    assert set(a) == {tiny.canonical(name) for name in load_file(folder / WEIGHTS)}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert not torch.equal(a["layers.0.attn.q.weight"], a["layers.1.attn.q.weight"])
    opened = Checkpoint(tmp_path / "a")
    assert opened.config.provenance == {"kind": "random", "config": str(config), "seed": 3}
    assert opened.config.dtype == "fp32"


def test_random_tensors_are_distributed_as_said() -> None:
    weight = random_tensor("layers.0.mlp.up.weight", (512, 512), torch.float32, seed=0)
    norm = random_tensor("layers.0.attn.q_norm.weight", (65536,), torch.float32, seed=0)
    assert weight.mean().item() == pytest.approx(0, abs=2e-4)
    assert weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert norm.mean().item() == pytest.approx(1, abs=2e-3)
    assert norm.std().item() == pytest.approx(0.1, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


class Exploit:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploited"),))


def truncate(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 32,')


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def missing_tensor(folder: Path) -> None:
    edit_tensors(folder, drop="model.layers.1.mlp.up_proj.weight")


def extra_tensor(folder: Path) -> None:
    edit_tensors(folder, **{"model.layers.0.mlp.router.weight": torch.ones(2, 2)})


def extra_layer(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)


def wrong_shape(folder: Path) -> None:
    edit_tensors(folder, **{"model.norm.weight": torch.ones(31)})


def integer_tensor(folder: Path) -> None:
    edit_tensors(folder, **{"model.norm.weight": torch.ones(32, dtype=torch.int8)})


def truncated_safetensors(folder: Path) -> None:
    truncate(folder / WEIGHTS)


def truncated_header(folder: Path) -> None:
    truncate(folder / WEIGHTS, keep=0.001)


def empty_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')


def shard_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')


def index_lies(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"ghost": "{WEIGHTS}"}}}}')


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def truncated_bin(folder: Path) -> None:
    truncate(as_bin(folder))


def bin_with_code(folder: Path) -> None:
    as_bin(folder, {"model.norm.weight": Exploit()})


def bin_that_is_a_plain_pickle(folder: Path) -> None:
    as_bin(folder).write_bytes(pickle.dumps({"model.norm.weight": Exploit()}))


def bin_with_a_list(folder: Path) -> None:
    as_bin(folder, [torch.ones(2)])


def bin_with_a_number(folder: Path) -> None:
    as_bin(folder, {"epoch": 3})


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (no_config, InputError, ["config.json"]),
        (config_is_no_json, InputError, ["config.json", "JSON"]),
        (config_is_a_list, InputError, ["config.json", "list"]),
        (no_weights, InputError, ["no weights"]),
        (missing_tensor, InputError, ["missing: layers.1.mlp.up.weight [48, 32]"]),
        (extra_tensor, InputError, ["not part of the model", "model.layers.0.mlp.router.weight"]),
        (extra_layer, InputError, ["9 tensors are not part of the model", "model.layers.2.", "6 more"]),
        (wrong_shape, InputError, ["model.norm.weight has [31], expected [32]"]),
        (integer_tensor, UnsupportedError, ["'model.norm.weight' is int8"]),
        (truncated_safetensors, InputError, [WEIGHTS, "not a complete safetensors"]),
        (truncated_header, InputError, [WEIGHTS, "not a complete safetensors"]),
        (empty_safetensors, InputError, [WEIGHTS, "not a complete safetensors"]),
        (missing_shard, InputError, ["model-1.safetensors", "no such file"]),
        (shard_outside, InputError, ["index.json", "../../secret.safetensors"]),
        (index_lies, InputError, ["index.json", "'ghost'"]),
        (index_without_map, InputError, ["index.json", "weight_map"]),
        (truncated_bin, TrtxError, ["pytorch_model.bin"]),
        (bin_with_code, InputError, ["pytorch_model.bin", "runs no code"]),
        (bin_that_is_a_plain_pickle, TrtxError, ["pytorch_model.bin"]),
        (bin_with_a_list, InputError, ["pytorch_model.bin", "list"]),
        (bin_with_a_number, InputError, ["pytorch_model.bin", "'epoch'"]),
    ],
)
def test_damage_is_named(
    folder: Path, tmp_path: Path, damage: Any, error: type[TrtxError], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(error) as caught:
        convert(str(folder), tmp_path / "out")
    assert all(word in caught.value.cause for word in words), caught.value.cause
    assert caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("damage", [missing_tensor, extra_tensor, wrong_shape])
def test_check_lists_what_convert_refuses(folder: Path, damage: Any) -> None:
    damage(folder)
    report = check(str(folder))
    assert not report.converts
    assert len(report.problems) == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere", "nowhere"), ("./no/where", "no/where"), ("random:none.json", "none.json"), ("none.gguf", "none.gguf")],
)
def test_no_such_source(source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(source)


def test_a_trtx_checkpoint_is_no_source(folder: Path, tmp_path: Path) -> None:
    convert(str(folder), tmp_path / "out")
    with pytest.raises(InputError, match="trtx directory already"):
        check(str(tmp_path / "out"))


def test_an_existing_target_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        convert("nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(1e5, UnsupportedError, "1e+05"), (float("nan"), InputError, "NaN"), (float("inf"), InputError, "infinity")],
)
def test_values_that_fp16_does_not_hold(
    folder: Path, tmp_path: Path, value: float, error: type[TrtxError], words: str
) -> None:
    edit_tensors(folder, **{"model.norm.weight": torch.full((32,), value)})
    with pytest.raises(error) as caught:
        convert(str(folder), tmp_path / "out", dtype="fp16")
    assert "'final_norm.weight'" in caught.value.cause
    assert words in caught.value.cause
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Folders without weights


def outline(folder: Path, **metadata: Any) -> Path:
    """Save the weights in shards, and remove all but their index.

    Args:
        metadata: replaces what the index says; None removes it.
    """
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    totals = {"total_size": sum(tensor.nbytes for tensor in state.values()), **metadata}
    known = {key: value for key, value in totals.items() if value is not None}
    index = {"metadata": known, "weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", list(tiny.VARIANTS))
def test_an_index_tells_as_much_as_headers(name: str, tmp_path: Path) -> None:
    """But for shapes: every family, with names and totals as transformers writes them."""
    tiny.of(tiny.VARIANTS[name]).save_pretrained(tmp_path, max_shard_size="20KB")
    expected = check(str(tmp_path))
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        shard.unlink()
    found = check(str(tmp_path))
    assert found.converts, found.problems
    assert (expected.seen, found.seen) == ("headers", "names")
    assert "no shapes" in found.notes[0]
    assert sorted(found.ignored) == sorted(expected.ignored)
    for what in ("spec", "dtype", "tensors", "parameters", "bytes"):
        assert getattr(found, what) == getattr(expected, what)


def test_a_config_tells_the_size(folder: Path) -> None:
    expected = check(str(folder))
    (folder / WEIGHTS).unlink()
    found = check(str(folder))
    assert (found.converts, found.seen, found.spec, found.bytes) == (True, "config", expected.spec, expected.bytes)
    assert "neither names nor shapes" in found.notes[0]


def test_an_index_of_bin_shards(folder: Path) -> None:
    outline(folder).joinpath(f"{WEIGHTS}.index.json").rename(folder / "pytorch_model.bin.index.json")
    report = check(str(folder))
    assert (report.converts, report.seen) == (True, "names")


@pytest.mark.parametrize("damage", [missing_tensor, extra_tensor, extra_layer])
def test_an_index_with_other_names(folder: Path, damage: Any) -> None:
    damage(folder)
    expected = check(str(folder)).problems
    assert check(str(outline(folder))).problems == expected


@pytest.mark.parametrize(
    ("settings", "metadata", "words"),
    [
        ({"intermediate_size": 52}, {}, ["total_size is", "which no choice of dtypes explains"]),
        ({"vocab_size": 101}, {}, ["total_size is", "which no choice of dtypes explains"]),
        ({}, {"total_size": 117633}, ["total_size is 117,633 bytes", "58,816", "117,632"]),
        ({}, {"total_parameters": 29409}, ["total_parameters is 29,409; config.json describes 29,408"]),
    ],
)
def test_totals_that_do_not_fit(
    folder: Path, settings: dict[str, Any], metadata: dict[str, Any], words: list[str]
) -> None:
    edit_config(outline(folder, **metadata), **settings)
    report = check(str(folder))
    (problem,) = report.problems
    assert all(word in problem for word in words), problem
    assert not report.converts


def test_the_total_of_a_wrapper_is_a_lower_bound(tmp_path: Path) -> None:
    model = tiny.of(tiny.VARIANTS["mistral3"])
    model.save_pretrained(tmp_path)
    total = sum(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())
    report = check(str(outline(tmp_path, total_size=total + 1000)))
    assert report.converts
    assert any("not needed, of unknown sizes" in note for note in report.notes)
    (tmp_path / f"{WEIGHTS}.index.json").write_text(
        (tmp_path / f"{WEIGHTS}.index.json").read_text().replace(str(total + 1000), "1000")
    )
    assert "total_size is 1,000 bytes" in check(str(tmp_path)).problems[0]


def test_mixed_dtypes_are_noted(folder: Path) -> None:
    state = {name: t if "layernorm" in name else t.bfloat16() for name, t in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    report = check(str(outline(folder)))
    assert (report.converts, report.dtype) == (True, "bf16")
    assert "in fp32: model.layers.*" in report.notes[-1]
    assert "layernorm.weight" in report.notes[-1]


@pytest.mark.parametrize(("named", "dtype"), [("float16", "fp16"), ("float32", "bf16"), (None, "bf16")])
def test_dtype_of_an_index(folder: Path, named: str | None, dtype: str) -> None:
    """16 bits by the total: which ones, config.json says."""
    edit_config(outline(folder, total_size=58816), dtype=named)
    assert check(str(folder)).dtype == dtype
    assert check(str(folder), dtype="fp32").dtype == "fp32"


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_a_tied_head_counts_once_or_twice(tmp_path: Path, stored: bool, counted: bool) -> None:
    embedding = tiny.save(tmp_path, tie_word_embeddings=True).model.embed_tokens.weight.detach()
    state = load_file(tmp_path / WEIGHTS)
    total = sum(tensor.nbytes for tensor in state.values()) + (embedding.nbytes if counted else 0)
    if stored:
        edit_tensors(tmp_path, **{"lm_head.weight": embedding.clone()})
    report = check(str(outline(tmp_path, total_size=total, total_parameters=total // 4)))
    assert (report.converts, report.dtype) == (True, "fp32")
    assert any("tied output projection" in note for note in report.notes) == (stored != counted)
    assert any("compares" in note for note in report.notes) == stored


def test_an_index_without_totals(folder: Path) -> None:
    report = check(str(outline(folder, total_size=None)))
    assert (report.converts, report.dtype) == (True, "fp32")
    assert "no total_size" in report.notes[-1]


@pytest.mark.parametrize("total", ["1 GB", [1], 1.5, True])
def test_a_total_that_is_no_number(folder: Path, total: Any) -> None:
    with pytest.raises(InputError, match=r"'total_size' is .*; expected a whole number"):
        check(str(outline(folder, total_size=total)))


def test_converting_needs_weights(folder: Path, tmp_path: Path) -> None:
    outline(folder)
    with pytest.raises(InputError, match=r"model-00001-of-00001\.safetensors: no such file"):
        convert(str(folder), tmp_path / "out")
    (folder / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        convert(str(folder), tmp_path / "out")


def test_a_part_of_the_shards_is_no_outline(tmp_path: Path) -> None:
    tiny.make("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="no such file"):
        check(str(tmp_path))
