"""Hugging Face checkpoints: a folder, or an id on the hub."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtx.converters.artifact import Draft, identify
from trtx.converters.checkpoint import Dtype
from trtx.converters.errors import InputError, NetworkError, UnsupportedError
from trtx.converters.hf_config import read_json_object
from trtx.converters.shards import Header, Headers, Shards
from trtx.converters.tokenizer_files import TOKENIZER_SOURCES, copy_tokenizer

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"


class FolderSource:
    """A folder with config.json and weights; see `trtx.converters.sources.Source`.

    The weights are `model.safetensors` or `pytorch_model.bin`, in one file or in the shards that an index lists.

    Raises:
        InputError: there is no config.json or no weights, or a file is missing or damaged.
    """

    canonical: bool = False
    default_dtype: Dtype | None = None
    config: Mapping[str, Any]

    def __init__(self, folder: Path, provenance: dict[str, Any] | None = None) -> None:
        self.config_name = str(folder / "config.json")
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder}: holds no config.json, so it is no Hugging Face checkpoint.",
                "Give the folder that `huggingface-cli download` or `save_pretrained` wrote.",
            )
        self.config = read_json_object(folder / "config.json")
        self.provenance = provenance or {"kind": "folder", "path": str(folder.absolute())}
        self.identity = identify(folder)
        self._folder = folder
        self._store = _open_weights(folder)
        self.headers: Mapping[str, Header] = self._store

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        tensor = self._store.tensor(name)
        return tensor if index is None else tensor[index]

    def write_tokenizer(self, draft: Draft) -> list[str]:
        return copy_tokenizer(self._folder, draft, self.config)


class BinShards(Headers):
    """The tensors of `torch.save` files, mapped. Only tensors are unpickled (`weights_only`), never code.

    Raises:
        InputError: a file is missing, truncated, holds code or something else than tensors.
        UnsupportedError: a file in the format of torch before 1.6, which can't be mapped.
    """

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load_bin(file).items():
                if not isinstance(tensor, Tensor):
                    raise InputError(f"{file}: {name!r} is no tensor.", "Give a checkpoint saved from a state dict.")
                self._tensors[name] = tensor
                self._headers[name] = Header(tensor.dtype, tuple(tensor.shape), file)

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped from the file."""
        return self._tensors[name]


def _load_bin(file: Path) -> dict[str, Any]:
    remedy = "Download or copy it again; it may be cut short."
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file.", "Download the checkpoint again; a shard is missing.") from None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: holds more than tensors ({_first_line(error)}); trtx runs no code from a checkpoint.",
            "Save it as safetensors, on a machine where you trust it.",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        if "_use_new_zipfile_serialization" in str(error):
            raise UnsupportedError(
                f"{file}: not a zip file, as torch.save writes since 1.6.",
                "If it is an older file, load and save it again; if it was cut short, download it again.",
            ) from error
        raise InputError(f"{file}: can't be read ({_first_line(error)}).", remedy) from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors.", remedy)
    return content


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _open_weights(folder: Path) -> Shards | BinShards:
    for name, store in ((SAFETENSORS, Shards), (BIN, BinShards)):
        if (folder / (name + _INDEX)).is_file():
            return _open_index(folder / (name + _INDEX), store)
        if (folder / name).is_file():
            return store([folder / name])
    raise InputError(
        f"{folder}: holds no weights ({SAFETENSORS} or {BIN}, or an index of shards).", "Download the checkpoint again."
    )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor → file beside the index."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index}: has no 'weight_map' from tensors to files.", "Download the checkpoint again.")
    for file in set(weight_map.values()):
        if Path(file).name != file:
            raise InputError(
                f"{index}: names {file!r}, which is not a file beside it.", "Do not trust this checkpoint."
            )
    return weight_map


def _open_index(index: Path, store: type[Shards] | type[BinShards]) -> Shards | BinShards:
    weight_map = _read_weight_map(index)
    shards = store([index.parent / file for file in sorted(set(weight_map.values()))])
    if absent := sorted(weight_map.keys() - shards.keys()):
        raise InputError(
            f"{index}: lists tensor {absent[0]!r}, which {weight_map[absent[0]]} does not hold.",
            "Download the checkpoint again.",
        )
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Without weights


