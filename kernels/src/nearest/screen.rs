//! Screening: f32 scores of all codes, and proof that the best code is among the few kept.
//!
//! # Method
//! The codebook is cut into tiles. For a block of tokens and one tile after another, a GEMM fills a small
//! array of scores s_k, a bound ε on their error is known per token and tile, and
//!
//! ```text
//! lower = max over codes j of (s_j - ε_j)        kept: every k with s_k + ε_k >= lower
//! ```
//!
//! `lower` only grows, so a code dropped early would be dropped at the end too. GEMM scores are of centred
//! codes c_k - m, with m the mean code: argmax z·c_k + b_k = argmax z·(c_k - m) + (b_k - β), for any m and β
//! free of k. Codes that share a direction get much smaller centred norms, hence a much smaller ε.
//! Equal rows are folded into the first, which wins their ties; otherwise dead codes would flood the list.
//!
//! # Proof
//! Let u = 2⁻²⁴ and v = 2⁻⁵³ be the roundings of f32 and f64, γ_n = n·u / (1 - n·u), D the width with
//! (D + 3)·u <= 1/8, |·| the Euclidean norm; nothing overflows (checked per token: all partial sums are at
//! most 2·(|z||c'| + |b'|), by Cauchy-Schwarz). Stored: c' = fl32(c - m), b' = fl32(b - β), through f64.
//! Let S_k be the score of the contract, and x_k = z·(c_k - m) + b_k - β the exact centred one.
//!
//! 1. *Contract.* Products are exact and at most D additions round, then adding b_k:
//!    |S_k - (x_k + z·m + β)| <= 2v(D + 1)(|z||c_k| + |b_k|).
//! 2. *Centring.* Each element is off by at most 1.01u|c'| + 2⁻¹⁴⁹:
//!    |z·c'_k - z·(c_k - m)| <= 1.01u|z||c'_k| + 2⁻¹⁴⁹√D|z|, and |b'_k - (b_k - β)| <= 1.01u|b'_k| + 2⁻¹⁴⁹.
//! 3. *GEMM.* In whatever order D products are summed, fused or not, each passes through at most D
//!    roundings, and a product loses at most 2⁻¹⁵⁰ to underflow, at most doubled by later roundings:
//!    |t_k - z·c'_k| <= γ_D|z||c'_k| + 2⁻¹⁴⁹D.
//! 4. *Adding b'.* |s_k - (t_k + b'_k)| <= u(|t_k| + |b'_k|) <= u(1 + γ_D)|z||c'_k| + u|b'_k| + 2⁻¹⁴⁹.
//!
//! With γ_D + 1.01u + u(1 + γ_D) <= γ_(D+3), the sum of the four is at most
//!
//! ```text
//! ε = γ_(D+3)|z||c'_k| + 3u|b'_k| + 2v(D + 1)(|z||c_k| + |b_k|) + 2⁻¹⁴⁹(√D|z| + D + 2)
//! ```
//!
//! Each norm is replaced by its maximum over the tile, so ε = |z|·slope + offset with two numbers per tile.
//! ε, `lower` and the threshold are computed in f64, where errors are about v(|s| + ε) each and v(D + 2)
//! relative for norms: enlarging slope and offset by 2⁻²⁰ covers them, because ε >= u|s|. The threshold is
//! rounded down to f32.
//!
//! Let k* be a true maximiser, tied ones included, and j the code that set `lower`. Up to a term free of k,
//! s_k* + ε_k* >= S_k* >= S_j >= s_j - ε_j = lower. So k* is kept. ∎
//!
//! Nothing here depends on how the GEMM tiles, fuses or threads, nor on which tokens share a block: these
//! can change the candidates, never the code.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;

use super::simd::Simd;
use crate::matrix::{self, Into, View};

/// Codes per tile: with [`MAX_BLOCK`] tokens, 512 KiB of scores, which stay in a core's cache.
const TILE: usize = 512;

/// Most tokens per block: enough for the GEMM to reuse a tile of codes.
const MAX_BLOCK: usize = 256;

/// Most candidates a token may have before it is scored against every code.
const MAX_CANDIDATES: usize = 256;

/// Half the distance from 1 to the next f32.
const U32: f64 = 1.0 / (1u64 << 24) as f64;

/// Half the distance from 1 to the next f64.
const U64: f64 = 1.0 / (1u64 << 53) as f64;

/// What the bound is enlarged by for being computed in f64 itself.
const SLACK: f64 = 1.0 + 1.0 / (1u64 << 20) as f64;

/// Sums of magnitudes below this cannot overflow f32, whatever their roundings.
const SAFE: f64 = (1u128 << 126) as f64;

