//! How far a screened score may be from the contract's, and why.
//!
//! # What is computed
//! Let u = 2⁻²⁴ and v = 2⁻⁵³ be the roundings of f32 and f64, D the width, |·| the Euclidean norm. Prepared once, for any
//! centre m and level β free of k, and an axis a in f32 with |a| <= 1.01 (the direction of m, or zero):
//!
//! ```text
//! c'_k = fl32(c_k - m)      c~_k = T(c'_k)           T: rounding to the precision of the screen, f32 or bf16
//! b'_k = fl32(b_k - β)      g_k  = fl32(dot64(a, c'_k))
//! ```
//!
//! For a token z, with any number α in f32 and w = z - α·a, the screen takes w~ = T(w) through f64 and computes
//!
//! ```text
//! p_k = w~·c~_k by the products of `cpu`          s_k = fl(p_k + fl(fl(α·g_k) + b'_k))
//! ```
//!
//! α = z·a/|a|² makes w short, and with it the error of rounding to T, where tokens share a direction with the codes.
//!
//! # Bound
//! Let S_k be the score of the contract and x_k = z·(c_k - m) + b_k - β the exact centred one. Nothing overflows (the guard
//! below). ζ = max(|z|, |α|).
//!
//! 1. *Contract.* Products are exact and at most D additions round, then adding b_k:
//!    |S_k - (x_k + z·m + β)| <= 2v(D + 1)(|z||c_k| + |b_k|).
//! 2. *Centring.* Each element is off by at most 1.01u|c'| + 2⁻¹⁴⁹:
//!    |z·c'_k - z·(c_k - m)| <= 1.01u|z||c'_k| + 2⁻¹⁴⁹√D|z|, and |b'_k - (b_k - β)| <= 1.01u|b'_k| + 2⁻¹⁴⁹.
//! 3. *Axis.* z·c'_k = w·c'_k + α(a·c'_k) exactly, and |g_k - a·c'_k| <= (1.03u + 2.1vD)|c'_k| + 2⁻¹⁴⁹.
//! 4. *Rounding to T.* w·c'_k - w~·c~_k = (w - w~)·c'_k + w~·(c'_k - c~_k), so it is at most |w - w~||c'_k| + |w~||e_k|
//!    with e_k = c~_k - c'_k. Both differences are known vectors and their norms are measured. An element of w passes one
//!    rounding of f64 before it is measured: |w - w~| <= r + 2.1vζ, where r is what was measured.
//! 5. *Sums.* |p_k - w~·c~_k| <= η|w~||c~_k| + λD + τ√D(|w~| + |c~_k|), where
//!    - f32: in whatever order D products are summed, fused or not, each passes through at most D roundings, and loses at
//!      most 2⁻¹⁵⁰ to underflow, at most doubled by later roundings: η = Du / (1 - Du), λ = 2⁻¹⁴⁹, τ = 0.
//!    - bf16: instructions multiply pairs, may round towards zero, add a pair and the sum so far in any order or aligned to
//!      the largest of the three, and flush numbers below 2⁻¹²⁶ to zero. Products are exact in f32. A pair costs at most
//!      three errors of 2⁻²³ of the magnitudes summed (two addends shifted, one result): η = nu' / (1 - nu') with
//!      n = 3⌈D/2⌉ and u' = 2⁻²³. Products and sums lose less than 2⁻¹²⁶ each by flushing, grown by at most 8/7 later:
//!      λ = 2⁻¹²⁴. A flushed element changes its product by less than 2⁻¹²⁶ times the other factor: τ = 2⁻¹²⁵.
//!      Widening to f32 and summing there is within this bound too.
//!    - *GPU*, fp16: products are exact. A tensor core takes the sum so far and blocks of B >= 4 products, aligns them to the
//!      largest magnitude, cuts them off at 2⁻²³⁻ᵉ of it (e >= 0 extra bits) and rounds the result towards zero. NVIDIA
//!      documents none of this; the form is that of published bit-accurate models (arXiv 2512.07004), of which (4, 0) is the
//!      coarsest: (B + 1)2⁻²³⁻ᵉ + 2⁻²² a block is at most 1.75D·2⁻²³ in all. η = D·2⁻²² / (1 - D·2⁻²²) leaves room for the
//!      additions of a split D. Scales are powers of two, so nothing is lost to them but below f32: λ = 2⁻¹⁴⁹, τ = 0. A
//!      device is asked once to multiply vectors that are hard to sum, and is not used if it misses this bound.
//! 6. *Last roundings.* |s_k - (p_k + α·g_k + b'_k)| <= 1.01u(|p_k| + 3|α·g_k| + 2|b'_k|) + 2⁻¹⁴⁹.
//!
//! With |g_k| <= 1.02|c'_k|, |p_k| <= (1 + η)|w~||c~_k| + …, η <= 1/7, and 2⁻¹⁴⁹ <= λ, their sum is at most
//!
//! ```text
//! ε = ζ·(5.3u|c'_k| + 2v(D + 2)(|c_k| + 2|c'_k|) + 2⁻¹⁴⁸√D) + r·|c'_k|
//!   + |w~|·(|e_k| + (η + 1.2u)|c~_k| + 2τ√D) + 3.1u|b'_k| + 2v(D + 1)|b_k| + 2τ√D|c~_k| + λ(2D + 4)
//! ```
//!
//! Each norm of a code is replaced by its maximum over the tile, so a tile has four numbers: [`Bound`]. ε, what is compared
//! with it and the threshold are computed in f64, where errors are about v(|s| + ε) each and v(D + 2) relative for norms:
//! enlarging the four numbers by 2⁻²⁰ covers them, because ε >= u|s|.
//!
//! *Guard.* All partial sums are at most 2·(|w~||c~| + |α||g| + |b'|), by Cauchy-Schwarz; a token is screened only where
//! the bracket is below 2¹²⁶. What overflowed on the way to T is infinite or not a number and fails the comparison.

