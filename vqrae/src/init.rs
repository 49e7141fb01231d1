//! A new model of a pretrained encoder.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::error::{Error, Result};
use crate::image::Preprocessor;
use crate::model::{self, Config, PREPROCESSOR, fresh_tensors, save};
use crate::weights::{self, Store};
use crate::{decoder, encoder, latent, quantizer, recipe};

/// What a new model is to be, but for what its encoder's folder says.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wishes {
    /// The quantizer.
    pub quantizer: quantizer::Config,
    /// The decoder; what is not said mirrors the encoder.
    #[serde(default)]
    pub decoder: decoder::Config,
    /// What is wished of the encoder.
    #[serde(default)]
    pub encoder: EncoderWishes,
    /// The normalisation of features before the quantizer.
    pub latent: Option<latent::Config>,
}

/// What is wished of an encoder.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncoderWishes {
    /// Which of its states are the features.
    pub features: Option<encoder::Features>,
    /// Which implementation runs it.
    pub backend: encoder::Backend,
}

impl Wishes {
    /// Of a section of a recipe.
    ///
    /// # Errors
    /// If a key is unknown or has a wrong value.
    pub fn of(section: &Value) -> std::result::Result<Self, String> {
        section.clone().try_into().map_err(|e: toml::de::Error| e.to_string())
    }

    /// Whether a model is one that was made with these wishes; else the key in which it differs.
    ///
    /// # Errors
    /// The key.
    pub fn check(&self, model: &Config) -> std::result::Result<(), &'static str> {
        let same = [
            ("quantizer", self.quantizer == model.quantizer),
            ("decoder", self.decoder == model.decoder),
            ("latent", self.latent == model.latent),
            ("encoder.features", self.encoder.features.is_none_or(|features| features == model.encoder.features())),
        ];
        same.into_iter().find(|(_, same)| !same).map_or(Ok(()), |(key, _)| Err(key))
    }
}

/// What [`init`] made.
#[derive(Debug, Clone, Serialize)]
pub struct InitReport {
    /// The new model's folder.
    pub folder: PathBuf,
    /// Its id.
    pub id: String,
    /// Weights that came from the encoder's folder.
    pub pretrained: usize,
    /// Weights that are fresh: quantizer and decoder.
    pub fresh: usize,
}

/// Makes a new VQRAE of a pretrained encoder: a folder of SigLIP, SigLIP2, DINOv2, InternViT or MAE.
///
/// `config_file` is TOML or JSON that holds [`Wishes`], or a [recipe](crate::train::Config) whose `[model]` section does;
/// `overrides` such as `model.decoder.num_hidden_layers=2` replace single keys. The encoder's sizes come from its own
/// folder, and the preprocessor is the encoder's. A `latent` section needs `statistics`: a file that
/// [`latent::Statistics`] wrote, or RAE's.
pub fn init(
    encoder_folder: &Path,
    config_file: &Path,
    overrides: &[String],
    statistics: Option<&Path>,
    output: &Path,
    seed: u64,
) -> Result<InitReport> {
    let wishes = recipe::read(config_file, overrides)?;
    let wishes = Wishes::of(wishes.get("model").unwrap_or(&Value::Table(wishes.clone())))
        .map_err(|reason| Error::config(config_file, reason))?;
    let (mut encoder, mut given) = weights::encoder(encoder_folder)?;
    if let Some(features) = wishes.encoder.features {
        *encoder.features_mut() = features;
    }
    match &mut encoder {
        encoder::Config::Siglip(siglip) => siglip.backend = wishes.encoder.backend,
        _ if wishes.encoder.backend == encoder::Backend::Vit => {}
        _ => {
            let reason = "encoder.backend is candle_transformers, which has SigLIP alone; leave it out";
            return Err(Error::config(config_file, reason));
        }
    }
    let config = Config { latent: wishes.latent, ..Config::new(encoder, wishes.quantizer, wishes.decoder) };
    config.check().map_err(|reason| Error::config(config_file, reason))?;
    given.retain(|name, _| config.encoder.needs(name));
    let pretrained = given.values().map(Tensor::elem_count).sum::<usize>();
    match (config.latent, statistics) {
        (Some(latent), Some(file)) => {
            let grid = latent.grid(config.encoder.grid());
            given.extend(latent::read(file, latent.normalize, grid, config.encoder.width())?);
        }
        (None, None) => {}
        (Some(_), None) => {
            let reason = "the section `latent` needs statistics: name their file, which `vqrae-cli features --statistics` \
                          writes, with --latent-statistics";
            return Err(Error::config(config_file, reason));
        }
        (None, Some(file)) => {
            let reason = format!(
                "statistics are given ({}), but there is no section `latent`; add \"latent\": {{\"normalize\": \"channel\"}}",
                file.display()
            );
            return Err(Error::config(config_file, reason));
        }
    }
    let preprocessor = Preprocessor::from_file(&encoder_folder.join(PREPROCESSOR))?;

    let names: Vec<String> = given.keys().cloned().collect();
    let tensors = fresh_tensors(&config, given, seed).map_err(|e| Error::weights(encoder_folder, e))?;
    if let Some(left) = names.iter().find(|name| !tensors.contains_key(*name)) {
        return Err(Error::weights(
            encoder_folder,
            format!("tensor `{left}` is not one that config.json has a use for"),
        ));
    }
    save(output, &config, &preprocessor, &tensors)?;
    let total = tensors.values().map(Tensor::elem_count).sum::<usize>();
    let id = model::id(&config, &preprocessor, &Store::of_tensors(tensors.clone(), output))?;
    Ok(InitReport { folder: output.to_path_buf(), id, pretrained, fresh: total - pretrained })
}
