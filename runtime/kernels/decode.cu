// `decode` of attention.py for up to 16 query heads a key head of up to 128 features, in bf16 or fp16, and a cache in
// their dtype or in e4m3: the last token of each sequence attends to all that is cached of it, and to itself. Arguments
// are those of the kernel there, but for what this one does not know: LayerNorm and biases of norms, ALiBi, latents.
//
// Keys and values go from memory to registers to tensor cores, where both are mma's A: [keys, features] times the
// queries, heads being the columns of B, then [features, keys] times the weights. Nothing is rearranged but weights: a
// lane's bytes of a key are features of its own, and it takes the same features of the queries; of values it has the
// same features of four keys, and makes pairs of keys out of them.
//
// A program has one key head of a sequence, or with SPLIT a share of its keys, and its warps take turns in tiles of
// 16 * TILES keys. Registers that have been multiplied are loaded again, so that a tile is always on its way, the first
// one while the kernel before still runs. What the warps found is added up in shared memory.
//
// Defined before this: KV_HEADS, SHARING, DIM; BYTES of a cached number; Q_STRIDE, K_STRIDE, V_STRIDE; ROPE, NORM,
// NORM_LAST, PER_HEAD, NORM_BYTES (of a number of the norms' weights), EPS, FLOOR, SCALE; WIDTH, BLOCK_SIZE; WINDOW,
// CHUNKED, CAP; SPLIT, AT_LEAST; CODES: out are codes; PDL; HALF: q is fp16; TILES, WARPS; BLOCKS: programs that a
// multiprocessor has to hold side by side.

#ifndef FETCHED
#define FETCHED ".L2::256B"
#endif
#include "common.cu"
#include "mma.cu"
#include "attention.cu"

constexpr int THREADS = 32 * WARPS, KEYS = 16 * TILES, EIGHTS = (SHARING + 7) / 8;  // eights of heads: mma's B
constexpr int STEPS = DIM / 16;                                                     // mma's to multiply 16 keys
constexpr int ROW = DIM * BYTES;
constexpr int K_WORDS = ROW / 16, V_WORDS = ROW / 32;             // of a row, in a lane
constexpr int K_LOAD = ROW % 64 ? 2 : 4;                          // words at a time
constexpr int V_LOAD = ROW % 64 ? 1 : ROW % 128 ? 2 : 4;
constexpr int K_RUN = 4 * K_LOAD / BYTES, V_RUN = 4 * V_LOAD / BYTES;  // features
constexpr int SIDE = BLOCK_SIZE % KEYS == 0 ? KEYS : BLOCK_SIZE % 16 == 0 ? 16 : 8;  // keys of a tile in one block
constexpr int SIDES = KEYS / SIDE;
constexpr int MINE = DIM / 4;                                 // features of a key in a lane
constexpr bool NEAR = ROPE % (8 * K_RUN) == 0;                // a lane has both features that are rotated together
constexpr int ANGLES = ROPE == 0 ? 1 : NEAR ? ROPE / 8 : MINE;
constexpr bool AHEAD = WARPS * BLOCKS <= 8;                   // there are registers to load q, k and v at once
constexpr float HIDDEN = -3e38f;
static_assert(DIM % 16 == 0 && ROW % 32 == 0 && BLOCK_SIZE % 8 == 0 && ROPE % 8 == 0 && SHARING <= 16, "shapes");

// WORDS from memory, where they are there; else what they are already. (With .nc, ptxas would move those that are ahead
// of griddepcontrol.wait behind it.)
template <int WORDS> __device__ __forceinline__ void fetch(unsigned* to, const unsigned char* from, bool there) {
#define FETCH(VECTOR, NAMES, FROM, THERE, ...)                                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " THERE ", 0;\n@p ld.global.L1::no_allocate" FETCHED VECTOR         \
                 ".u32 " NAMES ", [" FROM "];\n}"                                                                      \
                 : __VA_ARGS__ : "l"(from), "r"((int)there))
    if constexpr (WORDS == 4)
        FETCH(".v4", "{%0,%1,%2,%3}", "%4", "%5", "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3]));
    else if constexpr (WORDS == 2)
        FETCH(".v2", "{%0,%1}", "%2", "%3", "+r"(to[0]), "+r"(to[1]));
    else
        FETCH("", "%0", "%1", "%2", "+r"(to[0]));
}

