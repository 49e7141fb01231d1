//! Products with AVX-512, with and without its bf16 instructions.

/// f32 by f32.
pub(super) mod f32 {
    use std::arch::x86_64::{
        __m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
    };

    strips! {
        element: f32, features: "avx512f", rows: 6, panels: 4, vectors_of_a_panel: 1, sum: __m512,
        zero: _mm512_setzero_ps(),
        left: |a: *const f32| _mm512_set1_ps(*a),
        right: |b: *const f32| _mm512_loadu_ps(b),
        fuse: |sum, a, b| _mm512_fmadd_ps(a, b, sum),
        store: |c: *mut f32, sum| _mm512_storeu_ps(c, sum),
    }
}

/// bf16 by bf16, two products an instruction.
pub(super) mod bf16 {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    use std::mem::transmute;

    use crate::cpu::Bf16;

    strips! {
        element: Bf16, features: "avx512f,avx512bf16", rows: 6, panels: 4, vectors_of_a_panel: 1, sum: __m512,
        zero: _mm512_setzero_ps(),
        left: |a: *const Bf16| transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast::<i32>().read_unaligned())),
        right: |b: *const Bf16| transmute::<__m512i, __m512bh>(_mm512_loadu_si512(b.cast())),
        fuse: |sum, a, b| _mm512_dpbf16_ps(sum, a, b),
        store: |c: *mut f32, sum| _mm512_storeu_ps(c, sum),
    }
}

/// bf16 by bf16, widened to f32 on the way: for processors without bf16 instructions.
pub(super) mod widened {
    use std::arch::x86_64::{
        __m512, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use crate::cpu::Bf16;

    /// The first and the second number of every pair.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn widen(pairs: __m512i) -> (__m512, __m512) {
        let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(second))
    }

    strips! {
        element: Bf16, features: "avx512f", rows: 6, panels: 2, vectors_of_a_panel: 1, sum: __m512,
        zero: _mm512_setzero_ps(),
        left: |a: *const Bf16| widen(_mm512_set1_epi32(a.cast::<i32>().read_unaligned())),
        right: |b: *const Bf16| widen(_mm512_loadu_si512(b.cast())),
        fuse: |sum, a: (__m512, __m512), b: (__m512, __m512)| {
            _mm512_fmadd_ps(a.1, b.1, _mm512_fmadd_ps(a.0, b.0, sum))
        },
        store: |c: *mut f32, sum| _mm512_storeu_ps(c, sum),
    }
}
