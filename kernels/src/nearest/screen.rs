//! Screening: scores of all codes in f32 or bf16, and proof that the best code is among the few kept.
//!
//! # Method
//! The codebook is cut into tiles, packed for the products of [`cpu`](crate::cpu). For a block of tokens and one tile after
//! another, a product fills a small array of scores s_k, a bound ε on their error is known per token and tile, and
//!
//! ```text
//! lower = max over codes j of (s_j - ε_j)        kept: every k with s_k + ε_k >= lower
//! ```
//!
//! `lower` only grows, so a code dropped early would be dropped at the end too. What is screened are centred codes c_k - m,
//! with m the mean code: argmax z·c_k + b_k = argmax z·(c_k - m) + (b_k - β), for any m and β free of k. Codes that share a
//! direction get much smaller centred norms, hence a much smaller ε. Tokens lose their part along m, whose products with
//! the codes are known: [`bound`](super::bound). Equal rows are folded into the first, which wins their ties; otherwise dead
//! codes would flood the list.
//!
//! # Proof
//! [`bound`](super::bound) shows that, up to a term free of k, |s_k - S_k| <= ε_k for the score S_k of the contract. Let k*
//! be a true maximiser, tied ones included, and j the code that set `lower`. Up to that term,
//! s_k* + ε_k* >= S_k* >= S_j >= s_j - ε_j = lower. So k* is kept. ∎
//!
//! Nothing here depends on how products tile, fuse or thread, nor on which tokens share a block: these can change the
//! candidates, never the code.

use std::fmt;
use std::ops::Range;

use rayon::prelude::*;

use super::bound::{Bound, Extent, Reach, SAFE, Screened, Sums, floor_to_f32, thresholds};
use super::prepare::Layout;
use super::simd::{self, Simd};
use crate::cpu::{Isa, Matrix, Packed};
use crate::vectorised;

/// Codes per tile.
const TILE: usize = 64;

/// Tokens that meet a tile at once: whole strips of every instruction set (6 rows, or 32). Their scores (24 KiB) stay in
/// the cache until they are scanned.
const ROWS: usize = 96;

/// Most tokens per block: enough for a tile to be worth its way from memory.
const MAX_BLOCK: usize = 4 * ROWS;

/// Most candidates a token may have before it is refused.
const MAX_CANDIDATES: usize = 256;

/// Tokens per block when N tokens are searched: every thread gets as many blocks as the others.
pub(super) fn block_rows(tokens: usize) -> usize {
    let threads = rayon::current_num_threads();
    let blocks = threads * tokens.div_ceil(threads * MAX_BLOCK).max(1);
    tokens.div_ceil(blocks).next_multiple_of(8).clamp(8, MAX_BLOCK)
}

/// The centred, folded, rounded and packed copy of a codebook, and its error bounds.
#[derive(Clone, Debug)]
pub(super) struct Screen<T> {
    /// The direction a that tokens lose, (D).
    axis: Vec<f32>,
    /// |a|²
    axis_square: f64,
    tiles: Vec<Tile<T>>,
    /// No |c'| or |c~|, nor any |g|/|α|, is above this.
    reach: f64,
    /// The largest |b'|.
    offset: f64,
}

/// Up to [`TILE`] neighbouring columns.
#[derive(Clone)]
struct Tile<T> {
    /// The code that each column stands for, ascending.
    codes: Vec<u32>,
    /// c~, (D, columns)
    shadow: Packed<T>,
    /// g, one per column; zero in the padding.
    slope: Vec<f32>,
    /// b', one per column; -∞ in the padding, which therefore never wins.
    bias: Vec<f32>,
    bound: Bound,
}

/// One block's tokens and what is known of them; reused from block to block.
pub(super) struct Scratch<T> {
    /// w~, (tokens, D)
    tokens: Matrix<T>,
    /// (some tokens, columns of a tile)
    scores: Vec<f32>,
    reach: Reach,
    /// α
    alpha: Vec<f32>,
    /// The best code scores at least this; NaN for a token that is not screened.
    lower: Vec<f64>,
    /// What a code of the tile at hand must score.
    thresholds: Vec<f32>,
    /// Tokens that may have found a candidate.
    hits: Vec<usize>,
    /// Columns of the tile at hand that are candidates of one token.
    above: Vec<usize>,
    rows: Vec<Row>,
}

