//! Pixels to continuous features: the pretrained half of the tokenizer.

mod dinov2;
mod features;
mod internvit;
mod mae;
mod naflex;
mod siglip;
mod tower;

pub use dinov2::Dinov2Config;
pub use features::{By, Features, Fuse};
pub use internvit::InternVitConfig;
pub use mae::MaeConfig;
pub use naflex::NaflexConfig;
pub use siglip::{Backend, SiglipConfig, Stock};
pub(crate) use tower::Surroundings;
pub use tower::{Layout, Tower};

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::ops::Precision;
use crate::vit::RunBlock;

/// Which encoder, and its sizes: the `encoder` section of `config.json`, told apart by its `model_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model_type")]
pub enum Config {
    /// SigLIP, and SigLIP2 of a fixed image size.
    #[serde(rename = "siglip_vision_model")]
    Siglip(SiglipConfig),
    /// SigLIP2 NaFlex: images of any aspect ratio.
    #[serde(rename = "siglip2_vision_model")]
    Naflex(NaflexConfig),
    /// DINOv2, with or without registers.
    #[serde(rename = "dinov2", alias = "dinov2_with_registers")]
    Dinov2(Dinov2Config),
    /// InternViT.
    #[serde(rename = "internvl_vision")]
    InternVit(InternVitConfig),
    /// The encoder of a masked autoencoder.
    #[serde(rename = "vit_mae")]
    Mae(MaeConfig),
}

impl Config {
    /// What tells it from other encoders.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Siglip(config) => config.layout(),
            Self::Naflex(config) => config.layout(),
            Self::Dinov2(config) => config.layout(),
            Self::InternVit(config) => config.layout(),
            Self::Mae(config) => config.layout(),
        }
    }

    /// Side in pixels of the images that it was trained on, the longer one.
    pub fn image_size(&self) -> usize {
        match self {
            Self::Siglip(config) => config.image_size,
            Self::Naflex(config) => config.image_size(),
            Self::Dinov2(config) => config.image_size,
            Self::InternVit(config) => config.image_size[0].max(config.image_size[1]),
            Self::Mae(config) => config.image_size,
        }
    }

    /// Which of its states are the features.
    pub fn features_mut(&mut self) -> &mut Features {
        match self {
            Self::Siglip(config) => &mut config.features,
            Self::Naflex(config) => &mut config.features,
            Self::Dinov2(config) => &mut config.features,
            Self::InternVit(config) => &mut config.features,
            Self::Mae(config) => &mut config.features,
        }
    }

    /// Which of its states are the features.
    pub fn features(&self) -> Features {
        self.layout().features
    }

    /// Whether candle-transformers runs it.
    pub fn is_stock(&self) -> bool {
        matches!(self, Self::Siglip(config) if config.backend == Backend::CandleTransformers)
    }

    /// Width D of the features.
    pub fn width(&self) -> usize {
        self.layout().vit.width
    }

    /// Side of a patch in pixels.
    pub fn patch(&self) -> usize {
        self.layout().patch
    }

    /// The sizes of all its blocks, those that the features do not need included.
    pub fn vit(&self) -> crate::vit::Config {
        self.layout().vit
    }

    /// The grid (h, w) that the encoder was trained on.
    pub fn grid(&self) -> (usize, usize) {
        self.layout().grid
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        match self {
            Self::Siglip(config) => config.check(),
            Self::Naflex(config) => config.check(),
            Self::Dinov2(config) => config.check(),
            Self::InternVit(config) => config.check(),
            Self::Mae(config) => config.check(),
        }?;
        self.layout().check(self.image_size())
    }

    /// Whether one of the whole encoder's tensors, by its name here, is part of a model with these features: blocks and a
    /// final norm that they do not need are not.
    pub(crate) fn needs(&self, name: &str) -> bool {
        let layout = self.layout();
        let mut after = name.split('.').skip_while(|part| *part != "layers").skip(1);
        match after.next().and_then(|number| number.parse::<usize>().ok()) {
            Some(block) => !(layout.blocks().depth..layout.vit.depth).contains(&block),
            None => layout.features.has_norm() || !name.contains(".post_layernorm."),
        }
    }

    /// Where the tower and its blocks stand below the encoder's own name.
    pub(crate) fn places<'a>(&self, vb: &VarBuilder<'a>) -> (VarBuilder<'a>, VarBuilder<'a>) {
        match self {
            // As Hugging Face's checkpoints have it.
            Self::Siglip(_) => (vb.pp("vision_model"), vb.pp("vision_model").pp("encoder")),
            _ => (vb.clone(), vb.clone()),
        }
    }
}

/// An encoder with its weights.
#[derive(Debug, Clone)]
pub enum Encoder {
    /// On our [`Tower`].
    Tower(Box<Tower>),
    /// candle-transformers' SigLIP.
    Stock(Box<Stock>),
}

impl Encoder {
    /// Loads the encoder that `config` names.
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (tower, blocks) = config.places(&vb);
        match config {
            Config::Siglip(siglip) if config.is_stock() => Ok(Self::Stock(Box::new(Stock::load(tower, siglip)?))),
            _ => Ok(Self::Tower(Box::new(Tower::load(&tower, blocks, config.layout())?))),
        }
    }

    /// Has every block run by `runner`; candle-transformers runs its own.
    pub(crate) fn run_by(&mut self, runner: Arc<dyn RunBlock>) {
        if let Self::Tower(tower) = self {
            tower.run_by(runner);
        }
    }

    /// Has the products of the blocks read numbers of `precision`.
    pub(crate) fn multiply_in(&mut self, precision: Precision) {
        if let Self::Tower(tower) = self {
            tower.multiply_in(precision);
        }
    }

    /// Normalised pixels to features.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, h·P, w·P]`
    /// - output: `[B, h·w, D]`; with [`Features::Fuse`] both states side by side, `[B, h·w, 2·D]`, for
    ///   [`crate::fusion::Fusion`]
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tower(tower) => tower.forward(pixels),
            Self::Stock(stock) => stock.forward(pixels),
        }
    }

    /// The embeddings and the output of every block that the [`Features`] need, as transformers' `hidden_states`: one
    /// tensor `[B, P + N, D]` more than blocks, P tokens of the encoder's own (class token, registers) before those of the patches.
    ///
    /// # Errors
    /// Also where the encoder is candle-transformers', which does not show them.
    pub fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Self::Tower(tower) => tower.hidden_states(pixels),
            Self::Stock(_) => {
                candle_core::bail!("candle-transformers' SigLIP does not show its hidden states; set backend to vit")
            }
        }
    }
}
