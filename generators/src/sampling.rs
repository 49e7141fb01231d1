//! From scores to a code: guidance, temperature, top-k, top-p, and a draw that a seed repeats.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vqrae_kernels::vector::{exp, max};
use vqrae_kernels::vectorised;

/// How codes are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Scores are divided by it: below one, likelier codes come more often; zero takes the likeliest.
    pub temperature: f32,
    /// Only so many of the likeliest codes; zero: all.
    pub top_k: usize,
    /// Only the likeliest codes whose probabilities reach this together; one: all.
    pub top_p: f32,
    /// Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): scores go this far from those without a class through those
    /// with it. One: none; more: more like the class, less varied.
    pub guidance: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, guidance: 1.0 }
    }
}

impl Sampling {
    /// Whether the numbers make sense.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> Result<(), String> {
        let whole = |name: &str, value: f32, most: f32| match (0.0..=most).contains(&value) {
            true => Ok(()),
            false => Err(format!("{name} is {value}, expected: 0 to {most}")),
        };
        whole("temperature", self.temperature, 100.0)?;
        whole("guidance", self.guidance, 100.0)?;
        match self.top_p > 0.0 && self.top_p <= 1.0 {
            true => Ok(()),
            false => Err(format!("top-p is {}, expected: above 0, up to 1", self.top_p)),
        }
    }

    /// Whether scores without the class are needed.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }

    /// Scores that went from `free` (without the class) through `scores` by the guidance.
    pub fn guide(&self, scores: &mut [f32], free: &[f32]) {
        blend(scores, free, self.guidance);
    }

    /// Draws a code; with it, its probability among those that could be drawn. `scores` are spoilt.
    pub fn draw(&self, scores: &mut [f32], random: &mut impl Rng) -> (u32, f32) {
        let uniform: f64 = random.random();
        if self.temperature == 0.0 {
            return (likeliest(scores), 1.0);
        }
        soften(scores, 1.0 / self.temperature);
        if self.top_k > 0 && self.top_k < scores.len() {
            keep(scores, self.top_k, f64::INFINITY);
        }
        if self.top_p < 1.0 {
            keep(scores, scores.len(), total(scores) * f64::from(self.top_p));
        }
        let all = total(scores);
        let chosen = at(scores, uniform * all);
        (chosen as u32, (f64::from(scores[chosen]) / all) as f32)
    }
}

/// Weights of which the sums are kept together.
const PIECE: usize = 128;

/// The sum of weights, piece after piece.
fn total(weights: &[f32]) -> f64 {
    weights.chunks(PIECE).map(|piece| f64::from(add(piece))).sum()
}

/// The weight that holds the place `left` when they are laid end to end; the last that is not zero, where rounding goes beyond.
fn at(weights: &[f32], mut left: f64) -> usize {
    let mut last = 0;
    for (piece, weights) in weights.chunks(PIECE).enumerate() {
        let sum = f64::from(add(weights));
        if sum > 0.0 {
            last = piece;
            if left < sum {
                break;
            }
            left -= sum;
        }
    }
    let first = last * PIECE;
    let mut chosen = first;
    for (i, &weight) in weights[first..].iter().take(PIECE).enumerate() {
        if weight > 0.0 {
            chosen = first + i;
            left -= f64::from(weight);
            if left < 0.0 {
                break;
            }
        }
    }
    chosen
}

/// What one image draws from: a function of the seed and of the image's number alone.
pub fn random(seed: u64, image: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(image);
    random
}

/// The code of the highest score, the first of equal ones.
fn likeliest(scores: &[f32]) -> u32 {
    let first = |best: usize, i: usize| if scores[i] > scores[best] { i } else { best };
    (1..scores.len()).fold(0, first) as u32
}

