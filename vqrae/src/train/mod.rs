//! Stage-1 training: the loop, a page to read from top to bottom.
//!
//! A run is a folder: `config.toml` (what was asked for, every default filled in), `log.jsonl`, `checkpoints/`, and
//! `model/`, the model folder of the best validation so far.

pub mod checkpoint;
mod config;
pub mod data;
pub mod loss;
pub mod optimizer;
pub mod schedule;
pub mod start;

pub use config::{Config, Groups, Run, Start};

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use rand::RngCore;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::files;
use crate::image::{Preprocessor, ResizeMode, Rgb};
use crate::metrics::{self, CodeCounts};
use crate::model::{self, Network};
use crate::quantizer;
use crate::weights::Tensors;
use checkpoint::State;
use data::{Batch, Crops, Photos, Sizes, Views};
use loss::Loss;
use optimizer::AdamW;

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something a person may want to know.
    Note(&'a str),
    /// A step is done; a chance to end the run.
    Tick,
    /// A step is done and a line of the log is due.
    Step(&'a StepLog),
    /// A validation, with the first photos and their reconstructions.
    Validation(&'a ValidationLog, &'a [(Rgb, Rgb)]),
}

/// Hears what a run tells, and may end it after the step at hand.
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// A line of `log.jsonl`: means over the steps since the last one.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StepLog {
    /// Steps that are done, and of how many.
    pub step: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// What is minimised.
    pub loss: f64,
    /// The terms of the loss before their weights, by their names in the config.
    pub terms: BTreeMap<&'static str, f64>,
    /// The quantizer's loss.
    pub quantizer_loss: f64,
    /// PSNR in dB of the batch's mean squared error.
    pub psnr: f64,
    /// Share of the codebook that these steps chose.
    pub usage: f64,
    /// exp of the entropy of the codes that these steps chose.
    pub perplexity: f64,
    /// Norm of the gradients before clipping, of the last step.
    pub gradient_norm: f64,
    /// Learning rates of encoder, quantizer and decoder.
    pub rates: [f64; 3],
    /// Images a step.
    pub images_per_step: usize,
    /// Images a second.
    pub images_per_second: f64,
}

/// A validation's line of `log.jsonl`.
#[derive(Debug, Clone, Serialize)]
pub struct ValidationLog {
    /// Steps that are done.
    pub step: usize,
    /// Mean over the photos of the PSNR in dB of 8-bit images.
    pub validation_psnr: f64,
    /// Share of the codebook in use over the validation photos.
    pub validation_usage: f64,
    /// exp of the entropy of their codes.
    pub validation_perplexity: f64,
}

/// Trains as `config` says, in the folder `output`; goes on from the newest checkpoint there when `resume` is set.
///
/// # Errors
/// A config that makes no sense, photos that cannot be read, a checkpoint of another config, a loss that is not finite.
pub fn run(
    config: &Config,
    train: &Path,
    validation: Option<&Path>,
    output: &Path,
    resume: bool,
    tell: Observer,
) -> Result<()> {
    let photos = Photos::list(train)?;
    let validation = validation.map(Photos::list).transpose()?;
    std::fs::create_dir_all(output).map_err(Error::io(output))?;
    let found = if resume { checkpoint::newest(output)? } else { None };
    let mut trainer = Trainer::new(config, &photos, output, found, tell)?;
    trainer.table(&photos, tell);
    let steps = config.train.steps;
    if trainer.state.step == 0 {
        trainer.validate(validation.as_ref(), tell)?;
    }
    std::thread::scope(|scope| {
        let (sender, batches) = mpsc::sync_channel(2);
        let (first, preprocessor, sizes) = (trainer.state.step, trainer.preprocessor.clone(), trainer.sizes);
        let photos = &photos;
        scope.spawn(move || {
            feed(sender, config, &mut Crops::new(photos, &preprocessor, sizes, config.train.seed), first)
        });
        for step in first..steps {
            let batch = batches.recv().map_err(|_| Error::Training("the photos ended".into()))??;
            let log = trainer.step(step, batch, tell)?;
            let due = |every: usize| (every > 0 && (step + 1).is_multiple_of(every)) || step + 1 == steps;
            let stop = tell(log.as_ref().map_or(Event::Tick, Event::Step)).is_break();
            if due(config.train.validate_every) {
                trainer.validate(validation.as_ref(), tell)?;
            }
            if due(config.train.checkpoint_every) || stop {
                trainer.checkpoint()?;
            }
            if stop {
                return Ok(());
            }
        }
        Ok(())
    })
}