use crate::cpu::{Bf16, Element};
use crate::vectorised;

/// Half the distance from 1 to the next f32.
const U32: f64 = power_of_two(-24);

/// Half the distance from 1 to the next f64.
const U64: f64 = power_of_two(-53);

/// What the bound is enlarged by for being computed in f64 itself.
const SLACK: f64 = 1.0 + power_of_two(-20);

/// The smallest positive f32.
const TINY: f64 = power_of_two(-149);

/// Sums of magnitudes below this cannot overflow f32, whatever their roundings.
pub(crate) const SAFE: f64 = power_of_two(126);

const fn power_of_two(exponent: i64) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// A precision to screen in.
pub(super) trait Screened: Element {
    /// How its products are summed over `width` elements, where the bound holds: a width below a few hundred thousand.
    fn sums(width: usize) -> Option<Sums>;
}

/// Errors of a sum of products: η, λ and τ of the [proof](self).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    relative: f64,
    lost: f64,
    flushed: f64,
}

impl Sums {
    /// What a sum may be off by, for factors of these norms.
    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn bound(self, w: f64, c: f64, width: usize) -> f64 {
        let root = (width as f64).sqrt();
        self.relative * w * c + self.lost * width as f64 + self.flushed * root * (w + c)
    }
}

impl Screened for f32 {
    fn sums(width: usize) -> Option<Sums> {
        Some(Sums { relative: gamma(width as f64 * U32)?, lost: TINY, flushed: 0.0 })
    }
}

/// Sums of products of fp16 by tensor cores of compute capability 8.0 and later: see *GPU* in the [proof](self).
#[cfg(feature = "cuda")]
pub(crate) fn tensor_core_sums(width: usize) -> Option<Sums> {
    Some(Sums { relative: gamma(width as f64 * 4.0 * U32)?, lost: TINY, flushed: 0.0 })
}

/// Sums of products of f32, in any order.
#[cfg(feature = "cuda")]
pub(crate) fn plain_sums(width: usize) -> Option<Sums> {
    f32::sums(width)
}

impl Screened for Bf16 {
    fn sums(width: usize) -> Option<Sums> {
        let roundings = 3 * width.div_ceil(2);
        let relative = gamma(roundings as f64 * 2.0 * U32)?;
        Some(Sums { relative, lost: power_of_two(-124), flushed: power_of_two(-125) })
    }
}

/// x / (1 - x), where it is at most 1/7.
fn gamma(x: f64) -> Option<f64> {
    (x <= 0.125).then(|| x / (1.0 - x))
}

/// Largest magnitudes over the columns of one tile, from which its bound follows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extent {
    /// |c|
    pub(crate) code: f64,
    /// |c'|
    pub(crate) centred: f64,
    /// |c~|
    pub(crate) rounded: f64,
    /// |e|
    pub(crate) error: f64,
    /// |b|
    pub(crate) bias: f64,
    /// |b'|
    pub(crate) centred_bias: f64,
}

