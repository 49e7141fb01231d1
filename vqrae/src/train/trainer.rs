//! A step of training: forward, backward, guard, clip, AdamW, averages.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use rand::RngCore;

use super::averaging::WeightAverage;
use super::blocks::Blocks;
use super::checkpoint::{self, Checkpoint, State};
use super::config::{Config, GROUPS};
use super::data::{self, Batch, Photos, Sizes};
use super::gan::{Gan, LastLayer};
use super::guard;
use super::log::{Event, Journal, Observer, StepLog, Window};
use super::loss::{Losses, RECONSTRUCTION, Seen};
use super::optimizer::{self, AdamW, Gradients};
use super::parameters::Parameters;
use super::ranks::{Ranks, share};
use super::stage::{Stage, Teacher};
use crate::error::{Error, Result};
use crate::files;
use crate::image::Preprocessor;
use crate::metrics::CodeCounts;
use crate::model::{self, Network};
use crate::quantizer::{self, Quantized};
use crate::weights::Tensors;

/// A rank of a run between two steps.
pub(super) struct Trainer<'a> {
    pub(super) ranks: Rc<dyn Ranks>,
    pub(super) config: &'a Config,
    pub(super) output: &'a Path,
    pub(super) preprocessor: Preprocessor,
    /// The sizes that steps choose from.
    pub(super) buckets: Vec<Sizes>,
    pub(super) parameters: Parameters,
    pub(super) average: Option<WeightAverage>,
    pub(super) state: State,
    /// Of the rank that speaks for all.
    pub(super) journal: Option<Journal>,
    network: Network,
    blocks: Blocks,
    teacher: Option<Teacher>,
    losses: Losses,
    gan: Option<Gan>,
    optimizer: AdamW,
    window: Window,
    skipped_photos: usize,
}

/// What the parts of a batch give together.
#[derive(Default)]
pub(super) struct Sum {
    pub(super) loss: f64,
    pub(super) terms: BTreeMap<&'static str, f64>,
    pub(super) gradients: Gradients,
    pub(super) codes: Vec<u32>,
    /// Kept for moving averages alone.
    quantized: Vec<Quantized>,
    /// Kept for the discriminator alone.
    painted: Vec<Tensor>,
    /// Norm of the discriminator's gradients, if it has learnt.
    discriminator_norm: Option<f64>,
}

