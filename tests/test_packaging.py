"""What is shipped: a wheel, also one made of the sdist, holds the packages' files in git, no more and no fewer."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from trtx import __version__

ROOT = Path(__file__).parent.parent
ROOMS = ("builder", "cli", "converters", "quantize", "recipes", "runtime")


def git_files():
    """Files that git tracks or would track: nothing that it ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in names if (ROOT / name).is_file() or (ROOT / name).is_symlink()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, so that the build leaves nothing in the tree and finds nothing stale in it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    copy = tmp_path_factory.mktemp("checkout")
    for name in git_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def build(kind, source, out):
    """Build a wheel or an sdist with the build backend that pip would call."""
    program = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, check=True)
    (built,) = out.iterdir()
    return built


def packaged(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("trtx/")}


def expected():
    rooms = {f"trtx/{name}" for name in git_files() if name.split("/")[0] in ROOMS}
    return rooms | {"trtx/__init__.py", "trtx/py.typed"}


@pytest.mark.slow
def test_wheel_holds_what_git_holds(checkout, tmp_path):
    wheel = build("wheel", checkout, tmp_path)
    assert wheel.name == f"trtx-{__version__}-py3-none-any.whl"
    assert packaged(wheel) == expected()


@pytest.mark.slow
def test_wheel_of_the_sdist_is_the_same(checkout, tmp_path):
    out, unpacked, again = (tmp_path / name for name in ("sdist", "unpacked", "wheel"))
    for folder in (out, again):
        folder.mkdir()
    with tarfile.open(build("sdist", checkout, out)) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    assert packaged(build("wheel", source, again)) == expected()
