"""Directories that are complete or not there: also when the writer is killed, or the disk is full."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from trtx.converters import artifact
from trtx.converters.artifact import MANIFEST, Draft, Manifest, create, digest_file, identify
from trtx.converters.errors import InputError, OutputError


def make(target: Path, content: str = "weights", **settings: Any) -> None:
    with create(target, kind="checkpoint", command="convert", settings={}, **settings) as draft:
        (draft.path / "data.bin").write_text(content)
        draft.describe(parameters=7)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_directory_is_complete(tmp_path: Path) -> None:
    make(tmp_path / "new/out")
    manifest = Manifest.read(tmp_path / "new/out", "checkpoint")
    assert manifest.files == {"data.bin": {"bytes": 7, "xxh3": xxhash.xxh3_128_hexdigest(b"weights")}}
    assert manifest.about == {"parameters": 7}
    assert manifest.verify(tmp_path / "new/out") == []
    assert names(tmp_path / "new") == ["out"]
    assert names(tmp_path / "new/out") == ["data.bin", MANIFEST]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        create(tmp_path / "out", kind="checkpoint", command="convert", settings={}) as draft,
    ):
        (draft.path / "data.bin").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_digest_that_was_recorded_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "digest_file", lambda path: pytest.fail(f"{path} was read again"))
    with create(tmp_path / "out", kind="checkpoint", command="convert", settings={}) as draft:
        (draft.path / "data.bin").write_text("x")
        draft.record("data.bin", "0" * 32)
    assert Manifest.read(tmp_path / "out").files["data.bin"]["xxh3"] == "0" * 32


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "out", "new")
    assert (tmp_path / "out/data.bin").read_text() == "old"
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/data.bin").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_keeps_the_old_one_until_the_new_one_is_complete(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with create(tmp_path / "out", kind="checkpoint", command="convert", settings={}, force=True) as draft:
        (draft.path / "data.bin").write_text("new")
        assert (tmp_path / "out/data.bin").read_text() == "old"
        Manifest.read(tmp_path / "out")
    assert (tmp_path / "out/data.bin").read_text() == "new"


def test_force_works_where_directories_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/data.bin").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder of something else", "file", "dangling link"])
def test_force_replaces_trtx_directories_only(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("precious")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("precious")
    before = names(tmp_path)
    with pytest.raises(OutputError, match="not a trtx directory"):
        make(target, force=True)
    assert names(tmp_path) == before


def test_force_replaces_what_a_link_points_to(tmp_path: Path) -> None:
    make(tmp_path / "version-1", "old")
    (tmp_path / "current").symlink_to("version-1")
    make(tmp_path / "current", "new", force=True)
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "version-1/data.bin").read_text() == "new"
    assert names(tmp_path) == ["current", "version-1"]


def test_force_may_fill_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", force=True)
    Manifest.read(tmp_path / "out")


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="appeared"),
        create(tmp_path / "out", kind="checkpoint", command="convert", settings={}),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other").write_text("")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["other"]


def test_stale_temporaries_are_swept_and_live_ones_kept(tmp_path: Path) -> None:
    stale = tmp_path / ".out.trtx-00000000"
    other = tmp_path / ".another.trtx-00000000"
    for folder in (stale, other):
        folder.mkdir()
        (folder / "data.bin").write_text("left by a writer that died")
    with create(tmp_path / "out", kind="checkpoint", command="convert", settings={}) as live:
        assert not stale.exists()
        make(tmp_path / "out")
        assert live.path.exists()
        (tmp_path / "out").rename(tmp_path / "second")
    assert names(tmp_path) == [other.name, "out", "second"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing(tmp_path: Path, code: int) -> None:
    def fill(draft: Draft) -> None:
        (draft.path / "data.bin").write_text("half")
        raise OSError(code, os.strerror(code))

    with (
        pytest.raises(OutputError, match="disk is full") as caught,
        create(tmp_path / "out", kind="checkpoint", command="convert", settings={}) as draft,
    ):
        fill(draft)
    assert str(tmp_path / "out") in caught.value.cause
    assert names(tmp_path) == []


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    """Under a limit on file sizes, writes fail for real in the middle of a file."""
    script = f"""
        import resource, signal
        from pathlib import Path
        from trtx.converters.artifact import create
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, {resource.RLIM_INFINITY}))
        with create(Path({str(tmp_path / "out")!r}), kind="checkpoint", command="convert", settings={{}}) as draft:
            (draft.path / "data.bin").write_bytes(bytes(2 << 20))
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert finished.returncode != 0
    assert "File too large" in finished.stderr
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="can't be written"):
        make(tmp_path / "out")


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_where_a_folder_is_needed_is_an_output_error(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="can't be written"):
        make(tmp_path / "file" / inside / "out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    """SIGKILL at random moments: the target is complete or absent, and the next run cleans up."""
    from . import tiny

    tiny.save(tmp_path / "hf", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from trtx.converters.convert import convert\n"
        "print('go', flush=True)\n"
        "while True: convert(sys.argv[1], Path(sys.argv[2]), force=True, shard_bytes=1 << 20)\n"
    )
    out = tmp_path / "out"
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "hf"), str(out)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0.01, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert Manifest.read(out, "checkpoint").verify(out) == []
    make(out, force=True)
    assert names(tmp_path) == ["hf", "out"]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def damage_missing(out: Path) -> None:
    (out / "data.bin").unlink()


def damage_short(out: Path) -> None:
    (out / "data.bin").write_text("weigh")


def damage_manifest(out: Path) -> None:
    (out / MANIFEST).write_text('{"kind": ')


def damage_manifest_keys(out: Path) -> None:
    (out / MANIFEST).write_text('{"kind": "checkpoint"}')


def damage_format(out: Path) -> None:
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text.replace('"format": 1', '"format": 99, "field_of_later": 0'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing, "data.bin: is missing"),
        (damage_short, "data.bin: has 5 bytes instead of 7"),
        (damage_manifest, "not a trtx manifest"),
        (damage_manifest_keys, "not a trtx manifest"),
        (damage_format, "manifest format 99"),
    ],
)
def test_a_damaged_directory_is_named(tmp_path: Path, damage: Any, words: str) -> None:
    make(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=words):
        Manifest.read(tmp_path / "out")


def test_verify_finds_what_has_the_right_size(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out/data.bin").write_text("WEIGHTS")
    assert Manifest.read(tmp_path / "out").verify(tmp_path / "out") == ["data.bin"]


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Manifest.read(tmp_path / "none")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    with pytest.raises(InputError, match="Hugging Face checkpoint") as caught:
        Manifest.read(tmp_path / "hf", "checkpoint")
    assert "trtx convert" in caught.value.remedy
    make(tmp_path / "out")
    with pytest.raises(InputError, match="is a trtx checkpoint, and this command reads a trtx engine"):
        Manifest.read(tmp_path / "out", "engine")


def test_identity_changes_with_the_content(tmp_path: Path) -> None:
    make(tmp_path / "a", "x")
    make(tmp_path / "b", "x")
    make(tmp_path / "c", "y")
    a, b, c = (Manifest.read(tmp_path / name).identity() for name in "abc")
    assert a == b != c
    assert identify(tmp_path / "a")["identity"] == a
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/file").write_text("x")
    before = identify(tmp_path / "plain")
    assert before == identify(tmp_path / "plain")
    (tmp_path / "plain/file").write_text("longer")
    assert before != identify(tmp_path / "plain")


def test_digest_is_xxh3(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert digest_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(b"abc" * 1000)