/// What the screening of one token has come to.
#[derive(Default)]
pub(super) struct Row {
    fate: Fate,
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

impl<T: Screened> Screen<T> {
    /// Prepares the codes, or `None` where the bound does not hold: a codebook near the end of the f32 range, or a width
    /// in the hundreds of thousands.
    ///
    /// # Shapes
    /// `rows`: (K, D), `bias`: (K)
    pub(super) fn new(rows: &[f32], bias: &[f64], layout: &Layout, isa: Isa, simd: Simd) -> Option<Self> {
        let sums = T::sums(layout.center.len())?;
        let tile = |codes: &[u32]| Tile::new(rows, bias, layout, codes, sums, isa, simd);
        let (tiles, extents): (Vec<_>, Vec<_>) = layout.codes.par_chunks(TILE).map(tile).unzip();
        let reach = 1.02 * extents.iter().map(|e| e.centred.max(e.rounded)).fold(0.0, f64::max);
        let offset = extents.iter().map(|e| e.centred_bias).fold(0.0, f64::max);
        let axis_square = simd.dot64(&layout.axis, &layout.axis);
        // An overflow in c', c~ or b' is infinite here.
        (reach < SAFE && offset < SAFE).then(|| Self { axis: layout.axis.clone(), axis_square, tiles, reach, offset })
    }

    /// Screens one block of tokens, leaving their survivors in `scratch`.
    ///
    /// # Shapes
    /// `z`: (`tokens`, D)
    pub(super) fn run(&self, z: &[f32], tokens: usize, scratch: &mut Scratch<T>, simd: Simd) {
        scratch.reset(tokens, self.axis.len());
        for (i, z) in z.chunks_exact(self.axis.len()).enumerate() {
            self.begin(i, z, scratch, simd);
        }
        for tile in &self.tiles {
            thresholds(&tile.bound, &scratch.lower, &scratch.reach, &mut scratch.thresholds);
            for start in (0..tokens).step_by(ROWS) {
                tile.meet(start..tokens.min(start + ROWS), scratch, simd);
            }
        }
        for (row, &lower) in scratch.rows.iter_mut().zip(&scratch.lower) {
            row.drop_beaten(lower);
        }
    }

    /// Takes the axis off a token, rounds what is left, and decides whether it can be screened.
    fn begin(&self, i: usize, z: &[f32], scratch: &mut Scratch<T>, simd: Simd) {
        let norm = norm(z, simd);
        let alpha = if self.axis_square > 0.0 { (simd.dot64(z, &self.axis) / self.axis_square) as f32 } else { 0.0 };
        let (square, error) = reduce(scratch.tokens.row_mut(i), z, &self.axis, alpha);
        let size = f64::from(alpha.abs());
        let (rounded, error) = (square.sqrt(), error.sqrt());
        let fate = if norm == 0.0 {
            Fate::Origin
        } else if (rounded + size) * self.reach + self.offset < SAFE {
            Fate::Screened
        } else {
            Fate::Refused
        };
        scratch.begin(i, fate);
        if scratch.rows[i].fate == Fate::Screened {
            scratch.alpha[i] = alpha;
            scratch.reach.token[i] = norm.max(size);
            scratch.reach.error[i] = error;
            scratch.reach.rounded[i] = rounded;
        }
    }
}

impl<T: Screened> Tile<T> {
    fn new(
        rows: &[f32],
        bias: &[f64],
        layout: &Layout,
        codes: &[u32],
        sums: Sums,
        isa: Isa,
        simd: Simd,
    ) -> (Self, Extent) {
        let width = layout.center.len();
        let padded = codes.len().next_multiple_of(simd::SCAN);
        let (mut slope, mut centred_bias) = (vec![0.0; padded], vec![f32::NEG_INFINITY; padded]);
        let mut centred = vec![0.0; codes.len() * width];
        let (mut extent, mut spare) = (Extent::default(), vec![0.0; width]);
        for (column, (&k, centred)) in codes.iter().zip(centred.chunks_exact_mut(width)).enumerate() {
            let (code, bias) = (&rows[k as usize * width..][..width], bias[k as usize]);
            for (out, (x, m)) in centred.iter_mut().zip(code.iter().zip(&layout.center)) {
                *out = (f64::from(*x) - m) as f32;
            }
            slope[column] = simd.dot64(&layout.axis, centred) as f32;
            centred_bias[column] = (bias - layout.level) as f32;
            let (rounded, error) = rounding::<T>(centred, &mut spare, simd);
            extent = extent.or(Extent {
                code: norm(code, simd),
                centred: norm(centred, simd),
                rounded,
                error,
                bias: bias.abs(),
                centred_bias: f64::from(centred_bias[column]).abs(),
            });
        }
        let shadow = Packed::new(&centred, width, isa);
        let bound = Bound::new(extent, sums, width);
        (Self { codes: codes.to_vec(), shadow, slope, bias: centred_bias, bound }, extent)
    }

    /// Scores some tokens of the block against the tile and takes in what is good enough.
    fn meet(&self, tokens: Range<usize>, scratch: &mut Scratch<T>, simd: Simd) {
        let (start, stride) = (tokens.start, self.bias.len());
        let products = &mut scratch.scores[..tokens.len() * stride];
        self.shadow.multiply(products, stride, &scratch.tokens, tokens.clone(), 0, 0..self.shadow.panels());
        scratch.hits.clear();
        let (alpha, thresholds) = (&scratch.alpha[tokens.clone()], &scratch.thresholds[tokens]);
        simd.find_hits(products, &self.slope, &self.bias, alpha, thresholds, &mut scratch.hits);
        for at in 0..scratch.hits.len() {
            let hit = scratch.hits[at];
            self.take_in(start + hit, hit * stride, scratch, simd);
        }
    }

