// What stands between products and has no sum in it: activations, gates, and a scaled value added to the residual. Each is one
// pass over memory; a thread takes 16 bytes where rows are whole in these (`whole`), and one value where they are not.
#include "half.cuh"

/// x [rows, d] and a bias of d, or none: what a thread reads. The same words stand in src/cuda/elementwise.rs.
template <class T>
struct Biased {
    const T *x, *bias;
    long long rows;
    int d;
    /// Whether all rows, scales and biases can be met 16 bytes at a time.
    int whole;
};

/// The place of this thread among chunks of `lanes` values in rows of d; false past the last. There are fewer than 2^32 chunks,
/// since a division of 64 bits would cost more than the memory.
__device__ inline bool place(long long rows, int d, int lanes, long long& row, int& column) {
    const unsigned chunk = blockIdx.x * blockDim.x + threadIdx.x, chunks = d / lanes;
    row = chunk / chunks;
    column = (int)(chunk % chunks) * lanes;
    return row < rows;
}

/// x + bias at one chunk.
template <class T>
__device__ inline void load_biased(const Biased<T>& of, long long row, int column, float (&values)[LANES<T>]) {
    load_16(of.x + row * of.d + column, values);
    if (!of.bias) return;
    float bias[LANES<T>];
    load_16(of.bias + column, bias);
#pragma unroll
    for (int j = 0; j < LANES<T>; j++) values[j] += bias[j];
}

template <class T>
__device__ inline float biased(const Biased<T>& of, long long row, int column) {
    return to_f32(of.x[row * of.d + column]) + (of.bias ? to_f32(of.bias[column]) : 0.0f);
}

/// x Φ(x), or with ½(1 + tanh(√(2/π)(x + 0.044715 x³))) for Φ, which is 1 / (1 + exp(−2√(2/π)(…))) without cancellation.
template <bool TANH>
__device__ inline float gelu(float x) {
    if (!TANH) return x * normcdff(x);
    const float twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    return x / (1.0f + expf(-twice));
}

/// gelu(x + bias). out: [rows, d], which may be x.
template <class T, bool TANH>
__device__ void gelu_rows(const Biased<T>& of, T* out) {
    long long row;
    int column;
    if (!place(of.rows, of.d, of.whole ? LANES<T> : 1, row, column)) return;
    T* to = out + row * of.d + column;
    if (!of.whole) {
        *to = from_f32<T>(gelu<TANH>(biased(of, row, column)));
        return;
    }
    float values[LANES<T>];
    load_biased(of, row, column, values);
#pragma unroll
    for (int j = 0; j < LANES<T>; j++) values[j] = gelu<TANH>(values[j]);
    store_16(to, values);
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

/// silu(a) b, where a row of x [rows, 2 d] is d values of a, then d of b. out: [rows, d]
template <class T>
__device__ void gate_rows(const T* x, T* out, long long rows, int d, int whole) {
    long long row;
    int column;
    if (!place(rows, d, whole ? LANES<T> : 1, row, column)) return;
    const T* a = x + row * 2 * d + column;
    T* to = out + row * d + column;
    if (!whole) {
        *to = from_f32<T>(silu(to_f32(*a)) * to_f32(a[d]));
        return;
    }
    float values[LANES<T>], others[LANES<T>];
    load_16(a, values);
    load_16(a + d, others);
#pragma unroll
    for (int j = 0; j < LANES<T>; j++) values[j] = silu(values[j]) * others[j];
    store_16(to, values);
}

/// residual + scale ⊙ (x + bias); scale [d] and residual may be null. out: [rows, d], which may be x or residual.
template <class T>
__device__ void add_rows(const Biased<T>& of, const T* scale, const T* residual, T* out) {
    long long row;
    int column;
    if (!place(of.rows, of.d, of.whole ? LANES<T> : 1, row, column)) return;
    const long long at = row * of.d + column;
    if (!of.whole) {
        const float factor = scale ? to_f32(scale[column]) : 1.0f, base = residual ? to_f32(residual[at]) : 0.0f;
        out[at] = from_f32<T>(base + factor * biased(of, row, column));
        return;
    }
    float values[LANES<T>], others[LANES<T>];
    load_biased(of, row, column, values);
    if (scale) {
        load_16(scale + column, others);
#pragma unroll
        for (int j = 0; j < LANES<T>; j++) values[j] *= others[j];
    }
    if (residual) {
        load_16(residual + at, others);
#pragma unroll
        for (int j = 0; j < LANES<T>; j++) values[j] += others[j];
    }
    store_16(out + at, values);
}

KERNEL gelu_tanh_f32(Biased<float> of, float* out) { gelu_rows<float, true>(of, out); }

KERNEL gelu_erf_f32(Biased<float> of, float* out) { gelu_rows<float, false>(of, out); }

KERNEL gate_silu_f32(const float* x, float* out, long long rows, int d, int whole) {
    gate_rows(x, out, rows, d, whole);
}

KERNEL add_f32(Biased<float> of, const float* scale, const float* residual, float* out) {
    add_rows(of, scale, residual, out);
}

KERNEL gelu_tanh_f16(Biased<__half> of, __half* out) { gelu_rows<__half, true>(of, out); }

KERNEL gelu_erf_f16(Biased<__half> of, __half* out) { gelu_rows<__half, false>(of, out); }

KERNEL gate_silu_f16(const __half* x, __half* out, long long rows, int d, int whole) {
    gate_rows(x, out, rows, d, whole);
}

KERNEL add_f16(Biased<__half> of, const __half* scale, const __half* residual, __half* out) {
    add_rows(of, scale, residual, out);
}

KERNEL gelu_tanh_bf16(Biased<__nv_bfloat16> of, __nv_bfloat16* out) { gelu_rows<__nv_bfloat16, true>(of, out); }

KERNEL gelu_erf_bf16(Biased<__nv_bfloat16> of, __nv_bfloat16* out) { gelu_rows<__nv_bfloat16, false>(of, out); }

KERNEL gate_silu_bf16(const __nv_bfloat16* x, __nv_bfloat16* out, long long rows, int d, int whole) {
    gate_rows(x, out, rows, d, whole);
}

KERNEL add_bf16(Biased<__nv_bfloat16> of, const __nv_bfloat16* scale, const __nv_bfloat16* residual, __nv_bfloat16* out) {
    add_rows(of, scale, residual, out);
}
