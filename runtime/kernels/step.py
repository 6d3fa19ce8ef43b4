"""What begins a step."""

import triton
import triton.language as tl


@triton.jit
def resolve(ids, sources, last, out, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Token ids of a step, [count] int32: those that the host knows, and for -1 what row `sources` of `last` chose."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    known = tl.load(ids + index, inside, other=0)
    chosen = tl.load(last + tl.load(sources + index, inside, other=0), inside, other=0)
    tl.store(out + index, tl.where(known < 0, chosen, known), inside)
