"""trtx: from a Hugging Face checkpoint to a quantized, GPU-specific engine that runs and is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "TrtxError", "__version__"]

if TYPE_CHECKING:
    from trtx.converters.errors import TrtxError
    from trtx.runtime.llm import LLM
    from trtx.runtime.sampling import SamplingParams

_HOMES = {
    "LLM": "trtx.runtime.llm",
    "SamplingParams": "trtx.runtime.sampling",
    "TrtxError": "trtx.converters.errors",
}


def __getattr__(name: str) -> Any:
    """Import the top-level names on first use: `import trtx` alone must not load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trtx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