// Of what does not change while the kernel runs, in the place where it is written.
__device__ __forceinline__ float4 floats(const float* from) {
    float4 v;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ int integer(const int* from) {
    int v;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

// Past the first-level cache, which may hold what stood there before another program wrote.
__device__ __forceinline__ float4 shared_floats(const float* from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
    return v;
}
__device__ __forceinline__ float shared_float(const float* from) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}

// How many were there before this one; who is the last sees what the others have stored.
__device__ __forceinline__ int arrived(int* counter) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ float half_number(unsigned short bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}

// Two numbers in the dtype that is multiplied; in q's dtype, if that is another, they are already.
__device__ __forceinline__ unsigned pair(float low, float high) {
    return rounded_pair<(HALF || BYTES == 1)>(low, high);
}

// Of an 8 x 8 matrix a lane has row g, columns 2t and 2t + 1; then column g, rows 2t and 2t + 1.
__device__ __forceinline__ unsigned transposed(unsigned v) {
    unsigned y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(v));
    return y;
}

// Operands of `multiply`: features 4 `step` and up, two and two, of a lane's words of a key.
__device__ __forceinline__ unsigned of_key(const unsigned (&words)[K_WORDS], int step, int upper) {
    return BYTES == 1 ? halves(words[step % K_WORDS], upper) : words[(2 * step + upper) % K_WORDS];
}

// Feature i of a lane's, of two keys.
__device__ __forceinline__ unsigned of_values(const unsigned (&one)[V_WORDS], const unsigned (&other)[V_WORDS], int i) {
    if (BYTES == 1) return halves(__byte_perm(one[i / 4], other[i / 4], i % 4 / 2 ? 0x7362 : 0x5140), i % 2);
    return __byte_perm(one[i / 2 % V_WORDS], other[i / 2 % V_WORDS], i % 2 ? 0x7632 : 0x5410);
}

template <int WORDS> __device__ __forceinline__ void put(unsigned char* to, const unsigned* from) {
    if constexpr (WORDS == 4)
        *(uint4*)to = make_uint4(from[0], from[1], from[2], from[3]);
    else if constexpr (WORDS == 2)
        *(uint2*)to = make_uint2(from[0], from[1]);
    else
        *(unsigned*)to = *from;
}

// Two numbers as the cache keeps them; `inverse` is 1 / scale.
__device__ __forceinline__ unsigned stored(float low, float high, float scale, float inverse) {
    if (BYTES == 2) return pair(low, high);
    // Divided as if by /, whose slow paths are for numbers that the cache has as 0 or as the largest.
    const float a = low * inverse, b = high * inverse;
    return codes_of(fabsf(a) < 1024 ? fmaf(fmaf(-a, scale, low), inverse, a) : a,
                    fabsf(b) < 1024 ? fmaf(fmaf(-b, scale, high), inverse, b) : b);
}

// The feature that is number i of a lane's.
__device__ __forceinline__ int k_feature(int i, int t) { return i / K_RUN * 4 * K_RUN + t * K_RUN + i % K_RUN; }
__device__ __forceinline__ int v_feature(int i, int g) { return i / V_RUN * 8 * V_RUN + g * V_RUN + i % V_RUN; }

