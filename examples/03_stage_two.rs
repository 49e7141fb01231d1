//! What stage two does to an encoder that has learnt to see, with distillation and without: the paper's Table 6 in miniature.
//!
//! `cargo run --release --example 03_stage_two -- PHOTOS [OUTPUT]`
//!
//! PHOTOS is a folder or a tar of labelled photos. A photo's class is the folder that it lies in (`CLASS/0001.png`), or, where
//! it lies in none, the middle of its name (`cloth_CLASS_04d3.jpg`); photos that have neither are left out. Of every class
//! each fourth photo is held out, and all measures are of these.
//!
//! A small SigLIP-shaped encoder learns the classes. Then it becomes a tokenizer in five ways, with the same rates:
//!
//! - stage one alone: the encoder stays frozen
//! - two stages: stage one, then everything is trained, without a teacher and with one
//! - end to end: everything is trained from the start, without a teacher and with one
//!
//! Every way but the first has the same number of steps. What the encoder understands is measured by the mean of its features:
//! by what was made of the original features (an index of neighbours, a linear layer) and is kept; and by the same made anew
//! of the features as they are now, as the paper does with a language model. Of 1,924 phone photos of clothes, `cloth_CLASS_…`:
//!
//! | | PSNR, dB | cosine to the teacher | k-NN, kept, % | probe, kept, % | k-NN, anew, % | probe, anew, % |
//! |---|---|---|---|---|---|---|
//! | stage one alone | 17.36 | 1.000 | 42.3 | 42.8 | 42.3 | 42.8 |
//! | two stages, no distillation | 18.84 | 0.671 | 26.6 | 28.3 | 38.8 | 43.6 |
//! | two stages, distillation | 18.69 | 0.999 | 42.6 | 42.6 | 42.3 | 42.3 |
//! | end to end, no distillation | 18.62 | 0.577 | 27.9 | 24.5 | 37.7 | 41.3 |
//! | end to end, distillation | 18.58 | 0.999 | 41.9 | 42.3 | 42.1 | 42.8 |
//!
//! The largest class is 25.2 % of the photos held out, so without distillation all that was built on the encoder is lost; with
//! it nothing is, for 0.15 dB. What is built anew finds most of it again, other than in the paper: an encoder that has seen
//! 1,447 photos knows little that their pixels do not tell, and the difference of two shares of 477 photos is uncertain by
//! three points. The table took 12 minutes of one CPU core (`RAYON_NUM_THREADS=1`). Killed and called again with the same
//! words, the example goes on where it was.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example prints what it shows")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use vqrae::encoder::Encoder;
use vqrae::image::{Preprocessor, Resample};
use vqrae::ops::Linear;
use vqrae::train::data::{Crops, Sizes};
use vqrae::train::{self, Event, Files};
use vqrae::weights::{self, Tensors};
use vqrae::{DType, Device, Tensor, Vqrae, metrics, model};
use vqrae_examples::classes::{Labelled, split};
use vqrae_examples::understanding::{Learner, cosine, nearest, probe};

/// Everything but the stages. The paper gives the encoder 1e-5 for 70,000 steps of large batches in stage two; a few hundred
/// small steps at that rate would move nothing, so it is fifty times that here, with distillation and without.
const RECIPE: &str = r#"
[start]
from = "folder"
path = "" # of the run

[train]
steps = 0 # of the run
batch_size = 32
warmup_steps = 40
log_every = 100
checkpoint_every = 100
keep_checkpoints = 1
tensorboard = false
crop = { scale = [0.4, 1.0] }

[groups]
encoder = { peak = 5e-4, end = 5e-5 }
quantizer = { peak = 1e-3, schedule = "constant", warmup_steps = 0 }
decoder = { peak = 1e-3, end = 1e-4 }

[model.encoder]
model_type = "siglip_vision_model"
hidden_size = 128
intermediate_size = 512
num_hidden_layers = 4
num_attention_heads = 4
image_size = 64
patch_size = 16

[model.quantizer]
type = "simvq"
codebook_size = 2048
codebook_dim = 32
"#;

