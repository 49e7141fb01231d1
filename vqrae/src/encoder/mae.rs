//! MAE (He et al., arXiv 2111.06377), its encoder without the masking: the config of Hugging Face's `ViTMAEModel`.

use serde::{Deserialize, Serialize};

use super::{Features, Layout};
use crate::vit::{self, Activation, Interpolation};

/// Hugging Face's `ViTMAEConfig`, key by key; what concerns its own decoder and its masking is left out.
///
/// | checkpoint | hidden | MLP | layers | heads | patch |
/// |---|---|---|---|---|---|
/// | base | 768 | 3072 | 12 | 12 | 16 |
/// | large | 1024 | 4096 | 24 | 16 | 16 |
/// | huge | 1280 | 5120 | 32 | 16 | 14 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MaeConfig {
    /// Width D of a token.
    pub hidden_size: usize,
    /// Hidden width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// The MLP's activation: `gelu`.
    pub hidden_act: String,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// Side in pixels of the images that it was trained on.
    pub image_size: usize,
    /// Side P of a patch in pixels.
    pub patch_size: usize,
    /// Which features are handed on.
    pub features: Features,
}

impl Default for MaeConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            qkv_bias: true,
            hidden_act: "gelu".to_string(),
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            features: Features::default(),
        }
    }
}

impl MaeConfig {
    pub(super) fn layout(&self) -> Layout {
        let side = self.image_size / self.patch_size.max(1);
        Layout {
            vit: vit::Config {
                width: self.hidden_size,
                depth: self.num_hidden_layers,
                heads: self.num_attention_heads,
                mlp_width: self.intermediate_size,
                layer_norm_eps: self.layer_norm_eps,
                style: vit::Style {
                    no_qkv_bias: !self.qkv_bias,
                    activation: Activation::Gelu,
                    ..vit::Style::default()
                },
            },
            patch: self.patch_size,
            grid: (side, side),
            prefix: 1,
            interpolation: Interpolation::Bicubic,
            features: self.features,
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.hidden_act != "gelu" {
            return Err(format!("encoder: hidden_act is `{}`, expected: `gelu`", self.hidden_act));
        }
        Ok(())
    }
}
