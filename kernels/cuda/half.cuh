// Kernels of f16, bf16 and f32 in one text: what the types are called, how they are rounded and how they go 16 bytes at a
// time. Sums are f32 whatever the type.
#pragma once
#include <string.h>

#include "gpu.cuh"

constexpr int WARP = 32;

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(__half x) { return __half2float(x); }
__device__ inline float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_f32(float x);
template <>
__device__ inline float from_f32<float>(float x) { return x; }
template <>
__device__ inline __half from_f32<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Two values of T in a word, the first in the lower half, as mma.sync wants them.
template <class T>
__device__ inline uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
    const __half2 both = __floats2half2_rn(first, second);
    uint32_t word;
    memcpy(&word, &both, sizeof word);
    return word;
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    uint32_t word;
    memcpy(&word, &both, sizeof word);
    return word;
}

// The products of 16-bit values by their type.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) { mma_f16(c, a, b); }
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
    mma_bf16(c, a, b);
}

// Values in 16 bytes.
template <class T>
constexpr int LANES = 16 / sizeof(T);

// LANES values at `at`, which is on a 16-byte boundary.
template <class T>
__device__ inline void load_16(const T* at, float (&values)[LANES<T>]) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(at);
    T narrow[LANES<T>];
    memcpy(static_cast<void*>(narrow), &bytes, sizeof bytes);
#pragma unroll
    for (int i = 0; i < LANES<T>; i++) values[i] = to_f32(narrow[i]);
}

// Rounds LANES values to T at `at`, which is on a 16-byte boundary.
template <class T>
__device__ inline void store_16(T* at, const float (&values)[LANES<T>]) {
    T narrow[LANES<T>];
#pragma unroll
    for (int i = 0; i < LANES<T>; i++) narrow[i] = from_f32<T>(values[i]);
    uint4 bytes;
    memcpy(&bytes, narrow, sizeof bytes);
    *reinterpret_cast<uint4*>(at) = bytes;
}
