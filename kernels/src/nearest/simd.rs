//! The two inner loops, compiled for each vector unit and chosen once at run time.
//!
//! Each loop is written once, over fixed lanes that the compiler turns into vectors. Rust never contracts a
//! multiply and an add, and the lanes fix the order, so every variant returns the same bits.

/// Partial sums of `dot64`.
const LANES: usize = 32;

/// Codes per step when looking for a maximum: a few vectors of the widest unit, to hide its latency.
const SCAN: usize = 64;

/// The vector unit to use. A value other than `Baseline` proves that this machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Simd(Unit);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Defines a method of [`Simd`] that runs `$body` as compiled for the chosen unit.
macro_rules! dispatch {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:path) => {
        $(#[$doc])*
        #[inline]
        pub(super) fn $name(self, $($arg: $type),*) -> $out {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2($($arg: $type),*) -> $out {
                $body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $type),*) -> $out {
                $body($($arg),*)
            }
            match self.0 {
                Unit::Baseline => $body($($arg),*),
                // SAFETY: `available` makes this value only where it detected avx2.
                #[cfg(target_arch = "x86_64")]
                Unit::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: `available` makes this value only where it detected avx512f.
                #[cfg(target_arch = "x86_64")]
                Unit::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}

impl Simd {
    /// The widest unit of this machine.
    pub(super) fn detect() -> Self {
        Self::available().last().unwrap_or(Self(Unit::Baseline))
    }

    /// Every unit of this machine, the widest last.
    pub(super) fn available() -> impl Iterator<Item = Self> {
        [
            Some(Self(Unit::Baseline)),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx2").then_some(Self(Unit::Avx2)),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx512f").then_some(Self(Unit::Avx512)),
        ]
        .into_iter()
        .flatten()
    }

    dispatch! {
        /// [`dot64`], vectorised.
        fn dot64(a: &[f32], b: &[f32]) -> f64 = dot64
    }

    dispatch! {
        /// The largest `scores[j] + bias[j]`, each sum rounded to f32; -∞ for none.
        fn max_sum(scores: &[f32], bias: &[f32]) -> f32 = max_sum
    }

    /// Calls `keep(j, scores[j] + bias[j])` for each sum not below `threshold`, in ascending order of j.
    pub(super) fn for_each_above(self, scores: &[f32], bias: &[f32], threshold: f32, mut keep: impl FnMut(usize, f32)) {
        for (i, (s, b)) in scores.chunks(SCAN).zip(bias.chunks(SCAN)).enumerate() {
            if self.max_sum(s, b) < threshold {
                continue;
            }
            for (j, (s, b)) in s.iter().zip(b).enumerate() {
                if s + b >= threshold {
                    keep(i * SCAN + j, s + b);
                }
            }
        }
    }
}

/// The dot product of the contract: binary64, 32 lanes, butterfly over 16, 8, 4, 2, 1.
#[inline(always)]
pub(super) fn dot64(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0.0; LANES];
    let (a, a_tail) = a.as_chunks::<LANES>();
    let (b, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    // Addition commutes, so lane 0 of the butterfly needs only the lower half of each step.
    for half in [16, 8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

#[inline(always)]
fn max_sum(scores: &[f32], bias: &[f32]) -> f32 {
    // Not f32::max, whose NaN rule costs instructions: sums here are never NaN.
    let larger = |max: f32, sum: f32| if sum > max { sum } else { max };
    let mut max = [f32::NEG_INFINITY; SCAN];
    let (scores, scores_tail) = scores.as_chunks::<SCAN>();
    let (bias, bias_tail) = bias.as_chunks::<SCAN>();
    for (s, b) in scores.iter().zip(bias) {
        for lane in 0..SCAN {
            max[lane] = larger(max[lane], s[lane] + b[lane]);
        }
    }
    for (max, (s, b)) in max.iter_mut().zip(scores_tail.iter().zip(bias_tail)) {
        *max = larger(*max, s + b);
    }
    for half in [32, 16, 8, 4, 2, 1] {
        for lane in 0..half {
            max[lane] = larger(max[lane], max[lane + half]);
        }
    }
    max[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of every size and sign, from a multiplicative hash of the index.
    fn values(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32)
            .map(|i| {
                let bits = (i + 1).wrapping_mul(seed).wrapping_mul(0x9E37_79B1);
                let size = 2f32.powi((bits % 60) as i32 - 30);
                (bits as i32 as f32 / 2f32.powi(31)) * size
            })
            .collect()
    }

    /// `dot64` in the words of the contract, lane by lane and with the whole butterfly.
    fn dot64_in_words(a: &[f32], b: &[f32]) -> f64 {
        let mut lanes = [0f64; 32];
        for d in 0..a.len() {
            lanes[d % 32] += f64::from(a[d]) * f64::from(b[d]);
        }
        for distance in [16, 8, 4, 2, 1] {
            lanes = std::array::from_fn(|lane| lanes[lane] + lanes[lane ^ distance]);
        }
        lanes[0]
    }

    #[test]
    fn every_unit_sums_dot64_to_the_same_bits() {
        for len in [0, 1, 2, 31, 32, 33, 63, 64, 65, 250, 1536, 1537] {
            let (a, b) = (values(len, 3), values(len, 7));
            let expected = dot64_in_words(&a, &b);
            for simd in Simd::available() {
                let got = simd.dot64(&a, &b);
                assert_eq!(got.to_bits(), expected.to_bits(), "{simd:?}, length {len}: {got} != {expected}");
            }
        }
    }

    #[test]
    fn a_fused_product_changes_no_bit_of_the_sum() {
        let (a, b) = (values(4096, 11), values(4096, 13));
        let (mut fused, mut unfused) = (0f64, 0f64);
        for (a, b) in a.iter().zip(&b) {
            fused = f64::from(*a).mul_add(f64::from(*b), fused);
            unfused += f64::from(*a) * f64::from(*b);
        }
        assert_eq!(fused.to_bits(), unfused.to_bits());
    }

    #[test]
    fn every_unit_finds_the_same_maximum_and_the_same_codes_above_it() {
        for len in [0, 1, 15, 63, 64, 65, 200, 512] {
            let (scores, bias) = (values(len, 5), values(len, 9));
            let sums = || scores.iter().zip(&bias).map(|(s, b)| s + b);
            let expected = sums().fold(f32::NEG_INFINITY, f32::max);
            let threshold = expected / 4.0;
            let above = sums().enumerate().filter(|(_, sum)| *sum >= threshold).collect::<Vec<_>>();
            for simd in Simd::available() {
                assert_eq!(simd.max_sum(&scores, &bias), expected, "{simd:?}, length {len}");
                let mut got = Vec::new();
                simd.for_each_above(&scores, &bias, threshold, |j, sum| got.push((j, sum)));
                assert_eq!(got, above, "{simd:?}, length {len}");
            }
        }
    }
}
