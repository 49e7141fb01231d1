//! Products with NEON, which every 64-bit Arm processor has.

/// f32 by f32.
pub(super) mod f32 {
    use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32, vld1q_f32, vst1q_f32};

    strips! {
        element: f32, features: "neon", rows: 6, panels: 1, vectors_of_a_panel: 4, sum: float32x4_t,
        zero: vdupq_n_f32(0.0),
        left: |a: *const f32| vdupq_n_f32(*a),
        right: |b: *const f32| vld1q_f32(b),
        fuse: |sum, a, b| vfmaq_f32(sum, a, b),
        store: |c: *mut f32, sum| vst1q_f32(c, sum),
    }
}

/// bf16 by bf16, widened to f32 on the way.
pub(super) mod bf16 {
    use std::arch::aarch64::{
        float32x4_t, uint32x4_t, vandq_u32, vdupq_n_f32, vdupq_n_u32, vfmaq_f32, vld1q_u32, vreinterpretq_f32_u32,
        vshlq_n_u32, vst1q_f32,
    };

    use crate::cpu::Bf16;

    /// The first and the second number of every pair.
    #[inline]
    #[target_feature(enable = "neon")]
    fn widen(pairs: uint32x4_t) -> (float32x4_t, float32x4_t) {
        let second = vandq_u32(pairs, vdupq_n_u32(0xFFFF_0000));
        (vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)), vreinterpretq_f32_u32(second))
    }

    strips! {
        element: Bf16, features: "neon", rows: 4, panels: 1, vectors_of_a_panel: 4, sum: float32x4_t,
        zero: vdupq_n_f32(0.0),
        left: |a: *const Bf16| widen(vdupq_n_u32(a.cast::<u32>().read_unaligned())),
        right: |b: *const Bf16| widen(vld1q_u32(b.cast())),
        fuse: |sum, a: (float32x4_t, float32x4_t), b: (float32x4_t, float32x4_t)| {
            vfmaq_f32(vfmaq_f32(sum, a.0, b.0), a.1, b.1)
        },
        store: |c: *mut f32, sum| vst1q_f32(c, sum),
    }
}