/// Decodes ahead of the steps, until nobody listens.
fn feed(sender: mpsc::SyncSender<Result<Batch>>, config: &Config, crops: &mut Crops, first: usize) {
    let size = config.train.batch_size;
    for step in first..config.train.steps {
        if sender.send(crops.batch(step * size, size)).is_err() {
            return;
        }
    }
}

struct Trainer<'a> {
    config: &'a Config,
    output: &'a Path,
    preprocessor: Preprocessor,
    sizes: Sizes,
    network: Network,
    loss: Loss,
    parameters: BTreeMap<String, Var>,
    /// The quantizer's moving averages, which no gradient moves.
    averages: BTreeMap<String, Var>,
    frozen: Tensors,
    optimizer: AdamW,
    state: State,
    since: Since,
}

/// Sums since the last line of the log.
struct Since {
    begin: Instant,
    steps: usize,
    loss: f64,
    terms: BTreeMap<&'static str, f64>,
    codes: CodeCounts,
}

impl Since {
    fn now(codes: CodeCounts) -> Self {
        let begin = Instant::now();
        Self { begin, steps: 0, loss: 0.0, terms: BTreeMap::new(), codes }
    }
}

impl<'a> Trainer<'a> {
    fn new(
        config: &'a Config,
        photos: &Photos,
        output: &'a Path,
        found: Option<checkpoint::Checkpoint>,
        tell: Observer,
    ) -> Result<Self> {
        let loss = Loss::open(&config.loss, &Device::Cpu)?;
        let (model, preprocessor, start) = config.start_model(photos, found.is_some(), tell)?;
        let as_json = serde_json::to_value(config).map_err(|e| Error::config("config", e))?;
        let sizes = Sizes::of(preprocessor.size, &model)?;
        let (tensors, moments, state) = match found {
            None => (start, None, State { step: 0, best: None, config: as_json }),
            Some(found) if found.state.config != as_json => return Err(other_config(&found.state.config, &as_json)),
            Some(found) => (found.model, Some(found.optimizer), found.state),
        };
        let Split { parameters, averages, frozen } = Split::of(&tensors, &config.groups, &model)?;
        let all: HashMap<String, Tensor> = parameters
            .iter()
            .chain(&averages)
            .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
            .chain(frozen.iter().map(|(name, tensor)| (name.clone(), tensor.clone())))
            .collect();
        let network = Network::load(VarBuilder::from_tensors(all, DType::F32, &Device::Cpu), &model)?;
        let mut optimizer = AdamW::new(config.optimizer, &parameters);
        if let Some(moments) = moments {
            optimizer.load_state(moments)?;
        }
        let text = toml::to_string_pretty(config).map_err(|e| Error::config("config.toml", e))?;
        let path = output.join("config.toml");
        files::write_whole(&path, text.as_bytes()).map_err(Error::io(&path))?;
        trim_log(&output.join("log.jsonl"), state.step)?;
        let since = Since::now(no_codes(&model.quantizer));
        Ok(Self {
            config,
            output,
            preprocessor,
            sizes,
            network,
            loss,
            parameters,
            averages,
            frozen,
            optimizer,
            state,
            since,
        })
    }

