"""What begins a step, and what ends it."""

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


@triton.jit
def publish(
    chosen, host, ids, sources, positions, lengths, count,
    STRIDE: tl.constexpr, PENDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put what `count` rows have chosen, [2, STRIDE] int32, where the host reads it.

    Args:
        host: [2, STRIDE] int32, in the host's memory.
        ids, sources, positions, lengths: of a step of single tokens, which become those of the step after it; or None.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    for part in tl.static_range(2):
        tl.store(host + part * STRIDE + row, tl.load(chosen + part * STRIDE + row, inside), inside)
    if ids is not None:
        tl.store(ids + row, PENDING, inside)
        tl.store(sources + row, row, inside)
        tl.store(positions + row, tl.load(positions + row, inside) + 1, inside)
        tl.store(lengths + row, tl.load(lengths + row, inside) + 1, inside)
