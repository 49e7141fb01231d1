// CUDA's names for a CPU: with this header g++ compiles a .cu file as it stands, and `scheduler.cpp` runs it.
//
// Every thread of a block is a fiber; barriers, shuffles, votes, mma.sync, ldmatrix and cp.async are played as the PTX
// manual describes them. Types and 16-bit arithmetic are NVIDIA's own, from the toolkit's headers.
//
// What it shows: wrong indices and fragments, missing barriers and waits (in one of the orders, see `scheduler.h`),
// shared memory that is read before it is written (it is NaN), misaligned ldmatrix and cp.async, lanes that meet in
// different collectives. What it cannot show: races within one instruction of a warp, bank conflicts, registers, speed,
// memory order. A loop that spins until another thread writes never ends here.
#pragma once

#include "scheduler.h"

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <math.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#ifdef GPU_LIST_KERNELS
#define __global__ gpu_kernel_name  // build.sh looks for it in the preprocessed file
#else
#define __global__
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
// One a block: a block is played by one OS thread, whose fibers share what is thread-local. Inside a function that is
// static.
#define __shared__ thread_local

#define threadIdx (::gpu::lane->thread)
#define blockIdx (::gpu::lane->block->index)
#define blockDim (::gpu::lane->block->size)
#define gridDim (::gpu::lane->block->grid)
constexpr int warpSize = 32;

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::gpu::lane->block->shared)

namespace gpu {

inline unsigned lane_in_warp() { return lane->index % 32; }

// What a read of nothing gives: all bits set, NaN where that is a number.
template <class T>
T poison() {
    T value;
    std::memset(static_cast<void*>(&value), 0xff, sizeof value);
    return value;
}

template <class T>
struct Shuffle {
    T value, result;
    unsigned source;
};

// One lane's value read by another.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, const char* what) {
    static_assert(std::is_trivially_copyable<T>::value, "a shuffle moves bits");
    Shuffle<T> mine{value, value, source};
    meet_warp(
        mask,
        [](void* const* arguments, unsigned present) {
            for (unsigned l = 0; l < 32; l++) {
                if (!(present >> l & 1)) continue;
                Shuffle<T>& to = *static_cast<Shuffle<T>*>(arguments[l]);
                // A lane that does not take part has no value to give.
                const bool given = to.source < 32 && (present >> to.source & 1);
                to.result = given ? static_cast<Shuffle<T>*>(arguments[to.source])->value : poison<T>();
            }
        },
        &mine, what);
    return mine.result;
}

struct Vote {
    bool yes;
    unsigned ballot, present;
};

inline Vote vote(unsigned mask, bool yes, const char* what) {
    Vote mine{yes, 0, 0};
    meet_warp(
        mask,
        [](void* const* arguments, unsigned present) {
            unsigned ballot = 0;
            for (unsigned l = 0; l < 32; l++) {
                if (present >> l & 1 && static_cast<Vote*>(arguments[l])->yes) ballot |= 1u << l;
            }
            for (unsigned l = 0; l < 32; l++) {
                if (!(present >> l & 1)) continue;
                static_cast<Vote*>(arguments[l])->ballot = ballot;
                static_cast<Vote*>(arguments[l])->present = present;
            }
        },
        &mine, what);
    return mine;
}

// All lanes get f of all values, taken in the order of the lanes.
template <class T, class F>
T reduce(unsigned mask, T value, F, const char* what) {
    T mine = value;
    meet_warp(
        mask,
        [](void* const* arguments, unsigned present) {
            T sum{};
            bool first = true;
            for (unsigned l = 0; l < 32; l++) {
                if (!(present >> l & 1)) continue;
                const T next = *static_cast<T*>(arguments[l]);
                sum = first ? next : F()(sum, next);
                first = false;
            }
            for (unsigned l = 0; l < 32; l++) {
                if (present >> l & 1) *static_cast<T*>(arguments[l]) = sum;
            }
        },
        &mine, what);
    return mine;
}

// What a warp's tensor core and its loads do, see `tensor.cpp`.
enum class Half { F16, BF16 };
void mma(Half kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed);

// Keeps the compiler from joining a rounded operation with its neighbours (g++ makes a fused multiply-add of a * b + c,
// as nvcc does).
template <class T>
T rounded(T value) {
#ifdef __x86_64__
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
    return value;
}

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// A read-modify-write of any type of 2, 4 or 8 bytes; returns the old value.
template <class T, class F>
T update(T* at, F change) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    static_assert(sizeof(T) == sizeof(Bits), "an atomic is 2, 4 or 8 bytes");
    Bits* word = reinterpret_cast<Bits*>(at);
    Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        const T before = bits<T>(old);
        const Bits after = bits<Bits>(static_cast<T>(change(before)));
        if (__atomic_compare_exchange_n(word, &old, after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return before;
    }
}

// Several types for one argument: it has the type of the pointer's target.
template <class T>
struct Same {
    using type = T;
};
template <class T>
using Of = typename Same<T>::type;

}  // namespace gpu

// ---- barriers

