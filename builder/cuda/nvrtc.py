"""Kernels in CUDA C++ to machine code: by NVRTC, NVIDIA's compiler as a library, which needs no GPU and no toolkit."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from trtx.runtime.cuda.launch import HOPPER, Constant, Variant

OLDEST = 12, 8
"""The version that first knew every compute capability which kernels are compiled for."""


def has_hopper(sm: str) -> bool:
    """Whether kernels of compute capability 9.0 alone (`HOPPER`) are compiled for one, and launched there."""
    return sm == "9.0" and bool(nvrtc_version())


@cache
def nvrtc_version() -> str:
    """The version of NVRTC; empty where none can be loaded, or one too old.

    It comes with torch for CUDA, or as nvidia-cuda-nvrtc.
    """
    try:
        from cuda.bindings import nvrtc

        version = checked(nvrtc.nvrtcVersion())
    except (ImportError, RuntimeError):  # no cuda-bindings, no library
        return ""
    return ".".join(map(str, version)) if tuple(version) >= OLDEST else ""


def source(variant: Variant) -> str:
    """What is compiled: the kernel's file with those that it includes, its constants defined before it.

    Constants that are None or empty are left undefined.
    """
    constants = {**dict(variant.constants), "WARPS": variant.warps}
    defined = [f"#define {name} {_literal(value)}" for name, value in constants.items() if value not in (None, "")]
    return "\n".join([*defined, *_lines(f"{variant.function}.cu")])


def compile_native(variant: Variant, sm: str, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Machine code of a kernel for a compute capability ('9.0'), and what NVRTC says of it.

    Args:
        options: more of NVRTC's.

    Raises:
        RuntimeError: it does not compile.
    """
    from cuda.bindings import nvrtc

    target = f"sm_{sm.replace('.', '')}" + ("a" if variant.kernel in HOPPER else "")
    program = checked(nvrtc.nvrtcCreateProgram(source(variant).encode(), variant.function.encode(), 0, [], []))
    try:
        chosen = [option.encode() for option in (f"--gpu-architecture={target}", *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(chosen), chosen)
        # NVRTC writes into these bytes. An empty log is one zero, and Python has one object for all bytes of length 1.
        log = bytes(checked(nvrtc.nvrtcGetProgramLogSize(program)))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0").decode()
        if int(status):
            raise RuntimeError(text)
        code = bytes(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code, text
    finally:
        checked(nvrtc.nvrtcDestroyProgram(program))


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of NVRTC, or its values.

    Raises:
        RuntimeError: the call failed.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if len(values) == 1 else values


def _lines(name: str) -> list[str]:
    """A file beside the kernels, with what it includes in place."""
    lines = [f'#line 1 "{name}"']
    text = (files("trtx.runtime.kernels") / name).read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), 1):
        directive, _, rest = line.partition(" ")
        lines += [*_lines(rest.strip('"')), f'#line {number + 1} "{name}"'] if directive == "#include" else [line]
    return lines


def _literal(value: Constant) -> str:
    """A constant in C++: strings are the names of enumerators."""
    if isinstance(value, bool):
        return str(int(value))
    return f"{value!r}f" if isinstance(value, float) else str(value)
