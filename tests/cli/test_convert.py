"""`trtx convert` from the shell: results, exit codes, and what goes where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from tests.converters import tiny
from trtx.cli.app import app
from trtx.converters.errors import ExitCode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    tiny.save(path)
    return path


def trtx(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert_prints_what_was_written(folder: Path, tmp_path: Path) -> None:
    finished = trtx(folder, tmp_path / "out")
    assert finished.exit_code == ExitCode.OK, finished.stderr
    assert "llama, 3 layers" in finished.stdout
    assert str(tmp_path / "out") in finished.stdout
    assert "warning: no tokenizer.json" in finished.stderr
    assert (tmp_path / "out/manifest.json").is_file()


def test_json(folder: Path, tmp_path: Path) -> None:
    finished = trtx(folder, tmp_path / "out", "--dtype", "bf16", "--json")
    result = json.loads(finished.stdout)
    assert (result["dtype"], result["out"], result["spec"]["num_layers"]) == ("bf16", str(tmp_path / "out"), 3)


def test_check_writes_nothing(folder: Path, tmp_path: Path) -> None:
    finished = trtx(folder, "--check")
    assert finished.exit_code == ExitCode.OK, finished.stderr
    assert "converts  yes" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_fails_with_the_reason(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    tiny.save(tmp_path / "hf", num_hidden_layers=2)
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    finished = trtx(tmp_path / "hf", "--check", "--json")
    assert finished.exit_code == ExitCode.INPUT
    assert "layers.2.attn_norm.weight" in json.loads(finished.stdout)["problems"][0]
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("index", "seen", "words"),
    [(False, "config", "yes (tensors were not seen)"), (True, "names", "yes (shapes were not seen)")],
)
def test_check_without_weights(folder: Path, tmp_path: Path, index: bool, seen: str, words: str) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    if index:
        with safe_open(folder / "model.safetensors", "pt") as file:
            weight_map = dict.fromkeys(file.keys(), "model-1.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    finished = trtx(tmp_path, "--check")
    assert finished.exit_code == ExitCode.OK, finished.stderr
    assert f"converts  {words}" in finished.stdout
    result = json.loads(trtx(tmp_path, "--check", "--json").stdout)
    assert (result["seen"], result["converts"], result["problems"]) == (seen, True, [])
    refused = trtx(tmp_path, tmp_path / "out")
    assert refused.exit_code == ExitCode.INPUT


def test_check_names_what_an_index_lacks(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weight_map = {"model.norm.weight": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    finished = trtx(tmp_path, "--check")
    assert finished.exit_code == ExitCode.INPUT
    assert "29 tensors are missing: embed.weight" in finished.stdout
    assert "converts  no" in finished.stdout


def test_check_names_a_few_tensors_that_are_not_needed(folder: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    state = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for extra, words in ((names[:1], names[0]), ([*names, names[0].replace("0", "3")], "and 1 more")):
        tensors = {**state, **{name: torch.ones(4) for name in extra}}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert words in trtx(tmp_path, "--check").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere", "out"], ExitCode.INPUT, "nowhere"),
        (["nowhere"], ExitCode.USAGE, "OUT"),
        (["nowhere", "out", "--check"], ExitCode.USAGE, "OUT"),
        (["nowhere", "out", "--dtype", "int3"], ExitCode.USAGE, "--dtype"),
    ],
)
def test_errors_have_exit_codes(arguments: list[str], code: ExitCode, words: str) -> None:
    finished = trtx(*arguments)
    assert finished.exit_code == code, finished.stderr
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
