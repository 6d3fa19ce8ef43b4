"""Kernels that choose tokens from logits [R, V]. A row is split over many programs, which leave partial results.

Drawing needs no sorted row (as in FlashInfer's sampling, Ye et al. 2025, arXiv:2501.01005, but without rejections, so
that a random number gives one token). Numbers are relative to the row's largest and read as keys of 28 bits in the same
order; top-k and top-p become the smallest key that is kept, found as in a radix sort, from the highest four bits down:
each pass (`narrow`) sums up how many tokens, or how much weight, there is at each of the 16 next digits, among keys
that begin with the digits chosen so far. What is kept is then drawn from by inverting its running sum. Weights are
added as integers, so that a sum does not depend on how a row is split, and a draw not on the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

ONE = tl.constexpr(1 << 44)
"""The weight of the largest number, as an integer; 2^18 of them fit in 63 bits."""
NEAR, FAR = tl.constexpr(0x33800000), tl.constexpr(0x42D00000)
"""Bits of 2^-24 and 104: nearer numbers have the weight of the largest in fp32, and farther ones none."""
BITS, DIGITS = tl.constexpr(4), tl.constexpr(16)
BLOCK = tl.constexpr(1024)
STATE = tl.constexpr(5)
"""Numbers that a search hands from pass to pass: the key so far, the sum over larger keys, the sum to stay under (-1:
not known yet), the smallest key that top-k keeps, and how many of the tokens with this key it keeps."""


@triton.jit
def best(
    logits,
    values,
    tokens,
    finite,
    VOCABULARY: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The largest logit of each block of a row, its token, and whether all are finite. Grid: (R, SPLITS).

    Args:
        logits: [R, VOCABULARY], rows STRIDE apart.
        values, tokens, finite: [R, SPLITS]. Of equal logits the first counts.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    split = tl.program_id(1)
    token = split * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    value = tl.load(logits + row.to(tl.int64) * STRIDE + token, mask=inside, other=0.0).to(tl.float32)
    fine = tl.abs(value) < float("inf")
    value = tl.where(inside & (value == value), value, float("-inf"))
    top, where = tl.max(value, 0, return_indices=True)
    place = row * SPLITS + split
    tl.store(values + place, top)
    tl.store(tokens + place, split * BLOCK + where)
    tl.store(finite + place, tl.min(fine.to(tl.int32), 0))


@triton.jit
def settle(values, tokens, finite, token, fine, peak, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """What `best` found in the blocks, for whole rows: token, fine and peak (the largest value), [R]. Grid: R."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK)
    inside = split < SPLITS
    value = tl.load(values + row * SPLITS + split, mask=inside, other=float("-inf"))
    top, where = tl.max(value, 0, return_indices=True)
    tl.store(token + row, tl.load(tokens + row * SPLITS + where))
    tl.store(fine + row, tl.min(tl.load(finite + row * SPLITS + split, mask=inside, other=1), 0))
    if peak is not None:
        tl.store(peak + row, top)