@dataclass(frozen=True)
class Outline:
    """What a folder with a config.json and no weights tells.

    Attributes:
        config, config_name, provenance: as of `trtx.converters.sources.Source`.
        index: of the shards, which are not there; None: there is no index.
        names: of the stored tensors, from the index.
        total_size: bytes of all stored tensors, from the index.
        total_parameters: parameters of the model that was saved, from the index.
    """

    config: Mapping[str, Any]
    config_name: str
    provenance: dict[str, Any]
    index: Path | None = None
    names: tuple[str, ...] = ()
    total_size: int | None = None
    total_parameters: int | None = None


def read_outline(folder: Path) -> Outline | None:
    """What a folder without weights tells; None: a weight file is there, or no config.json.

    Raises:
        InputError: the config.json or the index is damaged.
    """
    indices = [folder / (name + _INDEX) for name in (SAFETENSORS, BIN) if (folder / (name + _INDEX)).is_file()]
    maps = [_read_weight_map(index) for index in indices]
    files = {SAFETENSORS, BIN}.union(*(weight_map.values() for weight_map in maps))
    path = folder / "config.json"
    if not path.is_file() or any((folder / file).exists() for file in files):
        return None
    outline = Outline(read_json_object(path), str(path), {"kind": "folder", "path": str(folder.absolute())})
    if not indices:
        return outline
    return replace(
        outline,
        index=indices[0],
        names=tuple(maps[0]),
        total_size=_read_total(indices[0], "total_size"),
        total_parameters=_read_total(indices[0], "total_parameters"),
    )


@dataclass(frozen=True)
class Sizes:
    """What a model's tensors take in a file, as far as the config tells: each kind may be in 16 or in 32 bits.

    Attributes:
        kinds: number of elements by kind of tensor.
        fixed: bytes of quantized values.
        scales: number of their scales, all of one dtype of 8, 16 or 32 bits.
    """

    kinds: Mapping[str, int]
    fixed: int = 0
    scales: int = 0

    @property
    def elements(self) -> int:
        """Of the tensors that are not quantized."""
        return sum(self.kinds.values())

    @property
    def least(self) -> int:
        """Fewest bytes that all of it can take."""
        return self.fixed + self.scales + 2 * self.elements

    def wide(self, total: int) -> tuple[str, ...] | None:
        """The kinds that are in 32 bits if all of it takes `total` bytes; None: no choice of them gives that."""
        found: list[tuple[str, ...]] = []
        for width in (4, 2, 1) if self.scales else (0,):
            excess, odd = divmod(total - self.fixed - self.scales * width - 2 * self.elements, 2)
            chosen = None if odd else _choose(self.kinds, excess)
            if chosen is not None:
                found.append(chosen)
        return min(found, key=len, default=None)


def _choose(kinds: Mapping[str, int], total: int) -> tuple[str, ...] | None:
    """Kinds whose elements sum to `total`: each sum of one half of them is looked for among those of the other."""
    if total == sum(kinds.values()):
        return tuple(kinds)
    names = list(kinds)
    left, right = _sums(kinds, names[::2]), _sums(kinds, names[1::2])
    found = [chosen + right[total - part] for part, chosen in left.items() if total - part in right]
    return min(found, key=len, default=None)


def _sums(kinds: Mapping[str, int], names: list[str]) -> dict[int, tuple[str, ...]]:
    sums: dict[int, tuple[str, ...]] = {0: ()}
    for name in names:
        for part, chosen in list(sums.items()):
            sums.setdefault(part + kinds[name], (*chosen, name))
    return sums


def _read_total(index: Path, key: str) -> int | None:
    metadata = read_json_object(index).get("metadata") or {}
    value = metadata.get(key) if isinstance(metadata, dict) else metadata
    if value is None:
        return None
    if type(value) not in (int, float) or not float(value).is_integer():  # some writers give 2.0
        raise InputError(f"{index}: {key!r} is {value!r}; expected a whole number.", "Download it again.")
    return int(value)


