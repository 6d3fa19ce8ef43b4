"""Directories that are complete or not there.

Every trtx command reads one directory and writes another. A directory is written beside its target, synced, and renamed
into place; its `manifest.json`, written last, says what it is and what made it. A directory without a manifest is
therefore not a trtx directory, however it came about.

    with create("out/", kind="checkpoint", command="convert", settings={...}, force=False) as draft:
        (draft.path / "config.json").write_text(...)
        draft.describe(parameters=135_000_000)

Temporary directories are named `.NAME.trtx-XXXXXXXX` and hold a lock while their writer lives; those whose writer died
are removed by the next writer of the same target.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from trtx import __version__
from trtx.converters.errors import InputError, OutputError, writing

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
KINDS = ("checkpoint", "engine")

_CHUNK = 8 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class Manifest:
    """What a trtx directory is and what made it; the content of `manifest.json`.

    Attributes:
        kind: 'checkpoint' or 'engine'.
        command: the trtx command that wrote it.
        settings: that command's settings, as JSON values.
        inputs: identity of what it was made from (`identify`).
        versions: Python and library versions of the writer.
        files: relative path → {'bytes': int, 'xxh3': hex digest (XXH3-128)}.
        about: facts for people and for `trtx inspect` (parameters, bytes, provenance, …).
    """

    kind: str
    command: str
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    versions: dict[str, str]
    created: str
    files: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    format: int = MANIFEST_FORMAT

    @classmethod
    def read(cls, directory: Path, kind: str | None = None) -> Manifest:
        """Read the manifest of `directory` and check that it is a complete trtx directory of `kind`.

        Raises:
            InputError: no such folder, not a trtx directory, another kind, or a listed file is missing or short.
        """
        path = directory / MANIFEST
        if not path.is_file():
            raise InputError(f"{directory}: {_what_it_is(directory)}", _what_to_do(directory, kind))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format", MANIFEST_FORMAT) != MANIFEST_FORMAT:
                raise InputError(
                    f"{path}: manifest format {content['format']}; this trtx ({__version__}) reads {MANIFEST_FORMAT}.",
                    "Make the directory again with this version.",
                )
            manifest = cls(**content)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not a trtx manifest ({error}).", "Make the directory again.") from error
        if kind is not None and manifest.kind != kind:
            step = {"checkpoint": "trtx convert", "engine": "trtx build"}[kind]
            raise InputError(
                f"{directory}: is a trtx {manifest.kind}, and this command reads a trtx {kind}.",
                f"Make one with `{step}`, or give the {kind}'s folder.",
            )
        for name, facts in manifest.files.items():
            file = directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
                raise InputError(
                    f"{file}: {found}.", f"The {manifest.kind} was damaged after it was written: make it again."
                )
        return manifest

    def identity(self) -> str:
        """XXH3-128 (hex) of what the directory holds: kind and the digests of its files."""
        return xxhash.xxh3_128_hexdigest(json.dumps([self.kind, self.files], sort_keys=True).encode())

    def verify(self, directory: Path) -> list[str]:
        """Hash every file again; return the names whose content differs from the manifest."""
        return [name for name, facts in self.files.items() if digest_file(directory / name) != facts["xxh3"]]


@dataclass
class Draft:
    """A trtx directory while it is being written.

    Attributes:
        path: where to write files. It becomes the target when the `create` block ends without an error.
    """

    path: Path
    digests: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, digest: str) -> None:
        """Note the XXH3-128 of a file that was hashed while it was written, so that it is not read again."""
        self.digests[name] = digest

    def describe(self, **facts: Any) -> None:
        """Add facts to the manifest's `about`."""
        self.about.update(facts)

    def write_json(self, name: str, content: Any) -> None:
        """Write a small JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy(self, source: Path, names: Sequence[str]) -> None:
        """Copy those of the small files `names` that `source` has."""
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, self.path / name)


def now() -> str:
    """The time, as it is written into files: in UTC, by ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@contextlib.contextmanager