    /// The run's settings, before the first step.
    fn table(&self, photos: &Photos, tell: Observer) {
        let (mut decayed, mut spared) = (0, 0);
        for (name, var) in &self.parameters {
            *(if optimizer::decays(name, var) { &mut decayed } else { &mut spared }) += var.elem_count();
        }
        let frozen: usize = self.frozen.values().map(Tensor::elem_count).sum();
        let train = &self.config.train;
        let lines = [
            format!(
                "photos {}, batch {}, steps {} to {}",
                photos.len(),
                train.batch_size,
                self.state.step,
                train.steps
            ),
            format!("trained {} (weight decay on {decayed}), frozen {frozen}", decayed + spared),
        ];
        for line in &lines {
            let _ = tell(Event::Note(line));
        }
    }

    /// Forward, backward, clip, step. Returns a line of the log when one is due.
    fn step(&mut self, step: usize, batch: Batch, tell: Observer) -> Result<Option<StepLog>> {
        for photo in &batch.skipped {
            let _ = tell(Event::Note(&format!("skipped {}", photo.reason)));
        }
        let train = &self.config.train;
        let (h, w) = self.sizes.input;
        let tensor = |values, (h, w)| Tensor::from_vec(values, (train.batch_size, 3, h, w), &Device::Cpu);
        let pixels = tensor(batch.inputs, (h, w))?;
        let target = if batch.targets.is_empty() { pixels.clone() } else { tensor(batch.targets, self.sizes.target)? };
        if step == 0 {
            self.begin(&pixels)?;
        }
        let seed = data::generator(train.seed, "quantizer", step).next_u64();
        let quantized = self.network.quantize_in_training(&pixels, seed)?;
        let painted = self.network.paint(&quantized.tokens, self.network.grid(h, w)?, DType::F32)?;
        let quantizer_loss = self.network.quantizer.loss(&quantized)?;
        let terms = self.loss.terms(&self.preprocessor, &target, &painted, quantizer_loss)?;
        let scalar = |tensor: &Tensor| Ok::<f64, Error>(f64::from(tensor.to_scalar::<f32>()?));
        let loss = scalar(&terms.total)?;
        let gradients = terms.total.backward()?;
        let groups = &self.config.groups;
        let rate = |name: &str| groups.of(name).at(step, train.warmup_steps, train.steps);
        let norm = self.optimizer.step(&self.parameters, &gradients, step, rate)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Err(Error::Training(format!(
                "step {step}: the loss is {loss} and the gradients' norm {norm}; the last checkpoint is good, resume from it with a lower learning rate"
            )));
        }
        if !self.averages.is_empty() {
            let mut choose = chooser(train.seed, "dead codes", step);
            self.set(self.network.quantizer.update(&quantized, &mut choose)?)?;
        }
        self.state.step = step + 1;
        let since = &mut self.since;
        since.steps += 1;
        since.loss += loss;
        for (name, value) in &terms.named {
            *since.terms.entry(name).or_default() += scalar(value)?;
        }
        since.codes.add(&quantized.indices.flatten_all()?.to_vec1::<u32>()?);
        if !(step + 1).is_multiple_of(train.log_every.max(1)) && step + 1 != train.steps {
            return Ok(None);
        }
        let log = self.summary(norm, ["encoder.", "quantizer.", "decoder."].map(rate));
        self.append(&log)?;
        self.since = Since::now(no_codes(&self.config.model.quantizer));
        Ok(Some(log))
    }

    /// Lets a codebook that starts from features do so.
    fn begin(&self, pixels: &Tensor) -> Result<()> {
        let features = || self.network.latents(pixels);
        let mut choose = chooser(self.config.train.seed, "first codes", 0);
        self.set(self.network.quantizer.first(features, &mut choose)?)
    }

    /// Sets tensors of the quantizer that training changes without a gradient.
    fn set(&self, tensors: Tensors) -> Result<()> {
        for (name, tensor) in tensors {
            let name = format!("quantizer.{name}");
            let var = self.averages.get(&name).or_else(|| self.parameters.get(&name));
            let frozen = || Error::Training(format!("`{name}` has to change; raise groups.quantizer.peak from 0"));
            var.ok_or_else(frozen)?.set(&tensor)?;
        }
        Ok(())
    }

    fn summary(&self, gradient_norm: f64, rates: [f64; 3]) -> StepLog {
        let since = &self.since;
        let mean = |sum: f64| sum / since.steps as f64;
        let std = f64::from(self.preprocessor.image_std[0]);
        let terms: BTreeMap<_, _> = since.terms.iter().map(|(&name, &sum)| (name, mean(sum))).collect();
        let term = |name| terms.get(name).copied().unwrap_or_default();
        StepLog {
            step: self.state.step,
            steps: self.config.train.steps,
            loss: mean(since.loss),
            quantizer_loss: term("quantizer"),
            psnr: -10.0 * (term("reconstruction") * std * std).log10(),
            usage: since.codes.usage(),
            perplexity: since.codes.perplexity(),
            gradient_norm,
            rates,
            terms,
            images_per_step: self.config.train.batch_size,
            images_per_second: (since.steps * self.config.train.batch_size) as f64
                / since.begin.elapsed().as_secs_f64(),
        }
    }

    /// Reconstructs the validation photos; the best model so far is written to `model/`.
    fn validate(&mut self, photos: Option<&Photos>, tell: Observer) -> Result<()> {
        let Some(photos) = photos else { return self.export() };
        let size = self.sizes.crop();
        let centre = Preprocessor { resize_mode: ResizeMode::CenterCrop, size, ..self.preprocessor.clone() };
        let ((h, w), target) = (self.sizes.input, self.sizes.target);
        let mut codes = no_codes(&self.config.model.quantizer);
        let (mut sum, mut count, mut shown) = (0.0, 0, Vec::new());
        let network = self.untracked()?;
        for index in 0..photos.len() {
            let views = |image: Rgb| self.sizes.views(centre.prepare(&image)?, &centre);
            let prepare = |image: Rgb| views(image).map_err(|kind| photos.unusable(index, kind));
            let Views { input, target: original } = match photos.open(index).and_then(prepare) {
                Ok(views) => views,
                Err(error) => {
                    let _ = tell(Event::Note(&format!("skipped {error}")));
                    continue;
                }
            };
            let pixels = Tensor::from_vec(centre.normalize(&input), (1, 3, h, w), &Device::Cpu)?;
            let quantized = network.quantize(&pixels)?;
            let painted = network.paint(&quantized.tokens, network.grid(h, w)?, DType::F32)?;
            codes.add(&quantized.indices.flatten_all()?.to_vec1::<u32>()?);
            let painted = centre.denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, target.0, target.1);
            sum += metrics::psnr(&original, &painted).unwrap_or_default().min(100.0);
            count += 1;
            if index % photos.len().div_ceil(self.config.train.sheet_images.max(1)) == 0 {
                shown.push((original, painted));
            }
        }
        let log = ValidationLog {
            step: self.state.step,
            validation_psnr: sum / f64::from(count.max(1)),
            validation_usage: codes.usage(),
            validation_perplexity: codes.perplexity(),
        };
        self.append(&log)?;
        let _ = tell(Event::Validation(&log, &shown));
        if self.state.best.is_none_or(|(best, _)| log.validation_psnr > best) {
            self.state.best = Some((log.validation_psnr, self.state.step));
            self.export()?;
        }
        Ok(())
    }

    /// The network over the same weights without gradients.
    fn untracked(&self) -> Result<Network> {
        let all: HashMap<String, Tensor> = self.tensors().into_iter().map(|(name, t)| (name, t.detach())).collect();
        let model = &self.config.model;
        Ok(Network::load(VarBuilder::from_tensors(all, DType::F32, &Device::Cpu), &model.config())?)
    }

    fn tensors(&self) -> Tensors {
        let trained =
            self.parameters.iter().chain(&self.averages).map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        trained.chain(self.frozen.clone()).collect()
    }

    /// Writes `model/`, in the dtype that the config asks for.
    fn export(&self) -> Result<()> {
        let dtype = self.config.train.save_dtype()?;
        // Sums of many features may lie beyond the range of f16, and variances below it.
        let wide = |name: &str| self.averages.contains_key(name) || name.starts_with("latent.");
        let of = |name: &str| if wide(name) { DType::F32 } else { dtype };
        let cast = |(name, tensor): (String, Tensor)| {
            let tensor = tensor.to_dtype(of(&name))?;
            Ok((name, tensor))
        };
        let tensors = self.tensors().into_iter().map(cast).collect::<Result<Tensors>>()?;
        model::save(&self.output.join("model"), &self.config.model.config(), &self.preprocessor, &tensors)
    }

    fn checkpoint(&self) -> Result<()> {
        let keep = self.config.train.keep_checkpoints;
        checkpoint::write(self.output, &self.state, &self.tensors(), &self.optimizer.state()?, keep)
    }

    fn append(&self, line: &impl Serialize) -> Result<()> {
        let path = self.output.join("log.jsonl");
        let text = serde_json::to_string(line).map_err(|e| Error::config(&path, e))?;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        writeln!(file, "{text}").map_err(Error::io(&path))
    }
}

