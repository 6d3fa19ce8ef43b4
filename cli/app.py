"""The `trtx` command: its subcommands, and the one place where errors become text and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperArgument, TyperCommand, TyperGroup

from trtx import __version__
from trtx.cli.common import stderr
from trtx.converters.errors import DoesNotFitError, ExitCode, TrtxError

COMMANDS = ("convert", "quantize", "build", "run", "bench", "inspect", "families", "doctor", "make")

EXIT_CODES = {
    ExitCode.OK: "done",
    ExitCode.BUG: "a bug in trtx; a traceback is printed",
    ExitCode.USAGE: "the command line is wrong",
    ExitCode.INPUT: "an input is missing, damaged or not what the command reads",
    ExitCode.UNSUPPORTED: "the model, feature, format or GPU is not supported",
    ExitCode.DOES_NOT_FIT: "the memory does not suffice",
    ExitCode.MISMATCH: "the engine was built for something else than what is here",
    ExitCode.QUALITY: "the quantized checkpoint failed its accuracy gate",
    ExitCode.OUTPUT: "the output exists or can't be written",
    ExitCode.NETWORK: "the Hugging Face hub can't be reached or refused",
    ExitCode.MISSING: "a package that the command needs is not installed",
    ExitCode.REQUEST: "a request of a batch failed; the others have finished",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
    ExitCode.PIPE: "the reader of standard output went away",
}


class _Commands(TyperGroup):
    """The subcommands. What they raise is reported here and becomes an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the chain, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(report(error)) from None
        return result


class _Command(TyperCommand):
    """A subcommand. Its help names arguments as the README does: SRC, not {SRC} or SRC <str>."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, TyperArgument):
                param.display_type_rich = lambda ctx: ""  # type: ignore[method-assign]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def _exit_code_table() -> str:
    """For the end of `trtx --help`; the \\b keeps click from joining the lines."""
    return "\n".join(["\b", "Exit codes:", *(f"  {code.value:3}  {text}" for code, text in EXIT_CODES.items())])


app = typer.Typer(
    cls=_Commands,
    epilog=_exit_code_table(),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the start-up time of rich's panels, and it can be grepped
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trtx {__version__}")
        raise typer.Exit


@app.callback()
def trtx(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """From a Hugging Face checkpoint to a quantized, GPU-specific engine that runs and is measured.

    \b
    convert → quantize → build → run, bench

    Each of the first three reads one directory and writes another. `trtx make` runs a whole chain from a recipe.
    Results go to stdout, everything else to stderr.
    """


def _register(name: str) -> None:
    function = getattr(import_module(f"trtx.cli.{name}"), name)
    summary, _, _ = function.__doc__.partition("\n")  # given as it is, or click cuts it in the list of commands
    app.command(name, cls=_Command, short_help=summary)(function)


for _name in COMMANDS:
    _register(_name)


def report(error: BaseException) -> ExitCode:
    """Print an error on stderr, a user error without traceback, and return the exit code it stands for."""
    if isinstance(error, BrokenPipeError):
        _discard_stdout()
        return ExitCode.PIPE
    if isinstance(error, KeyboardInterrupt):
        stderr().print("interrupted")
        return ExitCode.INTERRUPTED
    if _out_of_memory(error):
        error = DoesNotFitError(
            f"The memory does not suffice: {str(error).splitlines()[0] if str(error) else 'out of memory'}",
            "Build with a smaller --max-batch-size or --max-seq-len, use a smaller format, or free memory that "
            "other processes hold.",
        )
    if isinstance(error, TrtxError):
        _print("error", error.cause)
        if error.remedy:
            _print("remedy", error.remedy, colour="green")
        return error.exit_code
    traceback.print_exception(error)
    _print("error", f"{type(error).__name__}: this is a bug in trtx {__version__}. Report it with the lines above.")
    return ExitCode.BUG


def main() -> None:
    """The console script."""
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_stdout()
            sys.exit(ExitCode.PIPE)


def _print(label: str, text: str, colour: str = "red") -> None:
    stderr().print(f"[bold {colour}]{label}:[/] {escape(text)}", soft_wrap=True)


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not complain at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, CUDA's or torch's CPU allocator's out-of-memory error (torch need not be loaded)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
