// Matrix products on the CPU, as cuBLAS and cuBLASLt are asked for them: any strides, 16, 32 or 64 bits, an epilogue.
//
// Sums are f32 (f64 of f64), each one chain in the order of k, as no GPU library promises anything else. A product's
// operands and result must lie in allocations of the device: one that does not ends the program and says which.
#pragma once

#include "memory.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace gpu {

// The elements' type, by CUDA's numbers (cudaDataType).
enum Type : int { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };

inline size_t size_of(int type) {
    switch (type) {
        case F16: case BF16: return 2;
        case F32: return 4;
        case F64: return 8;
        default: return 0;
    }
}

// A matrix, or a batch of them: element (r, c) of number i lies at r * row + c * column + i * batch.
struct Matrix {
    void* data = nullptr;
    int type = F32;
    int64_t rows = 0, columns = 0, row = 1, column = 0, batch = 0;

    Matrix transposed() const {
        Matrix other = *this;
        std::swap(other.rows, other.columns);
        std::swap(other.row, other.column);
        return other;
    }
};

enum class Activation { None, Relu, Gelu };

// What f32 operands are rounded to before they are multiplied.
enum class Rounding { None, Tf32, F16, BF16 };

// d = activation(alpha a b + beta c + bias), bias [rows of d] along the columns.
struct MatrixProduct {
    Matrix a, b, c, d;
    double alpha = 1, beta = 0;
    int64_t batches = 1;
    Rounding rounding = Rounding::None;
    Activation activation = Activation::None;
    Matrix bias;       // of one column; no data, no bias
    Matrix before;     // gets what the activation is taken of; may have no data
};

inline double load(const Matrix& m, int64_t index) {
    switch (m.type) {
        case F16: return static_cast<double>(__half2float(static_cast<const __half*>(m.data)[index]));
        case BF16: return static_cast<double>(__bfloat162float(static_cast<const __nv_bfloat16*>(m.data)[index]));
        case F64: return static_cast<const double*>(m.data)[index];
        default: return static_cast<double>(static_cast<const float*>(m.data)[index]);
    }
}

template <class S>
void store(const Matrix& m, int64_t index, S value) {
    switch (m.type) {
        case F16: static_cast<__half*>(m.data)[index] = __float2half(static_cast<float>(value)); break;
        case BF16: static_cast<__nv_bfloat16*>(m.data)[index] = __float2bfloat16(static_cast<float>(value)); break;
        case F64: static_cast<double*>(m.data)[index] = static_cast<double>(value); break;
        default: static_cast<float*>(m.data)[index] = static_cast<float>(value);
    }
}

inline float rounded_to(Rounding rounding, float value) {
    uint32_t bits;
    switch (rounding) {
        case Rounding::F16: return __half2float(__float2half(value));
        case Rounding::BF16: return __bfloat162float(__float2bfloat16(value));
        case Rounding::Tf32:
            // 10 bits beside the leading one, to nearest, ties away from zero.
            if (!std::isfinite(value)) return value;
            std::memcpy(&bits, &value, 4);
            bits = (bits + 0x1000) & ~0x1fffu;
            std::memcpy(&value, &bits, 4);
            return value;
        default: return value;
    }
}

// Ends the program unless all of the matrices lie in one allocation.
inline void require_inside(const Matrix& m, int64_t batches, const char* call, const char* name) {
    if (m.rows <= 0 || m.columns <= 0 || batches <= 0) return;
    const int64_t last = (m.rows - 1) * m.row + (m.columns - 1) * m.column + (batches - 1) * m.batch;
    if (last >= 0 && inside(m.data, static_cast<size_t>(last + 1) * size_of(m.type))) return;
    std::fprintf(stderr,
                 "%s: %s [%lld, %lld] x %lld with strides %lld, %lld, %lld at %p does not lie in one allocation\n", call,
                 name, static_cast<long long>(m.rows), static_cast<long long>(m.columns),
                 static_cast<long long>(batches), static_cast<long long>(m.row), static_cast<long long>(m.column),
                 static_cast<long long>(m.batch), m.data);
    std::abort();
}

// Calls work(i) for i in 0 .. count, on several threads where `cost` (in additions) is worth it.
template <class F>
void share(int64_t count, double cost, F work) {
    const int64_t threads =
        cost < 4e6 ? 1 : std::min<int64_t>(count, std::max(1u, std::thread::hardware_concurrency()));
    std::atomic<int64_t> next{0};
    const auto run = [&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;) work(i);
    };
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++) others.emplace_back(run);
    run();
    for (std::thread& each : others) each.join();
}

// A tile of the result is two vectors of rows by six columns: twelve sums that stay in registers.
template <class S>
struct Tile {
    typedef S Vector __attribute__((vector_size(32)));
    static constexpr int64_t LANES = 32 / sizeof(S), ROWS = 2 * LANES, COLUMNS = 6;

    // sums [COLUMNS, ROWS] of a [k, ROWS] and b [k, COLUMNS].
    static void multiply(const S* a, const S* b, int64_t k, S* sums) {
        Vector sum[COLUMNS][2] = {};
        for (int64_t i = 0; i < k; i++) {
            Vector left[2];
            std::memcpy(left, a + i * ROWS, sizeof left);
            for (int64_t j = 0; j < COLUMNS; j++) {
                sum[j][0] += left[0] * b[i * COLUMNS + j];
                sum[j][1] += left[1] * b[i * COLUMNS + j];
            }
        }
        std::memcpy(sums, sum, sizeof sum);
    }
};

