"""Recipes: a model, its quantization, a GPU and a workload, as one YAML file. `trtx make` runs them.

A recipe has a section for each stage of the chain. Its keys are the arguments and options of that command, without the
dashes:

    description: Llama-3.1-8B in FP8 on one H100
    convert:
      source: meta-llama/Llama-3.1-8B-Instruct
    quantize:
      format: fp8
    build:
      gpu: h100-sxm
    bench:
      concurrency: 64

Values are kept as they are written, because the command's own parser reads them: `1e-3` stays '1e-3'.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from trtx.converters.errors import InputError

STAGES = ("convert", "quantize", "build", "run", "bench")
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class Setting:
    """One key of a stage.

    Attributes:
        values: as written; more than one for a list.
        where: 'FILE:LINE', for errors.
    """

    values: tuple[str, ...]
    where: str


@dataclass
class Recipe:
    """A recipe as read, with its stages in the order of the chain.

    Attributes:
        stages: stage → key → setting.
    """

    path: Path
    description: str = ""
    stages: dict[str, dict[str, Setting]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe, strictly.

        Raises:
            InputError: not YAML, an unknown stage, a key given twice, or a key without a value; names file and line.
        """
        recipe = cls(path)
        found: dict[str, dict[str, Setting]] = {}
        for name, (node, where) in _entries(_compose(path), str(path)).items():
            if name == "description":
                (recipe.description,) = _setting(node, where).values
            elif name in STAGES:
                entries = _entries(node, str(path)).items()
                found[name] = {key: _setting(value, line) for key, (value, line) in entries}
            else:
                raise InputError(f"{where}: unknown stage {name!r}.", f"Known stages: {', '.join(STAGES)}.")
        recipe.stages = {name: found[name] for name in STAGES if name in found}
        return recipe

    def assign(self, assignment: str) -> None:
        """Set or replace one key: 'STAGE.KEY=VALUE', VALUE as in YAML.

        Raises:
            InputError: not of that form.
        """
        where = f"--set {assignment}"
        name, equals, value = assignment.partition("=")
        stage, dot, key = name.partition(".")
        if not (equals and dot and key and stage in STAGES):
            raise InputError(f"{where}: not of the form STAGE.KEY=VALUE.", f"Known stages: {', '.join(STAGES)}.")
        self.stages.setdefault(stage, {})[key] = _setting(yaml.compose(value, yaml.SafeLoader), where)
        self.stages = {name: self.stages[name] for name in STAGES if name in self.stages}


def shipped() -> dict[str, Path]:
    """The recipes that come with trtx, by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        InputError: neither.
    """
    known = shipped()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise InputError(f"{name}: no such file and no shipped recipe.", f"Shipped recipes: {', '.join(known)}.")


def _compose(path: Path) -> yaml.Node:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error}).", "Correct the file.") from error
    if node is None:
        raise InputError(f"{path}: is empty.", f"Give it a section a stage: {', '.join(STAGES)}.")
    return node


def _entries(node: yaml.Node, file: str) -> dict[str, tuple[yaml.Node, str]]:
    """The keys of a mapping with their values and their places; a key given twice is an error."""
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{_where(node, file)}: expected keys and values.", "Write each option as `key: value`.")
    entries: dict[str, tuple[yaml.Node, str]] = {}
    for key, value in node.value:
        where = _where(key, file)
        if key.value in entries:
            raise InputError(f"{where}: key {key.value!r} is given twice.", "Keep one of them.")
        entries[key.value] = (value, where)
    return entries


def _setting(node: yaml.Node | None, where: str) -> Setting:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    values = tuple(item.value for item in items if isinstance(item, yaml.ScalarNode) and item.tag != _NULL)
    if len(values) < len(items):
        raise InputError(f"{where}: expected a value or a list of values.", "Give one, or leave the key out.")
    return Setting(values, where)


def _where(node: yaml.Node, file: str) -> str:
    return f"{file}:{node.start_mark.line + 1}"
