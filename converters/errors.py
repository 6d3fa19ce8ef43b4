"""User errors: one class, an exit code a kind, the cause and the remedy in the text.

Whatever goes wrong because of input, machine or settings is raised as a `TrtxError`; the command line prints it
without a traceback and exits with its code. `assert` and plain exceptions are left for bugs in trtx.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit codes of every `trtx` command. Scripts may rely on them."""

    OK = 0
    BUG = 1
    """An unexpected error inside trtx (a traceback is printed)."""
    USAGE = 2
    """The command line itself is wrong."""
    INPUT = 3
    """A file or folder given is missing, damaged or not what the command reads."""
    UNSUPPORTED = 4
    """The model, feature, format or GPU is not supported."""
    DOES_NOT_FIT = 5
    """The memory does not suffice; the text says by how much and what would fit."""
    MISMATCH = 6
    """The engine was built for something else than what is here."""
    QUALITY = 7
    """The quantized checkpoint failed its accuracy gate."""
    OUTPUT = 8
    """The output can't be written: the target exists, the disk is full, permission is denied."""
    NETWORK = 9
    """The Hugging Face hub can't be reached or refused."""
    MISSING = 10
    """A package that this command needs is not installed."""
    REQUEST = 11
    """At least one request of a batch failed; the others have finished."""
    INTERRUPTED = 130
    """Ctrl-C."""
    PIPE = 141
    """The reader of standard output went away."""


class TrtxError(Exception):
    """A user error.

    Args:
        cause: what is wrong, naming the file, key or tensor.
        remedy: what to do about it; starts with a verb.

    Subclasses set `exit_code`.
    """

    exit_code = ExitCode.BUG

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class InputError(TrtxError):
    """A missing, damaged or wrong input."""

    exit_code = ExitCode.INPUT


class UnsupportedError(TrtxError):
    """A model, feature, format or GPU that trtx does not support."""

    exit_code = ExitCode.UNSUPPORTED


class DoesNotFitError(TrtxError):
    """Too little memory; the text says by how much and which settings would fit."""

    exit_code = ExitCode.DOES_NOT_FIT


class MismatchError(TrtxError):
    """An engine that was built for another GPU, layout or format version."""

    exit_code = ExitCode.MISMATCH


class QualityError(TrtxError):
    """A quantized checkpoint that lost more accuracy than its gate allows."""

    exit_code = ExitCode.QUALITY


class OutputError(TrtxError):
    """An output that exists already or can't be written."""

    exit_code = ExitCode.OUTPUT


class NetworkError(TrtxError):
    """The hub can't be reached, or refused."""

    exit_code = ExitCode.NETWORK


class MissingPackageError(TrtxError):
    """An optional package that the command needs is not installed."""

    exit_code = ExitCode.MISSING


class RequestError(TrtxError):
    """A request that can't be served (too long, wrong parameters, non-finite logits); others go on."""

    exit_code = ExitCode.REQUEST


_REFUSALS = (
    errno.EACCES, errno.EPERM, errno.EROFS,
    errno.EEXIST, errno.ENOTDIR,  # a file stands where a folder is needed
    errno.ENAMETOOLONG, errno.ENOENT,  # no folder can be made there, as under /proc
)  # fmt: skip


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals while `target` is written into an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{target}: the disk is full ({error.strerror}).",
                "Free space or write elsewhere; nothing half-written was kept.",
            ) from error
        ours = str(error.filename or "").startswith(str(target.parent))
        if ours and error.errno in _REFUSALS:
            raise OutputError(f"{target}: can't be written ({error.strerror}).", "Choose a folder you own.") from error
        raise
