"""The `trtx` command as a shell sees it: help, exit codes, errors, signals, and what it imports."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trtx import __version__
from trtx.cli import common
from trtx.cli.app import COMMANDS, EXIT_CODES, app, report
from trtx.converters.errors import DoesNotFitError, ExitCode, TrtxError

HEAVY = ("torch", "transformers", "modelopt", "tensorrt", "tensorrt_rtx", "numpy", "matplotlib", "huggingface_hub")
TRTX = (sys.executable, "-c", "from trtx.cli.app import main; main()")

runner = CliRunner(env={"COLUMNS": "80"})


def command_with(action):
    """An app like trtx's, with one command that runs `action`, in a process of its own."""
    return (
        sys.executable,
        "-c",
        "import sys, time, trtx.cli.app as app\n"
        f"def probe():\n    '''Probe.'''\n    {action}\n"
        "app.app.command('probe')(probe)\n"
        "sys.argv = ['trtx', 'probe']\n"
        "app.main()",
    )


def test_all_commands_are_there_in_the_order_of_the_chain():
    assert tuple(typer.main.get_command(app).commands) == COMMANDS


def test_help_loads_nothing_heavy():
    program = f"""
import sys
from trtx.cli.app import main
sys.argv = ["trtx", "--help"]
try:
    main()
except SystemExit:
    print(sorted(set({HEAVY!r}) & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage:")
    assert done.stderr.strip() == "[]"


def test_the_python_api_is_loaded_when_it_is_used():
    program = """
import sys, trtx
assert "torch" not in sys.modules
from trtx import LLM, SamplingParams
print(LLM.__module__, SamplingParams.__module__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "trtx.runtime.llm trtx.runtime.sampling\n"


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_reads_well_at_80_columns(command):
    shown = runner.invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert max(len(line) for line in shown.output.splitlines()) <= 80
    assert not re.search(r"<[^|>]*>|\{", shown.output), "a Python type, or typer's braces, instead of a name"


def test_the_list_of_commands_is_not_cut():
    listed = " ".join(runner.invoke(app, ["--help"]).output.split())
    for name, command in typer.main.get_command(app).commands.items():
        assert f"{name} {command.help.splitlines()[0]}" in listed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_has_help(name):
    for parameter in typer.main.get_command(app).commands[name].params:
        assert parameter.help, f"trtx {name}: {parameter.name} has no help"


def test_version():
    assert runner.invoke(app, ["--version"]).output == f"trtx {__version__}\n"


def test_help_documents_every_exit_code():
    shown = runner.invoke(app, ["--help"]).output
    assert set(EXIT_CODES) == set(ExitCode)
    for code, text in EXIT_CODES.items():
        assert f"{code.value}  {text}" in shown


@pytest.mark.parametrize("arguments", [["frobnicate"], ["doctor", "--frobnicate"], []])
def test_wrong_command_line(arguments):
    assert runner.invoke(app, arguments).exit_code == ExitCode.USAGE


@pytest.mark.parametrize("error", TrtxError.__subclasses__())
def test_user_errors_are_cause_and_remedy_without_traceback(error, capsys):
    assert report(error("model.bin: [no] good.", "Fetch it again.")) == error.exit_code
    assert capsys.readouterr().err == "error: model.bin: [no] good.\nremedy: Fetch it again.\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_out_of_memory_is_a_user_error(error, capsys):
    assert report(error) == DoesNotFitError.exit_code
    shown = capsys.readouterr().err
    assert shown.startswith("error: The memory does not suffice")
    assert "remedy: " in shown


def test_anything_else_is_a_bug_with_a_traceback():
    done = subprocess.run(command_with("raise KeyError('q_proj')"), capture_output=True, text=True)
    assert done.returncode == ExitCode.BUG
    assert "Traceback" in done.stderr
    assert "bug in trtx" in done.stderr
    assert done.stdout == ""


def test_user_error_leaves_the_process_with_its_code(tmp_path):
    done = subprocess.run([*TRTX, "inspect", str(tmp_path / "nothing")], capture_output=True, text=True)
    assert done.returncode == ExitCode.INPUT
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_ctrl_c():
    probe = command_with("print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen(probe, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert errors == "interrupted\n"


@pytest.mark.parametrize("action", ["[print('x' * 100) for _ in range(10_000)]", "print('x')"])
def test_reader_that_goes_away(action):
    """Both while the command writes and when its last output is flushed at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command_with(action), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == ExitCode.PIPE
    assert done.stderr == ""


def test_reader_of_the_help_that_goes_away():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*TRTX, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode != 0


def test_reader_of_a_table_that_goes_away():
    """rich has an exit code of its own for this case."""
    action = "app.import_module('trtx.cli.common').stdout().print('x' * 100_000)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command_with(action), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (ExitCode.PIPE, "")


def test_tables_are_not_cut_in_a_pipe(capsys):
    from rich.table import Table

    table = Table()
    table.add_row(*["a long cell " * 5] * 5)
    common.emit({}, False, lambda: table)
    assert "…" not in capsys.readouterr().out


def test_json_is_one_line_and_strict(capsys):
    common.emit({"path": Path("a"), "text": "é\n"}, True, lambda: "")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"path": "a", "text": "é\n"}
    with pytest.raises(ValueError, match="JSON"):
        common.json_line({"x": float("nan")})


def test_progress_is_silent_without_a_terminal(capsys):
    with common.progress("read", 10) as advance:
        advance(10)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("total", [4096, None])
@pytest.mark.parametrize("unit", ["B", "tokens"])
def test_progress_on_a_terminal(total, unit, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with common.progress("read [shard]", total, unit) as advance:
        advance(4096)
    captured = capsys.readouterr()
    assert "read [shard]" in captured.err
    assert captured.out == ""
