//! The two inner loops, compiled for each vector unit and chosen once at run time.
//!
//! Each loop is written once, over fixed lanes that the compiler turns into vectors. Rust never contracts a
//! multiply and an add, and the lanes fix the order, so every variant returns the same bits.

/// Partial sums of `dot64`.
const LANES: usize = 32;

/// Codes per step when looking for large scores: one vector of the widest unit.
pub(super) const SCAN: usize = 16;

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
        /// Turns products p into scores `p[j] + (alpha * slope[j] + bias[j])` and returns the largest; -∞ for none.
        fn finish(products: &mut [f32], slope: &[f32], bias: &[f32], alpha: f32) -> f32 = finish
    }

    dispatch! {
        /// Appends to `hits` the index of each row that has a score, as [`Simd::finish`] defines it, not below its
        /// threshold.
        ///
        /// # Shapes
        /// `products`: (rows, S) with at least one row, `slope` and `bias`: (C) with C a multiple of [`SCAN`] and at most S, `alpha` and
        /// `thresholds`: (rows)
        fn find_hits(products: &[f32], slope: &[f32], bias: &[f32], alpha: &[f32], thresholds: &[f32], hits: &mut Vec<usize>) -> () = find_hits
    }

    dispatch! {
        /// Appends to `above` the index of each score not below `threshold`, ascending.
        fn find_above(scores: &[f32], threshold: f32, above: &mut Vec<usize>) -> () = find_above
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

/// Not `f32::max`, whose NaN rule costs instructions: a NaN here never wins.
#[inline(always)]
fn larger(max: f32, x: f32) -> f32 {
    if x > max { x } else { max }
}

#[inline(always)]
fn finish(products: &mut [f32], slope: &[f32], bias: &[f32], alpha: f32) -> f32 {
    let mut max = [f32::NEG_INFINITY; SCAN];
    for ((products, slope), bias) in products.chunks_mut(SCAN).zip(slope.chunks(SCAN)).zip(bias.chunks(SCAN)) {
        for (max, (p, (g, b))) in max.iter_mut().zip(products.iter_mut().zip(slope.iter().zip(bias))) {
            *p += alpha * g + b;
            *max = larger(*max, *p);
        }
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            max[lane] = larger(max[lane], max[lane + half]);
        }
    }
    max[0]
}

#[inline(always)]
fn find_above(scores: &[f32], threshold: f32, above: &mut Vec<usize>) {
    for (i, chunk) in scores.chunks(SCAN).enumerate() {
        if reaches(chunk, threshold) {
            let found = chunk.iter().enumerate().filter(|(_, s)| **s >= threshold);
            above.extend(found.map(|(j, _)| i * SCAN + j));
        }
    }
}

/// Whether any score does, without a branch per lane, which vectorises.
#[inline(always)]
fn reaches(scores: &[f32], threshold: f32) -> bool {
    let mut any = false;
    for s in scores {
        any |= *s >= threshold;
    }
    any
}

#[inline(always)]
fn find_hits(products: &[f32], slope: &[f32], bias: &[f32], alpha: &[f32], thresholds: &[f32], hits: &mut Vec<usize>) {
    const TOGETHER: usize = 4;
    let ((slope, []), (bias, [])) = (slope.as_chunks::<SCAN>(), bias.as_chunks::<SCAN>()) else {
        panic!("codes in whole vectors");
    };
    let stride = products.len() / thresholds.len();
    let row = |r: usize| products[r * stride..].as_chunks::<SCAN>().0;
    let mut hit = |r: usize, largest: [f32; SCAN]| {
        if reaches(&largest, thresholds[r]) {
            hits.push(r);
        }
    };
    let whole = thresholds.len() / TOGETHER * TOGETHER;
    for r in (0..whole).step_by(TOGETHER) {
        let alpha = [alpha[r], alpha[r + 1], alpha[r + 2], alpha[r + 3]];
        let mut max = [[f32::NEG_INFINITY; SCAN]; TOGETHER];
        let rows = row(r).iter().zip(row(r + 1)).zip(row(r + 2)).zip(row(r + 3));
        for ((((p0, p1), p2), p3), (g, b)) in rows.zip(slope.iter().zip(bias)) {
            let (g, b) = (*g, *b);
            for (max, (p, alpha)) in max.iter_mut().zip([p0, p1, p2, p3].into_iter().zip(alpha)) {
                *max = larger_scores(*max, p, &g, &b, alpha);
            }
        }
        for (i, max) in max.into_iter().enumerate() {
            hit(r + i, max);
        }
    }
    for (r, &alpha) in alpha.iter().enumerate().skip(whole) {
        let scores = row(r).iter().zip(slope.iter().zip(bias));
        hit(r, scores.fold([f32::NEG_INFINITY; SCAN], |max, (p, (g, b))| larger_scores(max, p, g, b, alpha)));
    }
}

/// The larger of `max` and the scores, lane by lane.
#[inline(always)]
fn larger_scores(
    max: [f32; SCAN],
    products: &[f32; SCAN],
    slope: &[f32; SCAN],
    bias: &[f32; SCAN],
    alpha: f32,
) -> [f32; SCAN] {
    std::array::from_fn(|lane| larger(max[lane], products[lane] + (alpha * slope[lane] + bias[lane])))
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
    fn every_unit_finds_the_same_scores_above_a_threshold() {
        for len in [0, 16, 64, 80, 512] {
            let (slope, bias) = (values(len, 5), values(len, 9));
            for rows in [1, 3, 4, 5, 9] {
                let (products, alpha) = (values(rows * len, 11), values(rows, 15));
                let score = |r: usize, j: usize| products[r * len + j] + (alpha[r] * slope[j] + bias[j]);
                let best = |r| (0..len).map(|j| score(r, j)).fold(f32::NEG_INFINITY, f32::max);
                // Some rows just reach their threshold, some just do not, and one has none.
                let threshold = |r| match r % 3 {
                    0 => best(r),
                    1 => best(r).next_up(),
                    _ => f32::NAN,
                };
                let thresholds = (0..rows).map(threshold).collect::<Vec<_>>();
                let expected = (0..rows).filter(|r| len > 0 && r % 3 == 0).collect::<Vec<_>>();
                for simd in Simd::available() {
                    let mut hits = Vec::new();
                    if len > 0 {
                        simd.find_hits(&products, &slope, &bias, &alpha, &thresholds, &mut hits);
                    }
                    assert_eq!(hits, expected, "{simd:?}, {rows} rows of {len}");
                    for r in 0..rows {
                        let mut scores = products[r * len..][..len].to_vec();
                        assert_eq!(simd.finish(&mut scores, &slope, &bias, alpha[r]), best(r));
                        let threshold = best(r) / 4.0;
                        let above = |j: &usize| score(r, *j) >= threshold;
                        let expected = (0..len).filter(above).collect::<Vec<_>>();
                        let mut got = Vec::new();
                        simd.find_above(&scores, threshold, &mut got);
                        assert_eq!(got, expected, "{simd:?}, length {len}");
                    }
                }
            }
        }
    }
}
