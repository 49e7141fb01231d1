//! DINOv2 (Oquab et al., arXiv 2304.07193), with or without registers (Darcet et al., arXiv 2309.16588): the config of
//! Hugging Face's `Dinov2Model` and `Dinov2WithRegistersModel`.

use serde::{Deserialize, Serialize};

use super::{Features, Layout};
use crate::vit::{self, Activation, Interpolation};

/// Hugging Face's `Dinov2Config`, key by key. A missing key takes Hugging Face's default.
///
/// | checkpoint | hidden | layers | heads | MLP |
/// |---|---|---|---|---|
/// | small | 384 | 12 | 6 | 4×, GELU |
/// | base | 768 | 12 | 12 | 4×, GELU |
/// | large | 1024 | 24 | 16 | 4×, GELU |
/// | giant | 1536 | 40 | 24 | SwiGLU, 4096 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dinov2Config {
    /// Width D of a token.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// The MLP's hidden width over D; SwiGLU takes two thirds of it, rounded up to a multiple of 8.
    pub mlp_ratio: usize,
    /// Whether the MLP is a SwiGLU.
    pub use_swiglu_ffn: bool,
    /// The MLP's activation otherwise: `gelu`.
    pub hidden_act: String,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Side in pixels of the images that it was trained on.
    pub image_size: usize,
    /// Side P of a patch in pixels.
    pub patch_size: usize,
    /// Number of registers; 4, or 0 for DINOv2 without them.
    pub num_register_tokens: usize,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// Which features are handed on.
    pub features: Features,
}

impl Default for Dinov2Config {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4,
            use_swiglu_ffn: false,
            hidden_act: "gelu".to_string(),
            qkv_bias: true,
            image_size: 224,
            patch_size: 14,
            num_register_tokens: 0,
            layer_norm_eps: 1e-6,
            features: Features::default(),
        }
    }
}

impl Dinov2Config {
    pub(super) fn layout(&self) -> Layout {
        let side = self.image_size / self.patch_size.max(1);
        let hidden = self.hidden_size.saturating_mul(self.mlp_ratio);
        let swiglu = self.use_swiglu_ffn;
        Layout {
            vit: vit::Config {
                width: self.hidden_size,
                depth: self.num_hidden_layers,
                heads: self.num_attention_heads,
                mlp_width: if swiglu { (hidden * 2 / 3).next_multiple_of(8) } else { hidden },
                layer_norm_eps: self.layer_norm_eps,
                style: vit::Style {
                    layer_scale: true,
                    no_qkv_bias: !self.qkv_bias,
                    activation: if swiglu { Activation::SwiGlu } else { Activation::Gelu },
                    ..vit::Style::default()
                },
            },
            patch: self.patch_size,
            grid: (side, side),
            prefix: 1 + self.num_register_tokens,
            // transformers antialiases where there are registers, as their authors did, and not where there are none.
            interpolation: match self.num_register_tokens {
                0 => Interpolation::Bicubic,
                _ => Interpolation::Antialiased,
            },
            features: self.features,
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.hidden_act != "gelu" {
            return Err(format!("encoder: hidden_act is `{}`, expected: `gelu`", self.hidden_act));
        }
        if self.mlp_ratio > 64 || self.num_register_tokens > 1024 {
            return Err("encoder: mlp_ratio or num_register_tokens is out of range, expected: up to 64 and 1024".into());
        }
        Ok(())
    }
}