impl<'a> Trainer<'a> {
    /// From what [`Config::start_model`] gives.
    pub(super) fn new(
        ranks: Rc<dyn Ranks>,
        config: &'a Config,
        (model, preprocessor, start): (model::Config, Preprocessor, Tensors),
        output: &'a Path,
        found: Option<Checkpoint>,
    ) -> Result<Self> {
        let device = ranks.device();
        let as_json = serde_json::to_value(config).map_err(|e| Error::config("config", e))?;
        let buckets = config.train.buckets(preprocessor.size, &model)?;
        let distillation = config.stage.as_ref().and_then(Stage::distillation);
        let of_start = |wanted| Teacher::of(wanted, config.start.folder(), &config.model.encoder, device);
        let mut teacher = distillation.map(of_start).transpose()?.flatten();
        if let Some(teacher) = &mut teacher {
            teacher.multiply_in(config.train.compute);
        }
        let hash = teacher.as_ref().map(|teacher| teacher.hash.clone());
        let mut gan = config.start_gan(&preprocessor, ranks.clone())?;
        let (tensors, moments, average, state) = match found {
            None => {
                let guard = guard::Seen::default();
                (start, None, None, State { step: 0, best: None, config: as_json, guard, teacher: hash })
            }
            Some(Checkpoint { state, model, optimizer, average, gan: of_gan }) => {
                check_config(&state.config, as_json)?;
                if state.teacher != hash {
                    let reason = "the distillation's teacher is another one than when this run began; put the folder back, or \
                                  train in a new --output-dir";
                    return Err(Error::Training(reason.into()));
                }
                if let Some(gan) = &mut gan {
                    gan.load_state(of_gan.unwrap_or_default())?;
                }
                (model, Some(optimizer), average, state)
            }
        };
        let parameters = Parameters::of(&tensors, &config.groups, &model, device)?;
        let mut network = Network::load(VarBuilder::from_tensors(parameters.tracked(), DType::F32, device), &model)?;
        network.multiply_in(config.train.compute);
        let blocks = Blocks::new(config.train.checkpoint_blocks);
        let runner: Arc<dyn crate::vit::RunBlock> = Arc::new(blocks.clone());
        network.run_by(&runner);
        if let Some(latent) = &network.latent {
            buckets.iter().try_for_each(|sizes| latent.check_grid(network.grid(sizes.input.0, sizes.input.1)?))?;
        }
        let mut optimizer = AdamW::new(config.optimizer, &parameters.trained)?;
        if let Some(moments) = moments {
            optimizer.load_state(moments)?;
        }
        let mut shadow = match config.train.ema_decay {
            0.0 => None,
            _ => Some(WeightAverage::new(&parameters.trained)?),
        };
        if let (Some(shadow), true) = (&mut shadow, state.step > 0) {
            shadow.load(average.unwrap_or_default())?;
        }
        let journal = ranks.is_first().then(|| begin_folder(config, output, state.step)).transpose()?;
        let distilled = distillation.map(|wanted| (wanted.target, wanted.weight));
        let losses = Losses::open(&config.loss, distilled, device)?;
        let window = Window::now(no_codes(&model.quantizer));
        let average = shadow;
        #[rustfmt::skip]
        let trainer = Self {
            ranks, config, output, preprocessor, buckets, parameters, average, state, journal, network, blocks, teacher, losses,
            gan, optimizer, window, skipped_photos: 0,
        };
        Ok(trainer)
    }

    /// The run's settings, before the first step.
    pub(super) fn table(&self, photos: &Photos, tell: Observer) {
        let (mut decayed, mut spared) = (0, 0);
        for (name, var) in &self.parameters.trained {
            *(if optimizer::decays(name, var.rank()) { &mut decayed } else { &mut spared }) += var.elem_count();
        }
        let frozen: usize = self.parameters.frozen.values().map(Tensor::elem_count).sum();
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
        let encoder = &self.config.model.encoder;
        let grids = self.buckets.iter().map(|sizes| (sizes.input.0 / encoder.patch(), sizes.input.1 / encoder.patch()));
        let other = grids.filter(|grid| *grid != encoder.grid());
        let interpolated = other.map(|(h, w)| {
            let (h0, w0) = encoder.grid();
            format!("the encoder's positions, made for {h0}x{w0} patches, are interpolated to {h}x{w}")
        });
        for line in lines.into_iter().chain(interpolated) {
            let _ = tell(Event::Note(&line));
        }
    }

