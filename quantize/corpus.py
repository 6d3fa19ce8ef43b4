"""Text for calibration and evaluation, as windows of token ids.

A text file is one document. A JSONL file has a document a line: an object with `text`, `prompt`, `messages` (their
contents, one after the other) or `input_ids`. Documents are tokenized one by one, joined, and cut into windows of equal
length from the beginning on; what is not needed is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtx.converters.artifact import digest_file
from trtx.converters.checkpoint import Checkpoint
from trtx.converters.errors import InputError
from trtx.converters.jsonl import read_objects

CALIBRATION = Path(__file__).parent / "data" / "calibration.txt"
EVALUATION = Path(__file__).parent / "data" / "evaluation.txt"
"""The texts that come with trtx; see the README.md beside them."""

_CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer has on running text: so much of a long text file is enough."""


@dataclass(frozen=True)
class Corpus:
    """Token ids to run a model on.

    Attributes:
        source: the file, or 'random tokens'.
        tokens: [windows, length], int64.
    """

    source: str
    tokens: Tensor

    def to_json(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        windows, length = self.tokens.shape
        return {"source": self.source, "windows": windows, "length": length}

    def batches(self, size: int) -> list[Tensor]:
        """The windows, `size` at a time."""
        return list(self.tokens.split(size))


def read_corpus(file: Path, checkpoint: Checkpoint, windows: int, length: int) -> Corpus:
    """At most `windows` windows of `length` tokens from a file; fewer when it is short.

    Raises:
        InputError: the file is missing, malformed, needs a tokenizer that the checkpoint lacks, holds token ids outside
            the vocabulary, or is shorter than one window.
    """
    wanted = windows * length
    ids: list[int] = []
    for document in _documents(file, checkpoint, wanted):
        ids += document
        if len(ids) >= wanted:
            break
    count = min(windows, len(ids) // length)
    if not count:
        raise InputError(
            f"{file}: has {len(ids)} tokens, and one window takes {length}.", "Give more text, or a shorter length."
        )
    return Corpus(str(file), torch.tensor(ids[: count * length]).view(count, length))


def random_corpus(vocab_size: int, windows: int, length: int, seed: int) -> Corpus:
    """Random tokens: the only text that fits random weights without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    return Corpus("random tokens", torch.randint(vocab_size, (windows, length), generator=generator))


def same_content(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    return a.stat().st_size == b.stat().st_size and digest_file(a) == digest_file(b)


def _documents(file: Path, checkpoint: Checkpoint, wanted: int) -> Iterator[list[int]]:
    from trtx.runtime.tokenizer import Tokenizer

    tokenizer: Tokenizer | None = None
    for where, document in _read(file, wanted * _CHARACTERS_PER_TOKEN):
        if isinstance(document, str):
            tokenizer = tokenizer or Tokenizer.load(checkpoint.path)
            yield tokenizer.encode(document)
        else:
            _check_ids(document, checkpoint.spec.vocab_size, where)
            yield document


def _read(file: Path, characters: int) -> Iterator[tuple[str, str | list[Any]]]:
    """(where, text or token ids) of each document."""
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, record in read_objects(lines, str(file)):
                    where = f"{file}:{number}"
                    yield where, _content(record, where)
        else:
            with file.open(encoding="utf-8") as text:
                yield str(file), text.read(characters)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}).", "Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}).", "Give a text or JSONL file.") from error


def _content(record: Mapping[str, Any], where: str) -> str | list[Any]:
    if isinstance(ids := record.get("input_ids"), list):
        return ids
    for key in ("text", "prompt"):
        if isinstance(text := record.get(key), str):
            return text
    try:
        return "\n".join([message["content"] for message in record["messages"]])
    except (KeyError, TypeError):
        raise InputError(
            f"{where}: has no document.", "Give each line `text`, `prompt`, `messages` or `input_ids`."
        ) from None


def _check_ids(ids: list[Any], vocab_size: int, where: str) -> None:
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InputError(
                f"{where}: {token!r} is not a token id.", f"The model's token ids go from 0 to {vocab_size - 1}."
            )
