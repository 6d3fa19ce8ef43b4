"""Recipes are read strictly, and errors name the file and the line."""

import pytest

from trtx import recipes
from trtx.converters.errors import InputError
from trtx.recipes import Recipe


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def values(content):
    return {stage: {key: s.values for key, s in section.items()} for stage, section in content.stages.items()}


def test_values_are_kept_as_written_and_stages_in_order(recipe):
    content = Recipe.read(
        recipe("bench:\n  rate: 1e-3\nconvert:\n  revision: 010\n  check: true\nrun:\n  stop: [a, ' b']\n")
    )
    assert values(content) == {
        "convert": {"revision": ("010",), "check": ("true",)},
        "run": {"stop": ("a", " b")},
        "bench": {"rate": ("1e-3",)},
    }
    assert list(content.stages) == ["convert", "run", "bench"]


@pytest.mark.parametrize(
    ("text", "place", "about"),
    [
        ("convert:\n  source: a\nquantise:\n  format: fp8\n", ":3", "quantise"),
        ("convert:\n  source: a\n  source: b\n", ":3", "twice"),
        ("convert:\n  source:\n", ":2", "a value"),
        ("convert:\n  source: {a: b}\n", ":2", "a value"),
        ("convert: a\n", ":1", "keys and values"),
        ("- convert\n", ":1", "keys and values"),
        ("convert: [\n", "", "not YAML"),
        ("", "", "empty"),
    ],
)
def test_what_is_wrong_is_named(recipe, text, place, about):
    path = recipe(text)
    with pytest.raises(InputError) as raised:
        Recipe.read(path)
    assert f"{path}{place}:" in raised.value.cause
    assert about in raised.value.cause
    assert raised.value.remedy


def test_assign(recipe):
    content = Recipe.read(recipe("build:\n  gpu: cpu\n"))
    content.assign("build.gpu=h100-sxm")
    content.assign("convert.source=a=b")
    content.assign("run.stop=[x, y]")
    assert values(content) == {
        "convert": {"source": ("a=b",)},
        "build": {"gpu": ("h100-sxm",)},
        "run": {"stop": ("x", "y")},
    }


@pytest.mark.parametrize("assignment", ["build", "build=cpu", "build.gpu", "built.gpu=cpu", "build.gpu=", "build.=cpu"])
def test_assign_refuses(recipe, assignment):
    with pytest.raises(InputError, match="--set"):
        Recipe.read(recipe("build:\n  gpu: cpu\n")).assign(assignment)


def test_find(recipe, monkeypatch):
    path = recipe("build:\n  gpu: cpu\n")
    assert recipes.find(str(path)) == path
    for name, shipped in recipes.shipped().items():
        assert recipes.find(name) == shipped
        assert Recipe.read(shipped).description
    with pytest.raises(InputError, match="no such file"):
        recipes.find("nothing")