/// Sets all but the heaviest to zero: at most `count`, and no more than it takes to reach `weight`. Of equal ones the first stay.
fn keep(weights: &mut [f32], count: usize, weight: f64) {
    let mut order: Vec<u32> = (0..weights.len() as u32).filter(|&i| weights[i as usize] > 0.0).collect();
    let heavier = |&a: &u32, &b: &u32| weights[b as usize].total_cmp(&weights[a as usize]).then(a.cmp(&b));
    if count < order.len() {
        order.select_nth_unstable_by(count - 1, heavier);
        order.truncate(count);
    }
    if weight.is_finite() {
        order.sort_unstable_by(heavier);
        let mut sum = 0.0;
        let enough = order.iter().position(|&i| {
            sum += f64::from(weights[i as usize]);
            sum >= weight
        });
        order.truncate(enough.map_or(order.len(), |last| last + 1));
    }
    let kept: Vec<(u32, f32)> = order.iter().map(|&i| (i, weights[i as usize])).collect();
    weights.fill(0.0);
    kept.into_iter().for_each(|(i, weight)| weights[i as usize] = weight);
}

vectorised! {
    /// `exp((score − largest) · scale)`.
    fn soften(scores: &mut [f32], scale: f32) {
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp((*score - largest) * scale);
        }
    }

    fn add(values: &[f32]) -> f32 {
        vqrae_kernels::vector::sum(values, values, |x, _| x)
    }

    fn blend(scores: &mut [f32], free: &[f32], guidance: f32) {
        for (score, &free) in scores.iter_mut().zip(free) {
            *score = free + guidance * (*score - free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ln of 1, 2, 3, 4.
    fn scores() -> [f32; 4] {
        [1f32, 2., 3., 4.].map(f32::ln)
    }

    fn shares(sampling: Sampling) -> [f64; 4] {
        let mut random = random(7, 0);
        let mut counts = [0.0; 4];
        for _ in 0..20_000 {
            let (code, probability) = sampling.draw(&mut scores(), &mut random);
            assert!((0.0..=1.0).contains(&probability));
            counts[code as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn assert_shares(sampling: Sampling, expected: [f64; 4]) {
        let shares = shares(sampling);
        // Four standard errors of 20,000 draws.
        assert!(shares.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.015), "{sampling:?}: {shares:?}");
    }

    #[test]
    fn codes_come_as_often_as_their_probability() {
        let sampling = Sampling::default();
        assert_shares(sampling, [0.1, 0.2, 0.3, 0.4]);
        // Squares: 1, 4, 9, 16 of 30.
        assert_shares(Sampling { temperature: 0.5, ..sampling }, [1.0, 4.0, 9.0, 16.0].map(|x| x / 30.0));
        assert_shares(Sampling { top_k: 2, ..sampling }, [0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
        // 0.4 is not enough, 0.4 + 0.3 is.
        assert_shares(Sampling { top_p: 0.69, ..sampling }, [0.0, 0.0, 3.0 / 7.0, 4.0 / 7.0]);
        assert_shares(Sampling { top_p: 0.39, ..sampling }, [0.0, 0.0, 0.0, 1.0]);
        assert_shares(Sampling { temperature: 0.0, ..sampling }, [0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn places_fall_into_weights_whatever_the_piece() {
        let mut weights = vec![0.0; 3 * PIECE];
        for (i, weight) in [(3, 1.0), (200, 2.0), (201, 1.0), (300, 4.0)] {
            weights[i] = weight;
        }
        assert_eq!(total(&weights), 8.0);
        let chosen = [0.0, 0.9, 1.0, 2.9, 3.5, 4.0, 7.9, 8.0].map(|place| at(&weights, place));
        assert_eq!(chosen, [3, 3, 200, 200, 201, 300, 300, 300]);
    }

    #[test]
    fn of_equal_codes_the_first_are_kept() {
        let mut weights = [0.25f32; 4];
        keep(&mut weights, 2, f64::INFINITY);
        assert_eq!(weights, [0.25, 0.25, 0.0, 0.0]);
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn guidance_goes_through_the_class() {
        let mut scores = [1.0, 2.0];
        Sampling { guidance: 3.0, ..Sampling::default() }.guide(&mut scores, &[0.0, 2.5]);
        assert_eq!(scores, [3.0, 1.0]);
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        let wrong = [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { guidance: f32::INFINITY, ..Sampling::default() },
        ];
        assert!(wrong.iter().all(|sampling| sampling.check().is_err()));
    }
}
