// What kernels of attention share: names of norms, and a softmax in powers of two.

enum Norm { none, rms, unit };

constexpr float LOG2E = 1.4426950408889634f, UNSEEN = -1e30f;

__device__ __forceinline__ float exp2_of(float v) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
    return y;
}
