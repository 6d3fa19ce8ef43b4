"""`trtx inspect`: what a trtx directory is, what made it and what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trtx.cli.common import Json, emit, note
from trtx.converters.errors import InputError, MismatchError, MissingPackageError, UnsupportedError

DESCRIPTIONS = {"checkpoint": "config.json", "engine": "engine.json"}
"""The file that holds a directory's spec, by its kind."""


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint or an engine.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file again; exit with 3 if one differs.")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors: dtype, shape and file.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="List the layers of a TensorRT engine; on the GPU it was built for.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint or engine is, what made it and what is in it."""
    from trtx.converters.artifact import Manifest

    manifest = Manifest.read(directory)
    data: dict[str, Any] = {"path": str(directory), "bytes": sum(facts["bytes"] for facts in manifest.files.values())}
    data |= vars(manifest)
    data["description"] = _read_description(directory, manifest.kind)
    if tensors:
        data["tensors"] = list(_tensors(directory, manifest.files))
    if verify:
        data["differs"] = manifest.verify(directory)
    refused = None
    if layers:
        try:
            data["layers"] = _layers(directory, data)
        except (MismatchError, MissingPackageError, UnsupportedError) as error:
            refused = error
    emit(data, as_json, lambda: _render(data))
    if data.get("differs"):
        raise InputError(
            f"{directory}: {', '.join(data['differs'])}: content differs from the manifest.",
            f"Make the {manifest.kind} again; it was damaged or changed after it was written.",
        )
    if verify:
        note(f"{len(manifest.files)} files verified.")
    if refused is not None:
        known = "The bindings and the number of layers, above, are known on any machine."
        raise type(refused)(f"--layers: {refused.cause}", f"{refused.remedy} {known}")


def _read_description(directory: Path, kind: str) -> dict[str, Any]:
    path = directory / DESCRIPTIONS[kind]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}).", f"Make the {kind} again.") from error
    return dict(content)


def _tensors(directory: Path, files: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from trtx.converters.shards import Shards

    for file in files:
        if file.endswith(".safetensors"):
            for name, header in Shards([directory / file]).items():
                dtype = str(header.dtype).removeprefix("torch.")
                yield {"name": name, "dtype": dtype, "shape": list(header.shape), "file": file}


def _layers(directory: Path, data: Mapping[str, Any]) -> list[str]:
    if not str(data["description"].get("backend", "")).startswith("tensorrt"):
        raise InputError(f"{directory}: --layers: not a TensorRT engine.", "Leave --layers out.")
    from trtx.builder.engine import Engine
    from trtx.runtime.tensorrt_runner import layers_of

    return layers_of(Engine(directory))


def _render(data: dict[str, Any]) -> RenderableType:
    facts = {**data["about"], **data["description"]}
    facts.pop("format", None)
    if "ledger" in facts:
        facts["ledger"] = {name: decimal(size) for name, size in facts["ledger"].items()}
    nested = {name: value for name, value in facts.items() if isinstance(value, Mapping) and value}
    top = {
        "made by": f"trtx {data['command']}",
        "created": data["created"],
        "size": f"{decimal(data['bytes'])} in {len(data['files'])} files",
        **{name: value for name, value in facts.items() if name not in nested},
    }
    inputs = {str(number): item["path"] for number, item in enumerate(data["inputs"], start=1)}
    sections = {"settings": data["settings"], "inputs": inputs, **nested, "versions": data["versions"]}
    parts: list[RenderableType] = [Text(f"{data['path']}: trtx {data['kind']}", "bold"), _facts(top)]
    parts += [Group(Text(f"\n{name}", "bold"), _facts(section)) for name, section in sections.items() if section]
    parts.append(_files(data["files"]))
    if "tensors" in data:
        parts.append(_tensor_table(data["tensors"]))
    if "layers" in data:
        parts += [Text("\nlayers", "bold"), *(Text(f"  {layer}") for layer in data["layers"])]
    return Group(*parts)


def _facts(facts: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _flatten(facts):
        table.add_row(Text(f"  {name}", "dim"), Text(_show(value)))
    return table


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _show(value: Any) -> str:
    """A value as people read it: numbers with separators, a list of equal items as '30 × none'."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) and value:
        if len(value) > 1 and all(item == value[0] for item in value):
            return f"{len(value)} × {_show(value[0])}"
        return ", ".join(map(_show, value))
    return str(value)


def _files(files: Mapping[str, Any]) -> Table:
    table = Table("\nfile", "\nsize", "\nxxh3", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    for name, facts in files.items():
        table.add_row(Text(name), decimal(facts["bytes"]), facts["xxh3"])
    return table


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    table = Table("\ntensor", "\ndtype", "\nshape", "\nfile", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for tensor in tensors:
        shape = " × ".join(map(str, tensor["shape"])) or "scalar"
        table.add_row(Text(tensor["name"]), tensor["dtype"], shape, Text(tensor["file"]))
    return table
