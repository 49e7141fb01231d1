// Kernels that show whether the played GPU does what a GPU does, and whether it shows bugs. `check.cpp` runs them.

#include "../gpu.cuh"

// ---- what must come out right

// c [16, 8] = a [16, 16] b [16, 8] + c, all row by row; the loads are as `gpu.cuh` says what lanes hold.
template <class T, class Multiply>
__device__ void product(const T* a, const T* b, float* c, Multiply multiply) {
    const unsigned group = threadIdx.x / 4, pair = threadIdx.x % 4 * 2;
    const auto two = [](T low, T high) {
        uint16_t bits[2];
        memcpy(&bits[0], &low, 2);
        memcpy(&bits[1], &high, 2);
        return static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 16;
    };
    const auto of_a = [&](unsigned row, unsigned k) { return two(a[row * 16 + k], a[row * 16 + k + 1]); };
    const auto of_b = [&](unsigned k, unsigned column) { return two(b[k * 8 + column], b[(k + 1) * 8 + column]); };
    const uint32_t fa[4] = {of_a(group, pair), of_a(group + 8, pair), of_a(group, pair + 8), of_a(group + 8, pair + 8)};
    const uint32_t fb[2] = {of_b(pair, group), of_b(pair + 8, group)};
    float sum[4];
    for (unsigned i = 0; i < 4; i++) sum[i] = c[(group + i / 2 * 8) * 8 + pair + i % 2];
    multiply(sum, fa, fb);
    for (unsigned i = 0; i < 4; i++) c[(group + i / 2 * 8) * 8 + pair + i % 2] = sum[i];
}

KERNEL product_f16(const __half* a, const __half* b, float* c) {
    product(a, b, c, [](float (&s)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2]) { mma_f16(s, fa, fb); });
}

KERNEL product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    product(a, b, c, [](float (&s)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2]) { mma_bf16(s, fa, fb); });
}

// Four matrices whose elements are their own numbers 0 .. 255, as each lane gets them: out [2, 32, 4] words.
KERNEL load_matrices(uint32_t* out) {
    DYNAMIC_SHARED(uint16_t, numbers);
    for (unsigned i = threadIdx.x; i < 256; i += 32) numbers[i] = static_cast<uint16_t>(i);
    __syncwarp();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(plain, numbers + threadIdx.x * 8);
    ldmatrix_x4_trans(transposed, numbers + threadIdx.x * 8);
    for (unsigned m = 0; m < 4; m++) {
        out[threadIdx.x * 4 + m] = plain[m];
        out[128 + threadIdx.x * 4 + m] = transposed[m];
    }
}

// Rows of 4 floats through shared memory in two stages; those from `rows` on are zeros. `wait` is 0 or 1 groups: with 1
// the newest copy is read too early. out [blocks, 4 threads].
template <int newest>
__device__ void pipeline(const float4* in, unsigned rows, float4* out) {
    DYNAMIC_SHARED(float4, stages);
    const unsigned t = threadIdx.x, n = blockDim.x;
    cp_async_16(&stages[t], &in[t], t < rows);
    cp_async_commit();
    cp_async_16(&stages[n + t], &in[n + t], n + t < rows);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    out[t] = stages[n - 1 - t];
    cp_async_wait<newest>();
    __syncthreads();
    out[n + t] = stages[n + n - 1 - t];
}

KERNEL pipeline_right(const float4* in, unsigned rows, float4* out) { pipeline<0>(in, rows, out); }
KERNEL pipeline_early(const float4* in, unsigned rows, float4* out) { pipeline<1>(in, rows, out); }

// out [9, 32]: what each lane gets of the others' numbers.
KERNEL shuffles(unsigned* out) {
    const unsigned l = threadIdx.x;
    out[l] = __shfl_sync(ALL_LANES, l, 5);
    out[32 + l] = __shfl_sync(ALL_LANES, l, 3, 8);
    out[64 + l] = __shfl_xor_sync(ALL_LANES, l, 1);
    out[96 + l] = __shfl_down_sync(ALL_LANES, l, 4, 16);
    out[128 + l] = __shfl_up_sync(ALL_LANES, l, 1);
    out[160 + l] = __ballot_sync(ALL_LANES, l % 3 == 0);
    out[192 + l] = static_cast<unsigned>(__any_sync(ALL_LANES, l == 31)) * 2 +
                   static_cast<unsigned>(__all_sync(ALL_LANES, l < 31));
    out[224 + l] = warp_sum(l);
    // The lower half and the upper half each among themselves.
    const unsigned half = l < 16 ? 0xffffu : 0xffff0000u;
    out[256 + l] = __shfl_xor_sync(half, l, 15, 16);
}

// Reverses each block's part, n % blockDim.x == 0 not asked: threads past the end return before the barrier.
KERNEL reverse_blocks(const float* in, float* out, unsigned n) {
    __shared__ float part[256];
    const unsigned start = blockIdx.x * blockDim.x, i = start + threadIdx.x;
    if (i >= n) return;
    const unsigned mine = min(blockDim.x, n - start);
    part[threadIdx.x] = in[i];
    __syncthreads();
    out[i] = part[mine - 1 - threadIdx.x];
}

// Sums over all blocks: the last one to come adds the parts, in order. `arrived` begins at zero.
KERNEL sum_blocks(const float* in, float* parts, unsigned* arrived, float* out) {
    __shared__ bool last;
    const float sum = warp_sum(in[blockIdx.x * 32 + threadIdx.x]);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    float all = 0;
    for (unsigned i = 0; i < gridDim.x; i++) all += parts[i];
    *out = all;
}

KERNEL histogram(const unsigned* values, unsigned* counts, float* weights, unsigned n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    atomicAdd(&counts[values[i]], 1);
    atomicAdd(&weights[values[i]], 0.5f);
    atomicMax(&counts[16], i);
}

// ---- what must be seen to be wrong

// As `reverse_blocks` of whole blocks without its barrier.
KERNEL reverse_careless(const float* in, float* out) {
    __shared__ float part[256];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = in[i];
    out[i] = part[blockDim.x - 1 - threadIdx.x];
}

// The barrier before the buffer is used again is missing: a fast warp overwrites what a slow one has not read.
KERNEL reuse_careless(float* out) {
    __shared__ float from_other[64];
    float sum = 0;
    for (unsigned round = 0; round < 4; round++) {
        from_other[threadIdx.x] = static_cast<float>(round);
        __syncthreads();
        sum += from_other[63 - threadIdx.x] * 10.0f;
    }
    out[threadIdx.x] = sum;
}

KERNEL read_unwritten(float* out) {
    __shared__ float fixed[32];
    DYNAMIC_SHARED(float, sized);
    out[threadIdx.x] = fixed[threadIdx.x];
    out[32 + threadIdx.x] = sized[threadIdx.x];
    __syncthreads();
    fixed[threadIdx.x] = 1;
    sized[threadIdx.x] = 1;
}

KERNEL never_meets(float* out) {
    if (threadIdx.x < 16) __syncthreads();
    else out[threadIdx.x] = __shfl_sync(ALL_LANES, 1.0f, 0);
}

KERNEL writes_past_the_end(float* out, unsigned n) { out[n] = 1; }

KERNEL writes_past_shared(float* out, unsigned n) {
    DYNAMIC_SHARED(float, sized);
    sized[n + threadIdx.x] = 1;
    *out = sized[n];
}

KERNEL loads_misaligned(uint32_t* out) {
    DYNAMIC_SHARED(uint16_t, numbers);
    uint32_t r[4];
    ldmatrix_x4(r, numbers + threadIdx.x * 8 + 1);
    out[threadIdx.x] = r[0];
}
