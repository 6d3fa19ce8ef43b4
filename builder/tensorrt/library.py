"""The two TensorRT modules: which is here, what it can build for, and its messages as our errors."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtx.converters.errors import MissingPackageError, UnsupportedError


@dataclass(frozen=True)
class Flavor:
    """One of the two modules.

    Attributes:
        backend: its name for `trtx build --backend`.
        module: what Python imports.
        package: what pip installs.
        minimum: the first major version that has the layers used here; None: any.
    """

    backend: str
    module: str
    package: str
    minimum: int | None


FLAVORS = {
    "tensorrt": Flavor("tensorrt", "tensorrt", "tensorrt>=11", 11),
    "tensorrt-rtx": Flavor("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu13", None),
}

_DRIVERLESS = "catchCudaError"
"""In messages about the missing driver, which building for another machine does not need."""


@cache
def load(flavor: Flavor) -> Any:
    """The module.

    Raises:
        MissingPackageError: it is not installed.
        UnsupportedError: it is too old.
    """
    try:
        module = importlib.import_module(flavor.module)
    except ImportError as error:
        raise MissingPackageError(
            f"--backend {flavor.backend}: the Python module {flavor.module!r} can't be imported ({error}).",
            f"Install it: pip install '{flavor.package}'",
        ) from error
    if flavor.minimum is not None and int(module.__version__.split(".")[0]) < flavor.minimum:
        raise UnsupportedError(
            f"--backend {flavor.backend}: {flavor.module} {module.__version__} lacks the layers that trtx builds with.",
            f"Install a newer one: pip install '{flavor.package}'",
        )
    return module


def is_here(flavor: Flavor) -> bool:
    """Whether the module can be imported."""
    try:
        load(flavor)
    except (MissingPackageError, UnsupportedError):
        return False
    return True


def targets(flavor: Flavor) -> list[str]:
    """Compute capabilities that the module builds for on any machine; none where it builds for the GPU at hand."""
    capabilities = getattr(load(flavor), "ComputeCapability", None)
    names = [name.removeprefix("SM") for name in dir(capabilities) if name.startswith("SM")]
    return sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=float)


class Messages:
    """Collects what TensorRT says. Its logger is one for the whole process, so this is too; see `messages`."""

    def __init__(self, trt: Any) -> None:
        collected = self.errors = list[str]()

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR and _DRIVERLESS not in message:
                    collected.append(message.strip())

        self.logger = Logger()

    def take(self) -> list[str]:
        """The errors since the last call."""
        found = list(self.errors)
        self.errors.clear()
        return found


@cache
def messages(flavor: Flavor) -> Messages:
    """The module's messages."""
    return Messages(load(flavor))


def refusal(what: str, errors: list[str]) -> UnsupportedError:
    """The error for a layer or an engine that TensorRT does not make."""
    said = "; ".join(dict.fromkeys(errors)) or "it gave no reason"
    return UnsupportedError(
        f"TensorRT refuses {what}: {said}",
        "Use another --backend or --dtype, or another quantization; `trtx build` names the combinations it knows.",
    )
