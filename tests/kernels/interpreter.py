"""What the interpreter of Triton 3.6 and 3.7 gets wrong.

It truncates to bf16 and e4m3, multiplies the bits of bf16 matrices, and can't loop to a number that is only known at
run time (NumPy 2.4 no longer makes an integer of an array with one number).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor


@cache
def mend() -> None:
    """Let the interpreter loop, convert floats and multiply matrices as torch does. Once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {
        tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    }  # fmt: skip
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def tensor(data: np.ndarray, kind: tl.dtype) -> Tensor:
        plain = np.ascontiguousarray(data).view(f"int{kind.primitive_bitwidth}")
        return torch.from_numpy(plain.copy()).reshape(data.shape).view(types[kind])

    def array(x: Tensor, kind: tl.dtype) -> np.ndarray:
        return x.contiguous().view(_INTEGERS[x.itemsize]).numpy().view(interpreter._get_np_dtype(kind))

    def convert(self, src, dst_type, rounding_mode=None):
        before, after = src.dtype.scalar, dst_type.scalar
        if before not in types or after not in types:
            return cast(self, src, dst_type)
        return handle(array(tensor(src.data, before).to(types[after]), after), after)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = (tensor(operand.data, operand.dtype.scalar).float() for operand in (a, b))
        return handle((x @ y).numpy() + d.data, d.dtype.scalar)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    builder.cast_impl = convert
    builder.create_fp_to_fp = convert
    builder.create_dot = dot


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
