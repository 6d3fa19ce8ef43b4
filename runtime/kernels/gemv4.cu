// `gemv4` of linear.py for int4 in groups of 128 and x in bf16 or fp16: out [N] = x [K] times words [N, K / 8] (gated:
// [2N, K / 8]). It multiplies on int8 tensor cores: one AND makes four weights an operand, where fp32 takes an AND and
// an FMA for each.
//
// x becomes integers, in units of a power of two that the largest number of its group decides: 22 bits with the sign
// where they meet even nibbles, 18 where they meet odd ones. Their digits of 8 bits are columns of mma's B. A group's
// sums are exact. Groups that are all below 2^-87 have that one's unit, 2^-107; NaN and infinity in x make every output
// NaN.
//
// Words are laid out so that the 16 bytes which a lane loads are mma's A but for a mask: q + 8 in a byte's even nibble,
// 16 (q + 8) in its odd one, which meets x / 16. Products of the 8 with x are taken off, computed once for all rows.
//
// A program has TILES of 16 rows (gated: half of them up), and its warps share K: each takes every WARPS-th chunk of
// four groups, and makes x's digits for itself, so that no warp waits for another before the end.
//
// Defined before this: N, K, GROUP, GATED, KIND, LIMIT (or not), OFFSET, PDL; SMOOTH; HALF: x and out are fp16; TILES,
// WARPS; BLOCKS: programs that a multiprocessor has to hold side by side.

#include "common.cu"

constexpr int PARTS = 1 + GATED, ROWS = 16 * TILES / PARTS, RUNS = K / 32, CHUNKS = K / 512;
static_assert(GROUP == 128 && K % 512 == 0 && WARPS <= CHUNKS, "K");
static_assert(TILES % PARTS == 0 && N % ROWS == 0 && ROWS <= 32 * WARPS, "N");