/// Tokens per block when N tokens are searched: small enough that every thread gets one.
pub(super) fn block_rows(tokens: usize) -> usize {
    tokens.div_ceil(rayon::current_num_threads()).next_multiple_of(8).clamp(8, MAX_BLOCK)
}

/// The centred, folded and tiled f32 copy of a codebook, and its error bounds.
#[derive(Clone, Debug)]
pub(super) struct Screen {
    width: usize,
    /// The code that each screened column stands for, ascending.
    codes: Vec<u32>,
    /// Tile after tile, each (D, columns of the tile): the layout a GEMM reads without packing.
    shadow: Vec<f32>,
    /// b', one per column.
    bias: Vec<f32>,
    tiles: Vec<Bound>,
    /// The largest |c'| and |b'| over all columns.
    reach: f64,
    offset: f64,
}

/// The bound of one tile: ε = |z|·slope + offset.
#[derive(Clone, Copy, Debug)]
struct Bound {
    slope: f64,
    offset: f64,
}

/// Largest magnitudes over the columns of one tile, from which its bound follows.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    code: f64,
    bias: f64,
    centred_code: f64,
    centred_bias: f64,
}

/// One block's scores and the state of its tokens; reused from block to block.
#[derive(Default)]
pub(super) struct Scratch {
    /// (tokens of the block, columns of the tile)
    scores: Vec<f32>,
    rows: Vec<Row>,
}

/// What is known of one token while its codes are screened.
#[derive(Default)]
pub(super) struct Row {
    fate: Fate,
    /// |z|
    norm: f64,
    /// The best code scores at least this.
    lower: f64,
    candidates: Vec<Candidate>,
}

#[derive(Default, PartialEq, Eq)]
enum Fate {
    #[default]
    Screened,
    Origin,
    Refused,
}

/// A code that may be the best one.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) code: u32,
    /// The code scores at most this.
    upper: f64,
}

/// The codes that may be a token's best, after screening.
pub(super) enum Survivors<'a> {
    /// The token is zero, whose code the codebook knows.
    Origin,
    /// These, at least one, in ascending order.
    Some(&'a [Candidate]),
    /// Any code: the token could not be screened.
    All,
}

impl Screen {
    /// Prepares the codes, or `None` where the bound does not hold: a codebook near the end of the f32
    /// range, or a width in the millions.
    ///
    /// # Shapes
    /// `rows`: (K, D), `bias`: (K)
    pub(super) fn new(rows: &[f32], bias: &[f64], width: usize, simd: Simd) -> Option<Self> {
        let gamma = gamma(width + 3)?;
        let codes = fold_duplicates(rows, width);
        let center = mean(rows, width, &codes);
        let level = codes.iter().map(|&k| bias[k as usize]).sum::<f64>() / codes.len() as f64;
        let centred_bias = codes.iter().map(|&k| (bias[k as usize] - level) as f32).collect::<Vec<_>>();

        let mut shadow = vec![0.0; codes.len() * width];
        let extents = shadow
            .par_chunks_mut(TILE * width)
            .zip(codes.par_chunks(TILE))
            .map(|(tile, codes)| center_tile(rows, &center, codes, tile, simd))
            .zip(codes.par_chunks(TILE).zip(centred_bias.par_chunks(TILE)))
            .map(|(extent, (codes, centred))| Extent {
                bias: largest(codes.iter().map(|&k| bias[k as usize])),
                centred_bias: largest(centred.iter().map(|&b| f64::from(b))),
                ..extent
            })
            .collect::<Vec<_>>();
        let reach = largest(extents.iter().map(|extent| extent.centred_code));
        let offset = largest(extents.iter().map(|extent| extent.centred_bias));
        let tiles = extents.iter().map(|extent| extent.bound(gamma, width as f64)).collect();
        // An overflow in c' or b' is infinite here.
        (reach < SAFE && offset < SAFE).then_some(Self {
            width,
            codes,
            shadow,
            bias: centred_bias,
            tiles,
            reach,
            offset,
        })
    }

