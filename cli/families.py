"""`trtx families`: which models can be converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trtx.cli.common import Json, emit

if TYPE_CHECKING:
    from trtx.converters.families import Family

_HEADINGS = ("family", "models", "beyond Llama", "proven on", "quantization", "GGUF")


def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show which model families can be converted, and how each was proven.

    "tiny": random models of it, with all its features, equal transformers in logits and greedy tokens; real weights are
    named where they were to be had.
    """
    from trtx.converters.families import FAMILIES

    rows = [_row(family) for family in FAMILIES]
    if markdown:
        typer.echo(_markdown([[_text(row[heading]) for heading in _HEADINGS] for row in rows]))
        return
    emit(rows, as_json, lambda: _table([[_text(row[heading]) for heading in _HEADINGS] for row in rows]))


def _row(family: Family) -> dict[str, Any]:
    return {
        "family": family.name,
        "architectures": list(family.architectures),
        "models": family.models,
        "beyond Llama": family.features,
        "proven on": ["tiny", *([family.real] if family.real else [])],
        "quantization": ["all formats", *(["fp8 KV cache"] if family.kv_cache_in_fp8 else [])],
        "GGUF": family.gguf is not None,
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _table(rows: list[list[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(rows: list[list[str]]) -> str:
    lines = [_HEADINGS, ("---",) * len(_HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
