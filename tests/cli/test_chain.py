"""The whole chain on a tiny model, driven by `trtx make` and by the sample Makefile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trtx.cli.app import app
from trtx.converters.errors import ExitCode

EXAMPLE = Path(__file__).parents[2] / "recipes" / "Makefile.example"
QUANTIZE = {"format": "int8_sq", "calib-samples": 4, "calib-length": 32, "eval-samples": 4, "eval-length": 32}
QUANTIZE |= {"max-ppl-increase": 1000}
BUILD = {"gpu": "cpu", "max-batch-size": 4, "max-seq-len": 64}
BENCH = {"concurrency": 2, "num-requests": 4, "isl": 8, "osl": 4}
NOT_RECORDED = {"convert": {"check"}, "quantize": {"keep"}, "build": {"plan_only"}}
"""Options that do not change what is written; and no command records where, how loudly or over what it wrote."""

runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama with two layers, random weights and a tokenizer of bytes, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate(["</s>", *sorted(letters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(model, tmp_path):
    stages = {
        "convert": {"source": str(model), "dtype": "fp32"},
        "quantize": QUANTIZE,
        "build": BUILD,
        "run": {"prompts": ["Hello", "world"], "max-tokens": 4, "temperature": 0},
        "bench": BENCH,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(stages))  # JSON is YAML
    return path


@pytest.mark.slow
def test_make_runs_the_chain_and_then_only_what_changed(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = runner.invoke(app, ["make", "tiny.yaml"])
    assert first.exit_code == ExitCode.OK, first.stderr
    assert json.loads(Path("tiny/bench.json").read_text())
    for target in ("checkpoint", "quantized", "engine"):
        manifest = json.loads(Path("tiny", target, "manifest.json").read_text())
        command = typer.main.get_command(app).commands[manifest["command"]]
        options = {p.name for p in command.params if p.param_type_name == "option"}
        unrecorded = options - manifest["settings"].keys() - {"force", "verbose", "as_json"}
        assert unrecorded <= NOT_RECORDED[command.name], f"trtx make can't see these options of {command.name} change"

    again = runner.invoke(app, ["make", "tiny.yaml"])
    assert again.exit_code == ExitCode.OK, again.stderr
    assert again.stderr.count("up to date") == 3

    changed = runner.invoke(app, ["make", "tiny.yaml", "--set", "build.kv-cache-memory=64MiB", "--set", "run.seed=1"])
    assert changed.exit_code == ExitCode.OK, changed.stderr
    assert changed.stderr.count("up to date") == 2


@pytest.mark.slow
def test_sample_makefile(model, tmp_path):
    def options(section):
        return " ".join(f"--{key} {value}" for key, value in section.items() if key != "format")

    trtx = Path(sys.executable).with_name("trtx")
    assignments = {
        "MODEL": model,
        "TRTX": trtx,
        "FORMAT": QUANTIZE["format"],
        "GPU": "cpu",
        "QUANTIZE": options(QUANTIZE),
        "BUILD": options({k: v for k, v in BUILD.items() if k != "gpu"}),
        "BENCH": options(BENCH),
    }
    shutil.copy(EXAMPLE, tmp_path / "Makefile")
    command = ["make", *(f"{key}={value}" for key, value in assignments.items())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}

    def run_make():
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    first = run_make()
    assert [f"{trtx} {stage} " in first for stage in ("convert", "quantize", "build", "bench")] == [True] * 4
    assert json.loads((tmp_path / "out/bench.json").read_text())
    assert str(trtx) not in run_make(), "nothing changed, so nothing runs"
