// What training's kernels share: the shape of their blocks, and sums in an order that depends on nothing but sizes.
//
// Every sum here has a fixed order and no atomic adds floats, so the same inputs give the same bits at every run. Where a CPU
// has the same loop (averages.cu, adamw.cu), operations are rounded one by one as it rounds them: `__fmul_rn` and its like
// are never fused.
#pragma once
#include "gpu.cuh"

constexpr int WARP = 32;
/// Threads of a block, in every kernel of training.
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

/// The sum over the block, on thread 0: butterflies of warps, then the warps in their order. `parts` is in shared memory; a
/// barrier must stand between two calls with the same.
__device__ inline double block_sum(double value, double (&parts)[WARPS]) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    if (threadIdx.x > 0) return value;
    for (int w = 1; w < WARPS; w++) value += parts[w];
    return value;
}
