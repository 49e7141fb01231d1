//! What a run is to do: a TOML file, and `key=value` overrides.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use candle_core::DType;
use serde::{Deserialize, Serialize};

use super::data::{Photos, ResizedCrop, Sizes};
use super::gan::{self, Gan};
use super::loss;
use super::optimizer;
use super::ranks::Ranks;
use super::schedule::Rate;
use super::stage::Stage;
use super::{Event, Observer, start};
use crate::error::{Error, Result};
use crate::image::{Preprocessor, Resample, ResizeMode};
use crate::init::Wishes;
use crate::model::{self, fresh_tensors};
use crate::ops::Precision;
use crate::weights::{self, Tensors};
use crate::{decoder, encoder, latent, quantizer, recipe};

/// The whole of a run's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the weights come from.
    pub start: Start,
    /// Which of the paper's stages this is; where it is not said, what the rates make of it, without a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// How long, how large, how often.
    pub train: Run,
    /// The weights of the loss terms.
    #[serde(default)]
    pub loss: loss::Weights,
    /// The adversarial part, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gan: Option<gan::Config>,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: optimizer::Config,
    /// Learning rates.
    pub groups: Groups,
    /// The model; when a run starts from a folder, the folder's.
    pub model: Model,
}

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Start {
    /// A model folder, as `init` makes it of a pretrained encoder; a `model` section must say the same as its
    /// `config.json`.
    Folder {
        /// The folder.
        path: PathBuf,
    },
    /// Random weights.
    Random,
    /// The best linear tokenizer of the photos; see [`start`].
    PrincipalComponents(start::Config),
}

impl Start {
    /// The model folder that the run starts from, if it does.
    pub(super) fn folder(&self) -> Option<&Path> {
        match self {
            Self::Folder { path } => Some(path),
            _ => None,
        }
    }
}

/// The model to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The encoder.
    pub encoder: encoder::Config,
    /// The quantizer.
    pub quantizer: quantizer::Config,
    /// The decoder; what is not said mirrors the encoder.
    #[serde(default)]
    pub decoder: decoder::Config,
    /// The normalisation of features before the quantizer, whose statistics a start from a folder has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<latent::Config>,
}

impl Model {
    fn of_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let model::Config { encoder, quantizer, decoder, latent, .. } = model::Config::from_json(&text, &path)?;
        Ok(Self { encoder, quantizer, decoder, latent })
    }

    /// As `config.json` has it.
    pub fn config(&self) -> model::Config {
        let (encoder, quantizer, decoder) = (self.encoder.clone(), self.quantizer.clone(), self.decoder.clone());
        model::Config { latent: self.latent, ..model::Config::new(encoder, quantizer, decoder) }
    }
}

/// How long, how large, how often.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Run {
    /// Steps of the whole run.
    pub steps: usize,
    /// Images a step, of all ranks together.
    pub batch_size: usize,
    /// Parts in which a rank's images of a step go through the network, their gradients summed: less memory, the same step.
    /// What compares the images of a batch (entropies, dynamic STE) sees a part of a rank at a time.
    pub accumulate: usize,
    /// What the products of the blocks read, forwards and backwards: `f32`, or `bf16`, which is faster where the processor has
    /// instructions for it. Weights, sums, norms, softmax, quantizer, losses and optimizer are f32 either way.
    pub compute: Precision,
    /// Steps in which the learning rates rise, of groups that do not say their own.
    pub warmup_steps: usize,
    /// Seed of weights, order and crops.
    pub seed: u64,
    /// Steps between lines of the log.
    pub log_every: usize,
    /// Steps between validations; 0 for the end only.
    pub validate_every: usize,
    /// Steps between checkpoints; 0 for the end only.
    pub checkpoint_every: usize,
    /// Checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// Photos on a validation sheet.
    pub sheet_images: usize,
    /// How the trained model brings photos to its size; training itself crops at random.
    pub resize_mode: ResizeMode,
    /// Dtype of the model that is written: `f32` or `f16`.
    pub save_dtype: String,
    /// γ of a moving average of the weights, which is validated and written in their place; zero keeps none.
    pub ema_decay: f64,
    /// A step whose gradient's norm is above this many times the median of the last hundred is skipped; zero skips only steps
    /// whose loss or gradient is not finite.
    pub guard: f64,
    /// More skipped steps in a row than this end the run.
    pub max_skipped: usize,
    /// Whether a block keeps only its input for the backward pass, which computes the rest again: the same gradients, less
    /// memory, a third to a half more time.
    pub checkpoint_blocks: bool,
    /// Sizes of training images, `HEIGHTxWIDTH`, of which every step draws one; the encoder's own where there are none.
    pub sizes: Vec<String>,
    /// Random resized crops; where it is not said, the short side is brought to the crop's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<ResizedCrop>,
    /// Whether to write TensorBoard's files too.
    pub tensorboard: bool,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch_size: 16,
            compute: Precision::F32,
            warmup_steps: 100,
            seed: 0,
            log_every: 20,
            validate_every: 200,
            checkpoint_every: 200,
            keep_checkpoints: 2,
            sheet_images: 16,
            resize_mode: ResizeMode::Squash,
            save_dtype: "f32".to_string(),
            accumulate: 1,
            ema_decay: 0.0,
            guard: 0.0,
            max_skipped: 10,
            checkpoint_blocks: false,
            sizes: Vec::new(),
            crop: None,
            tensorboard: true,
        }
    }
}

