//! What the examples of generators share: to train one on a folder of codes, to say how good it is, to paint codes.

use std::path::{Path, PathBuf};

use vqrae::image::Rgb;
use vqrae::{DType, Device, Tensor, Vqrae};
use vqrae_generators::data::Sequences;
use vqrae_generators::train::{self, Log, Recipe};
use vqrae_generators::{Config, Kind, generator, likelihood};

/// Of so many photos of a class one is kept apart.
pub const APART: usize = 10;

/// What was asked for: `CODES OUT [STEPS] [MORE]`.
pub struct Words {
    /// The folder of codes.
    pub codes: PathBuf,
    /// The generator's folder.
    pub output: PathBuf,
    /// Steps of the training.
    pub steps: usize,
    /// What an example of its own asks.
    pub more: Option<String>,
}

impl Words {
    /// Of the command line.
    pub fn read(steps: usize) -> anyhow::Result<Self> {
        let mut words = std::env::args_os().skip(1);
        let (Some(codes), Some(output)) = (words.next(), words.next()) else {
            anyhow::bail!("say where codes are and where the generator goes: CODES OUT [STEPS]");
        };
        let wish = words.next().map(|word| word.to_string_lossy().parse()).transpose()?;
        let more = words.next().map(|word| word.to_string_lossy().into_owned());
        Ok(Self { codes: codes.into(), output: output.into(), steps: wish.unwrap_or(steps), more })
    }
}

/// Trains a generator of a kind on codes of the shipped model, and prints how well it expects codes.
#[allow(clippy::print_stderr, reason = "an example says how far it is")]
pub fn learn(words: &Words, kind: Kind, recipe: &Recipe) -> anyhow::Result<()> {
    let tokenizer = Vqrae::shipped(&Device::Cpu, DType::F32)?;
    let [train, apart] = Sequences::read(&words.codes, APART)?;
    let classes = &train.classes;
    eprintln!("{} sequences of {} classes, {} photos kept apart", train.len(), classes.len(), apart.len());
    let config = Config::small(kind, train.tokenizer.clone(), classes.clone());
    if config.tokenizer.model_id != tokenizer.id() {
        anyhow::bail!("{}: these are not codes of the shipped model {}", words.codes.display(), tokenizer.id());
    }
    let codebook = tokenizer.codebook()?;
    let tell = |log: &Log| {
        let Log { step, train, validation, seen, rate } = log;
        eprintln!(
            "  {step:>5}/{}: training {train:.3} bits a code, apart {validation:.3}, the same of seen ones {seen:.3}; {rate:.1} sequences/s",
            recipe.steps
        );
    };
    train::run(&words.output, &config, recipe, &codebook, [&train, &apart], tell)?;
    report(&words.output, &codebook, [&train, &apart])
}

/// Bits a code of the generator as it is written, beside what counting expects.
#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn report(folder: &Path, codebook: &Tensor, [train, apart]: [&Sequences; 2]) -> anyhow::Result<()> {
    let (config, network) = generator::network(folder, codebook)?;
    let bits = |sequences| likelihood::of_network(&network, config.kind, sequences, likelihood::WHOLE);
    let some = likelihood::Effort { sequences: apart.len(), ..likelihood::WHOLE };
    let seen = likelihood::of_network(&network, config.kind, train, some)?;
    let counted = likelihood::counted(train, apart);
    println!("| bits a code, photos kept apart | |\n|---|---|");
    println!("| nothing known | {:.2} |", (config.tokenizer.codebook_size as f64).log2());
    println!("| how often each code occurs | {:.2} |", counted.unigram);
    println!("| how often at each place | {:.2} |", counted.per_position);
    println!("| this generator | {:.2} |", bits(apart)?);
    println!("| this generator, as many sequences it was trained on | {seen:.2} |");
    Ok(())
}

/// Codes as an image.
pub fn paint(tokenizer: &Vqrae, codes: &[u32], (h, w): (usize, usize)) -> anyhow::Result<Rgb> {
    let codes = Tensor::new(codes, &Device::Cpu)?.reshape((1, h, w))?;
    let painted = tokenizer.decode_from_indices(&codes)?;
    let (_, _, height, width) = painted.dims4()?;
    Ok(tokenizer.preprocessor().denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, height, width))
}