#ifdef PLANT_NO_BARRIER
// A bug for CI to find: the block's barriers do nothing.
inline void __syncthreads() {}
#else
inline void __syncthreads() { gpu::meet_block(false); }
#endif
inline int __syncthreads_count(int yes) { gpu::meet_block(yes); return gpu::lane->block->voted; }
inline int __syncthreads_or(int yes) { gpu::meet_block(yes); return gpu::lane->block->voted > 0; }
inline int __syncthreads_and(int yes) {
    gpu::meet_block(yes);
    return gpu::lane->block->voted == gpu::lane->block->voters;
}
inline void __syncwarp(unsigned mask = ~0u) { gpu::meet_warp(mask, nullptr, nullptr, "__syncwarp"); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- a warp's collectives. A lane outside its group of `width` reads its own value, as in CUDA.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned l = gpu::lane_in_warp(), w = static_cast<unsigned>(width);
    return gpu::shuffle(mask, value, (l & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
    const unsigned l = gpu::lane_in_warp(), w = static_cast<unsigned>(width), from = l ^ static_cast<unsigned>(other);
    // Lanes of earlier groups may be read, those of later ones may not.
    return gpu::shuffle(mask, value, from < (l & ~(w - 1)) + w ? from : l, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned l = gpu::lane_in_warp(), w = static_cast<unsigned>(width);
    return gpu::shuffle(mask, value, (l & (w - 1)) + by < w ? l + by : l, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    const unsigned l = gpu::lane_in_warp(), w = static_cast<unsigned>(width);
    return gpu::shuffle(mask, value, (l & (w - 1)) >= by ? l - by : l, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int yes) { return gpu::vote(mask, yes, "__ballot_sync").ballot; }
inline int __any_sync(unsigned mask, int yes) { return gpu::vote(mask, yes, "__any_sync").ballot != 0; }
inline int __all_sync(unsigned mask, int yes) {
    const gpu::Vote all = gpu::vote(mask, yes, "__all_sync");
    return all.ballot == all.present;
}
inline unsigned __activemask() {
    gpu::fail("__activemask has no meaning where lanes run one after the other: pass the mask that is meant");
}

namespace gpu {
struct Add { template <class T> T operator()(T a, T b) const { return a + b; } };
struct Min { template <class T> T operator()(T a, T b) const { return b < a ? b : a; } };
struct Max { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };
}  // namespace gpu
#define GPU_REDUCE(name, T, Operation) \
    inline T name(unsigned mask, T value) { return gpu::reduce(mask, value, gpu::Operation(), #name); }
GPU_REDUCE(__reduce_add_sync, unsigned, Add)
GPU_REDUCE(__reduce_add_sync, int, Add)
GPU_REDUCE(__reduce_min_sync, unsigned, Min)
GPU_REDUCE(__reduce_min_sync, int, Min)
GPU_REDUCE(__reduce_max_sync, unsigned, Max)
GPU_REDUCE(__reduce_max_sync, int, Max)
GPU_REDUCE(__reduce_and_sync, unsigned, And)
GPU_REDUCE(__reduce_or_sync, unsigned, Or)
GPU_REDUCE(__reduce_xor_sync, unsigned, Xor)
#undef GPU_REDUCE

// ---- tensor cores and copies in the background, as `gpu.cuh` describes them

#ifdef PLANT_FRAGMENT
// A bug for CI to find: b's halves are in the wrong registers, so its rows are 8 off.
#define GPU_FRAGMENT(b) {b[1], b[0]}
#else
#define GPU_FRAGMENT(b) {b[0], b[1]}
#endif
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t fragment[2] = GPU_FRAGMENT(b);
    gpu::mma(gpu::Half::F16, c, a, fragment);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t fragment[2] = GPU_FRAGMENT(b);
    gpu::mma(gpu::Half::BF16, c, a, fragment);
}
#undef GPU_FRAGMENT
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { gpu::ldmatrix(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { gpu::ldmatrix(r, row, true); }
inline void cp_async_16(void* shared, const void* global, bool valid) {
    gpu::copy_start(shared, valid ? global : nullptr);
}
inline void cp_async_commit() { gpu::copy_commit(); }
template <int N>
void cp_async_wait() {
    gpu::copy_wait(N);
}

// ---- atomics

template <class T>
T atomicAdd(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old + value; }); }
template <class T>
T atomicSub(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old - value; }); }
template <class T>
T atomicMax(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old < value ? value : old; }); }
template <class T>
T atomicMin(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return value < old ? value : old; }); }
template <class T>
T atomicExch(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T) { return value; }); }
template <class T>
T atomicAnd(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old & value; }); }
template <class T>
T atomicOr(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old | value; }); }
template <class T>
T atomicXor(T* at, gpu::Of<T> value) { return gpu::update(at, [=](T old) { return old ^ value; }); }
template <class T>
T atomicCAS(T* at, gpu::Of<T> expected, gpu::Of<T> value) {
    return gpu::update(at, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* at, unsigned last) {
    return gpu::update(at, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- memory

template <class T>
T __ldg(const T* at) { return *at; }
template <class T>
T __ldcs(const T* at) { return *at; }
template <class T>
T __ldcg(const T* at) { return *at; }
template <class T>
void __stcs(T* at, gpu::Of<T> value) { *at = value; }
template <class T>
void __stcg(T* at, gpu::Of<T> value) { *at = value; }

// ---- bits

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline unsigned __brev(unsigned v) {
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (v >> i & 1) << (31 - i);
    return out;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float v) { return gpu::bits<unsigned>(v); }
inline int __float_as_int(float v) { return gpu::bits<int>(v); }
inline float __uint_as_float(unsigned v) { return gpu::bits<float>(v); }
inline float __int_as_float(int v) { return gpu::bits<float>(v); }
inline long long __double_as_longlong(double v) { return gpu::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return gpu::bits<double>(v); }

// ---- numbers, rounded to nearest where CUDA does so

inline float __fadd_rn(float a, float b) { return gpu::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return gpu::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return gpu::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return gpu::rounded(a / b); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return gpu::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return gpu::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return gpu::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return gpu::rounded(a / b); }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __double2float_rn(double v) { return static_cast<float>(v); }
inline int __float2int_rn(float v) { return static_cast<int>(std::nearbyintf(v)); }
inline int __float2int_rz(float v) { return static_cast<int>(v); }
inline unsigned __float2uint_rn(float v) { return static_cast<unsigned>(std::nearbyintf(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }

namespace gpu {
// A sum or a conversion rounded towards an infinity: the nearest value, or its neighbour where that is on the wrong
// side.
template <class To>
To towards(long double exact, bool up) {
    const To nearest = static_cast<To>(exact);
    if (up ? nearest < exact : nearest > exact) return std::nextafter(nearest, up ? To(INFINITY) : To(-INFINITY));
    return nearest;
}
}  // namespace gpu
inline float __double2float_ru(double v) { return gpu::towards<float>(v, true); }
inline float __double2float_rd(double v) { return gpu::towards<float>(v, false); }
inline float __fadd_ru(float a, float b) { return gpu::towards<float>(static_cast<long double>(a) + b, true); }
inline float __fadd_rd(float a, float b) { return gpu::towards<float>(static_cast<long double>(a) + b, false); }
inline float __fmul_ru(float a, float b) { return gpu::towards<float>(static_cast<long double>(a) * b, true); }
inline float __fmul_rd(float a, float b) { return gpu::towards<float>(static_cast<long double>(a) * b, false); }

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }
inline float __frsqrt_rn(float v) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))); }
inline float normcdff(float v) { return 0.5f * std::erfc(v * -0.70710678f); }
inline double normcdf(double v) { return 0.5 * std::erfc(v * -0.70710678118654752); }
// glibc's headers have some of these names for themselves.
#define __expf(v) std::exp(static_cast<float>(v))
#define __exp2f(v) std::exp2(static_cast<float>(v))
#define __logf(v) std::log(static_cast<float>(v))
#define __log2f(v) std::log2(static_cast<float>(v))
#define __sinf(v) std::sin(static_cast<float>(v))
#define __cosf(v) std::cos(static_cast<float>(v))
#define __tanhf(v) std::tanh(static_cast<float>(v))
#define __powf(a, b) std::pow(static_cast<float>(a), static_cast<float>(b))
#define __saturatef(v) std::fmin(std::fmax(static_cast<float>(v), 0.0f), 1.0f)