template <class S>
void multiply_as(const MatrixProduct& p) {
    using T = Tile<S>;
    const int64_t m = p.d.rows, n = p.d.columns, k = p.alpha == 0 ? 0 : p.a.columns;
    const int64_t row_tiles = (m + T::ROWS - 1) / T::ROWS, column_tiles = (n + T::COLUMNS - 1) / T::COLUMNS;
    std::vector<S> a(static_cast<size_t>(row_tiles * T::ROWS * k)), b(static_cast<size_t>(column_tiles * T::COLUMNS * k));
    const double cost = static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(std::max<int64_t>(k, 1));
    const auto pack = [&](const Matrix& from, int64_t start, int64_t r, int64_t i) {
        const double value = load(from, start + r * from.row + i * from.column);
        if (p.rounding == Rounding::None) return static_cast<S>(value);
        return static_cast<S>(rounded_to(p.rounding, static_cast<float>(value)));
    };
    const Matrix bt = p.b.transposed();
    for (int64_t batch = 0; batch < p.batches; batch++) {
        const int64_t a_start = batch * p.a.batch, b_start = batch * p.b.batch;
        share(row_tiles, cost, [&](int64_t tile) {
            S* to = a.data() + tile * T::ROWS * k;
            for (int64_t i = 0; i < k; i++) {
                for (int64_t r = 0; r < T::ROWS; r++) {
                    const int64_t row = tile * T::ROWS + r;
                    to[i * T::ROWS + r] = row < m ? pack(p.a, a_start, row, i) : S(0);
                }
            }
        });
        share(column_tiles, cost, [&](int64_t tile) {
            S* to = b.data() + tile * T::COLUMNS * k;
            for (int64_t i = 0; i < k; i++) {
                for (int64_t c = 0; c < T::COLUMNS; c++) {
                    const int64_t column = tile * T::COLUMNS + c;
                    to[i * T::COLUMNS + c] = column < n ? pack(bt, b_start, column, i) : S(0);
                }
            }
        });
        share(column_tiles, cost, [&](int64_t column_tile) {
            S sums[T::COLUMNS * T::ROWS];
            for (int64_t row_tile = 0; row_tile < row_tiles; row_tile++) {
                T::multiply(a.data() + row_tile * T::ROWS * k, b.data() + column_tile * T::COLUMNS * k, k, sums);
                for (int64_t j = 0; j < T::COLUMNS && column_tile * T::COLUMNS + j < n; j++) {
                    const int64_t c = column_tile * T::COLUMNS + j;
                    for (int64_t i = 0; i < T::ROWS && row_tile * T::ROWS + i < m; i++) {
                        const int64_t r = row_tile * T::ROWS + i;
                        const auto at = [&](const Matrix& x) { return r * x.row + c * x.column + batch * x.batch; };
                        S value = static_cast<S>(p.alpha) * sums[j * T::ROWS + i];
                        if (p.beta != 0) value += static_cast<S>(p.beta) * static_cast<S>(load(p.c, at(p.c)));
                        if (p.bias.data) {
                            value += static_cast<S>(load(p.bias, r * p.bias.row + batch * p.bias.batch));
                        }
                        if (p.before.data) store(p.before, at(p.before), value);
                        if (p.activation == Activation::Relu) value = value < S(0) ? S(0) : value;
                        if (p.activation == Activation::Gelu) {
                            const S inner = S(0.7978845608028654) * (value + S(0.044715) * value * value * value);
                            value = S(0.5) * value * (S(1) + std::tanh(inner));
                        }
                        store(p.d, at(p.d), value);
                    }
                }
            }
        });
    }
}

inline void multiply(const MatrixProduct& p, const char* call) {
    if (p.d.rows <= 0 || p.d.columns <= 0 || p.batches <= 0) return;
    if (p.alpha != 0) {
        require_inside(p.a, p.batches, call, "A");
        require_inside(p.b, p.batches, call, "B");
    }
    if (p.beta != 0) require_inside(p.c, p.batches, call, "C");
    require_inside(p.d, p.batches, call, "D");
    if (p.bias.data) require_inside(p.bias, p.batches, call, "bias");
    if (p.before.data) require_inside(p.before, p.batches, call, "the epilogue's auxiliary output");
    if (p.a.type == F64) multiply_as<double>(p);
    else multiply_as<float>(p);
}

// Whether a library multiplies these types at all.
inline bool types_fit(int a, int b, int c) {
    if (size_of(a) == 0 || a != b) return false;
    return c == a || ((a == F16 || a == BF16) && c == F32);
}

// cuBLAS' numbers of computations, as far as they are played.
enum Compute : int { COMPUTE_16F = 64, COMPUTE_32F = 68, FAST_16F = 74, FAST_16BF = 75, FAST_TF32 = 77, COMPUTE_64F = 70 };

inline bool compute_fits(int compute, int a, int c) {
    switch (compute & ~1) {
        case COMPUTE_16F: return a == F16 && c == F16;
        case COMPUTE_64F: return a == F64;
        case COMPUTE_32F: return a != F64;
        default: return (compute == FAST_16F || compute == FAST_16BF || compute == FAST_TF32) && a == F32;
    }
}

inline Rounding rounding_of(int compute, int a) {
    if (a != F32) return Rounding::None;
    if (compute == FAST_16F) return Rounding::F16;
    if (compute == FAST_16BF) return Rounding::BF16;
    if (compute == FAST_TF32) return Rounding::Tf32;
    return Rounding::None;
}

// alpha or beta, whose type follows from the computation's.
inline double scale(int type, const void* value) {
    Matrix one;
    one.data = const_cast<void*>(value);
    one.type = type;
    return load(one, 0);
}

}  // namespace gpu
