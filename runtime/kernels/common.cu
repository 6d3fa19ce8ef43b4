// What kernels in CUDA C++ share. Defined before this: PDL; GATED, KIND, LIMIT (or not), OFFSET; HALF: x and out are
// fp16; FETCHED (or not): how much of a weight comes into the L2 cache for a part that is read, as PTX says it.

#ifndef FETCHED
#define FETCHED ""
#endif

// From here on kernels behind this may start.
__device__ __forceinline__ void let_others_start() {
    if (PDL) asm volatile("griddepcontrol.launch_dependents;");
}
// Until what kernels before have written is there.
__device__ __forceinline__ void wait_for_others() {
    if (PDL) asm volatile("griddepcontrol.wait;" : : : "memory");
}

// Part of a weight: read once, so that other things stay in the cache. (With .nc, ptxas would move those that are ahead
// of griddepcontrol.wait behind it.)
__device__ __forceinline__ uint4 streamed(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate" FETCHED ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// A number of x's dtype.
__device__ __forceinline__ float number(unsigned short bits) {
    float v;
    if (HALF)
        asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    else
        v = __uint_as_float((unsigned)bits << 16);
    return v;
}

__device__ __forceinline__ unsigned short rounded(float v) {
    unsigned short bits;
    if (HALF)
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// Two numbers in 16 bits.
template <bool FP16> __device__ __forceinline__ unsigned rounded_pair(float low, float high) {
    unsigned v;
    if (FP16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

#if GATED
enum Kind { silu, gelu, gelu_tanh, quick_gelu, relu, relu2 };

// `_gate` of linear.py.
__device__ __forceinline__ float gate(float x, float up) {
#ifdef LIMIT
    x = x > LIMIT ? LIMIT : x;
    up = up > LIMIT ? LIMIT : up < -LIMIT ? -LIMIT : up;
#endif
    float y;
    if (KIND == gelu) {
        y = 0.5f * x * (1 + erff(x * 0.7071067811865476f));
    } else if (KIND == relu || KIND == relu2) {
        const float positive = x < 0 ? 0 : x;
        y = KIND == relu2 ? positive * positive : positive;
    } else {  // x sigmoid(u)
        const float u = KIND == gelu_tanh    ? 1.5957691216057308f * (x + 0.044715f * x * x * x)
                        : KIND == quick_gelu ? 1.702f * x
                                             : x;
        y = __fdividef(x, 1 + __expf(-u));  // a division as IEEE wants it would branch, for each x
    }
    return y * (up + OFFSET);
}
#endif
