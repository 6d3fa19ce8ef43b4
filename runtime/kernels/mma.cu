// Products on tensor cores of what is stored in 16 bits or in e4m3, which is multiplied as fp16: that holds all of its
// numbers. Defined before this: BYTES of what is stored; HALF: it is fp16, or bf16; CODES (or not): e4m3 is written.

// c [16, 8] += a [16, 16] times b [16, 8]; of a, columns 2t and 2t + 1 of two rows, then 8 after these.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#define MMA(TYPE)                                                                                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                                         \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                                   \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
    if (HALF || BYTES == 1)
        MMA("f16");
    else
        MMA("bf16");
}

// Two codes of e4m3, the lower or the upper half of a word, in fp16.
__device__ __forceinline__ unsigned halves(unsigned word, int upper) {
    unsigned v = 0;
#if BYTES == 1
    if (upper)
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, high;\n}" : "=r"(v) : "r"(word));
    else
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.rn.f16x2.e4m3x2 %0, low;\n}" : "=r"(v) : "r"(word));
#endif
    return v;
}

// Two numbers, rounded to e4m3.
__device__ __forceinline__ unsigned short codes_of(float low, float high) {
    unsigned short v = 0;
#if BYTES == 1 || CODES
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
#endif
    return v;
}

// The same in fp16.
__device__ __forceinline__ unsigned coded(float low, float high) { return halves(codes_of(low, high), 0); }
