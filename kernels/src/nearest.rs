//! The contract of nearest-code search, its plain reference, and the [`Codebook`] that answers it fast.
//!
//! For a token z and codes c_k, all f32 as stored,
//!
//! ```text
//! score(k) = dot64(z, c_k) + b_k        code(z) = lowest k with the largest score
//! b_k      = -dot64(c_k, c_k) / 2       Euclidean: then score = (|z|² - |z - c_k|²) / 2
//! b_k      = 0                          cosine: codes normalised once, z left as it is
//! ```
//!
//! `dot64` sums in binary64 in one fixed order: 32 partial sums, lane l taking d = l, l + 32, … ascending
//! from +0, then a butterfly over the lanes at distances 16, 8, 4, 2, 1. The product of two f32 values is
//! exact in binary64 (48 of 53 bits), so fused and unfused multiply-adds agree and the order alone decides
//! the rounding: a plain loop, a vector unit and a GPU warp return the same bits.
//!
//! Scores are compared as numbers, so -0 equals +0. A NaN or an infinity in z is an error, never a code.
//! A token of zeros scores b_k everywhere: under the cosine metric it gets code 0.

mod screen;
mod simd;
#[cfg(test)]
mod tests;

use rayon::prelude::*;
use screen::{Scratch, Screen};
use simd::Simd;

use crate::Error;

/// How a code is ranked against a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Smallest Euclidean distance.
    Euclidean,
    /// Largest cosine; the codebook's rows are normalised when it is built.
    Cosine,
}

/// What a search did, summed over its tokens.
///
/// A token whose screening leaves one candidate is settled without any binary64 score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tokens searched, N.
    pub rows: usize,
    /// Codes within the proven bound of the best one, over the tokens that did not fall back.
    pub candidates: usize,
    /// Tokens with two candidates or more, decided by binary64 scores of these.
    pub rescored_rows: usize,
    /// Tokens scored in binary64 against every code: values near the end of the f32 range, or more
    /// near-ties than the candidate list holds.
    pub fallback_rows: usize,
}

impl Stats {
    fn plus(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            candidates: self.candidates + other.candidates,
            rescored_rows: self.rescored_rows + other.rescored_rows,
            fallback_rows: self.fallback_rows + other.fallback_rows,
        }
    }
}

/// K codes of width D, prepared for searching.
///
/// Holds the rows as searched and one screening copy of them (centred, duplicates folded, tiled), so twice
/// the codebook's size. A search needs, beyond its input and output, one tile of scores per thread.
#[derive(Clone, Debug)]
pub struct Codebook {
    rows: Vec<f32>,
    width: usize,
    metric: Metric,
    /// b_k, one per code.
    bias: Vec<f64>,
    /// The code of a token of zeros.
    origin: u32,
    simd: Simd,
    /// `None` where no f32 bound holds; every token then falls back.
    screen: Option<Screen>,
}

impl Codebook {
    /// Checks `rows` and prepares them; for [`Metric::Cosine`] each is divided by its norm (taken in
    /// binary64, stored in f32) and rows of zeros stay zero.
    ///
    /// # Shapes
    /// `rows`: (K, d)
    ///
    /// # Errors
    /// If K or `d` is zero, K exceeds `u32::MAX`, the values do not divide into rows, or a row is not
    /// finite.
    pub fn new(rows: Vec<f32>, d: usize, metric: Metric) -> Result<Self, Error> {
        let codes = count_rows(&rows, d)?;
        if codes == 0 {
            return Err(Error::NoCodes);
        }
        if u32::try_from(codes).is_err() {
            return Err(Error::TooManyCodes { codes });
        }
        if let Some(row) = first_non_finite(&rows, d) {
            return Err(Error::NonFiniteCode { row });
        }
        Ok(Self::prepare(rows, d, metric, Simd::detect()))
    }

    fn prepare(mut rows: Vec<f32>, width: usize, metric: Metric, simd: Simd) -> Self {
        if metric == Metric::Cosine {
            rows.par_chunks_mut(width).for_each(|row| normalise(row, simd));
        }
        let bias = rows
            .par_chunks(width)
            .map(|row| match metric {
                Metric::Euclidean => -simd.dot64(row, row) / 2.0,
                Metric::Cosine => 0.0,
            })
            .collect::<Vec<_>>();
        let origin = best(bias.iter().copied().zip(0..));
        let screen = Screen::new(&rows, &bias, width, simd);
        Self { rows, width, metric, bias, origin, simd, screen }
    }

    /// The number of codes, K; never zero.
    #[expect(clippy::len_without_is_empty, reason = "a codebook is never empty")]
    pub fn len(&self) -> usize {
        self.bias.len()
    }

    /// The width of a code, D.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How codes are ranked.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// The codes as searched, (K, D): normalised under [`Metric::Cosine`], as given otherwise.
    pub fn rows(&self) -> &[f32] {
        &self.rows
    }

