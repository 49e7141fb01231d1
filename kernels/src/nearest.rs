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

pub(crate) mod bound;
mod prepare;
mod screen;
mod simd;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use bound::Screened;
use prepare::Layout;
use rayon::prelude::*;
use screen::{Candidate, Scratch, Screen, Survivors};
use simd::Simd;

use crate::Error;
use crate::cpu::{Bf16, Isa};

/// How a code is ranked against a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Smallest Euclidean distance.
    Euclidean,
    /// Largest cosine; the codebook's rows are normalised when it is built.
    Cosine,
}

/// What codes are screened in before binary64 decides. It changes the time of a search, never its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Half the memory of f32, and twice its speed where the processor has instructions for it; more candidates.
    Bf16,
    /// The precision of the codes themselves.
    F32,
}

/// Width from which codes are screened in bf16 on processors that multiply it faster than f32. The few dimensions of
/// narrower codes leave many of them within the bound of bf16, and scoring these costs more than its products save.
const BF16_WIDTH: usize = 16;

impl Precision {
    /// The faster one for codes of width `d`, which [`Codebook::new`] takes.
    pub fn for_width(d: usize, isa: Isa) -> Self {
        if isa.has_bf16() && d >= BF16_WIDTH { Self::Bf16 } else { Self::F32 }
    }
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
    /// Tokens that bf16 could not screen and f32 screened again.
    pub rescreened_rows: usize,
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
            rescreened_rows: self.rescreened_rows + other.rescreened_rows,
            fallback_rows: self.fallback_rows + other.fallback_rows,
        }
    }
}

/// K codes of width D, prepared for searching.
///
/// Holds the rows as searched and a screening copy of them (centred, duplicates folded, packed) in bf16 or f32, so 1.5
/// times or twice the codebook's size; a copy in f32 joins one in bf16 once that turns out too coarse for the tokens. A
/// search needs, beyond its input and output, one block of tokens and some of their scores per thread.
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
    isa: Isa,
    screen: Screening,
}

/// The copies of the codes that are screened.
#[derive(Clone, Debug)]
enum Screening {
    /// In bf16, and in f32 once many tokens needed it (`None` in it where no bound holds).
    Bf16(Screen<Bf16>, OnceLock<Option<Screen<f32>>>),
    F32(Screen<f32>),
    /// No bound holds: every token falls back.
    None,
}

impl Screening {
    fn new(rows: &[f32], bias: &[f64], width: usize, isa: Isa, simd: Simd, precision: Precision) -> Self {
        let layout = Layout::new(rows, bias, width);
        let screening = match precision {
            Precision::Bf16 => {
                Screen::new(rows, bias, &layout, isa, simd).map(|screen| Self::Bf16(screen, OnceLock::new()))
            }
            Precision::F32 => Screen::new(rows, bias, &layout, isa, simd).map(Self::F32),
        };
        screening.unwrap_or(Self::None)
    }
}

/// Tokens of one search that bf16 cannot screen before a copy in f32 is worth its making.
const MANY: usize = 32;

/// Tokens that are gathered to be screened again at a time.
const GATHERED: usize = 4096;

/// Stands in the place of a code that screening did not find. No index is as large: `new` checked K.
const REFUSED: u32 = u32::MAX;

impl Codebook {
    /// Checks `rows` and prepares them; for [`Metric::Cosine`] each is divided by its norm (taken in
    /// binary64, stored in f32) and rows of zeros stay zero.
    ///
    /// # Shapes
    /// `rows`: (K, d)
    ///
    /// # Errors
    /// If K or `d` is zero, K exceeds `u32::MAX`, the values do not divide into rows, or a row is not
    /// finite; or if `VQRAE_CPU` names instructions that this machine has not.
    pub fn new(rows: Vec<f32>, d: usize, metric: Metric) -> Result<Self, Error> {
        let isa = Isa::detect()?;
        Self::screened(rows, d, metric, isa, Precision::for_width(d, isa))
    }

