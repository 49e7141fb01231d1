// What every kernel here is written in: the few instructions that CUDA C++ has no name for, and sums over a warp.
//
// nvcc makes instructions of them (sm_80 and newer). Any other compiler gets `cpu/emulator.h`, where a CPU plays them,
// so that a kernel's logic is tested where there is no GPU.
#pragma once

#include <stdint.h>

#ifndef __CUDACC__
#include "cpu/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// c [16, 8] += a [16, 16] b [16, 8] by one warp, all 32 lanes: `mma.sync.m16n8k16.row.col`, sums in f32.
// Lane l holds, with g = l / 4 and t = 2 (l % 4), two elements to a word, the lower index in the lower half:
//   a[0] = a(g, t..t+1)   a[1] = a(g+8, t..t+1)   a[2] = a(g, t+8..t+9)   a[3] = a(g+8, t+8..t+9)
//   b[0] = b(t..t+1, g)   b[1] = b(t+8..t+9, g)
//   c[0..1] = c(g, t..t+1)   c[2..3] = c(g+8, t..t+1)
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// As `mma_f16`, on bf16.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, by one warp, all 32 lanes. Lane l names row l % 8 of
// matrix l / 8, 16 bytes on a 16-byte boundary, and gets of each matrix m in r[m] its elements (l / 4, 2 (l % 4) .. +
// 1).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// As `ldmatrix_x4`, of the matrices transposed: lane l gets elements (2 (l % 4) .. + 1, l / 4).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// 16 bytes from global to shared memory in the background, past L1; zeros where not `valid`, and `global` is not read
// then. Both are on 16-byte boundaries. The bytes may be read after `cp_async_wait`, by other threads after a barrier
// too.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies: those since the last group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the N newest groups of this thread's copies are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

extern __shared__ __align__(128) unsigned char gpu_dynamic_shared[];

// Declares T* name at the block's dynamic shared memory, on a 128-byte boundary.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(gpu_dynamic_shared)

#endif

// A kernel that is found by its name. (`cpu/build.sh` finds kernels by these two words, so templates need a KERNEL
// each.)
#define KERNEL extern "C" __global__ void

constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum over the warp, in every lane the same bits: a butterfly adds the same pairs on both of their lanes.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(ALL_LANES, value, other);
    return value;
}

// The largest over the warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_max(T value) {
    for (int other = 16; other > 0; other /= 2) {
        const T theirs = __shfl_xor_sync(ALL_LANES, value, other);
        value = theirs > value ? theirs : value;
    }
    return value;
}