    /// Screens one block of tokens, leaving their survivors in `scratch`.
    ///
    /// # Shapes
    /// `z`: (`tokens`, D)
    pub(super) fn run(&self, z: &[f32], tokens: usize, scratch: &mut Scratch, simd: Simd) {
        scratch.reset(tokens);
        for (row, z) in scratch.rows.iter_mut().zip(z.chunks_exact(self.width)) {
            row.begin(simd.dot64(z, z).sqrt(), self.reach, self.offset);
        }
        let shadow = self.shadow.chunks(TILE * self.width);
        let columns = self.codes.chunks(TILE).zip(self.bias.chunks(TILE));
        for ((tile, (codes, bias)), bound) in shadow.zip(columns).zip(&self.tiles) {
            let scores = &mut scratch.scores[..tokens * codes.len()];
            multiply(tile, z, self.width, scores);
            for (row, scores) in scratch.rows.iter_mut().zip(scores.chunks_exact(codes.len())) {
                if row.fate == Fate::Screened {
                    row.scan(scores, bias, codes, *bound, simd);
                }
            }
        }
        scratch.rows.iter_mut().for_each(Row::drop_beaten);
    }
}

impl Extent {
    fn bound(self, gamma: f64, width: f64) -> Bound {
        let underflow = f64::from(f32::from_bits(1));
        let contract = 2.0 * U64 * (width + 1.0);
        let slope = gamma * self.centred_code + contract * self.code + underflow * width.sqrt();
        let offset = 3.0 * U32 * self.centred_bias + contract * self.bias + underflow * (width + 2.0);
        Bound { slope: slope * SLACK, offset: offset * SLACK }
    }
}

impl Scratch {
    /// The tokens of the last block.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// A block of tokens that no screen can take.
    pub(super) fn refuse(&mut self, tokens: usize) {
        self.rows.resize_with(tokens, Row::default);
        self.rows.iter_mut().for_each(|row| row.fate = Fate::Refused);
    }

    fn reset(&mut self, tokens: usize) {
        self.rows.resize_with(tokens, Row::default);
        self.scores.resize(tokens * TILE, 0.0);
    }
}

impl Row {
    pub(super) fn survivors(&self) -> Survivors<'_> {
        match self.fate {
            Fate::Screened => Survivors::Some(&self.candidates),
            Fate::Origin => Survivors::Origin,
            Fate::Refused => Survivors::All,
        }
    }

    fn begin(&mut self, norm: f64, reach: f64, offset: f64) {
        self.fate = if norm == 0.0 {
            Fate::Origin
        } else if norm * reach + offset < SAFE {
            Fate::Screened
        } else {
            Fate::Refused
        };
        self.norm = norm;
        self.lower = f64::NEG_INFINITY;
        self.candidates.clear();
    }

    /// Takes in the scores of one tile.
    fn scan(&mut self, scores: &[f32], bias: &[f32], codes: &[u32], bound: Bound, simd: Simd) {
        let epsilon = self.norm * bound.slope + bound.offset;
        let best = f64::from(simd.max_sum(scores, bias));
        if best + epsilon < self.lower {
            return;
        }
        self.lower = self.lower.max(best - epsilon);
        let threshold = floor_to_f32(self.lower - epsilon);
        simd.for_each_above(scores, bias, threshold, |j, score| {
            self.keep(Candidate { code: codes[j], upper: f64::from(score) + epsilon });
        });
    }

    fn keep(&mut self, candidate: Candidate) {
        if self.candidates.len() == MAX_CANDIDATES {
            self.drop_beaten();
        }
        if self.candidates.len() == MAX_CANDIDATES {
            self.fate = Fate::Refused;
        } else {
            self.candidates.push(candidate);
        }
    }

    fn drop_beaten(&mut self) {
        self.candidates.retain(|candidate| candidate.upper >= self.lower);
    }
}

/// γ_n, where it is at most 1/7.
fn gamma(n: usize) -> Option<f64> {
    let nu = n as f64 * U32;
    (nu <= 0.125).then(|| nu / (1.0 - nu))
}

/// The first index of each distinct row, ascending.
fn fold_duplicates(rows: &[f32], width: usize) -> Vec<u32> {
    // -0 and 0 score alike; adding 0 makes them one.
    let hash = |row: &[f32]| {
        let mut hasher = DefaultHasher::new();
        row.iter().for_each(|x| (x + 0.0).to_bits().hash(&mut hasher));
        hasher.finish()
    };
    let row = |k: u32| &rows[k as usize * width..][..width];
    let hashes = rows.par_chunks(width).map(hash).collect::<Vec<_>>();
    let mut first = HashMap::with_capacity(hashes.len());
    let is_first = |&(k, hash): &(u32, u64)| {
        let seen = *first.entry(hash).or_insert(k);
        // Different rows under one hash both stay: folding saves work, no answer needs it.
        seen == k || row(seen) != row(k)
    };
    (0..).zip(hashes).filter(is_first).map(|(k, _)| k).collect()
}