// c [16, 8] += a [16, 32] of TYPE times b [32, 8] of s8.
#define MMA(TYPE, c, a0, a1, a2, a3, b0, b1)                                                                         \
    asm("mma.sync.aligned.m16n8k32.row.col.s32." #TYPE ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                             \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

__device__ __forceinline__ float component(float4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// x, residual and out are not __restrict__: a kernel that may still run when this one starts writes x and residual, and
// residual may be out.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
gemv4(const unsigned short* x, const uint4* __restrict__ weight, const float4* __restrict__ groups,
      const float* __restrict__ smooth, const unsigned short* __restrict__ bias, const unsigned short* residual,
      unsigned short* out) {
    alignas(16) __shared__ unsigned digits[WARPS][4][2][4][4][4];  // by group, nibbles' parity, run, digit and word
    __shared__ float units[WARPS][4];
    __shared__ float sums[WARPS][16 * TILES];
    let_others_start();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * ROWS;

    // As operands lie: of every tile a lane has rows g and g + 8, of every group run t.
    const int g = lane / 4, t = lane % 4;
    const uint4* w_at[TILES];
    const float4* s_at[TILES];
    uint4 w[4][TILES][2];
    float4 scale[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int row = first + i / (TILES / PARTS) * N + i % (TILES / PARTS) * 16 + g;
        w_at[i] = weight + (long long)row * RUNS + 16 * warp + t;
        s_at[i] = groups + (long long)row * CHUNKS + warp;
    }
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) w[q][i][half] = streamed(w_at[i] + 8 * half * RUNS + 4 * q);
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) scale[i][half] = s_at[i][8 * half * CHUNKS];
    if (SMOOTH && lane < 16) asm volatile("prefetch.global.L2 [%0];" ::"l"(smooth + 512 * warp + 32 * lane));
    wait_for_others();

    // Of every group a lane makes the digits of columns 0, 8, 16 and 24 after this one: nibbles of parity h of a word.
    const int run = lane / 8, h = lane / 4 % 2, word = lane % 4, column = 32 * run + 4 * h + word;
    float y[TILES][4] = {};
    for (int chunk = warp; chunk < CHUNKS; chunk += WARPS) {
        __syncwarp();  // all have read the digits before
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int at = 512 * chunk + 128 * q + column;
            float v[4];
            unsigned most = 0;  // as bits: NaN is beyond infinity
#pragma unroll
            for (int p = 0; p < 4; p++) {
                v[p] = number(x[at + 8 * p]);
                if (SMOOTH) v[p] *= __ldg(smooth + at + 8 * p);
                most = max(most, __float_as_uint(v[p]) & 0x7FFFFFFF);
            }
            // Below 2^(E - 126), in units of 2^(E - 147); added to 2^23 + 2^22 the integer is in the mantissa. 0x8080
            // and the XOR give the lower two digits signs.
            const unsigned exponent = max(__reduce_max_sync(~0u, most) & 0x7F800000, 40u << 23);  // E
            const float inverse = __uint_as_float(((127u + 147 - 4 * h) << 23) - exponent);
            unsigned f[4];
#pragma unroll
            for (int p = 0; p < 4; p++)
                f[p] = (__float_as_uint(fmaf(v[p], inverse, 12582912.f + 0x8080)) - 0x4B400000) ^ 0x8080;
            const unsigned ab = __byte_perm(f[0], f[1], 0x5140), cd = __byte_perm(f[2], f[3], 0x5140);
            unsigned(*to)[4] = digits[warp][q][h][run];
            to[0][word] = __byte_perm(ab, cd, 0x5410);
            to[1][word] = __byte_perm(ab, cd, 0x7632);
            to[2][word] = __byte_perm(__byte_perm(f[0], f[1], 0x0062), __byte_perm(f[2], f[3], 0x0062), 0x5410);
            const unsigned unit = exponent == 255u << 23 ? 0x7FC00000 : exponent - (20 << 23);
            if (lane == 0) units[warp][q] = __uint_as_float(unit);
        }
        __syncwarp();

        const bool more = chunk + WARPS < CHUNKS;
        float4 next[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            w_at[i] += 16 * WARPS;
            s_at[i] += WARPS;
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (more) next[i][half] = s_at[i][8 * half * CHUNKS];
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
            // Columns 0 to 2 of B; others are of no use, and repeat them or are what was in a fourth place.
            const uint4 even = *(uint4*)digits[warp][q][0][t][g % 4], odd = *(uint4*)digits[warp][q][1][t][g % 4];
            const float unit = units[warp][q];
            constexpr unsigned EIGHT = 0xF8F8F8F8, EIGHTS = 0x80808080;  // -8 and -128
            int excess[4] = {};
            MMA(s8, excess, EIGHT, EIGHT, EIGHT, EIGHT, even.x, even.y);
            MMA(s8, excess, EIGHT, EIGHT, EIGHT, EIGHT, even.z, even.w);
            MMA(s8, excess, EIGHTS, EIGHTS, EIGHTS, EIGHTS, odd.x, odd.y);
            MMA(s8, excess, EIGHTS, EIGHTS, EIGHTS, EIGHTS, odd.z, odd.w);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                constexpr unsigned EVEN = 0x0F0F0F0F, ODD = 0xF0F0F0F0;
                const uint4 a = w[q][i][0], b = w[q][i][1];
                int c[4] = {excess[0], excess[1], excess[2], excess[3]};
                MMA(u8, c, a.x & EVEN, b.x & EVEN, a.y & EVEN, b.y & EVEN, even.x, even.y);
                MMA(u8, c, a.z & EVEN, b.z & EVEN, a.w & EVEN, b.w & EVEN, even.z, even.w);
                MMA(u8, c, a.x & ODD, b.x & ODD, a.y & ODD, b.y & ODD, odd.x, odd.y);
                MMA(u8, c, a.z & ODD, b.z & ODD, a.w & ODD, b.w & ODD, odd.z, odd.w);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (more) w[q][i][half] = streamed(w_at[i] + 8 * half * RUNS + 4 * q);
                    const float s = component(scale[i][half], q) * unit;
                    y[i][2 * half] = fmaf((float)c[2 * half], s, y[i][2 * half]);
                    y[i][2 * half + 1] = fmaf((float)c[2 * half + 1], s, y[i][2 * half + 1]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) scale[i][half] = next[i][half];
    }

    // Digits 0 and 1 are sums of lanes where t = 0, digit 2 where t = 1.
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float part = t == 0 ? fmaf(256, y[i][2 * half + 1], y[i][2 * half]) : 65536 * y[i][2 * half];
            part += __shfl_xor_sync(~0u, part, 1);
            if (t == 0) sums[warp][16 * i + 8 * half + g] = part;
        }
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const int row = first + threadIdx.x;
        float total[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            total[part] = bias ? number(bias[part * N + row]) : 0;
#pragma unroll
            for (int i = 0; i < WARPS; i++) total[part] += sums[i][part * ROWS + threadIdx.x];
        }
#if GATED
        total[0] = gate(total[0], total[1]);
#endif
        if (residual) total[0] += number(residual[row]);
        out[row] = rounded(total[0]);
    }
}