    /// Forward, backward, guard, clip, step. Returns a line of the log when one is due.
    pub(super) fn step(
        &mut self,
        step: usize,
        batch: Batch,
        waited: Duration,
        tell: Observer,
    ) -> Result<Option<StepLog>> {
        let skipped = self.ranks.lines(batch.skipped.iter().map(|photo| photo.reason.clone()).collect())?;
        for reason in &skipped {
            let _ = tell(Event::Note(&format!("skipped {reason}")));
        }
        self.skipped_photos += skipped.len();
        self.window.begin(waited);
        let train = &self.config.train;
        let size = train.batch_size / self.ranks.size();
        let tensor = |values, (h, w)| Tensor::from_vec(values, (size, 3, h, w), self.ranks.device());
        let Batch { inputs, targets, sizes, .. } = batch;
        let pixels = tensor(inputs, sizes.input)?;
        let target = if targets.is_empty() { pixels.clone() } else { tensor(targets, sizes.target)? };
        if step == 0 {
            self.begin(&pixels)?;
        }
        let mut sum = Sum::default();
        for (pixels, target) in self.parts(&pixels)?.iter().zip(self.parts(&target)?) {
            self.part(step, pixels, &target, sizes, &mut sum)?;
        }
        sum.share(&*self.ranks, train.accumulate)?;
        let (loss, norm) = (sum.loss, sum.gradients.norm()?);
        let taken = step - self.state.guard.skipped;
        self.state.step = step + 1;
        if let Err(reason) = self.state.guard.judge(loss, norm, train.guard) {
            self.skip(step, &reason, tell)?;
        } else {
            let rate = |name: &str| self.config.groups.of(name).at(step, train.warmup_steps, train.steps);
            self.optimizer.step(&self.parameters.trained, &sum.gradients, taken, rate)?;
            self.move_averages(step, &sum.quantized)?;
            self.discriminate(step, &target, &mut sum)?;
            self.window.take(loss, &sum.terms, &sum.codes);
        }
        if !(step + 1).is_multiple_of(train.log_every.max(1)) && step + 1 != train.steps {
            return Ok(None);
        }
        let mut norms = sum.gradients.norms()?;
        norms.extend(sum.discriminator_norm.map(|norm| ("discriminator".to_string(), norm)));
        let log = self.summary(step, norm, norms);
        if let Some(journal) = &mut self.journal {
            journal.append(&log)?;
        }
        self.window = Window::now(no_codes(&self.config.model.quantizer));
        Ok(Some(log))
    }

    /// The parts of a batch that gradients are accumulated over.
    fn parts(&self, batch: &Tensor) -> Result<Vec<Tensor>> {
        let parts = self.config.train.accumulate;
        let size = batch.dim(0)? / parts;
        Ok((0..parts).map(|part| batch.narrow(0, part * size, size)).collect::<candle_core::Result<_>>()?)
    }

    /// Forward and backward pass of one part.
    fn part(&self, step: usize, pixels: &Tensor, target: &Tensor, sizes: Sizes, sum: &mut Sum) -> Result<()> {
        let network = &self.network;
        let grid = network.grid(sizes.input.0, sizes.input.1)?;
        // One seed for all parts, so that they draw what the whole batch would.
        let seed = data::generator(self.config.train.seed, "quantizer", step).next_u64();
        let states = network.encoder.forward(pixels)?;
        let features = network.fuse(&states)?;
        let quantized = network.quantizer.quantize_in_training(&network.latents_of(&features, grid)?, seed)?;
        let hidden = network.hidden(&quantized.tokens, grid, DType::F32)?;
        let painted = network.decoder.head(&hidden, grid)?;
        let teacher = self.teacher.as_ref().map(|teacher| teacher.forward(pixels)).transpose()?;
        let mut terms = self.losses.terms(&Seen {
            pixels: target,
            painted: &painted,
            preprocessor: &self.preprocessor,
            states: &states,
            features: &features,
            quantized: &quantized,
            quantizer: &network.quantizer,
            teacher: teacher.as_ref(),
        })?;
        if let Some(gan) = &self.gan {
            let last_layer = || self.last_layer(&hidden, target, grid);
            let parts_before = self.ranks.rank() * self.config.train.accumulate + sum.painted.len();
            let first = parts_before * pixels.dim(0)?;
            if let Some(generator) = gan.generator_term(&painted, step, first, last_layer)? {
                terms.total = (terms.total + generator.term)?;
                *sum.terms.entry("generator").or_default() += generator.loss;
                *sum.terms.entry("generator_weight").or_default() += generator.weight;
            }
            sum.painted.push(painted.detach());
        }
        sum.gradients.add(Gradients::of(&self.parameters.trained, self.blocks.backward(&terms.total)?)?)?;
        let scalar = |tensor: &Tensor| Ok::<f64, Error>(f64::from(tensor.to_scalar::<f32>()?));
        sum.loss += scalar(&terms.total)?;
        for (name, term) in &terms.named {
            *sum.terms.entry(name).or_default() += scalar(term)?;
        }
        sum.codes.extend(quantized.indices.flatten_all()?.to_vec1::<u32>()?);
        if !self.parameters.averages.is_empty() {
            sum.quantized.push(detached(&quantized));
        }
        Ok(())
    }