impl Run {
    pub(super) fn save_dtype(&self) -> Result<DType> {
        match self.save_dtype.as_str() {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            other => Err(Error::Training(format!("train.save_dtype is `{other}`, expected: `f32` or `f16`"))),
        }
    }

    /// The sizes that steps choose from; `own` where the config names none.
    pub(super) fn buckets(&self, own: (usize, usize), model: &model::Config) -> Result<Vec<Sizes>> {
        let sides = |text: &str| text.split_once('x').and_then(|(h, w)| Some((h.parse().ok()?, w.parse().ok()?)));
        let wrong =
            |text: &str| Error::Training(format!("train.sizes has `{text}`, expected: HEIGHTxWIDTH, as 256x256"));
        let size = |text: &String| Sizes::of(sides(text).ok_or_else(|| wrong(text))?, model);
        match self.sizes.is_empty() {
            true => Ok(vec![Sizes::of(own, model)?]),
            false => self.sizes.iter().map(size).collect(),
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.batch_size == 0 || self.batch_size > 1 << 16 {
            return Err(format!("train.batch_size is {}, expected: 1 to 65536", self.batch_size));
        }
        if self.accumulate == 0 || !self.batch_size.is_multiple_of(self.accumulate) {
            let (parts, size) = (self.accumulate, self.batch_size);
            return Err(format!("train.accumulate is {parts}, expected: a divisor of train.batch_size = {size}"));
        }
        if !(0.0..1.0).contains(&self.ema_decay) {
            return Err(format!("train.ema_decay is {}, expected: 0 or more, less than 1", self.ema_decay));
        }
        if !(self.guard >= 0.0 && self.guard.is_finite()) {
            return Err(format!("train.guard is {}, expected: 0 or more", self.guard));
        }
        self.crop.map_or(Ok(()), |crop| crop.check())?;
        self.save_dtype().map(|_| ()).map_err(|e| e.to_string())
    }
}

/// The groups of parameters, each with a rate of its own.
pub(super) const GROUPS: [&str; 3] = ["encoder", "quantizer", "decoder"];

/// The group of a parameter, by its name.
pub(super) fn group(name: &str) -> &'static str {
    match name.split('.').next() {
        Some("encoder") => "encoder",
        Some("quantizer" | "fusion") => "quantizer",
        Some("discriminator") => "discriminator",
        _ => "decoder",
    }
}

/// The learning rates of the groups; a peak of zero freezes one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Of `encoder.…`; stage 1 of the paper has zero.
    pub encoder: Rate,
    /// Of `quantizer.…` and `fusion.…`, which is trained where the encoder is frozen.
    pub quantizer: Rate,
    /// Of `decoder.…`.
    pub decoder: Rate,
    /// Of the discriminator of the `gan` section, from the step on that it starts in; its warm-up and its cosine begin there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discriminator: Option<Rate>,
}

impl Groups {
    /// The rate of a parameter. `discriminator.…` is no part of a model and frozen as far as this goes.
    pub fn of(&self, name: &str) -> Rate {
        match group(name) {
            "encoder" => self.encoder,
            "quantizer" => self.quantizer,
            "discriminator" => Rate::FROZEN,
            _ => self.decoder,
        }
    }
}

