//! Products with AVX2 and FMA.

/// f32 by f32.
pub(super) mod f32 {
    use std::arch::x86_64::{
        __m256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    strips! {
        element: f32, features: "avx2,fma", rows: 6, panels: 1, vectors_of_a_panel: 2, sum: __m256,
        zero: _mm256_setzero_ps(),
        left: |a: *const f32| _mm256_set1_ps(*a),
        right: |b: *const f32| _mm256_loadu_ps(b),
        fuse: |sum, a, b| _mm256_fmadd_ps(a, b, sum),
        store: |c: *mut f32, sum| _mm256_storeu_ps(c, sum),
    }
}

/// bf16 by bf16, widened to f32 on the way.
pub(super) mod bf16 {
    use std::arch::x86_64::{
        __m256, __m256i, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_si256, _mm256_set1_epi32,
        _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
    };

    use crate::cpu::Bf16;

    /// The first and the second number of every pair.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn widen(pairs: __m256i) -> (__m256, __m256) {
        let second = _mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF_0000u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(second))
    }

    strips! {
        element: Bf16, features: "avx2,fma", rows: 4, panels: 1, vectors_of_a_panel: 2, sum: __m256,
        zero: _mm256_setzero_ps(),
        left: |a: *const Bf16| widen(_mm256_set1_epi32(a.cast::<i32>().read_unaligned())),
        right: |b: *const Bf16| widen(_mm256_loadu_si256(b.cast::<__m256i>())),
        fuse: |sum, a: (__m256, __m256), b: (__m256, __m256)| {
            _mm256_fmadd_ps(a.1, b.1, _mm256_fmadd_ps(a.0, b.0, sum))
        },
        store: |c: *mut f32, sum| _mm256_storeu_ps(c, sum),
    }
}