fn no_codes(quantizer: &quantizer::Config) -> CodeCounts {
    CodeCounts::new(quantizer.codebook_size(), quantizer.codes_per_token())
}

/// Names the first key in which a checkpoint's config differs.
fn other_config(old: &serde_json::Value, new: &serde_json::Value) -> Error {
    let pointer = difference(old, new, String::new()).unwrap_or_default();
    let reason = format!("the checkpoint was made with another `{pointer}`; train in a new --output-dir");
    Error::Training(reason)
}

fn difference(old: &serde_json::Value, new: &serde_json::Value, at: String) -> Option<String> {
    match (old.as_object(), new.as_object()) {
        (Some(a), Some(b)) => a.keys().chain(b.keys()).find_map(|key| {
            difference(&old[key], &new[key], format!("{at}.{key}").trim_start_matches('.').to_string())
        }),
        _ => (old != new).then_some(at),
    }
}

/// Draws different indices, the same for a seed, a purpose and a step.
fn chooser(seed: u64, purpose: &str, step: usize) -> impl FnMut(usize, usize) -> Vec<usize> {
    let mut random = data::generator(seed, purpose, step);
    move |n, amount| rand::seq::index::sample(&mut random, n, amount).into_vec()
}

/// A model's tensors by what training does to them: a group is trained when its rate is not zero.
struct Split {
    parameters: BTreeMap<String, Var>,
    averages: BTreeMap<String, Var>,
    frozen: Tensors,
}