    /// [`Codebook::new`] with the instructions and the precision of screening given: for tests and benches, since
    /// neither changes an answer.
    ///
    /// # Errors
    /// As [`Codebook::new`], whatever `VQRAE_CPU` says.
    pub fn screened(
        mut rows: Vec<f32>,
        d: usize,
        metric: Metric,
        isa: Isa,
        precision: Precision,
    ) -> Result<Self, Error> {
        check_codes(&rows, d)?;
        let simd = Simd::detect();
        if metric == Metric::Cosine {
            rows.par_chunks_mut(d).for_each(|row| normalise(row, simd));
        }
        let score = |row: &[f32]| match metric {
            Metric::Euclidean => -simd.dot64(row, row) / 2.0,
            Metric::Cosine => 0.0,
        };
        let bias = rows.par_chunks(d).map(score).collect::<Vec<_>>();
        let origin = best(bias.iter().copied().zip(0..));
        let screen = Screening::new(&rows, &bias, d, isa, simd, precision);
        Ok(Self { rows, width: d, metric, bias, origin, simd, isa, screen })
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

    /// The instructions that screen codes and the precision they do it in; `None` where values near the end of the f32
    /// range leave all to binary64.
    pub fn screening(&self) -> Option<(Isa, Precision)> {
        match self.screen {
            Screening::Bf16(..) => Some((self.isa, Precision::Bf16)),
            Screening::F32(_) => Some((self.isa, Precision::F32)),
            Screening::None => None,
        }
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
        let mut codes = vec![REFUSED; self.check_tokens(z)?];
        let mut stats = match &self.screen {
            Screening::Bf16(screen, _) => self.search(screen, z, &mut codes),
            Screening::F32(screen) => self.search(screen, z, &mut codes),
            Screening::None => Stats::default(),
        };
        if let Some(screen) = self.finer(refused(&codes)) {
            stats = stats.plus(self.search_again(screen, z, &mut codes));
        }
        let fallback_rows = refused(&codes);
        let left = codes.par_iter_mut().zip(z.par_chunks(self.width)).filter(|(code, _)| **code == REFUSED);
        left.for_each(|(code, z)| *code = self.best_of_all(z));
        let rows = codes.len();
        Ok((codes, Stats { rows, fallback_rows, ..stats }))
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
        let tokens = count(z.len(), self.width)?;
        check_finite(z, self.width)?;
        Ok(tokens)
    }

    /// Fills `codes`, a block of tokens at a time, but for those of tokens that cannot be screened.
    fn search<T: Screened>(&self, screen: &Screen<T>, z: &[f32], codes: &mut [u32]) -> Stats {
        let block = screen::block_rows(codes.len());
        let search = |scratch: &mut Scratch<T>, (codes, z): (&mut [u32], &[f32])| {
            screen.run(z, codes.len(), scratch, self.simd);
            let mut stats = Stats::default();
            for ((code, z), row) in codes.iter_mut().zip(z.chunks_exact(self.width)).zip(scratch.rows()) {
                *code = self.resolve(z, row.survivors(), &mut stats);
            }
            stats
        };
        codes
            .par_chunks_mut(block)
            .zip(z.par_chunks(block * self.width))
            .map_init(Scratch::new, search)
            .reduce(Stats::default, Stats::plus)
    }

    /// A finer screen than the first, if there is one and `refused` tokens or earlier ones were worth making it.
    fn finer(&self, refused: usize) -> Option<&Screen<f32>> {
        let Screening::Bf16(_, fine) = &self.screen else { return None };
        if refused >= MANY && fine.get().is_none() {
            // Not `get_or_init`: while one thread waits for others inside it, rayon may give it a search that needs it.
            let layout = Layout::new(&self.rows, &self.bias, self.width);
            let _ = fine.set(Screen::new(&self.rows, &self.bias, &layout, self.isa, self.simd));
        }
        fine.get().filter(|_| refused > 0)?.as_ref()
    }

    /// Screens again the tokens without a code.
    fn search_again(&self, screen: &Screen<f32>, z: &[f32], codes: &mut [u32]) -> Stats {
        let (mut stats, mut at) = (Stats::default(), 0);
        loop {
            let tokens = (at..codes.len()).filter(|&i| codes[i] == REFUSED).take(GATHERED).collect::<Vec<_>>();
            let Some(last) = tokens.last() else { return stats };
            at = last + 1;
            let z = tokens.iter().flat_map(|i| &z[i * self.width..][..self.width]).copied().collect::<Vec<_>>();
            let mut found = vec![REFUSED; tokens.len()];
            stats = stats.plus(self.search(screen, &z, &mut found));
            stats.rescreened_rows += tokens.len() - refused(&found);
            tokens.iter().zip(found).for_each(|(&i, code)| codes[i] = code);
        }
    }

    /// The code of one token from what its screening left, or [`REFUSED`].
    fn resolve(&self, z: &[f32], survivors: Survivors, stats: &mut Stats) -> u32 {
        match survivors {
            Survivors::Origin => self.origin,
            Survivors::All => REFUSED,
            Survivors::Some(candidates) => {
                stats.candidates += candidates.len();
                if let [only] = candidates {
                    return only.code;
                }
                stats.rescored_rows += 1;
                let score = |candidate: &Candidate| (self.score(z, candidate.code as usize), candidate.code);
                best(candidates.iter().map(score))
            }
        }
    }

    /// The code of one token from the scores of all K codes.
    fn best_of_all(&self, z: &[f32]) -> u32 {
        best((0..self.len()).map(|k| self.score(z, k)).zip(0..))
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

/// The number of codes that were not found.
fn refused(codes: &[u32]) -> usize {
    codes.iter().filter(|code| **code == REFUSED).count()
}

pub(crate) fn check_codes(rows: &[f32], d: usize) -> Result<(), Error> {
    let codes = count(rows.len(), d)?;
    if codes == 0 {
        return Err(Error::NoCodes);
    }
    if u32::try_from(codes).is_err() {
        return Err(Error::TooManyCodes { codes });
    }
    match first_non_finite(rows, d) {
        Some(row) => Err(Error::NonFiniteCode { row }),
        None => Ok(()),
    }
}

/// Whether every token is finite; the first that is not is named.
pub(crate) fn check_finite(z: &[f32], width: usize) -> Result<(), Error> {
    first_non_finite(z, width).map_or(Ok(()), |row| Err(Error::NonFiniteToken { row }))
}

/// The number of rows that `values` values of `width` make.
pub(crate) fn count(values: usize, width: usize) -> Result<usize, Error> {
    if width == 0 {
        return Err(Error::ZeroWidth);
    }
    if !values.is_multiple_of(width) {
        return Err(Error::RaggedRows { values, width });
    }
    Ok(values / width)
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