// WORDS of q's dtype: 1, 2 or 4.
template <int WORDS> __device__ __forceinline__ void get(unsigned* to, const unsigned short* from) {
    if constexpr (WORDS == 4) {
        const uint4 v = *(const uint4*)from;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else if constexpr (WORDS == 2) {
        const uint2 v = *(const uint2*)from;
        to[0] = v.x, to[1] = v.y;
    } else {
        to[0] = *(const unsigned*)from;
    }
}

// A lane's features of a query or a key, and of a value, in q's dtype.
__device__ __forceinline__ void get_key(unsigned (&words)[MINE / 2], const unsigned short* from, int t) {
    constexpr int WORDS = K_RUN % 8 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < MINE / 2; i += WORDS) get<WORDS>(words + i, from + k_feature(2 * i, t));
}
__device__ __forceinline__ void get_value(unsigned (&words)[STEPS], const unsigned short* from, int g) {
    constexpr int WORDS = V_RUN % 8 == 0 ? 4 : V_RUN % 4 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < STEPS; i += WORDS) get<WORDS>(words + i, from + v_feature(2 * i, g));
}

__device__ __forceinline__ float of_word(const unsigned* words, int i) {
    return number(words[i / 2] >> i % 2 * 16 & 0xFFFF);
}

__device__ __forceinline__ float weight_of(const void* weight, int feature) {
    return NORM_BYTES == 4 ? ((const float*)weight)[feature] : number(((const unsigned short*)weight)[feature]);
}

__device__ __forceinline__ void scale_by_norm(float (&x)[MINE], const void* weight, int t, float& factor) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < MINE; i++) squares += x[i] * x[i];
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    factor = rsqrtf(squares / DIM + EPS);
#pragma unroll
    for (int i = 0; i < MINE; i++) x[i] *= NORM == rms ? factor * weight_of(weight, k_feature(i, t)) : factor;
}

// `words`, normalized and rotated; all features begin at `from`.
__device__ __forceinline__ void prepare(float (&x)[MINE], const unsigned (&words)[MINE / 2], const unsigned short* from,
                                        const void* weight,
                                        const float (&c)[ANGLES], const float (&s)[ANGLES], int t) {
    float factor = 1;
#pragma unroll
    for (int i = 0; i < MINE; i++) x[i] = of_word(words, i);
    if (NORM != none && !NORM_LAST) scale_by_norm(x, weight, t, factor);
    if (ROPE && NEAR) {
#pragma unroll
        for (int i = 0; i < ROPE / 8; i++) {
            const float first = x[i], second = x[i + ROPE / 8];
            x[i] = first * c[i % ANGLES] - second * s[i % ANGLES];
            x[i + ROPE / 8] = second * c[i % ANGLES] + first * s[i % ANGLES];
        }
    } else if (ROPE) {
#pragma unroll
        for (int i = 0; i < MINE; i += 4) {
            const int feature = k_feature(i, t), half = ROPE / 2;
            if (feature < ROPE) {
                const int partner = feature < half ? feature + half : feature - half;
                unsigned two[2];
                get<2>(two, from + partner);
                float other[4] = {of_word(two, 0), of_word(two, 1), of_word(two, 2), of_word(two, 3)};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (NORM != none && !NORM_LAST) other[j] *= factor;
                    if (NORM == rms && !NORM_LAST) other[j] *= weight_of(weight, partner + j);
                    x[i + j] = x[i + j] * c[(i + j) % ANGLES] + other[j] * s[(i + j) % ANGLES];
                }
            }
        }
    }
    if (NORM != none && NORM_LAST) scale_by_norm(x, weight, t, factor);
}

// What is an exponent of 2 but for a factor.
__device__ __forceinline__ float capped(float score, float scale) {
    constexpr float CEILING = CAP > 0 ? CAP : 1;
    return CAP > 0 ? CEILING * (1 - 2 / (exp2_of(score * (scale * LOG2E * (2 / CEILING))) + 1)) : score;
}

// Of a head: the largest exponent, the sum of the powers, and four features of the values weighted with them.
struct Found {
    float peak = UNSEEN, total = 0;
    float4 sums = {0, 0, 0, 0};

