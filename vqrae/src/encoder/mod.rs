//! Pixels to continuous features: the pretrained half of the tokenizer.

mod siglip;

pub(crate) use siglip::Surroundings;
pub use siglip::{Backend, Features, Siglip, SiglipConfig};

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

/// Which encoder, and its sizes: the `encoder` section of `config.json`, told apart by its `model_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type")]
pub enum Config {
    /// SigLIP, and SigLIP2 of a fixed image size.
    #[serde(rename = "siglip_vision_model")]
    Siglip(SiglipConfig),
}

impl Config {
    /// Width D of the features.
    pub fn width(&self) -> usize {
        match self {
            Self::Siglip(config) => config.hidden_size,
        }
    }

    /// Side of a patch in pixels.
    pub fn patch(&self) -> usize {
        match self {
            Self::Siglip(config) => config.patch_size,
        }
    }

    /// The blocks' sizes.
    pub fn vit(&self) -> crate::vit::Config {
        match self {
            Self::Siglip(config) => config.vit(),
        }
    }

    /// The grid (h, w) that the encoder was trained on.
    pub fn grid(&self) -> (usize, usize) {
        match self {
            Self::Siglip(config) => config.grid(),
        }
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::Siglip(config) => config.check(),
        }
    }
}

/// An encoder with its weights.
#[derive(Debug, Clone)]
pub enum Encoder {
    /// SigLIP, and SigLIP2 of a fixed image size.
    Siglip(Siglip),
}

impl Encoder {
    /// Loads the encoder that `config` names.
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        match config {
            Config::Siglip(config) => Siglip::load(vb, config).map(Self::Siglip),
        }
    }

    /// Normalised pixels to features.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, h·P, w·P]`
    /// - output: `[B, h·w, D]`
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        match self {
            Self::Siglip(encoder) => encoder.forward(pixels),
        }
    }

    /// The embeddings and the output of every block, as transformers' `hidden_states`: depth + 1 tensors `[B, N, D]`.
    ///
    /// # Errors
    /// Also where the encoder is candle-transformers', which does not show them.
    pub fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Self::Siglip(Siglip::Vit(encoder)) => encoder.hidden_states(pixels),
            Self::Siglip(Siglip::Stock(_)) => {
                candle_core::bail!("candle-transformers' SigLIP does not show its hidden states; set backend to vit")
            }
        }
    }
}