impl Config {
    /// Reads a TOML file and applies overrides such as `train.steps=200`. Where a run starts from a folder, the file may
    /// leave the model to the folder, or have the [`Wishes`] that the folder was made with.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut table = recipe::read(path, overrides)?;
        if let Some(folder) = start_folder(&table).filter(|_| !is_whole(table.get("model"))) {
            let model = Model::of_folder(&folder)?;
            if let Some(wishes) = table.get("model") {
                let wishes = Wishes::of(wishes).map_err(|reason| Error::config(path, reason))?;
                wishes.check(&model.config()).map_err(|key| other_folder(&folder, key, path))?;
            }
            let model = toml::Value::try_from(model).map_err(|e| Error::config(path, e))?;
            table.insert("model".to_string(), model);
        }
        let config: Self = toml::Value::Table(table).try_into().map_err(|e| Error::config(path, e))?;
        config.check().map_err(|reason| Error::config(path, reason))?;
        Ok(config)
    }

    fn check(&self) -> std::result::Result<(), String> {
        self.model.config().check()?;
        if self.model.latent.is_some() && !matches!(self.start, Start::Folder { .. }) {
            return Err("model.latent needs statistics; set start.from = \"folder\", a folder that `init` made with \
                        --latent-statistics"
                .to_string());
        }
        let (train, optimizer) = (&self.train, &self.optimizer);
        let groups = &self.groups;
        let of_model = [("encoder", groups.encoder), ("quantizer", groups.quantizer), ("decoder", groups.decoder)];
        for (name, rate) in of_model.into_iter().chain(groups.discriminator.map(|rate| ("discriminator", rate))) {
            if !(rate.peak.is_finite() && rate.end.is_finite() && rate.peak >= 0.0 && rate.end >= 0.0) {
                return Err(format!("groups.{name}: rates must be 0 or more, got: {} and {}", rate.peak, rate.end));
            }
        }
        if optimizer.max_grad_norm <= 0.0 {
            return Err(format!("optimizer.max_grad_norm is {}, expected: more than 0", optimizer.max_grad_norm));
        }
        self.loss.check()?;
        self.check_gan()?;
        if let Some(stage) = &self.stage {
            stage.check(self.groups.encoder.peak, &self.model.config())?;
        }
        train.check()
    }

    fn check_gan(&self) -> std::result::Result<(), String> {
        let Some(gan) = &self.gan else {
            let stray = self.groups.discriminator.is_some();
            return if stray {
                Err("groups.discriminator is set, but there is no [gan] section".into())
            } else {
                Ok(())
            };
        };
        if !self.groups.discriminator.is_some_and(|rate| rate.peak > 0.0) {
            return Err("the [gan] section needs a rate: set groups.discriminator = { peak = 4e-5, end = 1e-5 }".into());
        }
        if gan.adaptive && self.groups.decoder.peak == 0.0 {
            return Err("gan.adaptive needs a decoder that is trained; raise groups.decoder.peak from 0".into());
        }
        gan.check()
    }

    /// The adversarial part at its beginning, if the run has one.
    pub(super) fn start_gan(&self, preprocessor: &Preprocessor, ranks: Rc<dyn Ranks>) -> Result<Option<Gan>> {
        let (Some(gan), Some(rate)) = (&self.gan, self.groups.discriminator) else { return Ok(None) };
        let Run { steps, warmup_steps, seed, .. } = self.train;
        let [mean, std] = preprocessor.unit_mean_and_std();
        let settings = gan::Settings { steps, warmup_steps, rate, optimizer: self.optimizer, seed, mean, std };
        Gan::among(ranks, gan, settings).map(Some)
    }

    /// The model's config, its preprocessor and the tensors of step 0 (none when a checkpoint `resumes`).
    pub(super) fn start_model(
        &self,
        photos: &Photos,
        resumes: bool,
        tell: Observer,
    ) -> Result<(model::Config, Preprocessor, Tensors)> {
        let (config, preprocessor) = (self.model.config(), self.preprocessor()?);
        if resumes {
            return Ok((config, preprocessor, Tensors::new()));
        }
        let tensors = match &self.start {
            Start::Folder { path } => weights::read(path)?,
            Start::Random => fresh_tensors(&config, Tensors::new(), self.train.seed)?,
            Start::PrincipalComponents(start) => {
                let mut tensors = fresh_tensors(&config, Tensors::new(), self.train.seed)?;
                let note = |text: &str| {
                    let _ = tell(Event::Note(text));
                };
                let seed = self.train.seed;
                start::principal_components(&mut tensors, &config, start, photos, &preprocessor, seed, note)?;
                tensors
            }
        };
        Ok((config, preprocessor, tensors))
    }

    /// How photos become the encoder's input.
    pub(super) fn preprocessor(&self) -> Result<Preprocessor> {
        let mut preprocessor = Preprocessor::siglip(self.model.encoder.image_size(), Resample::Bicubic);
        preprocessor = preprocessor.by(self.train.resize_mode, self.model.encoder.patch());
        if let Start::Folder { path } = &self.start {
            if Model::of_folder(path)? != self.model {
                return Err(Error::config(path, "its config.json differs from the run's [model] section"));
            }
            preprocessor = Preprocessor::from_file(&path.join("preprocessor_config.json"))?;
        }
        Ok(preprocessor)
    }
}

fn start_folder(table: &toml::Table) -> Option<PathBuf> {
    let start = table.get("start")?;
    let folder = start.get("from")?.as_str()? == "folder";
    folder.then(|| start.get("path")?.as_str().map(PathBuf::from))?
}

/// Whether a `model` section says all of a model, and not only what is wished of a new one.
fn is_whole(model: Option<&toml::Value>) -> bool {
    model.and_then(|model| model.get("encoder")?.get("model_type")).is_some()
}

fn other_folder(folder: &Path, key: &str, recipe: &Path) -> Error {
    let recipe = recipe.display();
    let reason =
        format!("its `{key}` is not that of {recipe}; make the folder with `vqrae-cli init --config {recipe}`");
    Error::config(folder.join("config.json"), reason)
}