    /// The decoder's head by itself, over the same hidden states, for an adaptive weight.
    fn last_layer(&self, hidden: &Tensor, target: &Tensor, grid: (usize, usize)) -> Result<LastLayer<'_>> {
        const NAME: &str = "decoder.head.weight";
        let frozen = || Error::Training(format!("gan.adaptive needs `{NAME}` to be trained"));
        let weight = self.parameters.trained.get(NAME).ok_or_else(frozen)?;
        let painted = self.network.decoder.head(&hidden.detach(), grid)?;
        let no_quantizer = Tensor::zeros((), DType::F32, self.ranks.device())?;
        let terms = self.losses.of_pixels(&self.preprocessor, target, &painted, no_quantizer)?;
        Ok(LastLayer { weight, painted, reconstruction: terms.total })
    }

    /// The discriminator's step, on all parts of the batch.
    fn discriminate(&mut self, step: usize, target: &Tensor, sum: &mut Sum) -> Result<()> {
        let Some(gan) = &mut self.gan else { return Ok(()) };
        let painted = Tensor::cat(&std::mem::take(&mut sum.painted), 0)?;
        let Some(log) = gan.discriminator_step(target, &painted, step)? else { return Ok(()) };
        sum.discriminator_norm = Some(log.gradient_norm);
        sum.terms.extend([
            ("discriminator", log.loss),
            ("lecam", log.lecam),
            ("logits_real", log.logits_real),
            ("logits_fake", log.logits_fake),
        ]);
        Ok(())
    }

    /// What follows a step that was taken: the quantizer's moving averages, and those of the weights.
    fn move_averages(&mut self, step: usize, parts: &[Quantized]) -> Result<()> {
        if !self.parameters.averages.is_empty() {
            let mut choose = chooser(self.config.train.seed, "dead codes", step);
            let batch = share::Batch(&*self.ranks);
            self.set(self.network.quantizer.update_shared(&joined(parts)?, &batch, &mut choose)?)?;
        }
        match &mut self.average {
            Some(average) => average.follow(&self.parameters.trained, self.config.train.ema_decay),
            None => Ok(()),
        }
    }

    /// Weights, moments and averages stay; too many such steps in a row end the run.
    fn skip(&self, step: usize, reason: &str, tell: Observer) -> Result<()> {
        let _ = tell(Event::Note(&format!("step {} is skipped: {reason}", step + 1)));
        let (in_a_row, most) = (self.state.guard.in_a_row, self.config.train.max_skipped);
        if in_a_row <= most {
            return Ok(());
        }
        let last = match checkpoint::newest_folder(self.output)? {
            Some(folder) => format!("the last good checkpoint is {}", folder.display()),
            None => "there is no checkpoint yet".to_string(),
        };
        Err(Error::Training(format!(
            "step {}: {reason}; {in_a_row} steps in a row were skipped, more than train.max_skipped = {most}; {last}: go on from \
             it with a lower learning rate",
            step + 1
        )))
    }

    /// Lets a codebook that starts from features do so; the average of the weights follows from there.
    fn begin(&mut self, pixels: &Tensor) -> Result<()> {
        let features = || {
            let parts = self.parts(pixels).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
            let parts = parts.iter().map(|part| Ok(self.network.latents(part)?.detach()));
            let own = Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
            self.ranks.join(&own).map_err(candle_core::Error::wrap)
        };
        let mut choose = chooser(self.config.train.seed, "first codes", 0);
        self.set(self.network.quantizer.first(features, &mut choose)?)?;
        if let Some(average) = &mut self.average {
            *average = WeightAverage::new(&self.parameters.trained)?;
        }
        Ok(())
    }

    /// Sets tensors of the quantizer that training changes without a gradient.
    fn set(&self, tensors: Tensors) -> Result<()> {
        for (name, tensor) in tensors {
            let name = format!("quantizer.{name}");
            let var = self.parameters.averages.get(&name).or_else(|| self.parameters.trained.get(&name));
            let frozen = || Error::Training(format!("`{name}` has to change; raise groups.quantizer.peak from 0"));
            var.ok_or_else(frozen)?.set(&tensor)?;
        }
        Ok(())
    }

    fn summary(&self, step: usize, gradient_norm: f64, gradient_norms: BTreeMap<String, f64>) -> StepLog {
        let (train, groups) = (&self.config.train, &self.config.groups);
        let std = f64::from(self.preprocessor.image_std[0]);
        let rate = |group: &str| (group.to_string(), groups.of(group).at(step, train.warmup_steps, train.steps));
        let of_discriminator = self.gan.as_ref().map(|gan| ("discriminator".to_string(), gan.rate(step)));
        StepLog {
            step: step + 1,
            steps: train.steps,
            psnr: -10.0 * (self.window.mean(RECONSTRUCTION) * std * std).log10(),
            gradient_norm,
            gradient_norms,
            rates: GROUPS.iter().map(|group| rate(group)).chain(of_discriminator).collect(),
            skipped_steps: self.state.guard.skipped,
            skipped_photos: self.skipped_photos,
            ..self.window.log(train.batch_size)
        }
    }

    /// Writes a checkpoint, once all ranks hold the same.
    pub(super) fn checkpoint(&self) -> Result<()> {
        let average = self.average.as_ref().map(|average| average.tensors(&self.parameters.trained)).transpose()?;
        let (model, optimizer) = (self.parameters.tensors()?, self.optimizer.state()?);
        let gan = self.gan.as_ref().map(Gan::state).transpose()?;
        let all = [Some(&model), Some(&optimizer), average.as_ref(), gan.as_ref()];
        share::agree(&*self.ranks, all.into_iter().flatten())?;
        if !self.ranks.is_first() {
            return Ok(());
        }
        let checkpoint = Checkpoint { state: self.state.clone(), model, optimizer, average, gan };
        checkpoint::write(self.output, &checkpoint, self.config.train.keep_checkpoints)
    }
}

