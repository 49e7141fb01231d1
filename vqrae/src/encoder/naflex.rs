//! SigLIP2 NaFlex (Tschannen et al., arXiv 2502.14786, §2.4): an image keeps its aspect ratio and has its own grid of at
//! most so many patches. The config of Hugging Face's `Siglip2VisionModel`; blocks and final norm are SigLIP's.
//!
//! Hugging Face pads the images of a batch to one length and masks the padding. Here every image goes its own way, so
//! there is neither: a batch holds images of one size.

use serde::{Deserialize, Serialize};

use super::{Features, Layout};
use crate::vit::{self, Interpolation};

/// Hugging Face's `Siglip2VisionConfig`, key by key, and one key of ours. A missing key takes Hugging Face's default.
///
/// | checkpoint | hidden | MLP | layers | heads |
/// |---|---|---|---|---|
/// | base | 768 | 3072 | 12 | 12 |
/// | so400m | 1152 | 4304 | 27 | 16 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NaflexConfig {
    /// Width D of a token.
    pub hidden_size: usize,
    /// Hidden width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Colour channels: 3.
    pub num_channels: usize,
    /// Number of positions, those of a square grid; any other grid's are interpolated from them.
    pub num_patches: usize,
    /// Side P of a patch in pixels.
    pub patch_size: usize,
    /// The MLP's activation: `gelu_pytorch_tanh`.
    pub hidden_act: String,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// Which features are handed on.
    pub features: Features,
}

impl Default for NaflexConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            num_patches: 256,
            patch_size: 16,
            hidden_act: ACTIVATION.to_string(),
            layer_norm_eps: 1e-6,
            features: Features::default(),
        }
    }
}

const ACTIVATION: &str = "gelu_pytorch_tanh";

impl NaflexConfig {
    /// Side in pixels of the square image whose grid the positions were made for.
    pub(super) fn image_size(&self) -> usize {
        self.num_patches.isqrt().saturating_mul(self.patch_size)
    }

    pub(super) fn layout(&self) -> Layout {
        let side = self.num_patches.isqrt();
        Layout {
            vit: vit::Config {
                width: self.hidden_size,
                depth: self.num_hidden_layers,
                heads: self.num_attention_heads,
                mlp_width: self.intermediate_size,
                layer_norm_eps: self.layer_norm_eps,
                style: vit::Style::default(),
            },
            patch: self.patch_size,
            grid: (side, side),
            prefix: 0,
            interpolation: Interpolation::AntialiasedBilinear,
            features: self.features,
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.num_channels != 3 {
            return Err(format!("encoder: num_channels is {}, expected: 3", self.num_channels));
        }
        if self.hidden_act != ACTIVATION {
            return Err(format!("encoder: hidden_act is `{}`, expected: `{ACTIVATION}`", self.hidden_act));
        }
        let side = self.num_patches.isqrt();
        if side == 0 || side.checked_mul(side) != Some(self.num_patches) {
            return Err(format!("encoder: num_patches is {}, expected: a square such as 256", self.num_patches));
        }
        Ok(())
    }
}
