//! TiTok's discriminator of patches (bytedance/1d-tokenizer, `NLayerDiscriminator`): convolutions, blurs, group norms.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::layers::{GroupNorm, adaptive_max_pool, convolution, leaky_relu};
use super::resample::blur;
use crate::ops::Conv2d;

/// Its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Channels of the first layer, a multiple of 32.
    pub width: usize,
    /// Halvings of height and width. The first keeps the number of channels, each later one doubles it.
    pub stages: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { width: 128, stages: 3 }
    }
}

const SLOPE: f64 = 0.1;
const GROUPS: usize = 32;
/// Height and width of the logits.
const SIDE: usize = 16;

impl Config {
    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        if !self.width.is_multiple_of(GROUPS) || self.width == 0 || self.width > 1 << 12 {
            return Err(format!("gan.nlayer.width is {}, expected: a multiple of {GROUPS} up to 4096", self.width));
        }
        if !(1..=6).contains(&self.stages) {
            return Err(format!("gan.nlayer.stages is {}, expected: 1 to 6", self.stages));
        }
        Ok(())
    }
}

/// The discriminator with its weights, by TiTok's names.
#[derive(Debug, Clone)]
pub struct NLayer {
    first: Conv2d,
    blocks: Vec<(Conv2d, GroupNorm)>,
    logits: (Conv2d, Conv2d),
}

impl NLayer {
    /// Loads `block_in`, `blocks.N` and `to_logits`.
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let mut width = config.width;
        let first = convolution(vb.pp("block_in.0"), 3, width, 5)?;
        let mut blocks = Vec::new();
        for stage in 0..config.stages {
            let (from, vb) = (width, vb.pp("blocks").pp(stage));
            width = config.width << stage;
            blocks.push((convolution(vb.pp(0), from, width, 3)?, GroupNorm::load(vb.pp(2), width, GROUPS)?));
        }
        let vb = vb.pp("to_logits");
        let logits = (convolution(vb.pp(0), width, width, 1)?, convolution(vb.pp(2), width, 1, 5)?);
        Ok(Self { first, blocks, logits })
    }

    /// How real each of 16×16 regions looks.
    ///
    /// # Shapes
    /// - images: `[B, 3, H, W]` in [0, 1]
    /// - output: `[B, 1, 16, 16]`
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let first = leaky_relu(&self.first.forward(images)?, SLOPE)?;
        let x = self.blocks.iter().try_fold(first, |x, (convolution, norm)| {
            leaky_relu(&norm.forward(&blur(&convolution.forward(&x)?)?)?, SLOPE)
        })?;
        let x = leaky_relu(&self.logits.0.forward(&adaptive_max_pool(&x, SIDE)?)?, SLOPE)?;
        self.logits.1.forward(&x)
    }
}