/// Writes `config.toml` and opens the log.
fn begin_folder(config: &Config, output: &Path, step: usize) -> Result<Journal> {
    let text = toml::to_string_pretty(config).map_err(|e| Error::config("config.toml", e))?;
    let path = output.join("config.toml");
    files::write_whole(&path, text.as_bytes()).map_err(Error::io(&path))?;
    Journal::open(output, step, config.train.tensorboard)
}

/// Without the graph that made it.
fn detached(quantized: &Quantized) -> Quantized {
    let Quantized { tokens, indices, projected, codes } = quantized;
    Quantized {
        tokens: tokens.detach(),
        indices: indices.clone(),
        projected: projected.detach(),
        codes: codes.detach(),
    }
}

/// What the whole batch has quantised.
fn joined(parts: &[Quantized]) -> Result<Quantized> {
    if let [one] = parts {
        return Ok(one.clone());
    }
    let cat = |of: fn(&Quantized) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0);
    Ok(Quantized {
        tokens: cat(|part| &part.tokens)?,
        indices: cat(|part| &part.indices)?,
        projected: cat(|part| &part.projected)?,
        codes: cat(|part| &part.codes)?,
    })
}

pub(super) fn no_codes(quantizer: &quantizer::Config) -> CodeCounts {
    CodeCounts::new(quantizer.codebook_size(), quantizer.codes_per_token())
}

/// Refuses a checkpoint of another config, and names the first key that differs. One that an older version wrote lacks keys;
/// it meant their defaults.
fn check_config(old: &serde_json::Value, new: serde_json::Value) -> Result<()> {
    let filled = serde_json::from_value::<Config>(old.clone()).and_then(serde_json::to_value);
    let old = filled.unwrap_or_else(|_| old.clone());
    if old == new {
        return Ok(());
    }
    let pointer = difference(&old, &new, String::new()).unwrap_or_default();
    let reason = format!("the checkpoint was made with another `{pointer}`; train in a new --output-dir");
    Err(Error::Training(reason))
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
