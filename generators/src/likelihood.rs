//! How well a generator expects codes, in bits a code, beside what counting alone expects.
//!
//! A code of 16,384 takes 14 bits if nothing is known. An autoregressive generator's figure is exact; a masked one's is an upper
//! bound, in expectation: the mean, over l uniform in 1 ..= N, of −log₂ p of l masked codes (arXiv 2110.02037, equation 5), which is MDLM's.

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use vqrae::Result;

use crate::config::Kind;
use crate::data::Sequences;
use crate::network::Network;
use crate::objective::{Examples, Schedule};

/// How much is computed for a figure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Sequences at most, spread over all.
    pub sequences: usize,
    /// Draws of what is masked, a sequence.
    pub draws: usize,
}

/// For a look at a training.
pub const QUICK: Effort = Effort { sequences: 128, draws: 2 };
/// For a report.
pub const WHOLE: Effort = Effort { sequences: usize::MAX, draws: 16 };

/// Bits a code of sequences, given their classes; not a number where there are none.
///
/// # Errors
/// If tensors cannot be computed.
pub fn of_network(network: &Network, kind: Kind, sequences: &Sequences, effort: Effort) -> Result<f64> {
    /// Sequences at a time.
    const BATCH: usize = 16;
    let count = sequences.len().min(effort.sequences);
    let chosen: Vec<usize> = (0..count).map(|i| i * sequences.len() / count).collect();
    let draws = if kind == Kind::Autoregressive { 1 } else { effort.draws };
    let mut bits = 0.0;
    for draw in 0..draws {
        for (i, chosen) in chosen.chunks(BATCH).enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(draw as u64);
            random.set_stream(i as u64);
            let codes: Vec<&[u32]> = chosen.iter().map(|&i| sequences.codes(i)).collect();
            let classes: Vec<u32> = chosen.iter().map(|&i| sequences.label(i)).collect();
            let examples = Examples::new(kind, Schedule::Elbo, &codes, &mut random);
            let places = Tensor::new(&examples.places[..], &Device::Cpu)?;
            let tokens = network.forward(&examples.inputs, &classes)?.index_select(&places, 0)?.detach();
            let loss = network.loss(&tokens, &examples.targets, &examples.weights)?.to_scalar::<f32>()?;
            bits += f64::from(loss) * chosen.len() as f64;
        }
    }
    Ok(bits / (draws * count) as f64 * std::f64::consts::LOG2_E)
}

/// What counting expects of sequences, in bits a code.
#[derive(Debug, Clone, Copy)]
pub struct Counted {
    /// By how often each code occurs.
    pub unigram: f64,
    /// By how often each code occurs at each place of the grid, which is as few as there are photos, so mixed with how often it
    /// occurs anywhere.
    pub per_position: f64,
}

/// What counting in `train` expects of `sequences`. What is added to every count, and how far places are mixed, are those that suit
/// `sequences` best: no honest choice could do better.
pub fn counted(train: &Sequences, sequences: &Sequences) -> Counted {
    let (n, k) = (train.tokens(), train.tokenizer.codebook_size as f64);
    let counts = train.counts();
    let total: f64 = counts.iter().map(|&count| f64::from(count)).sum();
    let mean = |bits: &dyn Fn(usize, u32) -> f64| {
        let all = (0..sequences.len()).flat_map(|i| sequences.codes(i).iter().enumerate());
        all.map(|(place, &code)| bits(place, code)).sum::<f64>() / (sequences.len() * n) as f64
    };
    let best = |figures: &mut dyn Iterator<Item = (f64, f64)>| {
        figures.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::NAN, f64::NAN))
    };
    let anywhere = |added: f64, code: u32| (f64::from(counts[code as usize]) + added) / (total + added * k);
    let (unigram, added) = best(
        &mut [0.03, 0.1, 0.3, 1.0, 3.0]
            .into_iter()
            .map(|added| (mean(&|_, code| -anywhere(added, code).log2()), added)),
    );
    let mut places = std::collections::HashMap::<(usize, u32), f64>::new();
    for i in 0..train.len() {
        for (place, &code) in train.codes(i).iter().enumerate() {
            *places.entry((place, code)).or_default() += 1.0;
        }
    }
    let here = |place: usize, code: u32| places.get(&(place, code)).map_or(0.0, |count| count / train.len() as f64);
    let mixed =
        |share: f64| mean(&|place, code| -((1.0 - share) * anywhere(added, code) + share * here(place, code)).log2());
    let (per_position, _) = best(&mut (0..20).map(|i| f64::from(i) / 20.0).map(|share| (mixed(share), share)));
    Counted { unigram, per_position }
}