impl Split {
    fn of(tensors: &Tensors, groups: &Groups, model: &model::Config) -> Result<Self> {
        let (mut parameters, mut averages, mut frozen) = (BTreeMap::new(), BTreeMap::new(), Tensors::new());
        for (name, tensor) in tensors {
            let tensor = tensor.to_dtype(DType::F32)?;
            let of_quantizer = name.strip_prefix("quantizer.");
            let never_changes =
                name.starts_with("latent.") || of_quantizer.is_some_and(|name| model.quantizer.is_frozen(name));
            if never_changes || groups.of(name).peak == 0.0 {
                frozen.insert(name.clone(), tensor);
            } else if of_quantizer.is_some_and(|name| model.quantizer.is_average(name)) {
                averages.insert(name.clone(), Var::from_tensor(&tensor)?);
            } else {
                parameters.insert(name.clone(), Var::from_tensor(&tensor)?);
            }
        }
        Ok(Self { parameters, averages, frozen })
    }
}

/// Drops the lines of steps that will be done again, and a line that a kill cut in half.
fn trim_log(path: &Path, step: usize) -> Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    let kept = |line: &&str| {
        let parsed: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        step > 0 && parsed["step"].as_u64().is_some_and(|s| s as usize <= step)
    };
    let lines: String = text.lines().filter(kept).map(|line| format!("{line}\n")).collect();
    files::write_whole(path, lines.as_bytes()).map_err(Error::io(path))
}
