//! The two stages of VQRAE (arXiv 2511.23386, §3.3), and what holds the encoder in the second: a frozen teacher.
//!
//! | `stage.name` | encoder | teacher |
//! |---|---|---|
//! | `codebook` | frozen, and run without a graph | none |
//! | `joint` | trained at a rate of its own | the encoder as it was before any training, run without a graph |

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::loss::Seen;
use crate::encoder::{self, Encoder};
use crate::error::{Error, Result};
use crate::model;
use crate::ops::Precision;
use crate::weights::{self, Tensors};

/// Which stage of the training a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Stage {
    /// Stage 1: the encoder is frozen; quantizer and decoder learn.
    Codebook,
    /// Stage 2: all learns.
    Joint {
        /// What keeps the encoder's features what they were.
        #[serde(default)]
        distillation: Distillation,
    },
}

/// What keeps the features of an encoder that is trained what they were.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Of the term in the loss; zero is none, and then understanding is lost (the paper's Table 6).
    pub weight: f64,
    /// What is compared.
    pub target: Target,
    /// A folder of the original encoder, or of a model that has it; the model folder that the run starts from where it is
    /// not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
}

impl Default for Distillation {
    fn default() -> Self {
        Self { weight: 1.0, target: Target::default(), teacher: None }
    }
}

/// What distillation compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The encoder's output with the teacher's: `mean ‖Z_I − T(X)‖²`, the paper's. Where features are fused of two states,
    /// both are compared.
    #[default]
    Continuous,
    /// The quantizer's output with the features that went in, these detached: `mean ‖Z_q − sg(Z_I)‖²`, as the starting
    /// document has it. It holds the codes to the features and not the features to anything.
    Quantized,
}

impl Target {
    /// The term, a scalar.
    pub(super) fn compare(self, seen: &Seen) -> candle_core::Result<Tensor> {
        match (self, seen.teacher) {
            (Self::Continuous, Some(teacher)) => (seen.states - teacher)?.sqr()?.mean_all(),
            (Self::Continuous, None) => candle_core::bail!("distillation has no teacher"),
            (Self::Quantized, _) => (&seen.quantized.tokens - seen.features.detach())?.sqr()?.mean_all(),
        }
    }
}

impl Stage {
    /// What is distilled, if anything.
    pub fn distillation(&self) -> Option<&Distillation> {
        match self {
            Self::Joint { distillation } => Some(distillation).filter(|distillation| distillation.weight > 0.0),
            Self::Codebook => None,
        }
    }

    /// Whether the stage and the rates say the same; the error names the key.
    pub(super) fn check(&self, encoder_peak: f64, model: &model::Config) -> std::result::Result<(), String> {
        let Self::Joint { distillation } = self else {
            return match encoder_peak == 0.0 {
                true => Ok(()),
                false => Err("stage.name = \"codebook\" keeps the encoder frozen; set groups.encoder.peak = 0, or \
                              stage.name = \"joint\""
                    .into()),
            };
        };
        if encoder_peak == 0.0 {
            return Err(
                "stage.name = \"joint\" trains the encoder; give groups.encoder.peak a rate (the paper has 1e-5)"
                    .into(),
            );
        }
        if !(distillation.weight >= 0.0 && distillation.weight.is_finite()) {
            return Err(format!("stage.distillation.weight is {}, expected: 0 or more", distillation.weight));
        }
        if distillation.target == Target::Quantized {
            if distillation.teacher.is_some() {
                return Err("stage.distillation.target = \"quantized\" has no teacher; remove teacher".into());
            }
            let (features, tokens) = (model.encoder.width(), model.width_out());
            if features != tokens {
                return Err(format!(
                    "stage.distillation.target = \"quantized\" compares features {features} wide with a decoder's input \
                     {tokens} wide; set model.decoder.hidden_size = {features}, or target = \"continuous\""
                ));
            }
        }
        Ok(())
    }
}

/// The frozen copy of the original encoder.
#[derive(Debug)]
pub(super) struct Teacher {
    encoder: Encoder,
    /// The hash of its tensors, which a checkpoint keeps.
    pub(super) hash: String,
}

impl Teacher {
    /// The teacher that a distillation asks for; `start` is the model folder that the run starts from.
    pub(super) fn of(
        distillation: &Distillation,
        start: Option<&Path>,
        config: &encoder::Config,
        device: &Device,
    ) -> Result<Option<Self>> {
        if distillation.target == Target::Quantized {
            return Ok(None);
        }
        let folder = match (&distillation.teacher, start) {
            (Some(folder), _) => folder,
            (None, Some(start)) => {
                still_original(start)?;
                start
            }
            (None, None) => {
                let reason = "stage.distillation needs the original encoder; set stage.distillation.teacher to its folder, \
                              or start.from = \"folder\"";
                return Err(Error::Training(reason.into()));
            }
        };
        Self::read(folder, config, device).map(Some)
    }

    fn read(folder: &Path, config: &encoder::Config, device: &Device) -> Result<Self> {
        let whole = folder.join("config.json");
        let text = std::fs::read_to_string(&whole).map_err(Error::io(&whole))?;
        let is_model = text.contains("\"vqrae\"") && model::Config::from_json(&text, &whole).is_ok();
        let tensors = if is_model { weights::read(folder)? } else { weights::encoder(folder)?.1 };
        let of_encoder = |(name, tensor): (String, Tensor)| {
            let name = name.strip_prefix("encoder.")?;
            config.needs(&format!("encoder.{name}")).then(|| (name.to_string(), tensor))
        };
        let tensors: Tensors = tensors.into_iter().filter_map(of_encoder).collect();
        let hash = hash(&tensors)?;
        let cast = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let tensors = tensors.into_iter().map(cast).collect::<Result<HashMap<_, _>>>()?;
        let unfit = |error| Error::weights(folder, format!("this teacher is another encoder than the run's: {error}"));
        let encoder = Encoder::load(VarBuilder::from_tensors(tensors, DType::F32, device), config).map_err(unfit)?;
        Ok(Self { encoder, hash })
    }

    /// Has it compute as the student does, so that the two differ by what was learnt alone.
    pub(super) fn multiply_in(&mut self, precision: Precision) {
        self.encoder.multiply_in(precision);
    }

    /// The original encoder's output for pixels `[B, 3, H, W]`; nothing of it is tracked.
    pub(super) fn forward(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        self.encoder.forward(pixels)
    }
}

/// Refuses the best model of a run that has trained its encoder: a copy of it is no original.
fn still_original(folder: &Path) -> Result<()> {
    let settings = folder.parent().unwrap_or(folder).join("config.toml");
    let Ok(text) = std::fs::read_to_string(&settings) else { return Ok(()) };
    let Ok(table) = text.parse::<toml::Table>() else { return Ok(()) };
    let peak = table.get("groups").and_then(|groups| groups.get("encoder")?.get("peak"));
    match peak.and_then(|peak| peak.as_float().or_else(|| Some(peak.as_integer()? as f64))) {
        Some(peak) if peak > 0.0 => {
            let reason = "this run has trained its encoder, so its model holds no original; set \
                          stage.distillation.teacher to a folder that does";
            Err(Error::config(settings, reason))
        }
        _ => Ok(()),
    }
}

/// A hash of tensors: names, shapes and values.
fn hash(tensors: &Tensors) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in tensors {
        hasher.update(name.as_bytes()).update(format!("{:?}", tensor.dims()).as_bytes());
        for value in tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()? {
            hasher.update(&value.to_le_bytes());
        }
    }
    Ok(hasher.finalize().to_hex()[..32].to_string())
}
