// A libcublas.so.13 of the matrix products that candle and we ask for, see product.h. Sums are f32, also where f16 was
// asked for; products of f32 are rounded to TF32 where the call or the math mode says so.

#include "product.h"
#include "stream.h"

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

constexpr int TF32_MATH = 3;

struct Handle {
    CUstream stream = nullptr;
    int math_mode = 0, pointer_mode = 0;
};

struct Operand {
    const void* data;
    int type, leading;
    long long stride;
};

// An operand as it lies in memory, by columns, and then as it is multiplied.
gpu::Matrix matrix(int transpose, int64_t rows, int64_t columns, const Operand& of) {
    gpu::Matrix whole;
    whole.data = const_cast<void*>(of.data);
    whole.type = of.type;
    whole.rows = transpose ? columns : rows;
    whole.columns = transpose ? rows : columns;
    whole.column = of.leading;
    whole.batch = of.stride;
    return transpose ? whole.transposed() : whole;
}

int multiply(const char* call, Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, double alpha,
             Operand a, Operand b, double beta, Operand c, int batches, int compute) {
    if (!handle) return NOT_INITIALIZED;
    if (m < 0 || n < 0 || k < 0 || batches < 0) return INVALID_VALUE;
    if (transpose_a < 0 || transpose_a > 2 || transpose_b < 0 || transpose_b > 2) return INVALID_VALUE;
    if (a.leading < std::max(1, transpose_a ? k : m) || b.leading < std::max(1, transpose_b ? n : k)) {
        return INVALID_VALUE;
    }
    if (c.leading < std::max(1, m)) return INVALID_VALUE;
    if (!gpu::types_fit(a.type, b.type, c.type) || !gpu::compute_fits(compute, a.type, c.type)) return NOT_SUPPORTED;
    gpu::MatrixProduct product;
    product.a = matrix(transpose_a, m, k, a);
    product.b = matrix(transpose_b, k, n, b);
    product.c = product.d = matrix(0, m, n, c);
    product.alpha = alpha;
    product.beta = beta;
    product.batches = batches;
    if (handle->math_mode == TF32_MATH && compute == gpu::COMPUTE_32F) compute = gpu::FAST_TF32;
    product.rounding = gpu::rounding_of(compute, a.type);
    return gpu::give(handle->stream, [=] {
               gpu::multiply(product, call);
               return CUDA_SUCCESS;
           }) == CUDA_SUCCESS
               ? SUCCESS
               : INVALID_VALUE;
}

int scale_type(int compute) {
    if ((compute & ~1) == gpu::COMPUTE_16F) return gpu::F16;
    return (compute & ~1) == gpu::COMPUTE_64F ? gpu::F64 : gpu::F32;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) {
    *handle = new Handle;
    return SUCCESS;
}

int cublasDestroy_v2(Handle* handle) {
    delete handle;
    return SUCCESS;
}

int cublasSetStream_v2(Handle* handle, CUstream stream) {
    handle->stream = stream;
    return SUCCESS;
}

int cublasGetStream_v2(Handle* handle, CUstream* stream) {
    *stream = handle->stream;
    return SUCCESS;
}

int cublasSetWorkspace_v2(Handle*, void*, size_t) { return SUCCESS; }

int cublasSetMathMode(Handle* handle, int mode) {
    handle->math_mode = mode;
    return SUCCESS;
}

int cublasGetMathMode(Handle* handle, int* mode) {
    *mode = handle->math_mode;
    return SUCCESS;
}

int cublasSetPointerMode_v2(Handle* handle, int mode) {
    handle->pointer_mode = mode;
    return SUCCESS;
}

int cublasGetPointerMode_v2(Handle* handle, int* mode) {
    *mode = handle->pointer_mode;
    return SUCCESS;
}

int cublasGetVersion_v2(Handle*, int* version) {
    *version = 130000;
    return SUCCESS;
}

int cublasGemmEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int a_type,
                 int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                 int compute, int) {
    if (!alpha || !beta) return INVALID_VALUE;
    return multiply("cublasGemmEx", handle, ta, tb, m, n, k, gpu::scale(scale_type(compute), alpha),
                    {a, a_type, lda, 0}, {b, b_type, ldb, 0}, gpu::scale(scale_type(compute), beta),
                    {c, c_type, ldc, 0}, 1, compute);
}

int cublasGemmStridedBatchedEx(Handle* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                               int a_type, int lda, long long stride_a, const void* b, int b_type, int ldb,
                               long long stride_b, const void* beta, void* c, int c_type, int ldc, long long stride_c,
                               int batches, int compute, int) {
    if (!alpha || !beta) return INVALID_VALUE;
    return multiply("cublasGemmStridedBatchedEx", handle, ta, tb, m, n, k, gpu::scale(scale_type(compute), alpha),
                    {a, a_type, lda, stride_a}, {b, b_type, ldb, stride_b}, gpu::scale(scale_type(compute), beta),
                    {c, c_type, ldc, stride_c}, batches, compute);
}

#define GEMM(NAME, BATCHED, T, TYPE, COMPUTE)                                                                         \
    int NAME(Handle* handle, int ta, int tb, int m, int n, int k, const T* alpha, const T* a, int lda, const T* b,    \
             int ldb, const T* beta, T* c, int ldc) {                                                                 \
        if (!alpha || !beta) return INVALID_VALUE;                                                                    \
        return multiply(#NAME, handle, ta, tb, m, n, k, gpu::scale(TYPE, alpha), {a, TYPE, lda, 0}, {b, TYPE, ldb, 0}, \
                        gpu::scale(TYPE, beta), {c, TYPE, ldc, 0}, 1, COMPUTE);                                       \
    }                                                                                                                 \
    int BATCHED(Handle* handle, int ta, int tb, int m, int n, int k, const T* alpha, const T* a, int lda,             \
                long long stride_a, const T* b, int ldb, long long stride_b, const T* beta, T* c, int ldc,            \
                long long stride_c, int batches) {                                                                    \
        if (!alpha || !beta) return INVALID_VALUE;                                                                    \
        return multiply(#BATCHED, handle, ta, tb, m, n, k, gpu::scale(TYPE, alpha), {a, TYPE, lda, stride_a},         \
                        {b, TYPE, ldb, stride_b}, gpu::scale(TYPE, beta), {c, TYPE, ldc, stride_c}, batches, COMPUTE); \
    }

GEMM(cublasSgemm_v2, cublasSgemmStridedBatched, float, gpu::F32, gpu::COMPUTE_32F)
GEMM(cublasDgemm_v2, cublasDgemmStridedBatched, double, gpu::F64, gpu::COMPUTE_64F)
GEMM(cublasHgemm, cublasHgemmStridedBatched, __half, gpu::F16, gpu::COMPUTE_16F)

}  // extern "C"
