"""`trtx quantize` from the shell: results, exit codes, and what goes where."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.converters import tiny
from tests.quantize import models
from trtx.cli.app import app
from trtx.converters.errors import ExitCode
from trtx.quantize.pipeline import MAX_PPL_INCREASE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint_of(models.make(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path):
    calib, judge = (models.write_tokens(tmp_path / f"{seed}.jsonl", seed) for seed in (1, 2))
    return ["--calib-data", calib, "--eval-data", judge, "--calib-length", "32", "--eval-length", "32"]


def trtx(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_the_table(checkpoint, texts, tmp_path):
    finished = trtx(checkpoint, tmp_path / "out", "--format", "int4_awq", "--max-ppl-increase", 1000, *texts)
    assert finished.exit_code == ExitCode.OK, finished.stderr
    assert "int4_awq, groups of 64" in finished.stdout
    assert "the gate is 1000%: passed" in finished.stdout
    assert "worst layers" in finished.stdout


def test_a_failed_gate_prints_the_figures_and_keeps_nothing(checkpoint, texts, tmp_path):
    finished = trtx(checkpoint, tmp_path / "out", "--format", "fp8", "--max-ppl-increase", -99, "--json", *texts)
    assert finished.exit_code == ExitCode.QUALITY
    assert json.loads(finished.stdout)["passed"] is False
    assert "Nothing was kept" in finished.stderr
    assert "--exclude 'layers." in finished.stderr
    assert not (tmp_path / "out").exists()


def test_keep(checkpoint, texts, tmp_path):
    finished = trtx(checkpoint, tmp_path / "out", "--format", "fp8", "--max-ppl-increase", -99, "--keep", *texts)
    assert finished.exit_code == ExitCode.QUALITY
    assert (tmp_path / "out" / "quality.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--format", "int2"], ExitCode.USAGE),
        (["--format", "fp8", "--device", "cuda"], ExitCode.UNSUPPORTED),
        (["--format", "fp8", "--exclude", "nothing"], ExitCode.INPUT),
        (["--format", "none"], ExitCode.INPUT),
    ],
)
def test_exit_codes(arguments, code, checkpoint, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert trtx(checkpoint, tmp_path / "out", *arguments, *texts).exit_code == code


def test_nothing_but_the_result_is_printed(checkpoint, texts, tmp_path):
    """ModelOpt prints on stdout and warns on stderr while it is imported and used."""
    arguments = ["quantize", checkpoint, tmp_path / "out", "--format", "int8_sq", "--json", "--force", *texts]
    command = [sys.executable, "-c", "from trtx.cli.app import main; main()", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode in (ExitCode.OK, ExitCode.QUALITY)
    assert json.loads(finished.stdout)["quantization"]["format"] == "int8_sq"
    assert all(line.startswith(("error:", "remedy:")) for line in finished.stderr.splitlines())


def test_help_tells_the_gates():
    shown = trtx("--help").stdout
    for format, gate in MAX_PPL_INCREASE.items():
        assert re.search(rf"^ +{format} .*\+{gate:g}%$", shown, re.MULTILINE), format
