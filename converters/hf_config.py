"""Typed, strict reading of a Hugging Face `config.json`.

A `Config` remembers which keys were read. `finish()` refuses what is left: a key that nobody read is a feature that
nobody modelled, and ignoring it would give a silently wrong model.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trtx.converters.errors import InputError, UnsupportedError

T = TypeVar("T")

_MISSING: Any = object()


class Config:
    """A JSON object whose keys are read one at a time, with their types.

    Every reader takes an optional default, returned when the key is absent or null; without one, both are an error.

    Args:
        where: what to call the object in errors, e.g. the file's path.
        family: whose keys these are; for errors.
    """

    def __init__(self, content: Mapping[str, Any], where: str, family: str) -> None:
        self.where = where
        self.family = family
        self._content = content
        self._read: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._content)

    def __contains__(self, key: str) -> bool:
        return self._content.get(key) is not None

    def given(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._content

    def integer(self, key: str, default: T = _MISSING, least: int = 1) -> int | T:
        """A whole number, at least `least`."""
        value = self._take(key, default)
        if value is not default and (type(value) is not int or value < least):
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: T = _MISSING) -> float | T:
        """A whole or fractional number."""
        value = self._take(key, default)
        if value is default:
            return default
        if type(value) not in (int, float):
            raise self.wrong(key, "a number")
        return float(value)

    def boolean(self, key: str, default: T = _MISSING) -> bool | T:
        """True or false."""
        value = self._take(key, default)
        if value is not default and type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: T = _MISSING) -> str | T:
        """A string."""
        value = self._take(key, default)
        if value is not default and type(value) is not str:
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str, default: T = _MISSING) -> list[str] | T:
        """A list of strings."""
        value = self._take(key, default)
        if value is not default and not (isinstance(value, list) and all(type(item) is str for item in value)):
            raise self.wrong(key, "a list of strings")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of numbers."""
        value = self._take(key, _MISSING)
        if not (isinstance(value, list) and all(type(item) in (int, float) for item in value)):
            raise self.wrong(key, "a list of numbers")
        return [float(item) for item in value]

    def integers(self, key: str, default: T = _MISSING) -> list[int] | T:
        """A list of whole numbers."""
        value = self._take(key, default)
        if value is not default and not (isinstance(value, list) and all(type(item) is int for item in value)):
            raise self.wrong(key, "a list of whole numbers")
        return value

    def raw(self, key: str, default: Any) -> Any:
        """A value of any type."""
        return self._take(key, default)

    def section(self, key: str) -> Config:
        """The object at `key`; an empty one when the key is absent or null."""
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Config(value, f"{self.where}: {key}", self.family)

    def wrong(self, key: str, expected: str) -> InputError:
        """The error for a value that `key` can't have."""
        return InputError(
            f"{self.where}: {key!r} is {self._content.get(key)!r}; expected {expected}.",
            "Correct it, or download the checkpoint again.",
        )

    def unsupported(self, key: str, supported: Sequence[str] = ()) -> UnsupportedError:
        """The error for a value of `key` that has a meaning, but not one that trtx models."""
        remedy = f"Use a model with one of: {', '.join(supported)}." if supported else "Use another model."
        return UnsupportedError(
            f"{self.where}: {key!r} is {self._content.get(key)!r}, which trtx does not model for {self.family}.", remedy
        )

    def finish(self, harmless: Container[str] = (), inert: Mapping[str, Any] | None = None) -> None:
        """Refuse every key that was not read.

        Args:
            harmless: keys that may have any value.
            inert: keys that may only have this value (with which they change nothing) or be null.

        Raises:
            UnsupportedError: names the first key that is left, and its value.
        """
        for key in sorted(self._content.keys() - self._read):
            if key in harmless:
                continue
            if inert is not None and key in inert and self._content[key] in (inert[key], None):
                continue
            raise UnsupportedError(
                f"{self.where}: key {key!r} ({_short(self._content[key])}) is not modelled for {self.family}; "
                "ignoring it could give a wrong model.",
                "If you know that it changes nothing, remove it from the file; else use another model.",
            )

    def _take(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self._content.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise InputError(
                f"{self.where}: key {key!r} is missing; {self.family} needs it.", "Download the checkpoint again."
            )
        return default


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file.", "Check the path; a Hugging Face checkpoint has a config.json."
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}).", "Correct it, or download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object, found {type(content).__name__}.", "Download it again.")
    return content


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