/// The mean of the given rows, in f64.
fn mean(rows: &[f32], width: usize, codes: &[u32]) -> Vec<f64> {
    let mut mean = vec![0.0; width];
    for &k in codes {
        for (sum, x) in mean.iter_mut().zip(&rows[k as usize * width..][..width]) {
            *sum += f64::from(*x);
        }
    }
    mean.iter_mut().for_each(|x| *x /= codes.len() as f64);
    mean
}

/// Writes the centred codes of one tile, (D, columns), and measures them.
fn center_tile(rows: &[f32], center: &[f64], codes: &[u32], tile: &mut [f32], simd: Simd) -> Extent {
    let width = center.len();
    let mut centred = vec![0.0; width];
    let mut extent = Extent::default();
    for (column, &k) in codes.iter().enumerate() {
        let code = &rows[k as usize * width..][..width];
        for (d, (out, (x, m))) in centred.iter_mut().zip(code.iter().zip(center)).enumerate() {
            *out = (f64::from(*x) - m) as f32;
            tile[d * codes.len() + column] = *out;
        }
        extent.code = extent.code.max(simd.dot64(code, code).sqrt());
        extent.centred_code = extent.centred_code.max(simd.dot64(&centred, &centred).sqrt());
    }
    extent
}

/// The largest magnitude.
fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.map(f64::abs).fold(0.0, f64::max)
}

/// The largest f32 not above `x`.
fn floor_to_f32(x: f64) -> f32 {
    let rounded = x as f32;
    if f64::from(rounded) > x { rounded.next_down() } else { rounded }
}

/// scores = z · tile, on this thread.
///
/// # Shapes
/// `tile`: (D, C), `z`: (N, D), `scores`: (N, C)
fn multiply(tile: &[f32], z: &[f32], width: usize, scores: &mut [f32]) {
    let (columns, tokens) = (tile.len() / width, z.len() / width);
    assert_eq!((columns * width, tokens * width, columns * tokens), (tile.len(), z.len(), scores.len()));
    let tile = View::new(tile, width, columns, columns);
    matrix::multiply(scores, columns, View::new(z, tokens, width, width), tile, 1.0, Into::Replace);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest share of its bound that the error of any difference of two scores takes.
    fn share_of_bound(rows: &[f32], bias: &[f64], z: &[f32]) -> f64 {
        let simd = Simd::detect();
        let width = z.len();
        let screen = Screen::new(rows, bias, width, simd).unwrap();
        let columns = screen.codes.len();
        assert!(columns <= TILE);
        let mut scores = vec![0.0; columns];
        multiply(&screen.shadow, z, width, &mut scores);
        let epsilon = simd.dot64(z, z).sqrt() * screen.tiles[0].slope + screen.tiles[0].offset;
        // The score of the contract less that of the screen is one constant, give or take ε.
        let off = |column: usize| {
            let k = screen.codes[column] as usize;
            let screened = scores[column] + screen.bias[column];
            simd.dot64(z, &rows[k * width..][..width]) + bias[k] - f64::from(screened)
        };
        let offs = (0..columns).map(off).collect::<Vec<_>>();
        let most = offs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = offs.iter().copied().fold(f64::INFINITY, f64::min);
        (most - least) / (2.0 * epsilon)
    }

    #[test]
    fn errors_of_screened_scores_stay_within_the_bound() {
        for (seed, width) in [1, 2, 3, 17, 32, 250, 1536].into_iter().enumerate() {
            for scale in [1e-30, 1e-22, 1e-6, 1.0, 1e6] {
                let mut state = seed as u32 + 1;
                // Half of the widths draw positive values only, whose errors add up the most.
                let mut value = || {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let x = (state >> 8) as f32 / (1 << 24) as f32;
                    scale * if seed % 2 == 0 { x } else { 2.0 * x - 1.0 }
                };
                let z = (0..width).map(|_| value()).collect::<Vec<_>>();
                let rows = (0..400 * width).map(|_| value()).collect::<Vec<_>>();
                let bias =
                    rows.chunks_exact(width).map(|row| -Simd::detect().dot64(row, row) / 2.0).collect::<Vec<_>>();
                for bias in [&bias, &vec![0.0; 400]] {
                    let share = share_of_bound(&rows, bias, &z);
                    assert!(share < 1.0, "width {width}, scale {scale:e}: {share} of the bound");
                }
            }
        }
    }

    #[test]
    fn thresholds_round_down() {
        for x in [0.1, -0.1, 1.0, 1.0 + 1e-12, -1.0 - 1e-12, 1e-60, -1e-60] {
            let floor = floor_to_f32(x);
            assert!(f64::from(floor) <= x && f64::from(floor.next_up()) > x, "{x:e} became {floor:e}");
        }
    }
}
