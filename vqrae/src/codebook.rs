//! What a codebook looks like: norms, nearest other codes, duplicates, and how evenly its codes are used.
//!
//! Everything here works on the rows of one codebook, `[K, e]` in raster order, as [`crate::Vqrae::codebook`] has them:
//! the vectors that features are compared with.
//!
//! ```
//! use vqrae::codebook;
//!
//! // K = 4 codes of width e = 2; the last is the first one again.
//! let rows = [0.0, 1.0, 3.0, 4.0, 3.0, 0.0, 0.0, 1.0];
//! assert_eq!(codebook::norms(&rows, 2)?, [1.0, 5.0, 3.0, 1.0]);
//! let neighbours = codebook::neighbours(&rows, 2)?;
//! assert_eq!((neighbours[2].code, neighbours[3].code), (0, 0));
//! assert_eq!(codebook::Twins::of(&neighbours, 0.5).identical, 1);
//! # Ok::<(), vqrae::Error>(())
//! ```

use rayon::prelude::*;
use serde::Serialize;
use vqrae_kernels::matrix::{Into, View, multiply};
use vqrae_kernels::{Error as KernelError, vector, vectorised};

use crate::Result;
use crate::metrics::CodeCounts;

/// The length of every code, in binary64.
///
/// # Shapes
/// - rows: `[K, e]`, e = `width`
/// - output: K norms
///
/// # Errors
/// If the values do not divide into rows, or a row is not finite.
pub fn norms(rows: &[f32], width: usize) -> Result<Vec<f64>> {
    check(rows, width)?;
    Ok(rows.par_chunks(width).map(|row| dot(row, row).sqrt()).collect())
}

/// The other code that is nearest to a code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neighbour {
    /// Its index; the lowest of equally near ones.
    pub code: u32,
    /// The Euclidean distance to it; 0 when the two are the same vector, and only then.
    pub distance: f64,
    /// The angle between the two vectors in degrees; `None` when one of them is zero.
    pub angle: Option<f64>,
}

/// The nearest other code of every code by Euclidean distance, exactly: all pairs are screened in f32, and those that
/// the rounding of f32 cannot rule out are compared in binary64. Codes of unit length have the nearest by cosine too.
///
/// # Shapes
/// - rows: `[K, e]`, e = `width`
/// - output: K neighbours; none at all when K is 1
///
/// # Errors
/// If the values do not divide into rows, or a row is not finite.
pub fn neighbours(rows: &[f32], width: usize) -> Result<Vec<Neighbour>> {
    let norms = norms(rows, width)?;
    if norms.len() < 2 {
        return Ok(Vec::new());
    }
    let screen = Screen::new(rows, width, &norms);
    let blocks = (0..norms.len()).into_par_iter().step_by(ROWS);
    Ok(blocks.flat_map_iter(|first| screen.block(first)).collect())
}

/// Codes that say the same as another one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Twins {
    /// Codes equal to one of lower index: what could be left out without any loss.
    pub identical: usize,
    /// Codes that are not equal to another one, but nearer to it than `below`.
    pub near: usize,
    /// The distance that counts as near: a share of the median distance to the nearest other code.
    pub below: f64,
}

impl Twins {
    /// Counts them; near is what is closer than `share` of the median nearest distance.
    pub fn of(neighbours: &[Neighbour], share: f64) -> Self {
        let mut distances: Vec<f64> = neighbours.iter().map(|neighbour| neighbour.distance).collect();
        distances.sort_by(f64::total_cmp);
        let below = share * quantile(&distances, 0.5).unwrap_or(0.0);
        let same =
            |(code, neighbour): &(usize, &Neighbour)| neighbour.distance == 0.0 && (neighbour.code as usize) < *code;
        Self {
            identical: neighbours.iter().enumerate().filter(same).count(),
            near: distances.iter().filter(|&&distance| distance > 0.0 && distance < below).count(),
            below,
        }
    }
}

/// How evenly the codes of a codebook are used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Usage {
    /// Tokens counted, over all images.
    pub tokens: u64,
    /// Codes chosen at least once.
    pub used: usize,
    /// Codes never chosen.
    pub dead: usize,
    /// Codes that would never have been chosen by as many tokens if all codes were equally likely: K (1 − 1/K)ⁿ. Where
    /// `dead` is about this, there were too few tokens to tell.
    pub dead_if_uniform: f64,
    /// `used` as a share of the codebook.
    pub usage: f64,
    /// `exp` of the entropy of the codes: K when all are chosen equally often.
    pub perplexity: f64,
    /// Gini coefficient of the counts: 0 when all codes are chosen equally often, near 1 when few take all.
    pub gini: f64,
    /// The smallest number of codes that half of the tokens chose.
    pub half_of_tokens: usize,
}