    __device__ __forceinline__ void add(float other_peak, float other_total, float4 other) {
        const float higher = fmaxf(peak, other_peak);
        const float fading = exp2_of(peak - higher), by = exp2_of(other_peak - higher);
        peak = higher, total = total * fading + other_total * by;
        sums.x = sums.x * fading + other.x * by, sums.y = sums.y * fading + other.y * by;
        sums.z = sums.z * fading + other.z * by, sums.w = sums.w * fading + other.w * by;
    }
};

// Divided by the sum of the powers, that of the head's sink included; 0 where no key was seen.
__device__ __forceinline__ void finish(Found x, int head, int feature, const float* sinks, const float* code_scales,
                                       const float* smooth, float v_scale, unsigned char* row) {
    if (sinks) x.add(sinks[head] * LOG2E, 1, {0, 0, 0, 0});
    const float by = v_scale / (x.total == 0 ? 1 : x.total);
    float y[4] = {x.sums.x * by, x.sums.y * by, x.sums.z * by, x.sums.w * by};
    if (CODES) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            y[i] = number(rounded(y[i]));
            if (smooth) y[i] *= smooth[head * DIM + feature + i];
            y[i] *= *code_scales;
        }
        *(unsigned*)(row + feature) = codes_of(y[0], y[1]) | codes_of(y[2], y[3]) << 16;
    } else {
        *(uint2*)(row + 2 * feature) =
            make_uint2(rounded(y[0]) | rounded(y[1]) << 16, rounded(y[2]) | rounded(y[3]) << 16);
    }
}

// q, k, v and out are not __restrict__: a kernel that may still run when this one starts writes q, k and v. Nor is what
// this one writes and reads.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
decode(const unsigned short* q, const unsigned short* k, const unsigned short* v, const float* cos, const float* sin,
       const void* q_weight, const void* k_weight, unsigned char* keys, unsigned char* values, const int* table,
       const int* lengths, const float* sinks, unsigned char* out, const float* code_scales, const float* smooth,
       float* partials, float* extremes, int* counters, float scale, float k_scale, float v_scale) {
    alignas(16) __shared__ float sums[WARPS][SHARING][DIM + 4];  // the 4 keep lanes' banks apart
    __shared__ float peaks[WARPS][8 * EIGHTS], totals[WARPS][8 * EIGHTS];
    __shared__ int before;
    let_others_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int head = blockIdx.x, sequence = blockIdx.y;
    const int* blocks = table + (long long)sequence * WIDTH;

    // Which tiles are taken does not depend on the length: the table is read while that is on its way.
    const int share = SPLIT ? blockIdx.z : 0;
    const int length = integer(lengths + sequence);
    int start = (share * WARPS + warp) * KEYS, found[SIDES];
#define FIND(position)                                                                                                 \
    for (int i = 0; i < SIDES; i++) found[i] = integer(blocks + min(((position) + i * SIDE) / BLOCK_SIZE, WIDTH - 1))
    if (!WINDOW) {
#pragma unroll
        FIND(start);
    }
    const int last = max(length - 1, 0);
    const int first_seen = CHUNKED ? last / max(WINDOW, 1) * WINDOW : WINDOW ? max(length - WINDOW, 0) : 0;
    int shares = 1;
    if (SPLIT) {
        const int tiles = (last + KEYS - 1) / KEYS - first_seen / KEYS;
        shares = max(min((tiles + AT_LEAST - 1) / AT_LEAST, (int)gridDim.z), 1);
        if (share >= shares) return;
    }
    const int stride = shares * WARPS * KEYS;
    if (WINDOW) {
        start += first_seen / KEYS * KEYS;
#pragma unroll
        FIND(start);
    }

    // Of 16 keys a lane has keys g and g + 8, and the values of 2t, 2t + 1, 2t + 8 and 2t + 9.
    unsigned key[TILES][2][K_WORDS] = {}, value[TILES][4][V_WORDS] = {};
    long long at[SIDES];
#define PLACE(position)                                                                                                \
    for (int i = 0; i < SIDES; i++)                                                                                    \
        at[i] = (((long long)found[i] * KV_HEADS + head) * BLOCK_SIZE + ((position) + i * SIDE) % BLOCK_SIZE) * ROW
#define THERE(p) ((p) < last && (!WINDOW || (p) >= first_seen))
#define ROW_OF(i, eight, row) (at[(16 * (i) + 8 * (eight)) / SIDE] + ((16 * (i) + 8 * (eight)) % SIDE + (row)) * ROW)
#define LOAD_KEYS(i, position)                                                                                         \
    for (int h = 0; h < 2; h++)                                                                                        \
        for (int c = 0; c < K_WORDS; c += K_LOAD)                                                                      \
            fetch<K_LOAD>(key[i][h] + c, keys + ROW_OF(i, h, g) + 16 * c + 4 * K_LOAD * t,                             \
                          THERE((position) + 16 * i + 8 * h + g))
#define LOAD_VALUES(i, position)                                                                                       \
    for (int h = 0; h < 4; h++)                                                                                        \
        for (int c = 0; c < V_WORDS; c += V_LOAD)                                                                      \
            fetch<V_LOAD>(value[i][h] + c, values + ROW_OF(i, h / 2, 2 * t + h % 2) + 32 * c + 4 * V_LOAD * g,         \
                          THERE((position) + 16 * i + h / 2 * 8 + 2 * t + h % 2))
#pragma unroll
    PLACE(start);
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        LOAD_KEYS(i, start);
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
#pragma unroll
        LOAD_VALUES(i, start);
    }
