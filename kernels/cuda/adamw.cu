// AdamW over all parameters of a group in one launch, and the squares of all gradients in another. What a parameter is stands in
// a table; blocks share the parameters out in pieces of PIECE elements.
#include "training.cuh"

/// Elements of a block. The same number stands in src/cuda/training/adamw.rs.
constexpr int PIECE = 1 << 14;

/// A parameter in the table. The same words stand in src/cuda/training/adamw.rs.
struct Parameter {
    float* value;
    const float* gradient;
    float* first;
    float* second;
    unsigned long long length;
    /// The blocks before its own.
    unsigned first_block;
    /// The share of the value that decays.
    float decay;
    /// The rate over the first moment's correction.
    float scale;
    unsigned unused;
};

/// What all parameters share; `rest1` is 1 - beta1 in f32, `root` one over the second moment's correction.
struct Constants {
    float beta1, rest1, beta2, rest2, eps, clip, root;
};

/// Whose block this is: the last entry that begins at or before it.
template <class T>
__device__ const T& owner(const T* table, int count, unsigned block) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (table[middle].first_block <= block) low = middle;
        else high = middle;
    }
    return table[low];
}

/// One step, every operation rounded as the CPU's loop rounds it (vqrae/src/train/optimizer.rs).
KERNEL __launch_bounds__(THREADS) adamw_step(const Parameter* table, int count, Constants c) {
    Parameter p = owner(table, count, blockIdx.x);
    size_t begin = (size_t)(blockIdx.x - p.first_block) * PIECE;
    size_t end = min((unsigned long long)(begin + PIECE), p.length);
#pragma unroll 2
    for (size_t i = begin + threadIdx.x; i < end; i += THREADS) {
        float gradient = __fmul_rn(p.gradient[i], c.clip), value = p.value[i];
        float first = __fadd_rn(__fmul_rn(c.beta1, p.first[i]), __fmul_rn(c.rest1, gradient));
        float second =
            __fadd_rn(__fmul_rn(c.beta2, p.second[i]), __fmul_rn(__fmul_rn(c.rest2, gradient), gradient));
        float length = __fadd_rn(__fsqrt_rn(__fmul_rn(second, c.root)), c.eps);
        float change = __fdiv_rn(__fmul_rn(p.scale, first), length);
        p.first[i] = first;
        p.second[i] = second;
        p.value[i] = __fsub_rn(value, __fadd_rn(__fmul_rn(p.decay, value), change));
    }
}

/// Numbers in a table.
struct Values {
    const float* values;
    unsigned long long length;
    /// The blocks before its own, and those that are its own.
    unsigned first_block, blocks;
};

/// parts [blocks], the sum of the squares of each block's piece.
KERNEL __launch_bounds__(THREADS) square_values(const Values* table, int count, double* parts) {
    __shared__ double warps[WARPS];
    Values v = owner(table, count, blockIdx.x);
    size_t begin = (size_t)(blockIdx.x - v.first_block) * PIECE;
    size_t end = min((unsigned long long)(begin + PIECE), v.length);
    double sum = 0.0;
    for (size_t i = begin + threadIdx.x; i < end; i += THREADS) sum = __fma_rn((double)v.values[i], (double)v.values[i], sum);
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

/// sums [count], each entry's parts together. A block an entry.
KERNEL __launch_bounds__(THREADS) sum_squares(const Values* table, const double* parts, double* sums) {
    __shared__ double warps[WARPS];
    Values v = table[blockIdx.x];
    double sum = 0.0;
    for (unsigned b = threadIdx.x; b < v.blocks; b += THREADS) sum += parts[v.first_block + b];
    sum = block_sum(sum, warps);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
