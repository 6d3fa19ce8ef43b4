"""Linears: few tokens times a resident weight, and what goes around a library's matrix product.

`gemv*` multiply one token, `skinny*` up to 64. Both are bound by reading the weight, once. The `*4` kernels read
weights of 4 bits as words of 8 (see `runtime.cuda.linear` for their order); `dequantize*` write a weight out for a
library to multiply.

Weights are [N, K] row-major; a gated linear has N gate rows, then N up rows.

    INPUT    what is multiplied           y is scaled by
    plain    x                            1
    smooth   x * smooth                   1
    e4m3     e4m3(x / input scale)        input scale * weight scale: `scales` = (1 / input scale, the product)
    int8     int8(x * smooth / …)         the same
    codes    x, which are codes already   x_scale of the token

    SCALE    of the weight: one | row: `scale` [rows] | tensor: `scale` []

Words of 4-bit weights. Each run of 32 columns is 4 words of 32 bits; nibble i of word j is column 4 i + j, so that a
thread reads 16 bytes of the weight and, for each nibble, consecutive columns of x. `CODES` are int4 (plus 8) or e2m1;
groups of GROUP columns share a scale: `groups` [rows, K / GROUP], fp32, e4m3, or E8M0 as uint8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from trtx.runtime.kernels.elementwise import activate, rounded


@triton.jit
def _gate(gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """act(gate) * (up + OFFSET), gate cut off above LIMIT and up on both sides."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return activate(gate, KIND) * (up + OFFSET)