#pragma unroll
    FIND(start + stride);
    float c[ANGLES], s[ANGLES];
    if (ROPE) {
        const float *cos_at = cos + (long long)last * (ROPE / 2), *sin_at = sin + (long long)last * (ROPE / 2);
#pragma unroll
        for (int i = 0; i < ANGLES; i += 4) {
            const int feature = k_feature(i, t);
            const bool upper = !NEAR && feature >= ROPE / 2;
            if (feature < ROPE) {
                const float4 x = floats(cos_at + feature - upper * (ROPE / 2));
                const float4 y = floats(sin_at + feature - upper * (ROPE / 2));
                const float sign = NEAR || upper ? 1 : -1;
                c[i] = x.x, c[i + 1] = x.y, c[i + 2] = x.z, c[i + 3] = x.w;
                s[i] = sign * y.x, s[i + 1] = sign * y.y, s[i + 2] = sign * y.z, s[i + 3] = sign * y.w;
            }
        }
    }
    wait_for_others();

    // The token itself, whose key and value need not come back from the cache: one warp puts them there.
    const bool owner = share == shares - 1 && warp == WARPS - 1 && length > 0;
    const unsigned short* own_at = k + (long long)sequence * K_STRIDE + head * DIM;
    const unsigned short* own_value_at = v + (long long)sequence * V_STRIDE + head * DIM;
    unsigned own_key[MINE / 2], own_value[STEPS];
    if (AHEAD && owner) {
        get_key(own_key, own_at, t);
        get_value(own_value, own_value_at, g);
    }
    unsigned query[EIGHTS][STEPS][2];
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
        float x[MINE];
        const int number_of = head * SHARING + min(8 * e + g, SHARING - 1);
        const unsigned short* from = q + (long long)sequence * Q_STRIDE + number_of * DIM;
        unsigned words[MINE / 2];
        get_key(words, from, t);
        prepare(x, words, from, (const char*)q_weight + (PER_HEAD ? number_of * DIM * NORM_BYTES : 0), c, s, t);
        const float by = FLOOR > 0 ? 1 + SCALE * logf(1 + floorf((last + 1) / (FLOOR > 0 ? FLOOR : 1))) : 1;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
            for (int upper = 0; upper < 2; upper++) {
                float low = x[4 * i + 2 * upper] * by, high = x[4 * i + 2 * upper + 1] * by;
                if (BYTES == 1) low = number(rounded(low)), high = number(rounded(high));
                query[e][i][upper] = 8 * e + g < SHARING ? pair(low, high) : 0;
            }
    }

    // Heads 2t and 2t + 1, and more eights of them: features of number 2i and 2i + 1 of a lane's of a value.
    const float factor = CAP > 0 ? LOG2E : scale * LOG2E;
    float y[EIGHTS][STEPS][4] = {}, peak[EIGHTS][2], total[EIGHTS][2] = {};
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) peak[e][0] = peak[e][1] = UNSEEN;
    if (owner) {
        if (!AHEAD) get_key(own_key, own_at, t);
        const long long own_block = integer(blocks + last / BLOCK_SIZE);
        const long long place = ((own_block * KV_HEADS + head) * BLOCK_SIZE + last % BLOCK_SIZE) * ROW;
        float x[MINE];
        unsigned own[K_WORDS], own_v[V_WORDS];
        const float inverse = BYTES == 1 ? 1 / k_scale : 1, inverse_v = BYTES == 1 ? 1 / v_scale : 1;
        prepare(x, own_key, own_at, (const char*)k_weight + (PER_HEAD ? head * DIM * NORM_BYTES : 0), c, s, t);
#pragma unroll
        for (int i = 0; i < K_WORDS; i++) {
            constexpr int COUNT = 4 / BYTES;
            own[i] = stored(x[COUNT * i], x[COUNT * i + 1], k_scale, inverse);
            if (BYTES == 1)
                own[i] |= stored(x[(COUNT * i + 2) % MINE], x[(COUNT * i + 3) % MINE], k_scale, inverse) << 16;
        }
        if (g == 0)
#pragma unroll
            for (int i = 0; i < K_WORDS; i += K_LOAD) put<K_LOAD>(keys + place + 16 * i + 4 * K_LOAD * t, own + i);
        if (!AHEAD) get_value(own_value, own_value_at, g);
        float scores[EIGHTS][4] = {};
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const unsigned low = of_key(own, i, 0), high = of_key(own, i, 1), a[4] = {low, low, high, high};
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) multiply(scores[e], a, query[e][i]);
        }
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                peak[e][j] = capped(scores[e][j], scale) * factor;
                total[e][j] = g == 0;  // of which the sum is taken
            }

