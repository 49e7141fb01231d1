//! Codes and tokens to search, always the same for the same words.

use anyhow::Result;
use clap::ValueEnum;
use rayon::prelude::*;
use vqrae::{DType, Device};

use crate::plan;

/// How codes and tokens lie to each other, which decides how many codes nearly are the nearest.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inputs {
    /// Every value from -1 to 1, alike
    Random,
    /// Around one direction, as the features of untrained encoders are: many near-ties
    Cone,
    /// Dimensions of fewer and fewer weight, as features after training are
    PowerLaw,
    /// The codebook of the model that ships with the program, and tokens around its codes; it has a width of its own
    Shipped,
}

/// What the values of a cone go away from its axis by: then codes have a mean of length 0.93, and a cosine of 0.86.
const OPENING: f32 = 0.4;

/// Seeds of codes, of a cone's axis and of the first set of tokens.
const CODES: u64 = 1;
const AXIS: u64 = 1 << 20;
const TOKENS: u64 = 2;

impl Inputs {
    /// Its name on the command line.
    #[cfg(feature = "cuda")]
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// Codes `[K, D]` and their width: those asked for, but for a shipped codebook.
    pub(super) fn codes(self, k: usize, d: usize) -> Result<(Vec<f32>, usize)> {
        if self != Self::Shipped {
            return Ok((self.shaped(noise(k * d, CODES), d), d));
        }
        let codebook = plan::shipped(&Device::Cpu, DType::F32)?.codebook()?;
        Ok((codebook.flatten_all()?.to_vec1()?, codebook.dim(1)?))
    }

    /// One of several sets of tokens `[N, D]` to be searched in these codes.
    pub(super) fn tokens(self, codes: &[f32], n: usize, d: usize, set: u64) -> Vec<f32> {
        let noise = self.shaped(noise(n * d, TOKENS + set), d);
        if self != Self::Shipped || codes.len() < d || d == 0 {
            return noise;
        }
        let size = (codes.iter().map(|x| x * x).sum::<f32>() / codes.len() as f32).sqrt();
        let rows = codes.len() / d;
        let of_code = |i: usize| codes[(i / d).wrapping_mul(7919) % rows * d + i % d];
        noise.into_par_iter().enumerate().map(|(i, x)| of_code(i) + size * x).collect()
    }

    /// Even noise `[N, D]` as these inputs lie.
    fn shaped(self, noise: Vec<f32>, d: usize) -> Vec<f32> {
        let axis = if self == Self::Cone { self::noise(d, AXIS) } else { Vec::new() };
        let value = |(i, x): (usize, f32)| match self {
            Self::Random | Self::Shipped => x,
            Self::Cone => axis[i % d] + OPENING * x,
            Self::PowerLaw => x / ((i % d + 1) as f32).sqrt(),
        };
        noise.into_par_iter().enumerate().map(value).collect()
    }
}

/// Numbers from -1 to 1 that look random and are always the same (SplitMix64).
pub(super) fn noise(count: usize, seed: u64) -> Vec<f32> {
    let value = |i: u64| {
        let mut x = (seed << 40 | (i + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).into_par_iter().map(|i| value(i as u64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    }

    #[test]
    fn inputs_lie_as_their_names_say() {
        let d = 256;
        let mean = |inputs: Inputs| {
            let (codes, _) = inputs.codes(64, d).unwrap();
            let tokens = inputs.tokens(&codes, 64, d, 0);
            codes.chunks(d).zip(tokens.chunks(d)).map(|(a, b)| cosine(a, b)).sum::<f32>() / 64.0
        };
        assert!(mean(Inputs::Random).abs() < 0.05 && mean(Inputs::PowerLaw).abs() < 0.1);
        assert!((mean(Inputs::Cone) - 0.86).abs() < 0.03, "{}", mean(Inputs::Cone));
        let (codes, _) = Inputs::PowerLaw.codes(64, d).unwrap();
        let size = |j: usize| codes.chunks(d).map(|row| row[j].abs()).sum::<f32>();
        assert!(size(0) > 8.0 * size(d - 1));
    }

    #[test]
    fn sets_differ_and_the_first_tokens_do_not_depend_on_how_many_there_are() {
        for inputs in [Inputs::Random, Inputs::Cone, Inputs::PowerLaw] {
            let (codes, d) = inputs.codes(8, 4).unwrap();
            let few = inputs.tokens(&codes, 3, d, 1);
            assert_eq!(few, inputs.tokens(&codes, 9, d, 1)[..12]);
            assert_ne!(few, inputs.tokens(&codes, 3, d, 2));
        }
    }

    #[cfg(feature = "shipped-model")]
    #[test]
    fn tokens_of_the_shipped_codebook_lie_around_its_codes() {
        let (codes, d) = Inputs::Shipped.codes(1, 1).unwrap();
        assert_eq!(codes.len() % d, 0);
        let tokens = Inputs::Shipped.tokens(&codes, 500, d, 0);
        let rows = codes.len() / d;
        let near = tokens.chunks(d).enumerate().map(|(i, z)| cosine(z, &codes[i * 7919 % rows * d..][..d]));
        assert!(near.sum::<f32>() / 500.0 > 0.6);
    }
}