template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<T>::value) return std::fmax(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<T>::value) return std::fmin(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- functions of 16-bit numbers that NVIDIA's headers have for devices alone: in f32, rounded once

#define GPU_HALF_FUNCTION(name, function)                                                              \
    inline __half name(__half v) { return __float2half(function(__half2float(v))); }                   \
    inline __nv_bfloat16 name(__nv_bfloat16 v) { return __float2bfloat16(function(__bfloat162float(v))); }
GPU_HALF_FUNCTION(hsqrt, std::sqrt)
GPU_HALF_FUNCTION(hrsqrt, rsqrtf)
GPU_HALF_FUNCTION(hrcp, __frcp_rn)
GPU_HALF_FUNCTION(hcos, std::cos)
GPU_HALF_FUNCTION(hsin, std::sin)
GPU_HALF_FUNCTION(hlog, std::log)
GPU_HALF_FUNCTION(hlog2, std::log2)
GPU_HALF_FUNCTION(hexp, std::exp)
GPU_HALF_FUNCTION(hexp2, std::exp2)
GPU_HALF_FUNCTION(hceil, std::ceil)
GPU_HALF_FUNCTION(hfloor, std::floor)
GPU_HALF_FUNCTION(hrint, std::nearbyint)
GPU_HALF_FUNCTION(htrunc, std::trunc)
#undef GPU_HALF_FUNCTION

inline __half __hfma(__half a, __half b, __half c) {
    // Exact in f64 but for sums of very different size, whose rest is below anything that a half can show.
    return __double2half(static_cast<double>(__half2float(a)) * static_cast<double>(__half2float(b)) +
                         static_cast<double>(__half2float(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16(static_cast<double>(__bfloat162float(a)) * static_cast<double>(__bfloat162float(b)) +
                             static_cast<double>(__bfloat162float(c)));
}