# ---------------------------------------------------------------------------------------------------------------------
# The hub


class HubHeaders:
    """A checkpoint on the hub of which only config and headers were fetched; see `trtx.converters.sources.Source`."""

    canonical: bool = False
    default_dtype: Dtype | None = None
    config: Mapping[str, Any]

    def __init__(self, config: Path, headers: Mapping[str, Header], provenance: dict[str, Any]) -> None:
        self.config = read_json_object(config)
        self.config_name = f"{provenance['id']}/config.json"
        self.headers = headers
        self.provenance = provenance
        self.identity = {"path": f"hub:{provenance['id']}", "identity": provenance["revision"]}

    def tensor(self, name: str, index: int | None = None) -> Tensor:
        raise AssertionError(f"{name}: only headers were fetched")

    def write_tokenizer(self, draft: Draft) -> list[str]:
        raise AssertionError("only headers were fetched")


def open_hub(model: str, revision: str | None, headers_only: bool) -> FolderSource | HubHeaders:
    """Fetch a model from the Hugging Face hub (or take it from the hub's cache) and open it.

    Only what conversion needs is downloaded: config, tokenizer and one set of weights. With `headers_only` the weights
    stay there; their headers are read by range requests.

    Raises:
        NetworkError: no such model or revision, it is gated, or the hub can't be reached.
    """
    import huggingface_hub as hub

    def fetch(*patterns: str) -> Path:
        return Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(patterns)))

    with _hub_errors(model, revision):
        folder = fetch("config.json", *TOKENIZER_SOURCES, SAFETENSORS + _INDEX, BIN + _INDEX)
        provenance = {"kind": "hub", "id": model, "revision": folder.name}
        if not (folder / "config.json").is_file():
            raise InputError(f"{model}: has no config.json on the hub.", "Give the id of a language model.")
        if headers_only:
            return HubHeaders(folder / "config.json", _remote_headers(model, folder.name), provenance)
        fetch(*_weight_files(folder, fetch))
    return FolderSource(folder, provenance)


def _weight_files(folder: Path, fetch: Any) -> list[str]:
    """Names of the weight files to download: those of the index, or the single file there is."""
    for name in (SAFETENSORS, BIN):
        index = folder / (name + _INDEX)
        if index.is_file():
            return sorted(set(read_json_object(index).get("weight_map", {}).values()))
        fetch(name)
        if (folder / name).is_file():
            return [name]
    return []


def _remote_headers(model: str, revision: str) -> dict[str, Header]:
    import huggingface_hub as hub

    metadata = hub.get_safetensors_metadata(model, revision=revision)
    return {
        name: Header.parse(info.dtype, info.shape, name, Path(file))
        for file, content in metadata.files_metadata.items()
        for name, info in content.tensors.items()
    }


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say what the hub's errors mean and what to do about them."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise NetworkError(
            f"{model}: is gated on the hub, and your account has no access.",
            f"Accept its terms at https://huggingface.co/{model} and log in with `hf auth login`, or set HF_TOKEN.",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise NetworkError(
            f"{model}: has no revision {revision!r} on the hub.", "Give a branch, tag or commit."
        ) from error
    except hub.NotASafetensorsRepoError as error:
        raise UnsupportedError(
            f"{model}: has no safetensors on the hub, so its headers can't be read from afar.",
            "Convert it without --check, or download it and check the folder.",
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        raise NetworkError(
            f"{model}: is no folder here, not in the hub's cache, and the hub can't be reached ({_first_line(error)}).",
            "Check the network (or unset HF_HUB_OFFLINE), or download the model elsewhere and give the folder.",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise NetworkError(
            f"{model}: is no folder here and no model on the hub, or it is private.",
            "Check the name; for a private model log in with `hf auth login`, or set HF_TOKEN.",
        ) from error
    except (hub.HfHubHTTPError, hub.HTTPError, hub.HFValidationError) as error:
        raise NetworkError(f"{model}: the hub refused ({_first_line(error)}).", "Try again later.") from error
