//! The models that `bench` knows by name, and how many products they take.

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;
use vqrae::encoder::SiglipConfig;
use vqrae::image::{Preprocessor, Resample};
use vqrae::model::{fresh_tensors, save};
use vqrae::quantizer::{self, SimVqConfig};
use vqrae::weights::Tensors;
use vqrae::{Config, decoder, encoder};

/// Number and width of the codes of [`Shape::Nearest`]: the paper's.
pub(super) const CODES: (usize, usize) = (16_384, 1_536);

/// Tokens that [`Shape::Nearest`] takes for an image: as many as 256 × 256 pixels have.
pub(super) const TOKENS: usize = 256;

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// The model that ships with the program
    Shipped,
    /// The size of SigLIP base, patches of 16
    SiglipBase,
    /// The size of SigLIP large, patches of 16
    SiglipLarge,
    /// The size of SigLIP so400m, patches of 16
    So400m,
    /// The search for the nearest of 16,384 codes of width 1,536 alone, for 256 tokens an image
    Nearest,
    /// For tests
    #[value(hide = true)]
    Tiny,
}

impl Shape {
    /// Its name on the command line.
    pub(super) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// Whether its weights are random, so that they have to be made.
    pub(super) fn is_random(self) -> bool {
        !matches!(self, Self::Shipped | Self::Nearest)
    }

    /// The paper's quantizer, and a decoder like the encoder.
    fn config(self) -> Result<Config> {
        let (hidden_size, num_hidden_layers, num_attention_heads, intermediate_size) = match self {
            Self::SiglipBase => (768, 12, 12, 3072),
            Self::SiglipLarge => (1024, 24, 16, 4096),
            Self::So400m => (1152, 27, 16, 4304),
            Self::Tiny => (32, 2, 2, 64),
            Self::Shipped => bail!("shipped is not random: its folder is weights/vqrae-small of the source"),
            Self::Nearest => bail!("nearest is a search, which has no model folder"),
        };
        let encoder = SiglipConfig {
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            intermediate_size,
            image_size: self.side(),
            ..SiglipConfig::default()
        };
        let mut quantizer = SimVqConfig::default();
        if self == Self::Tiny {
            (quantizer.codebook_size, quantizer.codebook_dim) = (64, 8);
        }
        let quantizer = quantizer::Config::SimVq(quantizer);
        Ok(Config::new(encoder::Config::Siglip(encoder), quantizer, decoder::Config::default()))
    }

    fn side(self) -> usize {
        if self == Self::Tiny { 32 } else { 256 }
    }

    /// Writes a model folder of random weights, always the same.
    pub(super) fn export(self, folder: &Path) -> Result<()> {
        const SEED: u64 = 0;
        let config = self.config()?;
        let tensors = fresh_tensors(&config, Tensors::new(), SEED)?;
        Ok(save(folder, &config, &Preprocessor::siglip(self.side(), Resample::Bicubic), &tensors)?)
    }
}

/// Floating-point operations that the products of tokenizing one image of `n` tokens take: the encoder's, the
/// projection's, and a score for every code.
pub(super) fn operations(config: &Config, n: usize) -> f64 {
    let (vit, patch) = (config.encoder.vit(), config.encoder.patch());
    let (d, k, e) = (vit.width, config.quantizer.codebook_size(), config.quantizer.width());
    let embedding = n * 3 * patch * patch * d;
    let block = n * d * (4 * d + 2 * vit.mlp_width) + 2 * n * n * d;
    2.0 * (embedding + vit.depth * block + n * d * e) as f64 + scores(n, k, e)
}

/// Floating-point operations of the scores of `n` tokens.
pub(super) fn scores(n: usize, k: usize, e: usize) -> f64 {
    2.0 * (n * k * e) as f64
}
