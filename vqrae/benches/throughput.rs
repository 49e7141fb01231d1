//! Images a second from normalised pixels to codes and from codes to pixels, and the memory that it takes.
//!
//! ```text
//! cargo bench -p vqrae --bench throughput -- [--shape shipped|siglip-l|siglip-l-stock] [--batch B] [--rounds R] [--export FOLDER]
//! ```
//! `siglip-l-stock` runs the encoder on candle-transformers' SigLIP. One JSON line a run. `--export` also writes the model folder, for a peer to read; `benches/peers.py` does that.

use std::path::PathBuf;
use std::time::Instant;

use vqrae::encoder::{Backend, SiglipConfig};
use vqrae::image::{Preprocessor, Resample};
use vqrae::quantizer::{self, SimVqConfig};
use vqrae::weights::Tensors;
use vqrae::{Config, DType, Device, Tensor, Vqrae, encoder, model};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let words: Vec<String> = std::env::args().collect();
    let word = |name: &str| words.iter().position(|w| w == name).and_then(|i| words.get(i + 1)).cloned();
    let number = |name: &str, default: usize| word(name).map_or(Ok(default), |w| w.parse());
    let (batch, rounds) = (number("--batch", 4)?, number("--rounds", 3)?);
    let shape = word("--shape").unwrap_or_else(|| "shipped".to_string());
    let model = load(&shape, word("--export").map(PathBuf::from))?;

    let pixels = Tensor::rand(-1f32, 1f32, (batch, 3, 256, 256), &Device::Cpu)?;
    let codes = model.encode_to_indices(&pixels)?;
    model.decode_from_indices(&codes)?;
    let encode = best(rounds, || model.encode_to_indices(&pixels))?;
    let decode = best(rounds, || model.decode_from_indices(&codes))?;
    report(&format!(
        r#"{{"shape":"{shape}","batch":{batch},"threads":{},"tokenize":{:.3},"reconstruct":{:.3},"peak_mib":{}}}"#,
        std::thread::available_parallelism()?,
        batch as f64 / encode,
        batch as f64 / decode,
        peak_mib(),
    ));
    Ok(())
}

#[allow(clippy::print_stdout, reason = "a benchmark prints what it measured")]
fn report(line: &str) {
    println!("{line}");
}

/// The best of some rounds, in seconds.
fn best(rounds: usize, run: impl Fn() -> candle_core::Result<Tensor>) -> Outcome<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..rounds {
        let begin = Instant::now();
        run()?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best)
}

fn load(shape: &str, export: Option<PathBuf>) -> Outcome<Vqrae> {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../weights/vqrae-small");
    let preprocessor = Preprocessor::siglip(256, Resample::Bicubic);
    let config = match shape {
        "shipped" => return Ok(Vqrae::from_pretrained(shipped, &Device::Cpu, DType::F32)?),
        "siglip-l" => siglip_large(Backend::Vit),
        "siglip-l-stock" => siglip_large(Backend::CandleTransformers),
        other => return Err(format!("--shape {other}: expected: shipped, siglip-l or siglip-l-stock").into()),
    };
    let tensors = model::fresh_tensors(&siglip_large(Backend::Vit), Tensors::new(), 0)?;
    if let Some(folder) = export {
        model::save(&folder, &config, &preprocessor, &tensors)?;
    }
    Ok(Vqrae::new(config, preprocessor, tensors, shape.as_ref(), &Device::Cpu, DType::F32)?)
}

/// SigLIP-L/16 at 256 px with the paper's quantizer and a symmetric decoder, random weights.
fn siglip_large(backend: Backend) -> Config {
    let encoder = SiglipConfig {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 24,
        num_attention_heads: 16,
        image_size: 256,
        backend,
        ..SiglipConfig::default()
    };
    let quantizer = quantizer::Config::SimVq(SimVqConfig::default());
    Config::new(encoder::Config::Siglip(encoder), quantizer, vqrae::decoder::Config::default())
}

/// The most memory that this process has held, in MiB; 0 where the system does not tell.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
}