/// The distillation's weight: the paper's.
const WEIGHT: f64 = 1.0;
/// Steps in which the encoder learns the classes, those of stage one, and those of stage two.
const STEPS: [usize; 3] = [6000, 300, 400];

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args_os().skip(1).map(PathBuf::from);
    let usage = "say where labelled photos are: 03_stage_two PHOTOS [OUTPUT]";
    let photos = words.next().ok_or_else(|| anyhow::anyhow!(usage))?;
    let output = words.next().unwrap_or_else(|| std::env::temp_dir().join("stage_two"));
    let begin = Instant::now();
    let [train, held_out] = split(&photos, &output)?;
    let [known, asked] = [&train.labels, &held_out.labels];
    eprintln!("{} photos of {} classes, {} held out", known.numbers.len(), known.classes, asked.numbers.len());

    // The tokenizer before any stage: an encoder that knows the classes, a fresh quantizer, a fresh decoder.
    let recipe = output.join("recipe.toml");
    std::fs::write(&recipe, RECIPE)?;
    let config = train::Config::read(&recipe, &[])?;
    let original = output.join("original/model");
    if !original.join(weights::FILE).exists() {
        let encoder = learn_classes(&config, &train)?;
        let wanted = config.model.config();
        let tensors = model::fresh_tensors(&wanted, encoder, config.train.seed)?;
        model::save(&original, &wanted, &preprocessor(&config), &tensors)?;
    }

    let [_, first, second] = STEPS;
    let ways = [
        ("stage one alone", "one", "original", first, None),
        ("two stages, no distillation", "two-free", "one", second, Some(0.0)),
        ("two stages, distillation", "two-held", "one", second, Some(WEIGHT)),
        ("end to end, no distillation", "end-to-end-free", "original", first + second, Some(0.0)),
        ("end to end, distillation", "end-to-end-held", "original", first + second, Some(WEIGHT)),
    ];
    let before = output.join("original");
    let (index, teacher) = (Seen::by(&before, &train)?, Seen::by(&before, &held_out)?);
    println!(
        "| | PSNR, dB | cosine to the teacher | k-NN, kept, % | probe, kept, % | k-NN, anew, % | probe, anew, % |"
    );
    println!("|---|---|---|---|---|---|---|");
    for (name, run, from, steps, distillation) in ways {
        eprintln!("{name}");
        let folder = Way { run, from, steps, distillation }.train(&output, &recipe)?;
        let (gallery, queries) = (Seen::by(&folder, &train)?, Seen::by(&folder, &held_out)?);
        println!(
            "| {name} | {:.2} | {:.3} | {:.1} | {:.1} | {:.1} | {:.1} |",
            queries.psnr,
            cosine(&teacher.features, &queries.features)?,
            nearest(&index.pooled, known, &queries.pooled, asked)?,
            probe(&index.pooled, known, &queries.pooled, asked)?,
            nearest(&gallery.pooled, known, &queries.pooled, asked)?,
            probe(&gallery.pooled, known, &queries.pooled, asked)?,
        );
    }
    let chance = held_out.labels.largest();
    println!("\nThe largest class is {chance:.1} % of the photos held out. {:.0} s.", begin.elapsed().as_secs_f64());
    Ok(())
}

fn preprocessor(config: &train::Config) -> Preprocessor {
    Preprocessor::siglip(config.model.encoder.image_size(), Resample::Bicubic)
}

