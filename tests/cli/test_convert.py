"""`trtx convert` from the shell: results, exit codes, and what goes where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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
