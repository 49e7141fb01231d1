//! What a training step asks of a generator: inputs, targets and weights, of which the loss is a weighted sum.

use rand::Rng;
use rand::seq::index;
use serde::{Deserialize, Serialize};

use crate::config::Kind;
use crate::network::UNKNOWN;

/// How many codes are masked, and what each counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// MDLM's (arXiv 2406.07524): l of N codes, l uniform, each counting 1 / l. The loss is then a bound of −log p a code, in
    /// expectation over l (as in arXiv 2110.02037): likelihoods can be compared.
    #[default]
    Elbo,
    /// MaskGIT's (arXiv 2202.04200): a share of cos(π u / 2), u uniform, all masked codes of a batch counting alike. Much is
    /// masked most of the time, as when sampling in few steps.
    Cosine,
}

/// A batch as the network takes it.
#[derive(Debug, Default)]
pub struct Examples {
    /// B · N codes or [`UNKNOWN`].
    pub inputs: Vec<u32>,
    /// The tokens whose output counts.
    pub places: Vec<u32>,
    /// The code that each should be.
    pub targets: Vec<u32>,
    /// What each counts; sums to one, but for chance.
    pub weights: Vec<f32>,
}

impl Examples {
    /// Of a batch of sequences; `random` decides what is masked.
    pub fn new(kind: Kind, schedule: Schedule, sequences: &[&[u32]], random: &mut impl Rng) -> Self {
        let mut examples = Self::default();
        // One number for the whole batch, spread evenly over it: the loss differs less from batch to batch.
        let first: f64 = random.random();
        for (i, codes) in sequences.iter().enumerate() {
            let even = (first + i as f64 / sequences.len() as f64).fract();
            match (kind, schedule) {
                (Kind::Autoregressive, _) => examples.shifted(codes),
                (Kind::Masked, Schedule::Elbo) => {
                    let masked = ((even * codes.len() as f64) as usize + 1).min(codes.len());
                    examples.masked(codes, masked, 1.0 / masked as f32, random);
                }
                (Kind::Masked, Schedule::Cosine) => {
                    let share = (std::f64::consts::FRAC_PI_2 * even).cos();
                    let masked = ((share * codes.len() as f64).ceil() as usize).clamp(1, codes.len());
                    examples.masked(codes, masked, 1.0, random);
                }
            }
        }
        let all = match (kind, schedule) {
            (Kind::Masked, Schedule::Elbo) => sequences.len() as f32,
            _ => examples.targets.len() as f32,
        };
        examples.weights.iter_mut().for_each(|weight| *weight /= all);
        examples
    }

    /// Every code by those before it.
    fn shifted(&mut self, codes: &[u32]) {
        self.places.extend(self.inputs.len() as u32..(self.inputs.len() + codes.len()) as u32);
        self.inputs.push(UNKNOWN);
        self.inputs.extend(&codes[..codes.len() - 1]);
        self.targets.extend(codes);
        self.weights.extend(std::iter::repeat_n(1.0, codes.len()));
    }

    /// `count` of the codes by the others.
    fn masked(&mut self, codes: &[u32], count: usize, weight: f32, random: &mut impl Rng) {
        let first = self.inputs.len();
        self.inputs.extend(codes);
        let mut places = index::sample(random, codes.len(), count).into_vec();
        places.sort_unstable();
        for place in places {
            self.inputs[first + place] = UNKNOWN;
            self.places.push((first + place) as u32);
            self.targets.push(codes[place]);
            self.weights.push(weight);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn examples(kind: Kind, schedule: Schedule) -> Examples {
        let codes: Vec<u32> = (10..20).collect();
        Examples::new(kind, schedule, &[&codes, &codes, &codes, &codes], &mut ChaCha8Rng::seed_from_u64(1))
    }

    #[test]
    fn a_code_is_asked_of_those_before_it() {
        let examples = examples(Kind::Autoregressive, Schedule::Elbo);
        assert_eq!(examples.inputs[..4], [UNKNOWN, 10, 11, 12]);
        assert_eq!(examples.targets[..4], [10, 11, 12, 13]);
        assert_eq!((examples.places.len(), examples.places[39]), (40, 39));
        assert!((examples.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn masked_codes_are_asked_for_and_all_others_are_shown() {
        for schedule in [Schedule::Elbo, Schedule::Cosine] {
            let examples = examples(Kind::Masked, schedule);
            for (place, code) in examples.inputs.iter().enumerate() {
                let asked = examples.places.iter().position(|&asked| asked as usize == place);
                assert_eq!(*code == UNKNOWN, asked.is_some());
                assert_eq!(asked.map_or(*code, |i| examples.targets[i]), 10 + place as u32 % 10);
            }
            assert!((examples.weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn numbers_of_masked_codes_are_spread_evenly() {
        let examples = examples(Kind::Masked, Schedule::Elbo);
        let mut counts: Vec<_> =
            (0..4).map(|i| examples.inputs[10 * i..][..10].iter().filter(|&&x| x == UNKNOWN).count()).collect();
        counts.sort_unstable();
        // A quarter of ten apart.
        assert!(counts.windows(2).all(|pair| pair[1] - pair[0] >= 2), "{counts:?}");
        let of_first = examples.weights[0] * 4.0;
        assert!((1.0 / of_first).fract() < 1e-5, "a weight is one over a count: {of_first}");
    }
}