impl Usage {
    /// The figures of some counts.
    pub fn of(counts: &CodeCounts) -> Self {
        let mut sorted = counts.counts().to_vec();
        sorted.sort_unstable();
        let (k, tokens) = (sorted.len(), sorted.iter().sum::<u64>());
        let dead = sorted.iter().take_while(|&&count| count == 0).count();
        Self {
            tokens,
            used: k - dead,
            dead,
            dead_if_uniform: k as f64 * (1.0 - 1.0 / k.max(1) as f64).powf(tokens as f64),
            usage: counts.usage(),
            perplexity: counts.perplexity(),
            gini: gini(&sorted),
            half_of_tokens: half(&sorted, tokens),
        }
    }
}

/// The value below which a share `q` of ascending values lies, linear between two of them; `None` of no values.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(low + (high - low) * at.fract())
}

/// 2 Σ i xᵢ / (n Σ xᵢ) − (n + 1) / n over ascending values, i from 1.
fn gini(sorted: &[u64]) -> f64 {
    let (n, total) = (sorted.len() as f64, sorted.iter().sum::<u64>() as f64);
    if total == 0.0 {
        return 0.0;
    }
    let ranked: f64 = sorted.iter().zip(1..).map(|(&count, rank)| count as f64 * f64::from(rank)).sum();
    2.0 * ranked / (n * total) - (n + 1.0) / n
}

/// How many of the largest counts make up half of `tokens`.
fn half(sorted: &[u64], tokens: u64) -> usize {
    let sums = sorted.iter().rev().scan(0, |sum, &count| {
        *sum += count;
        Some(*sum)
    });
    if tokens == 0 { 0 } else { sums.take_while(|&sum| 2 * sum < tokens).count() + 1 }
}

fn check(rows: &[f32], width: usize) -> Result<()> {
    if width == 0 {
        return Err(KernelError::ZeroWidth.into());
    }
    if !rows.len().is_multiple_of(width) {
        return Err(KernelError::RaggedRows { values: rows.len(), width }.into());
    }
    match rows.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(KernelError::NonFiniteCode { row: at / width }.into()),
        None => Ok(()),
    }
}

/// Codes whose products are computed at a time.
const ROWS: usize = 64;

/// Codes that they are compared with at a time.
const COLUMNS: usize = 1024;

/// The codes as they are screened: score(a, c) = a·c − |c|²/2 in f32 is the larger the nearer c is to a.
struct Screen<'a> {
    rows: &'a [f32],
    width: usize,
    norms: &'a [f64],
    /// The rows times a power of two that brings the longest to a length of ½ to 1, lest products leave f32's range.
    scaled: Vec<f32>,
    /// −|c|²/2 of the scaled rows.
    bias: Vec<f32>,
    /// More than twice what a score can be off: for lengths up to 1 that is at most 1.5 (e + 4) 2⁻²⁴, whatever the order
    /// of the sum, and half of the margin is more than twice as much.
    margin: f32,
}

/// What screening found for one code so far.
#[derive(Clone)]
struct Found {
    best: f32,
    /// Scores within the margin of the best one of their time, and whose they are, by ascending code.
    candidates: Vec<(f32, u32)>,
}

vectorised! {
    /// The largest element.
    fn largest(scores: &[f32]) -> f32 {
        vector::max(scores)
    }
}

impl<'a> Screen<'a> {
    fn new(rows: &'a [f32], width: usize, norms: &'a [f64]) -> Self {
        let longest = norms.iter().copied().fold(0.0, f64::max);
        let scale = if longest > 0.0 { (-longest.log2().floor() - 1.0).exp2() } else { 1.0 };
        Self {
            rows,
            width,
            norms,
            scaled: rows.par_iter().map(|&value| (f64::from(value) * scale) as f32).collect(),
            bias: norms.iter().map(|norm| (-(norm * scale).powi(2) / 2.0) as f32).collect(),
            margin: 4.0 * (width + 8) as f32 * f32::EPSILON,
        }
    }

