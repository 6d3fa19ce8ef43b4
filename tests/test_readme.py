"""Every command that the README shows is run, in its order, in one folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.h100 import table
from trtx.builder.tensorrt import modes
from trtx.builder.tensorrt.library import FLAVORS
from trtx.cli.app import EXIT_CODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language, without the indentation of a list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", README, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def run(command: list[str], folder: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_make_targets_are_those_of_the_makefile():
    commands = blocks("sh")[0].split("\n")[:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert run([*command.split(), "--dry-run"], ROOT)


def test_demo_runs_the_chain_of_the_readme(tmp_path):
    """`make demo` shows the README's five commands, so that running these is running those."""
    shown = run(["make", "--dry-run", "--always-make", "demo", "BIN=."], ROOT)
    source = re.search(r"trtx convert (\S+)", shown)
    assert source
    for command in blocks("sh")[1].replace("$MODEL", source[1]).strip().split("\n"):
        assert command in shown.replace("./", "").replace(" --force", ""), command


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(smollm2_gguf, tmp_path):
    for block in blocks("sh")[1:]:
        output = run(["bash", "-euo", "pipefail", "-c", block], tmp_path, MODEL=str(smollm2_gguf))
        if "capital of France" in block:
            assert "Paris" in output
    (program,) = blocks("python")
    assert "Paris" in run([sys.executable, "-c", program], tmp_path)
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_exit_codes_are_the_documented_ones():
    section = README.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section, flags=re.MULTILINE)
    assert rows == [(str(code.value), text) for code, text in EXIT_CODES.items()]


def test_family_table_is_the_generated_one():
    """Put it right with: trtx families --markdown"""
    shown = README.partition("<!-- families -->\n")[2].partition("<!-- end of families -->")[0]
    assert shown == run(["trtx", "families", "--markdown"], ROOT)


def test_speed_table_is_of_the_committed_report():
    """Put it right with: python tests/bench/h100.py --table tests/gpu/results/h100-bench.json"""
    shown = README.partition("<!-- h100 -->\n")[2].partition("\n<!-- end of h100 -->")[0]
    assert shown == table(json.loads((ROOT / "tests/gpu/results/h100-bench.json").read_text()))


def test_mode_table_is_the_generated_one():
    """Put it right with: python -c "from trtx.builder.tensorrt import library, modes; print(modes.markdown(…))"."""
    shown = README.partition("<!-- modes -->\n")[2].partition("<!-- end of modes -->")[0]
    assert shown == modes.markdown(FLAVORS["tensorrt-rtx"])
