"""`trtx make`: run the chain of a recipe, and only those stages whose inputs or settings changed.

Each stage is turned into the arguments of its command and goes through the command's own parser, so that a recipe means
exactly what the command line means. The directories between the stages are chosen here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from trtx import __version__
from trtx.cli.common import stderr, to_json
from trtx.converters.errors import InputError, TrtxError

if TYPE_CHECKING:
    from trtx.recipes import Recipe, Setting

TARGETS = {"convert": "checkpoint", "quantize": "quantized", "build": "engine"}
"""Stages that write a directory, and its name in OUT."""

REPORT = "bench.json"
"""Where in OUT the bench stage writes its report, unless the recipe has an `output`."""


def make(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write. Default: a folder named as the recipe.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.KEY=VALUE", help="Set or replace a key of the recipe; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run every stage, changed or not.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands that would run, and stop.")] = False,
    list_shipped: Annotated[bool, typer.Option("--list", help="List the shipped recipes, and stop.")] = False,
) -> None:
    """Run the chain of a recipe; skip stages that are up to date.

    A stage that writes a directory is skipped when its input, its settings and
    the version of trtx are those that made the directory. Paths in a recipe are
    relative to the current folder.
    """
    from trtx import recipes

    if list_shipped:
        for name, path in recipes.shipped().items():
            typer.echo(f"{name:24} {recipes.Recipe.read(path).description}")
        return
    if recipe is None:
        raise typer.BadParameter("RECIPE is missing. Give a YAML file, or a name that --list shows.")
    content = recipes.Recipe.read(recipes.find(recipe))
    for assignment in assignments or ():
        content.assign(assignment)

    changed = force
    for stage in _plan(content, out or Path(content.path.stem), context):
        if not changed and stage.is_up_to_date():
            stderr().print(f"[dim]up to date:[/] {escape(str(stage.target))}", soft_wrap=True)
        elif dry_run:
            typer.echo(stage.command_line)
            changed = True  # what follows depends on a directory that is not there yet
        else:
            stderr().print(f"[bold]$ {escape(stage.command_line)}[/]", soft_wrap=True)
            stage.run()


@dataclass(frozen=True)
class _Stage:
    """One command of the chain.

    Attributes:
        arguments: as they would stand on the command line.
        context: the same, parsed.
        target: the directory it writes, if it writes one.
    """

    name: str
    command: Any
    arguments: list[str]
    context: Any
    target: Path | None

    @property
    def command_line(self) -> str:
        return shlex.join(["trtx", self.name, *self.arguments])

    def run(self) -> None:
        with self.context:
            self.command.invoke(self.context)

    def is_up_to_date(self) -> bool:
        """Whether the target was made by this command, with these settings, of an input that is still the same."""
        from trtx.converters.artifact import Manifest, identify

        if self.target is None:
            return False
        try:
            manifest = Manifest.read(self.target)
            unchanged = all(identify(Path(item["path"]))["identity"] == item["identity"] for item in manifest.inputs)
        except (TrtxError, OSError):
            return False
        parameters = self.context.params
        same_settings = all(
            to_json(parameters[name]) == to_json(value)
            for name, value in manifest.settings.items()
            if name in parameters
        )
        return (
            unchanged and same_settings and manifest.command == self.name and manifest.versions["trtx"] == __version__
        )


def _plan(recipe: Recipe, out: Path, context: typer.Context) -> list[_Stage]:
    """The stages of a recipe; all of them are parsed before the first one runs."""
    from trtx.recipes import Setting

    commands = context.find_root().command.commands  # type: ignore[attr-defined]
    stages: list[_Stage] = []
    latest = None
    for name, section in recipe.stages.items():
        target = out / TARGETS[name] if name in TARGETS else None
        if name == "bench":
            section.setdefault("output", Setting((str(out / REPORT),), str(recipe.path)))
        command = commands[name]
        arguments = _arguments(name, command, section, latest, target)
        try:
            parsed = command.make_context(name, list(arguments), parent=context.parent)
        except typer.TyperException as error:
            param = getattr(error, "param", None)
            where = section[_key(param)].where if param and _key(param) in section else recipe.path
            raise InputError(
                f"{where}: {name}: {error.format_message()}", f"Correct it, or give --set {name}.KEY=VALUE."
            ) from None
        stages.append(_Stage(name, command, arguments, parsed, target))
        latest = target or latest
    return stages


def _arguments(
    name: str, command: Any, section: Mapping[str, Setting], source: Path | None, target: Path | None
) -> list[str]:
    """The words after `trtx NAME`: options, then what is read, what is written, and the rest."""
    positional = [_key(param) for param in command.params if param.param_type_name == "argument"]
    options = {_key(param): param for param in command.params if param.param_type_name == "option"}
    paths = zip(positional, (source, target), strict=False)
    decided = {key: (str(path),) for key, path in paths if path is not None}
    known = [key for key in (*positional, *options) if key not in decided and key not in ("force", "help")]
    for key, setting in section.items():
        if key not in known:
            raise InputError(f"{setting.where}: unknown key {key!r} of {name}.", f"Known keys: {', '.join(known)}.")
    words = [word for key, setting in section.items() if key in options for word in _words(options[key], setting)]
    if target is not None:
        words.append("--force")
    for key in positional:
        words += decided.get(key) or (section[key].values if key in section else ())
    return words


def _key(param: Any) -> str:
    """A parameter's key in a recipe: the long name of an option without dashes, the name of an argument."""
    return str(max(param.opts, key=len)).lstrip("-")


def _words(option: Any, setting: Setting) -> Iterator[str]:
    if not option.is_flag:
        for value in setting.values:
            yield from (max(option.opts, key=len), value)
    elif setting.values == ("true",):
        yield max(option.opts, key=len)
    elif setting.values == ("false",):
        yield from option.secondary_opts[:1]
    else:
        raise InputError(f"{setting.where}: {', '.join(setting.values)!r} is not true or false.", "Write one of them.")