#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const unsigned two = stored(of_word(own_value, 2 * i), of_word(own_value, 2 * i + 1), v_scale, inverse_v);
            if (BYTES == 2) own_v[i % V_WORDS] = two;
            if (BYTES == 1) own_v[i / 2] = i % 2 ? own_v[i / 2] | two << 16 : two;
            const unsigned read = BYTES == 1 ? halves(two, 0) : two;
#pragma unroll
            for (int e = 0; e < EIGHTS; e++) {
                y[e][i][0] = y[e][i][1] = BYTES == 1 ? half_number(read & 0xFFFF) : number(read & 0xFFFF);
                y[e][i][2] = y[e][i][3] = BYTES == 1 ? half_number(read >> 16) : number(read >> 16);
            }
        }
        if (t == 0)
#pragma unroll
            for (int i = 0; i < V_WORDS; i += V_LOAD) put<V_LOAD>(values + place + 32 * i + 4 * V_LOAD * g, own_v + i);
    }

#pragma unroll 1
    for (; start < last; start += stride) {
        const int next = start + stride;
#pragma unroll
        PLACE(next);
        float scores[TILES][EIGHTS][4] = {};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const unsigned a[4] = {of_key(key[i][0], step, 0), of_key(key[i][1], step, 0),
                                       of_key(key[i][0], step, 1), of_key(key[i][1], step, 1)};
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) multiply(scores[i][e], a, query[e][step]);
            }
        }
        if (next < last) {  // as a branch, so that ptxas does not put the loads behind the softmax
#pragma unroll
            for (int i = 0; i < TILES; i++) {
#pragma unroll
                LOAD_KEYS(i, next);
            }
#pragma unroll
            FIND(next + stride);
        }

        unsigned weights[TILES][EIGHTS][2];
