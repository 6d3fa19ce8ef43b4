"""JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from trtx.converters.errors import InputError


def read_objects(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and content of every line that is not blank.

    Args:
        lines: a file opened in binary mode, or sys.stdin.buffer.
        name: what to call it in errors.

    Raises:
        InputError: names the line that is not UTF-8, not JSON, or not an object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            content = json.loads(line.decode("utf-8-sig"))  # Windows programs put a mark at the start of the file
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start}).", "Save the file as UTF-8."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}).", "Write one JSON object a line.") from error
        if not isinstance(content, dict):
            raise InputError(
                f"{where}: a JSON {type(content).__name__}, not an object.", "Write one JSON object a line."
            )
        yield number, content
