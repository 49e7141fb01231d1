// A libcublasLt.so.13: matrix products with bias and activation in one call, see product.h. Any algorithm that it is
// handed is the one that it has. GELU is the tanh form, as in cuBLASLt.

#include "product.h"
#include "stream.h"

#include <map>

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

// Attributes by their numbers; every value is kept as eight bytes.
struct Attributes {
    std::map<int, int64_t> values;

    int64_t get(int attribute, int64_t otherwise) const {
        const auto found = values.find(attribute);
        return found == values.end() ? otherwise : found->second;
    }

    int set(int attribute, const void* value, size_t bytes, size_t expected) {
        if (!value || bytes != expected || expected > 8) return INVALID_VALUE;
        int64_t wide = 0;
        if (bytes == 4) {
            int32_t narrow;
            std::memcpy(&narrow, value, 4);
            wide = narrow;
        } else {
            std::memcpy(&wide, value, bytes);
        }
        values[attribute] = wide;
        return SUCCESS;
    }
};

enum LayoutAttribute { TYPE, ORDER, ROWS, COLUMNS, LEADING, BATCHES, BATCH_STRIDE };
enum ProductAttribute {
    COMPUTE_TYPE = 0,
    SCALE_TYPE = 1,
    TRANSPOSE_A = 3,
    TRANSPOSE_B = 4,
    TRANSPOSE_C = 5,
    EPILOGUE = 7,
    BIAS = 8,
    BIAS_STRIDE = 10,
    AUXILIARY = 11,
    AUXILIARY_LEADING = 12,
    AUXILIARY_STRIDE = 13,
    BIAS_TYPE = 26,
};
enum Epilogue {
    PLAIN = 1,
    RELU = 2,
    WITH_BIAS = 4,
    GELU = 32,
    KEEP_INPUT = 128,
};

struct Layout : Attributes {};
struct Description : Attributes {};
struct Preference : Attributes {};
struct Handle {};

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

gpu::Matrix matrix(const Layout& layout, const void* data) {
    gpu::Matrix m;
    m.data = const_cast<void*>(data);
    m.type = static_cast<int>(layout.get(TYPE, 0));
    m.rows = layout.get(ROWS, 0);
    m.columns = layout.get(COLUMNS, 0);
    m.column = layout.get(LEADING, 0);
    m.batch = layout.get(BATCH_STRIDE, 0);
    // By rows is by columns the other way round.
    if (layout.get(ORDER, 0) == 1) std::swap(m.row, m.column);
    return m;
}

bool leading_fits(const Layout& layout) {
    const int64_t along = layout.get(ORDER, 0) == 1 ? layout.get(COLUMNS, 0) : layout.get(ROWS, 0);
    return layout.get(LEADING, 0) >= std::max<int64_t>(along, 1);
}

// The product that a call describes, or why there is none.
int describe(const Description* description, const Layout* a, const Layout* b, const Layout* c, const Layout* d,
             gpu::MatrixProduct* out) {
    if (!description || !a || !b || !c || !d) return INVALID_VALUE;
    gpu::MatrixProduct& p = *out;
    p.a = matrix(*a, nullptr);
    p.b = matrix(*b, nullptr);
    p.c = matrix(*c, nullptr);
    p.d = matrix(*d, nullptr);
    if (description->get(TRANSPOSE_A, 0)) p.a = p.a.transposed();
    if (description->get(TRANSPOSE_B, 0)) p.b = p.b.transposed();
    if (description->get(TRANSPOSE_C, 0)) return NOT_SUPPORTED;
    for (const Layout* each : {a, b, c, d}) {
        if (!leading_fits(*each)) return INVALID_VALUE;
        if (each->get(BATCHES, 1) != d->get(BATCHES, 1)) return INVALID_VALUE;
    }
    if (p.a.rows != p.d.rows || p.b.columns != p.d.columns || p.a.columns != p.b.rows) return INVALID_VALUE;
    if (p.c.rows != p.d.rows || p.c.columns != p.d.columns || p.c.type != p.d.type) return INVALID_VALUE;
    const int compute = static_cast<int>(description->get(COMPUTE_TYPE, 0));
    if (!gpu::types_fit(p.a.type, p.b.type, p.d.type)) return NOT_SUPPORTED;
    if (!gpu::compute_fits(compute, p.a.type, p.d.type)) return NOT_SUPPORTED;
    p.rounding = gpu::rounding_of(compute, p.a.type);
    p.batches = d->get(BATCHES, 1);

    const int64_t epilogue = description->get(EPILOGUE, PLAIN);
    if (epilogue & ~(PLAIN | RELU | WITH_BIAS | GELU | KEEP_INPUT)) return NOT_SUPPORTED;
    if (epilogue & RELU) p.activation = gpu::Activation::Relu;
    if (epilogue & GELU) p.activation = gpu::Activation::Gelu;
    if (epilogue & WITH_BIAS) {
        p.bias.data = reinterpret_cast<void*>(description->get(BIAS, 0));
        p.bias.type = static_cast<int>(description->get(BIAS_TYPE, p.d.type));
        p.bias.rows = p.d.rows;
        p.bias.columns = 1;
        p.bias.batch = description->get(BIAS_STRIDE, 0);
    }
    if (epilogue & KEEP_INPUT) {
        // ReLU keeps a bit mask, which nothing here asks for.
        if (!(epilogue & GELU)) return NOT_SUPPORTED;
        p.before = p.d;
        p.before.data = reinterpret_cast<void*>(description->get(AUXILIARY, 0));
        p.before.row = 1;
        p.before.column = description->get(AUXILIARY_LEADING, 0);
        p.before.batch = description->get(AUXILIARY_STRIDE, 0);
        if (p.before.column < p.d.rows) return INVALID_VALUE;
    }
    return SUCCESS;
}

}  // namespace