impl Extent {
    /// The larger magnitudes of both.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            code: self.code.max(other.code),
            centred: self.centred.max(other.centred),
            rounded: self.rounded.max(other.rounded),
            error: self.error.max(other.error),
            bias: self.bias.max(other.bias),
            centred_bias: self.centred_bias.max(other.centred_bias),
        }
    }
}

/// What the bound depends on, token by token; zeros for tokens that are not screened.
#[derive(Default)]
pub(super) struct Reach {
    /// ζ = max(|z|, |α|)
    pub(super) token: Vec<f64>,
    /// r, the error of rounding w
    pub(super) error: Vec<f64>,
    /// |w~|
    pub(super) rounded: Vec<f64>,
}

impl Reach {
    pub(super) fn reset(&mut self, tokens: usize) {
        for part in [&mut self.token, &mut self.error, &mut self.rounded] {
            part.clear();
            part.resize(tokens, 0.0);
        }
    }
}

/// The bound of one tile: ε is a weighted sum of a token's part of [`Reach`], and an offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    token: f64,
    error: f64,
    rounded: f64,
    offset: f64,
}

impl Bound {
    pub(crate) fn new(extent: Extent, sums: Sums, width: usize) -> Self {
        let Extent { code, centred, rounded, error, bias, centred_bias } = extent;
        let (width, root) = (width as f64, (width as f64).sqrt());
        let contract = 2.0 * U64 * (width + 2.0);
        let flushed = 2.0 * sums.flushed * root;
        Self {
            token: SLACK * (5.3 * U32 * centred + contract * (code + 2.0 * centred) + 2.0 * TINY * root),
            error: SLACK * centred,
            rounded: SLACK * (error + (sums.relative + 1.2 * U32) * rounded + flushed),
            offset: SLACK
                * (3.1 * U32 * centred_bias + contract * bias + flushed * rounded + sums.lost * (2.0 * width + 4.0)),
        }
    }

    /// The weights of a token's |z|, r and |w~|, and the offset, whose sum is ε.
    #[cfg(feature = "cuda")]
    pub(crate) fn weights(&self) -> [f64; 4] {
        [self.token, self.error, self.rounded, self.offset]
    }

    /// ε of token `i`.
    pub(super) fn of(&self, reach: &Reach, i: usize) -> f64 {
        self.weigh(reach.token[i], reach.error[i], reach.rounded[i])
    }

    #[inline(always)]
    fn weigh(&self, token: f64, error: f64, rounded: f64) -> f64 {
        token * self.token + error * self.error + rounded * self.rounded + self.offset
    }
}

vectorised! {
    /// What codes of a tile must score to be kept: the tokens' `lower` less ε.
    pub(super) fn thresholds(bound: &Bound, lower: &[f64], reach: &Reach, thresholds: &mut [f32]) {
        let reach = reach.token.iter().zip(&reach.error).zip(&reach.rounded);
        for ((out, lower), ((token, error), rounded)) in thresholds.iter_mut().zip(lower).zip(reach) {
            *out = floor_to_f32(lower - bound.weigh(*token, *error, *rounded));
        }
    }
}

/// An f32 not above `x`, at most a few units of its last place below.
#[inline(always)]
pub(super) fn floor_to_f32(x: f64) -> f32 {
    // Rounding to the nearest is off by half a unit, at most 2⁻²⁴|x| or 2⁻¹⁵⁰.
    (x - x.abs() * (2.0 * U32) - TINY) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_round_down() {
        for x in [0.0, 0.1, -0.1, 1.0, 1.0 + 1e-12, -1.0 - 1e-12, 1e-45, -1e-45, 1e-60, -1e-60, 1e30, -1e30] {
            let floor = f64::from(floor_to_f32(x));
            assert!(floor <= x && floor >= x - x.abs() * 1e-6 - 1e-44, "{x:e} became {floor:e}");
        }
        assert_eq!(floor_to_f32(f64::NEG_INFINITY), f32::NEG_INFINITY);
        assert!(floor_to_f32(f64::NAN).is_nan());
    }

    #[test]
    fn powers_of_two() {
        assert_eq!((U32, U64, SAFE), (2f64.powi(-24), 2f64.powi(-53), 2f64.powi(126)));
        assert_eq!(TINY, f64::from(f32::from_bits(1)));
    }
}