#pragma unroll
        for (int e = 0; e < EIGHTS; e++) {
            float higher[2], fading[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float most = UNSEEN;
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        float& score = scores[i][e][2 * h + j];
                        score = THERE(start + 16 * i + 8 * h + g) ? capped(score, scale) * factor : HIDDEN;
                        most = fmaxf(most, score);
                    }
#pragma unroll
                for (int far = 4; far < 32; far *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
                higher[j] = fmaxf(peak[e][j], most);
                fading[j] = exp2_of(peak[e][j] - higher[j]);
                peak[e][j] = higher[j];
                total[e][j] *= fading[j];
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float low = exp2_of(scores[i][e][2 * h] - higher[0]);
                    const float high = exp2_of(scores[i][e][2 * h + 1] - higher[1]);
                    total[e][0] += low;
                    total[e][1] += high;
                    weights[i][e][h] = transposed(pair(low, high));
                }
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) y[e][i][j] *= fading[j % 2];
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const unsigned a[4] = {
                    of_values(value[i][0], value[i][1], 2 * step), of_values(value[i][0], value[i][1], 2 * step + 1),
                    of_values(value[i][2], value[i][3], 2 * step), of_values(value[i][2], value[i][3], 2 * step + 1)};
#pragma unroll
                for (int e = 0; e < EIGHTS; e++) multiply(y[e][step], a, weights[i][e]);
            }
#pragma unroll
            LOAD_VALUES(i, next);
        }
    }

#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int far = 4; far < 32; far *= 2) total[e][j] += __shfl_xor_sync(~0u, total[e][j], far);
            const int member = 8 * e + 2 * t + j;
            if (g == 0) peaks[warp][member] = peak[e][j], totals[warp][member] = total[e][j];
            if (member < SHARING)
#pragma unroll
                for (int i = 0; i < STEPS; i++)
                    *(float2*)&sums[warp][member][v_feature(2 * i, g)] = make_float2(y[e][i][j], y[e][i][2 + j]);
        }
    __syncthreads();

    // Four features of a head a thread.
    constexpr int FOURS = SHARING * DIM / 4;
    const long long ordinal = (long long)sequence * KV_HEADS + head, first_share = ordinal * gridDim.z;
    const bool whole = !SPLIT || shares == 1;
    for (int four = threadIdx.x; four < FOURS; four += THREADS) {
        const int member = four / (DIM / 4), feature = four % (DIM / 4) * 4;
        Found x;
#pragma unroll
        for (int i = 0; i < WARPS; i++)
            x.add(peaks[i][member], totals[i][member], *(const float4*)&sums[i][member][feature]);
        if (whole) {
            finish(x, head * SHARING + member, feature, sinks, code_scales, smooth, v_scale,
                   out + (ordinal * SHARING + member) * DIM * (CODES ? 1 : 2));
        } else {
            *(float4*)(partials + ((first_share + share) * SHARING + member) * DIM + feature) = x.sums;
            if (feature == 0) {
                extremes[(first_share + share) * (2 * SHARING) + member] = x.peak;
                extremes[(first_share + share) * (2 * SHARING) + SHARING + member] = x.total;
            }
        }
    }
    if (whole) return;
    __syncthreads();  // every thread has stored before one of them says so
    if (threadIdx.x == 0) before = arrived(counters + ordinal);
    __syncthreads();
    if (before != shares - 1) return;
    if (threadIdx.x == 0) counters[ordinal] = 0;
    for (int four = threadIdx.x; four < FOURS; four += THREADS) {
        const int member = four / (DIM / 4), feature = four % (DIM / 4) * 4;
        Found x;
#pragma unroll 4
        for (int i = 0; i < shares; i++) {
            const float* there = extremes + (first_share + i) * (2 * SHARING) + member;
            x.add(shared_float(there), shared_float(there + SHARING),
                  shared_floats(partials + ((first_share + i) * SHARING + member) * DIM + feature));
        }
        finish(x, head * SHARING + member, feature, sinks, code_scales, smooth, v_scale,
               out + (ordinal * SHARING + member) * DIM * (CODES ? 1 : 2));
    }
}
