//! Drawing with a masked generator: many codes at a time, in few steps.

use rand::Rng;
use rayon::prelude::*;

use crate::generator::Generator;
use crate::network::UNKNOWN;
use crate::sampling::Sampling;

/// Which of the codes that a step draws stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Order {
    /// Those that it is surest of (MaskGIT, arXiv 2202.04200): so many that a share of cos(π s / 2 S) is still masked after step
    /// s of S. Sureness is the logarithm of the probability, plus Gumbel noise that falls from `noise` to none.
    Confidence {
        /// What the noise starts at; zero: none, and images are dull.
        noise: f32,
    },
    /// Any, each with the same chance: the reverse process of absorbing diffusion with a linear schedule (MDLM, arXiv 2406.07524).
    Ancestral,
}

/// How an image is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Steps S, each a pass through the network.
    pub steps: usize,
    /// Which codes stay.
    pub order: Order,
    /// How they are drawn.
    pub sampling: Sampling,
}

impl Default for Plan {
    fn default() -> Self {
        Self { steps: 12, order: Order::Confidence { noise: 6.0 }, sampling: Sampling::default() }
    }
}

/// Draws the codes of an image that are [`UNKNOWN`]; those that are known stay and are seen by the others.
///
/// # Shapes
/// - codes: N; replaced
///
/// # Panics
/// When there are not N codes, or a code or class is beyond the config's: a bug in the caller, not in the input.
pub fn draw<R: Rng + Send>(
    generator: &Generator,
    class: Option<usize>,
    codes: &mut [u32],
    plan: &Plan,
    random: &mut R,
) {
    rayon::scope(|_| draw_here(generator, class, codes, plan, random));
}

fn draw_here(generator: &Generator, class: Option<usize>, codes: &mut [u32], plan: &Plan, random: &mut impl Rng) {
    assert_eq!(codes.len(), generator.config().tokens(), "draw: a code a place");
    let all = codes.iter().filter(|&&code| code == UNKNOWN).count();
    for step in 0..plan.steps.max(1) {
        let masked: Vec<usize> = (0..codes.len()).filter(|&place| codes[place] == UNKNOWN).collect();
        if masked.is_empty() {
            return;
        }
        let drawn = candidates(generator, class, codes, &masked, &plan.sampling, random);
        let left = 1.0 - (step + 1) as f64 / plan.steps.max(1) as f64;
        let stay = match plan.order {
            Order::Confidence { noise } => surest(&drawn, kept_masked(all, left), noise * left as f32, random),
            Order::Ancestral => {
                // From t to s, (t − s) / t of the masked codes come out.
                let share = 1.0 / (plan.steps.max(1) - step) as f64;
                (0..drawn.len()).filter(|_| random.random_bool(share)).collect()
            }
        };
        for i in stay {
            codes[masked[i]] = drawn[i].0;
        }
    }
}

/// How many of `all` codes are still masked when a share `left` of the steps is left.
fn kept_masked(all: usize, left: f64) -> usize {
    let share = (std::f64::consts::FRAC_PI_2 * (1.0 - left)).cos();
    if left <= 0.0 { 0 } else { (share * all as f64) as usize }
}

/// A code for every masked place, with its probability.
fn candidates(
    generator: &Generator,
    class: Option<usize>,
    codes: &[u32],
    masked: &[usize],
    sampling: &Sampling,
    random: &mut impl Rng,
) -> Vec<(u32, f32)> {
    /// Places whose scores are held at a time: 4 MiB of 16,384 codes, which stay in the cache and need no fresh memory.
    const PLACES: usize = 64;
    let (d, k) = (generator.config().width, generator.config().tokenizer.codebook_size);
    let tokens = generator.tokens(codes, class, masked);
    let free = sampling.is_guided().then(|| generator.tokens(codes, None, masked));
    // A generator of random numbers a place, so that places can be drawn side by side.
    let seeds: Vec<u64> = masked.iter().map(|_| random.random()).collect();
    let pieces = tokens.par_chunks(PLACES * d).zip(seeds.par_chunks(PLACES)).enumerate();
    let drawn = pieces.flat_map_iter(|(piece, (tokens, seeds))| {
        let mut scores = generator.scores_of(tokens);
        if let Some(free) = &free {
            sampling.guide(&mut scores, &generator.scores_of(&free[piece * PLACES * d..][..tokens.len()]));
        }
        let rows = scores.par_chunks_exact_mut(k).zip(seeds);
        rows.map(|(row, &seed)| sampling.draw(row, &mut crate::sampling::random(seed, 0))).collect::<Vec<_>>()
    });
    drawn.collect()
}

/// All but the `unsure` least sure, at least one.
fn surest(drawn: &[(u32, f32)], unsure: usize, noise: f32, random: &mut impl Rng) -> Vec<usize> {
    let sureness: Vec<f32> = drawn
        .iter()
        .map(|&(_, probability)| {
            let uniform: f32 = random.random_range(f32::MIN_POSITIVE..1.0);
            probability.max(f32::MIN_POSITIVE).ln() - noise * (-uniform.ln()).ln()
        })
        .collect();
    let mut order: Vec<usize> = (0..drawn.len()).collect();
    order.sort_by(|&a, &b| sureness[b].total_cmp(&sureness[a]).then(a.cmp(&b)));
    order.truncate(drawn.len().saturating_sub(unsure).max(1));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cosine_leaves_what_maskgit_leaves() {
        // 256 · cos(π/2 · s/4) for s = 1, 2, 3.
        let left = |step: f64| kept_masked(256, 1.0 - step / 4.0);
        assert_eq!([left(1.0), left(2.0), left(3.0), left(4.0)], [236, 181, 97, 0]);
    }

    #[test]
    fn without_noise_the_likeliest_stay() {
        let drawn = [(5, 0.1), (6, 0.9), (7, 0.5), (8, 0.9)];
        let mut random = crate::sampling::random(0, 0);
        assert_eq!(surest(&drawn, 2, 0.0, &mut random), [1, 3]);
        assert_eq!(surest(&drawn, 9, 0.0, &mut random), [1]);
    }
}