    /// The neighbours of the [`ROWS`] codes from `first` on, or of as many as there are.
    fn block(&self, first: usize) -> Vec<Neighbour> {
        let codes = first..self.norms.len().min(first + ROWS);
        let mut found = vec![Found { best: f32::NEG_INFINITY, candidates: Vec::new() }; codes.len()];
        let mut scores = vec![0.0; codes.len() * COLUMNS];
        for start in (0..self.norms.len()).step_by(COLUMNS) {
            let columns = COLUMNS.min(self.norms.len() - start);
            self.score(first, codes.len(), start, columns, &mut scores);
            for (row, found) in found.iter_mut().enumerate() {
                found.update(&scores[row * columns..][..columns], start, self.margin);
            }
        }
        codes.zip(found).map(|(code, found)| self.decide(code, &found)).collect()
    }

    /// Scores `[count, columns]` of the codes from `first` on against those from `start` on; of a code with itself −∞.
    fn score(&self, first: usize, count: usize, start: usize, columns: usize, scores: &mut [f32]) {
        let bias = &self.bias[start..start + columns];
        scores.chunks_exact_mut(columns).take(count).for_each(|row| row.copy_from_slice(bias));
        let view = |from: usize, n: usize| View::new(&self.scaled[from * self.width..], n, self.width, self.width);
        multiply(scores, columns, view(first, count), view(start, columns).t(), 1.0, Into::Add);
        for row in 0..count {
            if (start..start + columns).contains(&(first + row)) {
                scores[row * columns + first + row - start] = f32::NEG_INFINITY;
            }
        }
    }

    /// The nearest of the candidates, in binary64.
    fn decide(&self, code: usize, found: &Found) -> Neighbour {
        let (mut nearest, mut smallest) = (0, f64::INFINITY);
        for &(_, other) in found.candidates.iter().filter(|(score, _)| *score >= found.best - self.margin) {
            let square = square_distance(self.row(code), self.row(other as usize));
            if square < smallest {
                (nearest, smallest) = (other, square);
            }
            if square == 0.0 {
                break;
            }
        }
        Neighbour { code: nearest, distance: smallest.sqrt(), angle: self.angle(code, nearest as usize) }
    }

    fn row(&self, code: usize) -> &[f32] {
        &self.rows[code * self.width..][..self.width]
    }

    /// 2 atan2(‖a‖b‖ − b‖a‖‖, ‖a‖b‖ + b‖a‖‖), which is exact for small angles too (Kahan).
    fn angle(&self, a: usize, b: usize) -> Option<f64> {
        let (length_a, length_b) = (self.norms[a], self.norms[b]);
        let (mut minus, mut plus) = (0.0, 0.0);
        for (&x, &y) in self.row(a).iter().zip(self.row(b)) {
            let (x, y) = (f64::from(x) / length_a, f64::from(y) / length_b);
            minus += (x - y).powi(2);
            plus += (x + y).powi(2);
        }
        (length_a > 0.0 && length_b > 0.0).then(|| 2.0 * minus.sqrt().atan2(plus.sqrt()).to_degrees())
    }
}

