"""Compiles kernels in a process of its own: variants as JSON on standard input, machine code as JSON lines on output.

Triton looks at its environment when it is imported, and `multiprocessing` would run the caller's script again.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from trtx.builder.cuda.nvrtc import compile_native
from trtx.runtime.cuda.launch import Variant

ALIGNMENT = 16
"""Bytes that every pointer is a multiple of; Triton reads and writes whole vectors where it knows so."""


def main() -> None:
    """Compile each variant, and print what became of it."""
    job = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # what Triton prints is no result
    for index, entry in job["variants"]:
        try:
            result = compile_variant(Variant.from_json(entry), job["sm"])
        except Exception as error:  # Triton raises many kinds
            result = {"error": f"{type(error).__name__}: {str(error)[-600:]}"}
        print(json.dumps({"index": index, **result}), file=out, flush=True)


def compile_variant(variant: Variant, sm: str) -> dict[str, Any]:
    """Symbol, shared memory and machine code of a kernel for a compute capability ('9.0')."""
    if variant.native:
        code = compile_native(variant, sm)[0].hex()
        return {"symbol": variant.function, "shared_bytes": variant.shared_bytes, "code": code}

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trtx.runtime.cuda.launch import kernel_function

    function = kernel_function(variant.kernel)
    names = function.arg_names
    constants: dict[str, Any] = dict(variant.constants)
    signature = dict.fromkeys(constants, "constexpr")
    attributes = {}
    for index, kind in enumerate(variant.types):
        signature[names[index]] = "constexpr" if kind == "none" else kind
        if kind == "none":
            constants[names[index]] = None
        elif kind.startswith("*"):
            attributes[index,] = [["tt.divisibility", ALIGNMENT]]
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options: dict[str, Any] = {"num_warps": variant.warps, "num_stages": variant.stages, "launch_pdl": variant.pdl}
    if variant.registers:
        options["maxnreg"] = variant.registers
    major, minor = map(int, sm.split("."))
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise ValueError("it wants scratch memory, which the launcher does not give")
    return {"symbol": metadata.name, "shared_bytes": metadata.shared, "code": compiled.asm["cubin"].hex()}


if __name__ == "__main__":
    main()
