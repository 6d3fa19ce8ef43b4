"""Where models come from.

A source hands over what a model's files say, under Hugging Face's names: a config, tensors by name, and tokenizer
files. Four kinds: a Hugging Face folder, a hub id, a GGUF file, random weights. Opening one reads headers only. Of the
first two, checkpoints in MXFP4 and block fp8 are read as the unquantized ones that they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trtx.converters.artifact import MANIFEST, Draft
from trtx.converters.checkpoint import Dtype
from trtx.converters.errors import InputError
from trtx.converters.gguf_file import GgufSource
from trtx.converters.huggingface import FolderSource, Outline, open_hub, read_outline
from trtx.converters.prequantized import dequantized
from trtx.converters.random_weights import RandomSource
from trtx.converters.shards import Header

RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Source(Protocol):
    """A model as its files give it.

    Attributes:
        config: as in a Hugging Face config.json.
        config_name: what to call the config in errors.
        headers: the stored tensors by name.
        canonical: the tensors have canonical names already; else Hugging Face's.
        default_dtype: of the checkpoint, where the user names none; None: that of the stored tensors.
        provenance: where the weights came from, for reports: JSON values.
        identity: of the files, for the manifest.
    """

    config: Mapping[str, Any]
    config_name: str
    headers: Mapping[str, Header]
    canonical: bool
    default_dtype: Dtype | None
    provenance: dict[str, Any]
    identity: dict[str, Any]

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        """A stored tensor on the CPU, mapped from its file where possible. Do not write to it.

        Args:
            index: give only this one of its first dimension (an expert).
        """
        ...

    def write_tokenizer(self, draft: Draft) -> list[str]:
        """Write the tokenizer's files and generation_config.json; returns warnings about what could not be written."""
        ...


def open_source(text: str, *, revision: str | None = None, seed: int = 0, headers_only: bool = False) -> Source:
    """Open what the user calls SRC.

    Args:
        text: a folder, a hub id (`org/name`), a `.gguf` file, or `random:CONFIG.json`.
        revision: branch, tag or commit on the hub.
        seed: of random weights.
        headers_only: from the hub, fetch only what a check needs; its tensors have no values then.

    Raises:
        InputError: nothing of the kind is there, or it is damaged.
        UnsupportedError: a file in a format that trtx does not read.
        NetworkError: the hub can't be reached or refused.
    """
    path = Path(text)
    if not path.exists() and _HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return dequantized(open_hub(text, revision, headers_only))
    if revision is not None:
        raise InputError(f"{text}: is not on the hub, so it has no revisions.", "Leave out --revision.")
    if text.startswith(RANDOM):
        return RandomSource(Path(text.removeprefix(RANDOM)), seed)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            raise InputError(f"{path}: is a trtx directory already.", "Give it to `trtx quantize` or `trtx build`.")
        return dequantized(FolderSource(path))
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path)
        raise InputError(f"{path}: is neither a folder nor a .gguf file.", "Give the folder that holds config.json.")
    raise InputError(
        f"{text}: no such file or folder, and no hub id (org/name).",
        "Give a folder, a hub id, a .gguf file or random:CONFIG.json.",
    )


def open_outline(text: str) -> Outline | None:
    """What a folder without weights tells; None: it has weights, or `text` is something else.

    Raises:
        InputError: its config.json or index is damaged.
    """
    path = Path(text)
    return read_outline(path) if path.is_dir() and not (path / MANIFEST).is_file() else None