    /// Takes in the tile's products with one token, which start at `first`.
    fn take_in(&self, token: usize, first: usize, scratch: &mut Scratch<T>, simd: Simd) {
        let scores = &mut scratch.scores[first..][..self.codes.len()];
        let best = simd.finish(scores, &self.slope, &self.bias, scratch.alpha[token]);
        let epsilon = self.bound.of(&scratch.reach, token);
        let lower = scratch.lower[token].max(f64::from(best) - epsilon);
        scratch.above.clear();
        simd.find_above(scores, floor_to_f32(lower - epsilon), &mut scratch.above);
        let row = &mut scratch.rows[token];
        for &column in &scratch.above {
            let upper = f64::from(scores[column]) + epsilon;
            row.keep(Candidate { code: self.codes[column], upper }, lower);
        }
        scratch.lower[token] = if row.fate == Fate::Screened { lower } else { f64::NAN };
    }
}

impl<T: Screened> Scratch<T> {
    pub(super) fn new() -> Self {
        Self {
            tokens: Matrix::new(0, 0),
            scores: vec![0.0; ROWS * TILE],
            reach: Reach::default(),
            alpha: Vec::new(),
            lower: Vec::new(),
            thresholds: Vec::new(),
            hits: Vec::with_capacity(ROWS),
            above: Vec::with_capacity(TILE),
            rows: Vec::new(),
        }
    }

    /// The tokens of the last block.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Room for a block. Rows of an earlier block are overwritten.
    fn reset(&mut self, tokens: usize, width: usize) {
        if self.tokens.rows() < tokens || self.tokens.columns() != width {
            self.tokens = Matrix::new(tokens, width);
        }
        self.reach.reset(tokens);
        self.alpha.clear();
        self.alpha.resize(tokens, 0.0);
        self.lower.clear();
        self.lower.resize(tokens, f64::NAN);
        self.thresholds.resize(tokens, 0.0);
        self.rows.resize_with(tokens, Row::default);
    }

    fn begin(&mut self, i: usize, fate: Fate) {
        if fate == Fate::Screened {
            self.lower[i] = f64::NEG_INFINITY;
        } else {
            self.tokens.row_mut(i).fill(T::default());
        }
        self.rows[i].fate = fate;
        self.rows[i].candidates.clear();
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

    fn keep(&mut self, candidate: Candidate, lower: f64) {
        if self.candidates.len() == MAX_CANDIDATES {
            self.drop_beaten(lower);
        }
        if self.candidates.len() == MAX_CANDIDATES {
            self.fate = Fate::Refused;
        } else {
            self.candidates.push(candidate);
        }
    }

    fn drop_beaten(&mut self, lower: f64) {
        self.candidates.retain(|candidate| candidate.upper >= lower);
    }
}

impl<T> fmt::Debug for Tile<T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Tile").field("codes", &self.codes.len()).field("bound", &self.bound).finish_non_exhaustive()
    }
}

fn norm(x: &[f32], simd: Simd) -> f64 {
    simd.dot64(x, x).sqrt()
}

/// |T(x)| and |T(x) - x|.
fn rounding<T: Screened>(x: &[f32], spare: &mut [f32], simd: Simd) -> (f64, f64) {
    spare.iter_mut().zip(x).for_each(|(out, &x)| *out = T::narrow(x).widen());
    let rounded = norm(spare, simd);
    // Exact: a number less its rounding to fewer bits.
    spare.iter_mut().zip(x).for_each(|(out, x)| *out -= x);
    (rounded, norm(spare, simd))
}

/// Partial sums of [`reduce`].
const LANES: usize = 16;

vectorised! {
    /// w~ = T(z - α·a), |w~|² and the square of its error.
    fn reduce[T: Screened](out: &mut [T], z: &[f32], axis: &[f32], alpha: f32) -> (f64, f64) {
        let alpha = f64::from(alpha);
        let (mut squares, mut errors) = ([0f64; LANES], [0f64; LANES]);
        for ((out, z), axis) in out.chunks_mut(LANES).zip(z.chunks(LANES)).zip(axis.chunks(LANES)) {
            for (l, (out, (z, a))) in out.iter_mut().zip(z.iter().zip(axis)).enumerate() {
                let rest = f64::from(*z) - alpha * f64::from(*a);
                *out = T::narrow(rest as f32);
                let rounded = f64::from(out.widen());
                squares[l] += rounded * rounded;
                errors[l] += (rounded - rest) * (rounded - rest);
            }
        }
        (squares.iter().sum(), errors.iter().sum())
    }
}

#[cfg(test)]
mod tests;