    /// The code of each token, by the [contract](self), on all threads of the current rayon pool.
    ///
    /// # Shapes
    /// `z`: (N, D); returns (N)
    ///
    /// # Errors
    /// If the values do not divide into rows, or a row is not finite (the first such row is named).
    pub fn nearest(&self, z: &[f32]) -> Result<Vec<u32>, Error> {
        Ok(self.nearest_with_stats(z)?.0)
    }

    /// [`Codebook::nearest`], with an account of the work done.
    ///
    /// # Errors
    /// As [`Codebook::nearest`].
    pub fn nearest_with_stats(&self, z: &[f32]) -> Result<(Vec<u32>, Stats), Error> {
        let mut codes = vec![0; self.check_tokens(z)?];
        let block = screen::block_rows(codes.len());
        let stats = codes
            .par_chunks_mut(block)
            .zip(z.par_chunks(block * self.width))
            .map_init(Scratch::default, |scratch, (codes, z)| self.search_block(z, codes, scratch))
            .reduce(Stats::default, Stats::plus);
        Ok((codes, stats))
    }

    /// The [contract](self) as a plain loop over all K codes, without vector units or screening.
    ///
    /// # Errors
    /// As [`Codebook::nearest`].
    pub fn nearest_reference(&self, z: &[f32]) -> Result<Vec<u32>, Error> {
        self.check_tokens(z)?;
        let code = |z| {
            let rows = self.rows.chunks_exact(self.width).zip(&self.bias);
            best(rows.map(|(c, b)| simd::dot64(z, c) + b).zip(0..))
        };
        Ok(z.par_chunks(self.width).map(code).collect())
    }

    /// The number of tokens, N, if all are whole and finite.
    fn check_tokens(&self, z: &[f32]) -> Result<usize, Error> {
        let tokens = count_rows(z, self.width)?;
        match first_non_finite(z, self.width) {
            Some(row) => Err(Error::NonFiniteToken { row }),
            None => Ok(tokens),
        }
    }

    /// Fills `codes` for one block of tokens.
    fn search_block(&self, z: &[f32], codes: &mut [u32], scratch: &mut Scratch) -> Stats {
        if let Some(screen) = &self.screen {
            screen.run(z, codes.len(), scratch, self.simd);
        } else {
            scratch.refuse(codes.len());
        }
        let mut stats = Stats { rows: codes.len(), ..Stats::default() };
        for ((code, z), row) in codes.iter_mut().zip(z.chunks_exact(self.width)).zip(scratch.rows()) {
            *code = self.resolve(z, row, &mut stats);
        }
        stats
    }

    /// The code of one token from what its screening left.
    fn resolve(&self, z: &[f32], row: &screen::Row, stats: &mut Stats) -> u32 {
        let score = |k: u32| (self.score(z, k as usize), k);
        match row.survivors() {
            screen::Survivors::Origin => self.origin,
            screen::Survivors::All => {
                stats.fallback_rows += 1;
                // K fits: `new` checked it.
                best((0..self.len() as u32).map(score))
            }
            screen::Survivors::Some(candidates) => {
                stats.candidates += candidates.len();
                if let [only] = candidates {
                    return only.code;
                }
                stats.rescored_rows += 1;
                best(candidates.iter().map(|candidate| score(candidate.code)))
            }
        }
    }

    /// score(k) of the [contract](self).
    fn score(&self, z: &[f32], k: usize) -> f64 {
        let c = &self.rows[k * self.width..][..self.width];
        self.simd.dot64(z, c) + self.bias[k]
    }
}

/// The first index of the largest score; 0 for no scores.
fn best(scores: impl Iterator<Item = (f64, u32)>) -> u32 {
    let larger = |best: (f64, u32), next: (f64, u32)| if next.0 > best.0 { next } else { best };
    scores.reduce(larger).map_or(0, |(_, k)| k)
}

fn count_rows(values: &[f32], width: usize) -> Result<usize, Error> {
    if width == 0 {
        return Err(Error::ZeroWidth);
    }
    if !values.len().is_multiple_of(width) {
        return Err(Error::RaggedRows { values: values.len(), width });
    }
    Ok(values.len() / width)
}

fn first_non_finite(values: &[f32], width: usize) -> Option<usize> {
    // On bits, because an integer maximum vectorises and `all(is_finite)` does not.
    let magnitude = |x: &f32| x.to_bits() & !(1 << 31);
    let largest = |row: &[f32]| row.iter().map(magnitude).fold(0, u32::max);
    values.par_chunks(width).position_first(|row| largest(row) >= f32::INFINITY.to_bits())
}

fn normalise(row: &mut [f32], simd: Simd) {
    let norm = simd.dot64(row, row).sqrt();
    if norm > 0.0 {
        for x in row {
            *x = (f64::from(*x) / norm) as f32;
        }
    }
}