def create(
    target: Path,
    *,
    kind: str,
    command: str,
    settings: Mapping[str, Any],
    inputs: Sequence[dict[str, Any]] = (),
    versions: Mapping[str, str] | None = None,
    force: bool = False,
) -> Iterator[Draft]:
    """Write a trtx directory: all of it appears at `target` when the block ends, or nothing does.

    Args:
        force: replace a target that exists. The old one stays until the new one is complete.

    Raises:
        OutputError: the target exists (without `force`), the disk is full, or the folder can't be written.
    """
    refuse_target(target, force)
    target = Path(os.path.realpath(target))  # a link stays a link: what it points to is replaced
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary, lock = _make_locked(target)
    draft = Draft(temporary)
    try:
        with writing(target):
            yield draft
            manifest = Manifest(
                kind=kind,
                command=command,
                settings=dict(settings),
                inputs=list(inputs),
                versions={"trtx": __version__, "python": platform.python_version(), **(versions or {})},
                created=now(),
                files=_list_files(draft),
                about=draft.about,
            )
            draft.write_json(MANIFEST, vars(manifest))
            _sync(temporary)
            _put_in_place(temporary, target, force)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def digest_file(path: Path) -> str:
    """XXH3-128 of a file, as hex."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def write_hashed(file: BinaryIO, data: memoryview, hasher: xxhash.xxh3_128) -> None:
    """Write `data` and hash it in pieces that stay in the CPU's cache between the two."""
    for start in range(0, len(data), _CHUNK):
        piece = data[start : start + _CHUNK]
        hasher.update(piece)
        file.write(piece)


def identify(path: Path) -> dict[str, Any]:
    """Say what an input is, cheaply: a trtx directory by its digests, anything else by its files' sizes and times."""
    path = Path(os.path.abspath(path))
    if (path / MANIFEST).is_file():
        return {"path": str(path), "identity": Manifest.read(path).identity()}
    inside = [path] if path.is_file() else path.iterdir()
    files = sorted(p for p in inside if p.is_file() and not p.name.startswith("."))
    facts = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return {"path": str(path), "identity": xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())}


def refuse_target(target: Path, force: bool) -> None:
    """Refuse a target that `create` would refuse, before any work is done.

    Raises:
        OutputError: it exists (without `force`), or is no trtx directory.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise OutputError(f"{target}: exists already.", "Give another folder, or --force to replace it.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise OutputError(
            f"{target}: is not a trtx directory, so --force will not replace it.",
            "Move it away or give another folder.",
        )


def _make_locked(target: Path) -> tuple[Path, int]:
    """A temporary folder beside the target and the descriptor that locks it while this process lives."""
    # Locked before it has the name that another writer's sweep looks for.
    token = secrets.token_hex(4)
    unlocked = target.parent / f".{token}.trtx-new"
    unlocked.mkdir()
    lock = os.open(unlocked, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return unlocked.rename(target.parent / f".{target.name}.trtx-{token}"), lock


def _sweep(target: Path) -> None:
    """Remove temporaries of this target whose writer died: their lock is free."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.trtx-*"):
        with contextlib.suppress(OSError):
            lock = os.open(stale, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
            finally:
                os.close(lock)


def _list_files(draft: Draft) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in draft.path.rglob("*") if p.is_file()):
        name = path.relative_to(draft.path).as_posix()
        files[name] = {"bytes": path.stat().st_size, "xxh3": draft.digests.get(name) or digest_file(path)}
    return files


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path, force: bool) -> None:
    if not target.exists():
        temporary.rename(target)
    elif not force:
        raise OutputError(f"{target}: appeared while it was being made.", "Give another folder, or --force.")
    elif not _exchange(temporary, target):
        # No atomic exchange on this file system: the target is absent for a moment, never half there.
        aside = temporary.with_name(temporary.name + "-old")
        target.rename(aside)
        temporary.rename(target)
        shutil.rmtree(aside)
    _fsync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step (Linux `renameat2`); the caller deletes what is now at `a`."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _what_it_is(directory: Path) -> str:
    if not directory.exists():
        return "no such folder."
    if directory.is_file():
        return "is a file, and this command reads a folder written by trtx."
    if (directory / "config.json").is_file():
        return "is a Hugging Face checkpoint, not a trtx directory."
    return "is not a trtx directory (no manifest.json)."


def _what_to_do(directory: Path, kind: str | None) -> str:
    if directory.suffix == ".gguf" or (directory / "config.json").is_file():
        return f"Convert it first: trtx convert {directory} OUT"
    return {
        "checkpoint": "Give a folder written by `trtx convert` or `trtx quantize`.",
        "engine": "Give a folder written by `trtx build`.",
        None: "Give a folder written by `trtx convert`, `trtx quantize` or `trtx build`.",
    }[kind]