@triton.jit
def _multiplied(
    v, smooth, inverse, k,
    K: tl.constexpr, INPUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements v of x, in fp32, as the weight is multiplied with them; k: their columns, all below K if WHOLE."""
    if smooth is not None:
        v *= _vector(smooth, k, K, WHOLE)
    if INPUT == "e4m3" or INPUT == "int8":
        v = rounded(v, inverse, INPUT)
    return v


@triton.jit
def _vector(pointer, k, K: tl.constexpr, WHOLE: tl.constexpr):
    """Elements k of [K] in fp32; 0 beyond the end."""
    if WHOLE:
        return tl.load(pointer + k).to(tl.float32)
    else:
        return tl.load(pointer + k, mask=k < K, other=0.0).to(tl.float32)


@triton.jit
def _block(pointers, row, k, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of a weight [N, K], which is read once, so that other things stay in the caches; 0 beyond its end."""
    if N % ROWS == 0 and K % BLOCK_K == 0:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=(row < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _inverse(scales, INPUT: tl.constexpr):
    """1 / input scale."""
    if INPUT == "e4m3" or INPUT == "int8":
        return tl.load(scales)
    else:
        return 1.0


@triton.jit
def _finished(
    y, n, m, inside, scale, scales, x_scale, bias,
    INPUT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Sums for outputs n (and tokens m: broadcast to each other) with their scales and the bias."""
    if INPUT == "e4m3" or INPUT == "int8":
        y *= tl.load(scales + 1)
    if INPUT == "codes":
        y *= tl.load(x_scale + m)
    if SCALE == "row":
        y *= tl.load(scale + n, mask=inside, other=0.0)
    if SCALE == "tensor":
        y *= tl.load(scale)
    if bias is not None:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def gemv(
    x, weight, scale, scales, smooth, x_scale, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, INPUT: tl.constexpr, SCALE: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N] = x [K] times weight [N, K] (gated: [2N, K]) of a float dtype, e4m3 or int8; ROWS outputs a program.

    residual: [N], added in the end, or None.

    The weight's first block is on its way while the kernel before still runs. (More of it, fetched into the L2 cache
    meanwhile, made an H100 slower.)
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    tile = weight + tl.program_id(0).to(tl.int64) * ROWS * K + tl.arange(0, ROWS)[:, None] * K + k[None, :]
    w = _block(tile, row, k, N, K, ROWS, BLOCK_K)
    if GATED:
        u = _block(tile + N * K, row, k, N, K, ROWS, BLOCK_K)
    inverse = _inverse(scales, INPUT)
    if PDL:
        tl.extra.cuda.gdc_wait()

    WHOLE: tl.constexpr = K % BLOCK_K == 0
    inside = row < N
    if residual is not None:
        added = tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    v = _multiplied(_vector(x, k, K, WHOLE), smooth, inverse, k, K, INPUT, WHOLE)
    sums = w.to(tl.float32) * v[None, :]
    if GATED:
        up_sums = u.to(tl.float32) * v[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        at = start + k
        w = _block(tile + start, row, at, N, K, ROWS, BLOCK_K)
        if GATED:
            u = _block(tile + N * K + start, row, at, N, K, ROWS, BLOCK_K)
        v = _multiplied(_vector(x, at, K, WHOLE), smooth, inverse, at, K, INPUT, WHOLE)
        sums += w.to(tl.float32) * v[None, :]
        if GATED:
            up_sums += u.to(tl.float32) * v[None, :]

    y = _finished(tl.sum(sums, 1), row, 0, inside, scale, scales, x_scale, bias, INPUT, SCALE)
    if GATED:
        up = _finished(tl.sum(up_sums, 1), N + row, 0, inside, scale, scales, x_scale, bias, INPUT, SCALE)
        y = _gate(y, up, KIND, LIMIT, OFFSET)
    if residual is not None:
        y += added
    tl.store(out + row, y, mask=inside)


@triton.jit
def _cast(w, DTYPE: tl.constexpr):
    """Exact: codes fit into every DTYPE they are cast to."""
    return w if w.dtype == DTYPE else w.to(tl.float32).to(DTYPE)


@triton.jit
def _tokens(
    x, smooth, inverse, m, k, M, K: tl.constexpr, INPUT: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Columns k of tokens m as they are multiplied, [BLOCK_K, BLOCK_M]."""
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    if WHOLE:
        v = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
    else:
        v = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
    if INPUT != "plain" and INPUT != "codes":
        v = _multiplied(v.to(tl.float32), smooth, inverse, k[None, :], K, INPUT, WHOLE).to(DTYPE)
    return tl.trans(v)


@triton.jit
def skinny(
    x, weight, scale, scales, smooth, x_scale, bias, residual, out, partials, counters, M,
    N: tl.constexpr, K: tl.constexpr, INPUT: tl.constexpr, SCALE: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] times weight [N, K] (gated: [2N, K]), M up to BLOCK_M; BLOCK_N outputs a program.

    The weight is the left operand: tensor cores want 64 of its rows, and few tokens fit any number of columns. SPLITS
    programs share the K of a tile; see `_reduced`. residual: [M, N], added in the end, or None.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    offsets = tl.arange(0, BLOCK_K)
    tile = weight + tl.program_id(0).to(tl.int64) * BLOCK_N * K + tl.arange(0, BLOCK_N)[:, None] * K
    inverse = _inverse(scales, INPUT)
    SHARE: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    begin = tl.program_id(1) * SHARE
    # A first block of the weight is on its way while the kernel before still runs, and multiplied last. Not of codes:
    # what is done to x takes the registers, and an H100 was slower.
    AHEAD: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth > 8
    first = begin + offsets
    if AHEAD:
        w_first = _block(tile + first[None, :], row, first, N, K, BLOCK_N, BLOCK_K)
        if GATED:
            u_first = _block(tile + N * K + first[None, :], row, first, N, K, BLOCK_N, BLOCK_K)
    if PDL:
        tl.extra.cuda.gdc_wait()

    # e4m3 is multiplied as such where x is e4m3 too, other codes in x's dtype, which holds them exactly.
    FP8: tl.constexpr = weight.dtype.element_ty == tl.float8e4nv and (INPUT == "e4m3" or INPUT == "codes")
    MULTIPLIED: tl.constexpr = tl.float8e4nv if FP8 else x.dtype.element_ty
    if AHEAD:
        v_first = _tokens(x, smooth, inverse, m, first, M, K, INPUT, BLOCK_K, MULTIPLIED)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(begin + (BLOCK_K if AHEAD else 0), tl.minimum(begin + SHARE, K), BLOCK_K):
        k = start + offsets
        w = _block(tile + k[None, :], row, k, N, K, BLOCK_N, BLOCK_K)
        v = _tokens(x, smooth, inverse, m, k, M, K, INPUT, BLOCK_K, MULTIPLIED)
        sums = tl.dot(_cast(w, MULTIPLIED), v, sums, max_num_imprecise_acc=BLOCK_K)
        if GATED:
            u = _block(tile + N * K + k[None, :], row, k, N, K, BLOCK_N, BLOCK_K)
            up_sums = tl.dot(_cast(u, MULTIPLIED), v, up_sums, max_num_imprecise_acc=BLOCK_K)
    if AHEAD:
        sums = tl.dot(_cast(w_first, MULTIPLIED), v_first, sums, max_num_imprecise_acc=BLOCK_K)
        if GATED:
            up_sums = tl.dot(_cast(u_first, MULTIPLIED), v_first, up_sums, max_num_imprecise_acc=BLOCK_K)
    _reduced(
        sums, up_sums, row, scale, scales, x_scale, bias, residual, out, partials, counters, M,
        N, INPUT, SCALE, GATED, KIND, LIMIT, OFFSET, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _columns(word, NIBBLE: tl.constexpr):
    """The columns of x that a nibble of words stands for."""
    return word // 4 * 32 + word % 4 + 4 * NIBBLE


@triton.jit
def _e2m1(word, NIBBLE: tl.constexpr):
    """A nibble of words times 2^-126, in fp32: sign, exponent and mantissa moved to where fp32 has its lowest."""
    sign_first = word << (28 - 4 * NIBBLE)  # an arithmetic shift repeats the sign, and leaves it where fp32 has it
    return ((sign_first >> 6) & -0x7E400000).to(tl.float32, bitcast=True)


@triton.jit
def _group_scale(groups, inside):
    """Scales of groups in fp32."""
    scale = tl.load(groups, mask=inside, other=0.0)
    if groups.dtype.element_ty == tl.uint8:  # E8M0: the exponent of an fp32; 2^-127 is subnormal
        bits = scale.to(tl.int32) << 23
        return tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
    else:
        return scale.to(tl.float32)


@triton.jit
def _word_products(
    x, weight, groups, smooth, row, word,
    N: tl.constexpr, K: tl.constexpr, INPUT: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Products of x with the words `weight`, summed over the nibbles of each and scaled, but for FACTOR in `gemv4`."""
    WHOLE: tl.constexpr = K % (8 * WORDS) == 0
    inside = (row < N)[:, None] & (word < K // 8)[None, :]
    group = groups + row[:, None] * (K // GROUP) + (word // 4 * 32 // GROUP)[None, :]
    scale = _group_scale(group, inside)
    if CODES == "int4":
        # Under the exponent of 1 a nibble u is 1 + u / 16 in the mantissa's upper bits, 1 + u / 256 in the next four:
        # u - 8 is 16 (that - 1.5), or 256 (that - 1.03125). What is subtracted is summed once for all rows. An
        # instruction takes one constant: program_id(2), which is 0, makes the other one a register.
        one = 0x3F800000 + tl.program_id(2)
        low = tl.zeros([ROWS, WORDS], tl.float32)
        high = tl.zeros([ROWS, WORDS], tl.float32)
        excess = tl.zeros([WORDS], tl.float32)
        for pair in tl.static_range(4):
            k = _columns(word, 2 * pair)
            v = _multiplied(_vector(x, k, K, WHOLE), smooth, 1.0, k, K, INPUT, WHOLE)
            k = _columns(word, 2 * pair + 1)
            u = _multiplied(_vector(x, k, K, WHOLE), smooth, 1.0, k, K, INPUT, WHOLE)
            both = weight << (15 - 8 * pair) if pair < 2 else weight >> (8 * pair - 15)
            low += ((both & 0x00078000) | one).to(tl.float32, bitcast=True) * v[None, :]
            high += ((both & 0x00780000) | one).to(tl.float32, bitcast=True) * u[None, :]
            excess += 16.5 * v + 1.5 * u
        return (16 * low + (high - excess[None, :])) * scale
    else:
        sums = tl.zeros([ROWS, WORDS], tl.float32)  # x and the sum share the 2^126 that nibbles lack
        for nibble in tl.static_range(8):
            if GROUP == 16 and nibble == 4:  # the second group of the run
                sums *= scale
                scale = _group_scale(group + 1, inside)
                first = sums
                sums = tl.zeros([ROWS, WORDS], tl.float32)
            k = _columns(word, nibble)
            v = _multiplied(_vector(x, k, K, WHOLE), smooth, 1.0, k, K, INPUT, WHOLE) * 9223372036854775808.0
            sums += _e2m1(weight, nibble) * v[None, :]
        sums *= scale
        if GROUP == 16:
            sums += first
        return sums


@triton.jit
def gemv4(
    x, weight, groups, scale, smooth, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, INPUT: tl.constexpr, SCALE: tl.constexpr,
    CODES: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`gemv` for words [N, K / 8], WORDS at a time."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, WORDS)
    WIDTH: tl.constexpr = K // 8
    tile = weight + tl.program_id(0).to(tl.int64) * ROWS * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + word[None, :]
    w = _block(tile, row, word, N, WIDTH, ROWS, WORDS)
    if GATED:
        u = _block(tile + N * WIDTH, row, word, N, WIDTH, ROWS, WORDS)
        up_groups = groups + N * (K // GROUP)
    if PDL:
        tl.extra.cuda.gdc_wait()

    sums = _word_products(x, w, groups, smooth, row, word, N, K, INPUT, CODES, GROUP, ROWS, WORDS)
    if GATED:
        up_sums = _word_products(x, u, up_groups, smooth, row, word, N, K, INPUT, CODES, GROUP, ROWS, WORDS)
    for start in range(WORDS, WIDTH, WORDS):
        at = start + word
        w = _block(tile + start, row, at, N, WIDTH, ROWS, WORDS)
        if GATED:
            u = _block(tile + N * WIDTH + start, row, at, N, WIDTH, ROWS, WORDS)
        sums += _word_products(x, w, groups, smooth, row, at, N, K, INPUT, CODES, GROUP, ROWS, WORDS)
        if GATED:
            up_sums += _word_products(x, u, up_groups, smooth, row, at, N, K, INPUT, CODES, GROUP, ROWS, WORDS)

    inside = row < N
    FACTOR: tl.constexpr = 16.0 if CODES == "int4" else 9223372036854775808.0
    y = _finished(tl.sum(sums, 1) * FACTOR, row, 0, inside, scale, None, None, bias, INPUT, SCALE)
    if GATED:
        up = _finished(tl.sum(up_sums, 1) * FACTOR, N + row, 0, inside, scale, None, None, bias, INPUT, SCALE)
        y = _gate(y, up, KIND, LIMIT, OFFSET)
    if residual is not None:
        y += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, y, mask=inside)


@triton.jit
def _value(weight, groups, NIBBLE: tl.constexpr, inside, CODES: tl.constexpr, GROUP: tl.constexpr):
    """What a nibble of words stands for, in fp32, but for the scale of the tensor; groups: pointers to its scales."""
    if GROUP == 16 and NIBBLE >= 4:
        groups += 1
    scale = _group_scale(groups, inside)
    if CODES == "int4":
        return (((weight >> (4 * NIBBLE)) & 15).to(tl.float32) - 8) * scale
    else:
        return _e2m1(weight, NIBBLE) * 2.0**126 * scale


@triton.jit
def skinny4(
    x, weight, groups, scale, bias, residual, out, partials, counters, M,
    N: tl.constexpr, K: tl.constexpr, SCALE: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`skinny` for words [N, K / 8], WORDS at a time: a product for each nibble, of values rounded to x's dtype."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = K // 8
    tile = weight + tl.program_id(0).to(tl.int64) * BLOCK_N * WIDTH + tl.arange(0, BLOCK_N)[:, None] * WIDTH
    SHARE: tl.constexpr = (WIDTH + WORDS * SPLITS - 1) // (WORDS * SPLITS) * WORDS
    begin = tl.program_id(1) * SHARE
    if PDL:
        tl.extra.cuda.gdc_wait()

    DTYPE: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(begin, tl.minimum(begin + SHARE, WIDTH), WORDS):
        word = start + tl.arange(0, WORDS)
        inside = (row < N)[:, None] & (word < WIDTH)[None, :]
        w = _block(tile + word[None, :], row, word, N, WIDTH, BLOCK_N, WORDS)
        group = groups + row[:, None] * (K // GROUP) + (word // 4 * 32 // GROUP)[None, :]
        if GATED:
            u = _block(tile + N * WIDTH + word[None, :], row, word, N, WIDTH, BLOCK_N, WORDS)
        for nibble in tl.static_range(8):
            k = _columns(word, nibble)
            v = tl.load(x + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (word < WIDTH)[None, :], other=0.0)
            v = tl.trans(v)
            sums = tl.dot(_value(w, group, nibble, inside, CODES, GROUP).to(DTYPE), v, sums)
            if GATED:
                up = _value(u, group + N * (K // GROUP), nibble, inside, CODES, GROUP)
                up_sums = tl.dot(up.to(DTYPE), v, up_sums)
    _reduced(
        sums, up_sums, row, scale, None, None, bias, residual, out, partials, counters, M,
        N, "plain", SCALE, GATED, KIND, LIMIT, OFFSET, BLOCK_M, BLOCK_N, SPLITS,
    )  # fmt: skip


@triton.jit
def _reduced(
    sums, up_sums, row, scale, scales, x_scale, bias, residual, out, partials, counters, M,
    N: tl.constexpr, INPUT: tl.constexpr, SCALE: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a tile; of its SPLITS programs the last to arrive adds up the sums of all, in their order.

    partials: [tiles, SPLITS, 1 or 2, BLOCK_N, BLOCK_M] in fp32; counters: [tiles], zeros before and after.
    """
    if SPLITS == 1:
        _write(
            sums, up_sums, row, scale, scales, x_scale, bias, residual, out, M,
            N, INPUT, SCALE, GATED, KIND, LIMIT, OFFSET, BLOCK_M,
        )  # fmt: skip
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        EACH: tl.constexpr = SIZE * (2 if GATED else 1)
        within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        shares = partials + tl.program_id(0).to(tl.int64) * SPLITS * EACH + within
        tl.store(shares + tl.program_id(1) * EACH, sums)
        if GATED:
            tl.store(shares + tl.program_id(1) * EACH + SIZE, up_sums)
        tl.debug_barrier()  # all threads have stored before one says so
        arrived = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            sums = tl.load(shares, cache_modifier=".cg")
            if GATED:
                up_sums = tl.load(shares + SIZE, cache_modifier=".cg")
            for split in range(1, SPLITS):
                sums += tl.load(shares + split * EACH, cache_modifier=".cg")
                if GATED:
                    up_sums += tl.load(shares + split * EACH + SIZE, cache_modifier=".cg")
            tl.store(counters + tl.program_id(0), 0)
            _write(
                sums, up_sums, row, scale, scales, x_scale, bias, residual, out, M,
                N, INPUT, SCALE, GATED, KIND, LIMIT, OFFSET, BLOCK_M,
            )  # fmt: skip


@triton.jit
def _write(
    sums, up_sums, row, scale, scales, x_scale, bias, residual, out, M,
    N: tl.constexpr, INPUT: tl.constexpr, SCALE: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    n, m = row[:, None], tl.arange(0, BLOCK_M)[None, :]
    inside = n < N
    token = tl.minimum(m, M - 1)
    y = _finished(sums, n, token, inside, scale, scales, x_scale, bias, INPUT, SCALE)
    if GATED:
        up = _finished(up_sums, N + n, token, inside, scale, scales, x_scale, bias, INPUT, SCALE)
        y = _gate(y, up, KIND, LIMIT, OFFSET)
    if residual is not None:
        y += tl.load(residual + m * N + n, mask=inside & (m < M), other=0.0).to(tl.float32)
    tl.store(out + m * N + n, y, mask=inside & (m < M))


@triton.jit
def gated_activation(
    y, scales, smooth, out,
    WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, WIDTH] = act(gate) * (up + OFFSET) for y [T, 2 * WIDTH], gate and up side by side. Grid: T, blocks.

    scales, smooth: of a linear that multiplies e4m3 codes: `out` are those codes. Either may be None.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = y + tl.program_id(0).to(tl.int64) * 2 * WIDTH + i
    gate = tl.load(pair, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(pair + WIDTH, mask=i < WIDTH, other=0.0).to(tl.float32)
    v = _gate(gate, up, KIND, LIMIT, OFFSET)
    if scales is not None:
        v = v.to(y.dtype.element_ty).to(tl.float32)
        v = _multiplied(v, smooth, tl.load(scales), i, WIDTH, "e4m3", WIDTH % BLOCK == 0)
    tl.store(out + tl.program_id(0).to(tl.int64) * WIDTH + i, v, mask=i < WIDTH)


@triton.jit
def multiplied(
    x, scales, smooth, out,
    K: tl.constexpr, INPUT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, K]: x as INPUT says: smoothed, or codes of e4m3 or int8. Grid: T, blocks."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inverse = _inverse(scales, INPUT)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * K
    v = tl.load(x + row + k, mask=k < K, other=0.0).to(tl.float32)
    v = _multiplied(v, smooth, inverse, k, K, INPUT, K % BLOCK == 0)
    tl.store(out + row + k, v, mask=k < K)


@triton.jit
def by_token(x, out, x_scale, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """E4M3 codes out [T, K] of x, with a scale a token: x_scale [T]. Grid: T."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64) * K
    k = tl.arange(0, BLOCK)
    v = tl.load(x + row + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), 0)
    scale = tl.where(largest == 0, 1.0, largest / 448.0)
    tl.store(x_scale + tl.program_id(0), scale)
    tl.store(out + row + k, rounded(v, 1 / scale, "e4m3"), mask=k < K)


@triton.jit
def dequantize(
    weight, scale, out,
    K: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] that codes of 8 bits stand for. Grid: N, blocks."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * K
    w = tl.load(weight + row + k, mask=k < K, other=0.0).to(tl.float32)
    w *= tl.load(scale + tl.program_id(0)) if SCALE == "row" else tl.load(scale)
    if PDL:
        tl.extra.cuda.gdc_wait()
    tl.store(out + row + k, w, mask=k < K)


@triton.jit
def dequantize4(
    weight, groups, scale, out,
    K: tl.constexpr, SCALE: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The weight [N, K] that words stand for. Grid: N, blocks of words."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < K // 8
    w = tl.load(weight + row * (K // 8) + word, mask=inside, other=0)
    group = groups + row * (K // GROUP) + word // 4 * 32 // GROUP
    for nibble in tl.static_range(8):
        value = _value(w, group, nibble, inside, CODES, GROUP)
        if SCALE == "tensor":
            value *= tl.load(scale)
        tl.store(out + row * K + _columns(word, nibble), value, mask=inside)
