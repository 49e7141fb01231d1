//! Seconds to draw one image of 256 codes: with keys and values kept, without, and in 12 steps of a masked generator of the same
//! size. Fresh weights, which take as long as trained ones.
//!
//! `cargo bench --workspace --bench sampling [-- --json] [--rounds N]`

use std::time::Instant;

use vqrae::weights::{Fresh, Tensors};
use vqrae::{DType, Device, Vqrae};
use vqrae_generators::autoregressive::{Image, draw, draw_uncached};
use vqrae_generators::config::Tokenizer;
use vqrae_generators::masked::{self, Plan};
use vqrae_generators::network::{Network, UNKNOWN};
use vqrae_generators::sampling::{Sampling, random};
use vqrae_generators::{Config, Generator, Kind};

/// How it is measured, and told.
struct Words {
    /// Each way so often, in turns; the best counts.
    rounds: usize,
    /// A line of JSON a row.
    json: bool,
}

#[allow(clippy::print_stdout, reason = "a benchmark prints what it measured")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().collect();
    let after = |name: &str| words.iter().position(|word| word == name).and_then(|i| words.get(i + 1));
    let rounds = after("--rounds").map_or(Ok(5), |rounds| rounds.parse())?;
    let words = Words { rounds, json: words.iter().any(|word| word == "--json") };
    let tokenizer = Vqrae::shipped(&Device::Cpu, DType::F32)?;
    if !words.json {
        println!(
            "| numbers | images at a time | without a cache, s an image | with, s | times as fast | masked in 12 steps, s | without ÷ masked |"
        );
        println!("|---|---|---|---|---|---|---|");
    }
    for dtype in [DType::F32, DType::BF16] {
        for images in [1, 8] {
            run(&tokenizer, dtype, images, &words)?;
        }
    }
    Ok(())
}

#[allow(clippy::print_stdout, reason = "a benchmark prints what it measured")]
fn run(tokenizer: &Vqrae, dtype: DType, images: usize, words: &Words) -> Result<(), Box<dyn std::error::Error>> {
    let sampling = Sampling::default();
    let plan = Plan { sampling, ..Plan::default() };
    let [masked, by_rows] = [Kind::Masked, Kind::Autoregressive].map(|kind| generator(tokenizer, kind, dtype));
    let (masked, by_rows) = (masked?, by_rows?);
    let empty = || vec![vec![UNKNOWN; masked.config().tokens()]; images];
    let mut best = [f64::INFINITY; 3];
    for _ in 0..words.rounds {
        let [mut uncached, mut cached, mut at_once] = [(); 3].map(|()| empty());
        let mut took = [0.0; 3];
        let begin = Instant::now();
        for (i, codes) in uncached.iter_mut().enumerate() {
            draw_uncached(&by_rows, &mut Image { class: Some(0), codes, random: random(1, i as u64) }, &sampling);
        }
        took[0] = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let numbered = cached.iter_mut().enumerate();
        let mut wishes: Vec<_> = numbered
            .map(|(i, codes)| Image { class: Some(0), codes: codes.as_mut_slice(), random: random(1, i as u64) })
            .collect();
        draw(&by_rows, &mut wishes, &sampling);
        took[1] = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        for (i, codes) in at_once.iter_mut().enumerate() {
            masked::draw(&masked, Some(0), codes, &plan, &mut random(1, i as u64));
        }
        took[2] = begin.elapsed().as_secs_f64();
        if cached != uncached {
            return Err("with keys and values kept, other codes were drawn".into());
        }
        best.iter_mut().zip(took).for_each(|(best, took)| *best = best.min(took));
    }
    let [uncached, cached, at_once] = best.map(|seconds| seconds / images as f64);
    let dtype = dtype.as_str();
    if words.json {
        println!(
            "{{\"dtype\":\"{dtype}\",\"images\":{images},\"uncached\":{uncached},\"cached\":{cached},\"masked\":{at_once}}}"
        );
    } else {
        let (cache, steps) = (uncached / cached, uncached / at_once);
        println!("| {dtype} | {images} | {uncached:.3} | {cached:.4} | {cache:.1} | {at_once:.4} | {steps:.1} |");
    }
    Ok(())
}

fn generator(tokenizer: &Vqrae, kind: Kind, dtype: DType) -> Result<Generator, Box<dyn std::error::Error>> {
    let side = 16;
    let whose = Tokenizer {
        model_id: tokenizer.id().to_string(),
        preprocessing: String::new(),
        dtype: String::new(),
        codebook_size: tokenizer.codebook_size(),
        grid: (side, side),
    };
    let config = Config::small(kind, whose, vec!["any".to_string()]);
    let codebook = tokenizer.codebook()?;
    let tensors = Fresh::new(0, Tensors::new()).make(|vb| Network::load(vb, &config, &codebook))?;
    Ok(Generator::new(config, tensors, &codebook, dtype)?)
}