/// An encoder that tells the classes apart by the mean of its features.
fn learn_classes(config: &train::Config, train: &Labelled) -> anyhow::Result<Tensors> {
    let [steps, ..] = STEPS;
    let (encoder, size, preprocessor) = (&config.model.encoder, config.train.batch_size, preprocessor(config));
    let sizes = Sizes::of(preprocessor.size, &config.model.config())?;
    let mut learner = Learner::new(1.5e-3, steps, |vb| {
        let head = Linear::load(vb.pp("head"), encoder.width(), train.labels.classes)?;
        Ok((Encoder::load(vb.pp("encoder"), encoder)?, head))
    })?;
    let mut crops = Crops::new(&train.photos, &preprocessor, config.train.crop, config.train.seed);
    let mut sum = 0.0;
    for step in 0..steps {
        let batch = crops.batch(step * size, size, sizes)?;
        let pixels = Tensor::from_vec(batch.inputs, (size, 3, sizes.input.0, sizes.input.1), &Device::Cpu)?;
        let labels: Vec<u32> = batch.photos.iter().map(|&photo| train.labels.numbers[photo]).collect();
        let (encoder, head) = &learner.layers;
        let logits = head.forward(&encoder.forward(&pixels)?.mean(1)?)?;
        sum += learner.step(step, &logits, &Tensor::new(labels, &Device::Cpu)?)?;
        if (step + 1) % 250 == 0 {
            eprintln!("  classes {:>5}/{steps}: cross-entropy {:.3}", step + 1, sum / 250.0);
            sum = 0.0;
        }
    }
    let learnt = learner.parameters.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    Ok(learnt.filter(|(name, _)| name.starts_with("encoder.")).collect())
}

/// A run of the trainer.
struct Way {
    /// The run's folder, and that of the run whose model it starts from.
    run: &'static str,
    from: &'static str,
    steps: usize,
    /// The distillation's weight where the encoder is trained.
    distillation: Option<f64>,
}

impl Way {
    fn train(&self, output: &Path, recipe: &Path) -> anyhow::Result<PathBuf> {
        let stage = match self.distillation {
            None => "stage={name=\"codebook\"}".to_string(),
            Some(weight) => format!("stage={{name=\"joint\",distillation={{weight={weight:?}}}}}"),
        };
        let start = format!("start.path={:?}", output.join(self.from).join("model"));
        let mut wishes = vec![stage, start, format!("train.steps={}", self.steps)];
        if self.distillation.is_none() {
            wishes.push("groups.encoder={peak=0}".to_string());
        }
        let run = output.join(self.run);
        let files = Files { train: vec![output.join("photos/train")], validation: vec![], output: run.clone() };
        let mut tell = |event: Event| {
            if let Event::Step(log) = event {
                let (step, steps, psnr) = (log.step, log.steps, log.psnr);
                let distilled =
                    log.terms.get("distillation").map_or(String::new(), |term| format!(", distillation {term:.4}"));
                let (usage, speed) = (100.0 * log.usage, log.images_per_second);
                eprintln!("  {step:>5}/{steps}: {psnr:.2} dB, usage {usage:.0} %, {speed:.0} images/s{distilled}");
            }
            ControlFlow::Continue(())
        };
        train::run(&train::Config::read(recipe, &wishes)?, &files, true, &mut tell)?;
        Ok(run)
    }
}

/// What a model makes of photos.
struct Seen {
    /// `[M, N, D]`.
    features: Tensor,
    /// Their mean over the tokens, `[M, D]`.
    pooled: Tensor,
    /// Mean over the photos, in dB.
    psnr: f64,
}

impl Seen {
    fn by(run: &Path, labelled: &Labelled) -> anyhow::Result<Self> {
        let model = Vqrae::from_pretrained(run.join("model"), &Device::Cpu, DType::F32)?;
        let preprocessor = model.preprocessor();
        let (mut features, mut psnr) = (vec![], 0.0);
        for i in 0..labelled.photos.len() {
            let photo = preprocessor.prepare(&labelled.photos.open(i)?)?;
            let (h, w) = (photo.height, photo.width);
            let pixels = Tensor::from_vec(preprocessor.normalize(&photo), (1, 3, h, w), &Device::Cpu)?;
            features.push(model.encode(&pixels)?);
            let tokens = model.quantize(&features[i])?.tokens;
            let painted = model.decode(&tokens, model.grid_of(h, w)?)?;
            let painted = preprocessor.denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, h, w);
            psnr += metrics::psnr(&photo, &painted).unwrap_or_default() / labelled.photos.len() as f64;
        }
        let features = Tensor::cat(&features, 0)?;
        Ok(Self { pooled: features.mean(1)?, features, psnr })
    }
}
