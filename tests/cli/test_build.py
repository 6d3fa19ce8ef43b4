"""`trtx build`, as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from tests.builder.models import LLAMA_8B, TINY
from trtx.builder.engine import Engine
from trtx.cli.app import app
from trtx.converters.errors import ExitCode


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / "model" / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))
        return f"random:{path}"

    return write


def trtx(*arguments):
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


def test_builds_and_prints_ledger(config, tmp_path):
    done = trtx(config(TINY), tmp_path / "engine", "--gpu", "cpu", "--max-batch-size", 2, "--kv-cache-memory", "1MiB")
    assert done.exit_code == ExitCode.OK, done.output
    for text in ("random weights", "kv cache", "reserve", "2 sequences"):
        assert text in done.stdout
    assert "trtx run" in done.stderr
    assert Engine(tmp_path / "engine").config.ledger["kv_cache"] <= 1 << 20


def test_json(config, tmp_path):
    done = trtx(config(TINY), tmp_path / "engine", "--gpu", "cpu", "--json")
    result = json.loads(done.stdout)
    assert result["ledger"] == Engine(tmp_path / "engine").config.ledger
    assert result["limits"]["max_batch_size"] == 8
    assert result["random_weights"] is True


def test_plan_only_shows_every_split_and_writes_nothing(config, tmp_path):
    done = trtx(config(LLAMA_8B), "--plan-only", "--gpu", "h100-sxm", "--gpus", 16)
    assert done.exit_code == ExitCode.OK, done.output
    assert "unchecked estimate" in done.stdout
    assert done.stdout.count("chosen") == 1
    assert "16 does not divide 8 key/value heads" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_than_one_rank_prints_the_plan_and_stops(config, tmp_path):
    done = trtx(config(LLAMA_8B), tmp_path / "engine", "--gpu", "h100-sxm", "--gpus", 2)
    assert done.exit_code == ExitCode.UNSUPPORTED
    assert "chosen" in done.stdout
    assert "--plan-only" in done.stderr
    assert not (tmp_path / "engine").exists()


def test_does_not_fit(config, tmp_path):
    done = trtx(config(LLAMA_8B), tmp_path / "engine", "--gpu", "l4", "--max-seq-len", 131072)
    assert done.exit_code == ExitCode.DOES_NOT_FIT
    assert "--max-seq-len" in done.stderr and "weights" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["--gpu", "cpu"], ExitCode.USAGE, "--plan-only"),
        (["OUT", "--kv-cache-memory", "many"], ExitCode.USAGE, "not a size"),
        (["OUT", "--tp", "0"], ExitCode.USAGE, "--tp"),
        (["OUT", "--dtype", "fp8"], ExitCode.USAGE, "bf16"),
        (["OUT", "--gpu", "voodoo2"], ExitCode.UNSUPPORTED, "h100-sxm"),
        (["OUT", "--kv-block-size", "20"], ExitCode.INPUT, "8, 16, 32, 64, 128"),
    ],
)
def test_bad_usage(config, tmp_path, arguments, code, text):
    done = trtx(config(TINY), *(tmp_path / a if a == "OUT" else a for a in arguments))
    assert done.exit_code == code
    assert text in done.stderr


def test_target_is_refused_before_anything_is_planned(config, tmp_path):
    source = config(TINY)
    (tmp_path / "engine").mkdir()
    done = trtx(source, tmp_path / "engine", "--gpu", "cpu")
    assert done.exit_code == ExitCode.OUTPUT
    assert done.stdout == ""


def test_hugging_face_folder(config, tmp_path):
    config(TINY)
    done = trtx(tmp_path / "model", tmp_path / "engine")
    assert done.exit_code == ExitCode.INPUT
    assert "trtx convert" in done.stderr