extern "C" {

int cublasLtCreate(Handle** handle) {
    *handle = new Handle;
    return SUCCESS;
}

int cublasLtDestroy(Handle* handle) {
    delete handle;
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = new Layout;
    (*layout)->values = {{TYPE, type},
                         {ROWS, static_cast<int64_t>(rows)},
                         {COLUMNS, static_cast<int64_t>(columns)},
                         {LEADING, leading}};
    return SUCCESS;
}

int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
    if (!layout) return INVALID_VALUE;
    switch (attribute) {
        case TYPE: case ORDER: case BATCHES: return layout->set(attribute, value, bytes, 4);
        case ROWS: case COLUMNS: case LEADING: case BATCH_STRIDE: return layout->set(attribute, value, bytes, 8);
        default: return NOT_SUPPORTED;
    }
}

int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Description** description, int compute, int scale_type) {
    *description = new Description;
    (*description)->values = {{COMPUTE_TYPE, compute}, {SCALE_TYPE, scale_type}};
    return SUCCESS;
}

int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t bytes) {
    if (!description) return INVALID_VALUE;
    switch (attribute) {
        case COMPUTE_TYPE: case SCALE_TYPE: case TRANSPOSE_A: case TRANSPOSE_B: case TRANSPOSE_C: case EPILOGUE:
        case BIAS_TYPE:
            return description->set(attribute, value, bytes, 4);
        case BIAS: case BIAS_STRIDE: case AUXILIARY: case AUXILIARY_LEADING: case AUXILIARY_STRIDE:
            return description->set(attribute, value, bytes, 8);
        default: return NOT_SUPPORTED;
    }
}

int cublasLtMatmulDescDestroy(Description* description) {
    delete description;
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return SUCCESS;
}

int cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
    if (!preference) return INVALID_VALUE;
    return preference->set(attribute, value, bytes, bytes == 4 ? 4 : 8);
}

int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(Handle* handle, Description* description, Layout* a, Layout* b, Layout* c, Layout* d,
                                   Preference* preference, int wanted, Heuristic* found, int* count) {
    if (!handle) return NOT_INITIALIZED;
    if (!preference || !found || !count || wanted < 1) return INVALID_VALUE;
    *count = 0;
    gpu::MatrixProduct product;
    const int status = describe(description, a, b, c, d, &product);
    if (status != SUCCESS) return status;
    *found = Heuristic{};
    found->waves = 1;
    *count = 1;
    return SUCCESS;
}

int cublasLtMatmul(Handle* handle, Description* description, const void* alpha, const void* a, Layout* a_layout,
                   const void* b, Layout* b_layout, const void* beta, const void* c, Layout* c_layout, void* d,
                   Layout* d_layout, const Algorithm*, void*, size_t, CUstream stream) {
    if (!handle) return NOT_INITIALIZED;
    if (!alpha || !beta) return INVALID_VALUE;
    gpu::MatrixProduct product;
    const int status = describe(description, a_layout, b_layout, c_layout, d_layout, &product);
    if (status != SUCCESS) return status;
    if ((description->get(EPILOGUE, PLAIN) & WITH_BIAS) && !product.bias.data) return INVALID_VALUE;
    const int scale_type = static_cast<int>(description->get(SCALE_TYPE, 0));
    product.alpha = gpu::scale(scale_type, alpha);
    product.beta = gpu::scale(scale_type, beta);
    product.a.data = const_cast<void*>(a);
    product.b.data = const_cast<void*>(b);
    product.c.data = const_cast<void*>(c);
    product.d.data = d;
    return gpu::give(stream, [=] {
               gpu::multiply(product, "cublasLtMatmul");
               return CUDA_SUCCESS;
           }) == CUDA_SUCCESS
               ? SUCCESS
               : INVALID_VALUE;
}

}  // extern "C"