@triton.jit(do_not_specialize=["count"])
def adjust(
    logits, edited, rows, tokens, repetition, penalty, count, VOCABULARY: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Penalties: edited[row, token] from logits[row, token], for `count` places, each there once. Grid: blocks of them.

    Args:
        edited: [R, VOCABULARY], fp32.
        repetition: divides what is positive and multiplies what is negative.
        penalty: subtracted then; infinite: the token is forbidden.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens + index, mask=inside, other=0)
    value = tl.load(logits + row * STRIDE + token, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(repetition + index, mask=inside, other=1.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    tl.store(edited + row * VOCABULARY + token, value - tl.load(penalty + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def key_of(distance):
    """The key of numbers so far below the largest; not a number: 0, as for the farthest."""
    bits = distance.to(tl.int32, bitcast=True)
    return -tl.minimum(tl.maximum(bits, NEAR), FAR) + FAR


@triton.jit
def distances(logits, temperature, peak, block, VOCABULARY: tl.constexpr):
    """How far the numbers of a block of a row are below the largest, after temperature; infinity beyond the row."""
    heat = tl.where(temperature == 0, 1.0, temperature)
    token = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + token, mask=token < VOCABULARY, other=float("-inf")).to(tl.float32)
    return tl.div_rn(peak, heat) - tl.div_rn(value, heat)


@triton.jit
def settled(state, sums, top_p, shift, row, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """The state after a pass that looked at the digits at `shift`: the smallest digit that stays under the target."""
    prefix = tl.load(state + row * STATE)
    above = tl.load(state + row * STATE + 1)
    target = tl.load(state + row * STATE + 2)
    floor = tl.load(state + row * STATE + 3)
    ties = tl.load(state + row * STATE + 4)
    digit = tl.arange(0, DIGITS)
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    place = (row * SPLITS + split) * DIGITS + digit[None, :]
    found = tl.sum(tl.load(sums + place, mask=split < SPLITS, other=0), 0)
    total = tl.sum(found, 0)
    if target < 0:
        nearest = tl.exp(-(-floor.to(tl.int32) + FAR).to(tl.float32, bitcast=True))
        whole = total.to(tl.float64) + ties.to(tl.float64) * nearest.to(tl.float64) * ONE
        share = tl.load(top_p + row)
        target = tl.where(share < 1, tl.maximum((whole * share).to(tl.int64), 1), 1 << 62)
    beyond = above + total - tl.cumsum(found, 0)
    chosen = tl.min(tl.where(beyond < target, digit, DIGITS - 1), 0)
    above = tl.sum(tl.where(digit == chosen, beyond, 0), 0)
    return prefix + (chosen.to(tl.int64) << shift), above, target, floor, ties


@triton.jit
def keep(state, row, prefix, above, target, floor, ties):
    """Write a state."""
    tl.store(state + row * STATE, prefix)
    tl.store(state + row * STATE + 1, above)
    tl.store(state + row * STATE + 2, target)
    tl.store(state + row * STATE + 3, floor)
    tl.store(state + row * STATE + 4, ties)


@triton.jit(do_not_specialize=["shift"])
def narrow(
    logits,
    temperatures,
    peaks,
    top_k,
    top_p,
    state,
    sums,
    new_state,
    new_sums,
    shift,
    VOCABULARY: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MASS: tl.constexpr,
    FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One pass of the search: the sums [R, SPLITS, DIGITS] at the digits at `shift`. Grid: (R, SPLITS).

    Args:
        temperatures, peaks, top_p: [R], fp32; a temperature of 0 stands for any.
        top_k: [R], int32.
        state, sums: of the pass before; absent in the first.
        new_state: [R, STATE], int64.
        BLOCKS: of a row that one program adds up.
        MASS: weights are added up, for top-p, and not tokens, for top-k.
        FIRST: the first pass of its kind.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    zero = row * 0
    if FIRST:
        prefix, above, target, floor, ties = zero, zero, zero - 1, zero, zero
        if not MASS:
            target = tl.load(top_k + row).to(tl.int64)
        elif state is not None:
            floor, counted, limit, _, _ = settled(state, sums, top_p, 0, row, SPLITS, BLOCK_SPLITS)
            ties = limit - counted
    else:
        prefix, above, target, floor, ties = settled(state, sums, top_p, shift + BITS, row, SPLITS, BLOCK_SPLITS)
    if split == 0:
        keep(new_state, row, prefix, above, target, floor, ties)

    temperature = tl.load(temperatures + row)
    peak = tl.load(peaks + row)
    digit = tl.arange(0, DIGITS)
    total = tl.zeros([DIGITS], tl.int64)
    for block in range(split * BLOCKS, tl.minimum((split + 1) * BLOCKS, tl.cdiv(VOCABULARY, BLOCK))):
        distance = distances(logits + row * STRIDE, temperature, peak, block, VOCABULARY)
        key = key_of(distance)
        inside = (key >> (shift + BITS)) == (prefix >> (shift + BITS)).to(tl.int32)
        if MASS:
            inside = inside & (key > floor)
        else:
            inside = inside & (block * BLOCK + tl.arange(0, BLOCK) < VOCABULARY)
        if tl.max(inside.to(tl.int32), 0) > 0:
            here = inside[:, None] & (((key >> shift) & (DIGITS - 1))[:, None] == digit[None, :])
            if MASS:
                weight = tl.sum(tl.where(here, tl.exp(-distance)[:, None], 0.0), 0)
                total += (weight * ONE).to(tl.int64)
            else:
                total += tl.sum(here.to(tl.int32), 0).to(tl.int64)
    tl.store(new_sums + (row * SPLITS + split) * DIGITS + digit, total)


@triton.jit
def integer_weights(distance, smallest, reach):
    """exp(-distance) as integers; 0 for keys below `smallest` and beyond `reach`."""
    kept = (key_of(distance) >= smallest) & (distance <= reach)
    return (tl.where(kept, tl.exp(-distance), 0.0) * ONE).to(tl.int64)


@triton.jit
def weigh(
    logits,
    temperatures,
    peaks,
    reaches,
    top_p,
    state,
    sums,
    smallest,
    masses,
    VOCABULARY: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weight that is kept in each part of a row, masses [R, SPLITS]. Grid: (R, SPLITS).

    Args:
        reaches: [R], how far below the largest min-p keeps numbers.
        state, sums: of the last pass of a search; absent without one.
        smallest: [R], int32, where the smallest key that is kept goes.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    least = (row * 0).to(tl.int32)
    if state is not None:
        key, _, _, floor, _ = settled(state, sums, top_p, 0, row, SPLITS, BLOCK_SPLITS)
        least = tl.maximum(key, floor).to(tl.int32)
    if split == 0:
        tl.store(smallest + row, least)
    temperature = tl.load(temperatures + row)
    peak = tl.load(peaks + row)
    reach = tl.load(reaches + row)
    total = row * 0
    for block in range(split * BLOCKS, tl.minimum((split + 1) * BLOCKS, tl.cdiv(VOCABULARY, BLOCK))):
        distance = distances(logits + row * STRIDE, temperature, peak, block, VOCABULARY)
        total += tl.sum(integer_weights(distance, least, reach), 0)
    tl.store(masses + row * SPLITS + split, total)


@triton.jit
def draw(
    logits,
    temperatures,
    peaks,
    reaches,
    smallest,
    masses,
    uniforms,
    tokens,
    VOCABULARY: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token at which the running sum of weights passes a share of their sum, where the temperature is not 0.

    Grid: R.

    Args:
        smallest, masses: of `weigh`.
        uniforms: [R], fp64, the shares.
        tokens: [R], int32; written for rows with a temperature only.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    if temperature == 0:
        return
    splits = tl.arange(0, BLOCK_SPLITS)
    mass = tl.load(masses + row * SPLITS + splits, mask=splits < SPLITS, other=0)
    sums = tl.cumsum(mass, 0)
    target = (tl.load(uniforms + row) * tl.sum(mass, 0).to(tl.float64)).to(tl.int64)
    split = tl.minimum(tl.sum((sums <= target).to(tl.int32), 0), SPLITS - 1)
    passed = tl.sum(tl.where(splits < split, mass, 0), 0)
    peak = tl.load(peaks + row)
    reach = tl.load(reaches + row)
    least = tl.load(smallest + row)
    token = split * (BLOCKS * BLOCK)
    for block in range(split * BLOCKS, tl.minimum((split + 1) * BLOCKS, tl.cdiv(VOCABULARY, BLOCK))):
        distance = distances(logits + row * STRIDE, temperature, peak, block, VOCABULARY)
        weights = integer_weights(distance, least, reach)
        token += tl.sum((passed + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
        passed += tl.sum(weights, 0)
    tl.store(tokens + row, tl.minimum(token, VOCABULARY - 1))