impl Found {
    /// Takes in the scores of the codes from `start` on.
    fn update(&mut self, scores: &[f32], start: usize, margin: f32) {
        let best = largest(scores);
        if best < self.best - margin {
            return;
        }
        self.best = self.best.max(best);
        let floor = self.best - margin;
        let near = scores.iter().zip(start as u32..).filter(|(score, _)| **score >= floor);
        self.candidates.extend(near.map(|(&score, code)| (score, code)));
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

fn square_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tiny_codebook_by_hand() {
        // Codes on the plane: (3, 4), (3, 3), (-1, 0), (3, 4) again, (0, 0).
        let rows = [3.0, 4.0, 3.0, 3.0, -1.0, 0.0, 3.0, 4.0, 0.0, 0.0];
        let norms = norms(&rows, 2).unwrap();
        assert_eq!(norms, [5.0, 18f64.sqrt(), 1.0, 5.0, 0.0]);
        let found = neighbours(&rows, 2).unwrap();
        assert_eq!(found.iter().map(|n| n.code).collect::<Vec<_>>(), [3, 0, 4, 0, 2]);
        assert_eq!(found.iter().map(|n| n.distance).collect::<Vec<_>>(), [0.0, 1.0, 1.0, 0.0, 1.0]);
        // cos = (9 + 12) / (5 √18)
        let angle = (21.0 / (5.0 * 18f64.sqrt())).acos().to_degrees();
        assert!((found[1].angle.unwrap() - angle).abs() < 1e-9);
        assert_eq!((found[0].angle, found[2].angle, found[4].angle), (Some(0.0), None, None));
        // The median nearest distance is 1: the twin pair is identical, not near; nothing is nearer than 1.
        assert_eq!(Twins::of(&found, 1.0), Twins { identical: 1, near: 0, below: 1.0 });
        assert_eq!(Twins::of(&found, 1.5), Twins { identical: 1, near: 3, below: 1.5 });
    }

    #[test]
    fn usage_by_hand() {
        let mut counts = CodeCounts::new(4, 1);
        counts.add(&[1, 1, 1, 3]);
        let usage = Usage::of(&counts);
        assert_eq!((usage.tokens, usage.used, usage.dead, usage.half_of_tokens), (4, 2, 2, 1));
        // Ascending 0 0 1 3: 2 (3·1 + 4·3) / (4·4) − 5/4 = 30/16 − 20/16
        assert!((usage.gini - 0.625).abs() < 1e-12, "{}", usage.gini);
        assert!((usage.dead_if_uniform - 4.0 * 0.75f64.powi(4)).abs() < 1e-12);
        let even = (3.0f64 / 4.0).ln() * -0.75 + (0.25f64).ln() * -0.25;
        assert!((usage.perplexity - even.exp()).abs() < 1e-12);
        let nothing = Usage::of(&CodeCounts::new(3, 1));
        assert_eq!((nothing.gini, nothing.half_of_tokens, nothing.dead, nothing.dead_if_uniform), (0.0, 0, 3, 3.0));
    }

    #[test]
    fn quantiles_by_hand() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[1.0, 2.0, 4.0, 8.0], 0.5), Some(3.0));
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 1.0), Some(4.0));
    }

    /// All pairs, in binary64.
    fn reference(rows: &[f32], width: usize) -> Vec<u32> {
        let row = |k: usize| &rows[k * width..][..width];
        let k = rows.len() / width;
        let nearest = |a: usize| {
            let others = (0..k).filter(|&b| b != a).map(|b| (square_distance(row(a), row(b)), b as u32));
            others.reduce(|best, next| if next.0 < best.0 { next } else { best }).unwrap().1
        };
        (0..k).map(nearest).collect()
    }

    /// Values that repeat nowhere soon, −1 to 1.
    fn noise(count: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn screening_never_changes_the_answer() {
        let (k, width) = (1500, 7);
        let plain = noise(k * width);
        type Shape = (&'static str, fn(usize, f32) -> f32);
        let shapes: [Shape; 6] = [
            ("plain", |_, x| x),
            ("far from the origin, so that f32 sees hardly a difference", |_, x| 1e4 + x),
            ("on a coarse grid, so that many are equal", |_, x| (x * 1.5).round()),
            ("tiny", |_, x| x * 1e-38),
            ("huge", |_, x| x * 1e38),
            ("of very different lengths", |i, x| x * (i as f32 / -400.0).exp()),
        ];
        for (name, shape) in shapes {
            let rows: Vec<f32> = plain.iter().enumerate().map(|(i, &x)| shape(i / width, x)).collect();
            let found: Vec<_> = neighbours(&rows, width).unwrap().iter().map(|n| n.code).collect();
            assert_eq!(found, reference(&rows, width), "{name}");
        }
    }

    #[test]
    fn odd_codebooks_are_answered_or_refused() {
        assert_eq!(neighbours(&[1.0, 2.0], 2).unwrap(), []);
        let zeros = neighbours(&[0.0; 6], 2).unwrap();
        assert_eq!(zeros.iter().map(|n| (n.code, n.distance)).collect::<Vec<_>>(), [(1, 0.0), (0, 0.0), (0, 0.0)]);
        assert_eq!(Twins::of(&zeros, 0.5).identical, 2);
        assert!(neighbours(&[1.0; 3], 2).unwrap_err().to_string().contains("multiple of the width 2"));
        assert!(norms(&[1.0; 3], 0).is_err());
        assert!(norms(&[1.0, f32::NAN], 1).unwrap_err().to_string().contains("code 1"));
    }
}
