"""`trtx make`: recipes become command lines, and only stages that changed run."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from trtx import recipes
from trtx.cli import make as make_module
from trtx.cli.app import app
from trtx.cli.common import Force
from trtx.converters.artifact import create, identify
from trtx.converters.errors import ExitCode

runner = CliRunner(env={"COLUMNS": "80"})
RECIPE = "convert:\n  source: {source}\n  dtype: bf16\nquantize:\n  format: fp8\nbuild:\n  gpu: cpu\n"


@pytest.fixture
def ran(monkeypatch):
    """A chain whose commands only copy text and count, behind the real `make`; the list of what ran."""
    ran = []
    chain = typer.Typer()

    def copy(name, kind, source, out, force, mark="", **settings):
        ran.append(name)
        text = (source / "text" if source.is_dir() else source).read_text()
        inputs = [identify(source)]
        with create(out, kind=kind, command=name, settings=settings, inputs=inputs, force=force) as draft:
            (draft.path / "text").write_text(text.strip() + mark)

    @chain.command()
    def convert(source: Path, out: Path, dtype: str = "fp32", force: Force = False):
        copy("convert", "checkpoint", source, out, force, dtype=dtype)

    @chain.command()
    def quantize(
        checkpoint: Path,
        out: Path,
        format: Annotated[str, typer.Option()],
        kv_cache: str = "none",
        calib_size: Annotated[int, typer.Option(min=1)] = 8,
        force: Force = False,
    ):
        copy("quantize", "checkpoint", checkpoint, out, force, format, format=format, kv_cache=kv_cache)

    @chain.command()
    def build(checkpoint: Path, out: Path, gpu: str = "auto", force: Force = False):
        copy("build", "engine", checkpoint, out, force, gpu, gpu=gpu)

    @chain.command()
    def run(engine: Path, prompts: list[str], chat: bool = False, stream: bool = True):
        ran.append(f"run {prompts} {chat} {stream}")

    @chain.command()
    def bench(engine: Path, output: Path | None = None):
        ran.append(f"bench {output}")

    chain.command()(make_module.make)
    monkeypatch.setattr(app, "registered_commands", chain.registered_commands)
    return ran


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "model").write_text("weights")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(source=tmp_path / "model"))
    return path


def make(recipe, *arguments):
    return runner.invoke(app, ["make", str(recipe), "--out", str(recipe.parent / "out"), *arguments])


def test_runs_the_chain_once(ran, recipe):
    assert make(recipe).exit_code == ExitCode.OK
    assert ran == ["convert", "quantize", "build"]
    assert (recipe.parent / "out/engine/text").read_text() == "weightsfp8cpu"
    ran.clear()
    done = make(recipe)
    assert ran == []
    assert done.stdout == ""
    assert done.stderr.count("up to date") == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "build.gpu=l4"], ["build"]),
        (["--set", "quantize.format=nvfp4"], ["quantize", "build"]),
        (["--set", "convert.dtype=fp16"], ["convert"]),  # the same text comes out, so what follows stays
        (["--force"], ["convert", "quantize", "build"]),
    ],
)
def test_runs_what_changed(ran, recipe, arguments, expected):
    make(recipe)
    ran.clear()
    assert make(recipe, *arguments).exit_code == ExitCode.OK
    assert ran == expected


def test_runs_again_when_the_source_or_a_target_changed(ran, recipe):
    make(recipe)
    ran.clear()
    (recipe.parent / "model").write_text("other weights")
    make(recipe)
    assert ran == ["convert", "quantize", "build"]
    ran.clear()
    (recipe.parent / "out/quantized/manifest.json").unlink()
    (recipe.parent / "out/quantized/text").unlink()
    make(recipe)
    assert ran == ["quantize"]


def test_dry_run_prints_commands_to_paste(ran, recipe):
    source, out = recipe.parent / "model", recipe.parent / "out"
    done = make(recipe, "--dry-run", "--set", "run.prompts=[a 'b', c]", "--set", "run.stream=false")
    assert done.stdout.splitlines() == [
        f"trtx convert --dtype bf16 --force {source} {out}/checkpoint",
        f"trtx quantize --format fp8 --force {out}/checkpoint {out}/quantized",
        f"trtx build --gpu cpu --force {out}/quantized {out}/engine",
        f"trtx run --no-stream {out}/engine 'a '\"'\"'b'\"'\"'' c",
    ]
    assert ran == []
    assert not out.exists()


def test_flags_and_lists(ran, recipe):
    done = make(recipe, "--set", "run.prompts=[a, b]", "--set", "run.chat=true", "--set", "run.stream=false")
    assert done.exit_code == ExitCode.OK
    assert ran[-1] == "run ['a', 'b'] True False"


def test_bench_writes_its_report_into_out_unless_told_otherwise(ran, recipe):
    recipe.write_text(recipe.read_text() + "bench: {}\n")
    make(recipe)
    assert ran[-1] == f"bench {recipe.parent / 'out/bench.json'}"
    make(recipe, "--set", "bench.output=mine.json")
    assert ran[-1] == "bench mine.json"


@pytest.mark.parametrize(
    ("line", "place", "about"),
    [
        ("  kv-cash: fp8", ":6", "kv-cash"),
        ("  out: elsewhere", ":6", "out"),
        ("  force: true", ":6", "force"),
        ("  calib-size: many", ":6", "calib-size"),
        ("  calib-size: 0", ":6", "calib-size"),
    ],
)
def test_wrong_key_or_value_is_named_before_anything_runs(ran, recipe, line, place, about):
    text = recipe.read_text().replace("  format: fp8\n", f"  format: fp8\n{line}\n")
    recipe.write_text(text)
    done = make(recipe)
    assert done.exit_code == ExitCode.INPUT
    assert f"{recipe}{place}: " in done.stderr
    assert about in done.stderr
    assert ran == []


def test_flag_that_is_not_true_or_false(ran, recipe):
    done = make(recipe, "--set", "run.chat=perhaps", "--set", "run.prompts=a")
    assert done.exit_code == ExitCode.INPUT
    assert "true or false" in done.stderr


def test_missing_source(ran, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("convert:\n  dtype: bf16\n")
    done = make(path)
    assert done.exit_code == ExitCode.INPUT
    assert "source" in done.stderr.lower()
    assert "--set convert.KEY=VALUE" in done.stderr


def test_list_and_nothing(ran):
    listed = runner.invoke(app, ["make", "--list"])
    assert all(name in listed.stdout for name in recipes.shipped())
    assert runner.invoke(app, ["make"]).exit_code == ExitCode.USAGE


@pytest.mark.parametrize("name", recipes.shipped())
def test_shipped_recipes_fit_the_commands(name):
    done = runner.invoke(app, ["make", name, "--dry-run"])
    assert done.exit_code == ExitCode.OK, done.stderr
    assert done.stdout.startswith("trtx convert ")
