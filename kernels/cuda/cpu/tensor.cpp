// mma.sync and ldmatrix, by what the PTX manual says each lane holds.
//
// A tensor core's sum is not documented. What is published of it (Khattak and Mikaitis, arXiv 2512.07004, give models
// per part): the addends, c among them, are aligned to the largest exponent and cut off, not rounded, one or more bits
// below f32's last; the sum is cut off to f32. That is played here with blocks of 8 products and one bit more, which is
// harsher than rounding. VQRAE_GPU_MMA=nearest sums in f64 and rounds once instead, which is closer than any GPU is.

#include "emulator.h"

#include <cstdlib>

namespace gpu {

namespace {

struct Product {
    float (*c)[4];
    const uint32_t (*a)[4];
    const uint32_t (*b)[2];
};

float element(Half kind, uint32_t word, unsigned which) {
    const uint16_t half = static_cast<uint16_t>(word >> (which % 2 * 16));
    if (kind == Half::BF16) return bits<float>(static_cast<uint32_t>(half) << 16);
    return __half2float(__half(__half_raw{half}));
}

// f32, cut off towards zero.
float cut(double value) {
    const float nearest = static_cast<float>(value);
    if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) return std::nextafter(nearest, 0.0f);
    return nearest;
}

constexpr unsigned PRODUCTS = 8;
constexpr int EXTRA_BITS = 1;

// c + a[0] b[0] + .. + a[7] b[7] as a tensor core adds.
float aligned_sum(const float* a, const float* b, float c) {
    double addends[PRODUCTS + 1];
    int64_t largest = 0;
    for (unsigned k = 0; k < PRODUCTS; k++) addends[k] = static_cast<double>(a[k]) * static_cast<double>(b[k]);
    addends[PRODUCTS] = static_cast<double>(c);
    for (double addend : addends) largest = std::max(largest, bits<int64_t>(addend) & 0x7ff0000000000000);
    if (largest == 0x7ff0000000000000) {
        double sum = 0;
        for (double addend : addends) sum += addend;
        return static_cast<float>(sum);
    }
    const int exponent = static_cast<int>(largest >> 52);  // as f64 holds it; zero stands for zero, and cuts nothing
    if (exponent <= 23 + EXTRA_BITS) return 0.0f;
    // The last place that is kept, and its inverse: powers of two, so that only the cut changes a value.
    const double unit = bits<double>(static_cast<int64_t>(exponent - 23 - EXTRA_BITS) << 52);
    const double per_unit = bits<double>(static_cast<int64_t>(2046 - (exponent - 23 - EXTRA_BITS)) << 52);
    int64_t sum = 0;
    for (double addend : addends) sum += static_cast<int64_t>(addend * per_unit);
    return cut(static_cast<double>(sum) * unit);
}

bool nearest_from_environment() {
    const char* text = std::getenv("VQRAE_GPU_MMA");
    if (!text || !*text || !std::strcmp(text, "truncate")) return false;
    if (!std::strcmp(text, "nearest")) return true;
    std::fprintf(stderr, "VQRAE_GPU_MMA is truncate or nearest, got: %s\n", text);
    std::abort();
}

template <Half kind>
void multiply(void* const* arguments, unsigned) {
    static const bool nearest = nearest_from_environment();
    float a[16][16], b[8][16];  // b by columns
    const auto of = [&](unsigned l) -> const Product& { return *static_cast<const Product*>(arguments[l]); };
    for (unsigned l = 0; l < 32; l++) {
        const unsigned group = l / 4, pair = l % 4 * 2;
        for (unsigned word = 0; word < 4; word++) {
            for (unsigned i = 0; i < 2; i++) {
                a[group + word % 2 * 8][pair + word / 2 * 8 + i] = element(kind, (*of(l).a)[word], i);
            }
        }
        for (unsigned word = 0; word < 2; word++) {
            for (unsigned i = 0; i < 2; i++) b[group][pair + word * 8 + i] = element(kind, (*of(l).b)[word], i);
        }
    }
    for (unsigned l = 0; l < 32; l++) {
        const unsigned group = l / 4, pair = l % 4 * 2;
        for (unsigned i = 0; i < 4; i++) {
            const float* row = a[group + i / 2 * 8];
            const float* column = b[pair + i % 2];
            float& c = (*of(l).c)[i];
            if (nearest) {
                double sum = static_cast<double>(c);
                for (unsigned k = 0; k < 16; k++) sum += static_cast<double>(row[k]) * static_cast<double>(column[k]);
                c = static_cast<float>(sum);
            } else {
                for (unsigned k = 0; k < 16; k += PRODUCTS) c = aligned_sum(row + k, column + k, c);
            }
        }
    }
}

struct Load {
    uint32_t (*r)[4];
    const unsigned char* row;
};

template <bool transposed>
void load(void* const* arguments, unsigned) {
    uint16_t matrices[4][8][8];
    for (unsigned l = 0; l < 32; l++) {
        std::memcpy(matrices[l / 8][l % 8], static_cast<const Load*>(arguments[l])->row, 16);
    }
    for (unsigned l = 0; l < 32; l++) {
        const unsigned group = l / 4, pair = l % 4 * 2;
        for (unsigned m = 0; m < 4; m++) {
            const uint32_t low = transposed ? matrices[m][pair][group] : matrices[m][group][pair];
            const uint32_t high = transposed ? matrices[m][pair + 1][group] : matrices[m][group][pair + 1];
            (*static_cast<Load*>(arguments[l])->r)[m] = low | high << 16;
        }
    }
}

}  // namespace

void mma(Half kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Product mine{&c, &a, &b};
    if (kind == Half::F16) meet_full_warp(multiply<Half::F16>, &mine, "mma_f16");
    else meet_full_warp(multiply<Half::BF16>, &mine, "mma_bf16");
}

void ldmatrix(uint32_t (&r)[4], const void* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of a row at %p, which is on no 16-byte boundary", row);
    check_shared(row, "ldmatrix");
    Load mine{&r, static_cast<const unsigned char*>(row)};
    if (transposed) meet_full_warp(load<true>, &mine, "ldmatrix_x4_trans");
    else meet_full_warp(load<false>, &mine, "ldmatrix_x4");
}

}  // namespace gpu
