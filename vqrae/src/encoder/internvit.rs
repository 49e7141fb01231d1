//! InternViT (Chen et al., arXiv 2312.14238): the config of Hugging Face's `InternVLVisionModel`.

use serde::{Deserialize, Serialize};

use super::{Features, Layout};
use crate::vit::{self, Activation, Interpolation};

/// Hugging Face's `InternVLVisionConfig`, key by key. A missing key takes Hugging Face's default.
///
/// | checkpoint | hidden | MLP | layers | heads | norms | q, k |
/// |---|---|---|---|---|---|---|
/// | 300M | 1024 | 4096 | 24 | 16 | layer_norm | bias |
/// | 6B | 3200 | 12800 | 45 | 25 | rms_norm | normed, no bias |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct InternVitConfig {
    /// Width D of a token.
    pub hidden_size: usize,
    /// Hidden width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Whether q, k and v have a bias.
    pub attention_bias: bool,
    /// Whether q and k pass a root-mean-square norm.
    pub use_qk_norm: bool,
    /// The MLP's activation: `gelu`.
    pub hidden_act: String,
    /// `layer_norm` or `rms_norm`.
    pub norm_type: String,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// Height and width in pixels of the images that it was trained on.
    pub image_size: [usize; 2],
    /// Sides of a patch in pixels, which are equal.
    pub patch_size: [usize; 2],
    /// Whether a pooled token is what others use: then there is no final norm.
    pub use_mean_pooling: bool,
    /// Which features are handed on.
    pub features: Features,
}

impl Default for InternVitConfig {
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            attention_bias: false,
            use_qk_norm: false,
            hidden_act: "gelu".to_string(),
            norm_type: "layer_norm".to_string(),
            layer_norm_eps: 1e-6,
            image_size: [448, 448],
            patch_size: [14, 14],
            use_mean_pooling: true,
            features: Features::BeforeNorm,
        }
    }
}

impl InternVitConfig {
    pub(super) fn layout(&self) -> Layout {
        let side = |axis: usize| self.image_size[axis] / self.patch_size[axis].max(1);
        Layout {
            vit: vit::Config {
                width: self.hidden_size,
                depth: self.num_hidden_layers,
                heads: self.num_attention_heads,
                mlp_width: self.intermediate_size,
                layer_norm_eps: self.layer_norm_eps,
                style: vit::Style {
                    rms_norm: self.norm_type == "rms_norm",
                    no_qkv_bias: !self.attention_bias,
                    qk_norm: self.use_qk_norm,
                    layer_scale: true,
                    activation: Activation::Gelu,
                    ..vit::Style::default()
                },
            },
            patch: self.patch_size[0],
            grid: (side(0), side(1)),
            prefix: 1,
            interpolation: Interpolation::Bicubic,
            features: self.features,
        }
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if self.hidden_act != "gelu" {
            return Err(format!("encoder: hidden_act is `{}`, expected: `gelu`", self.hidden_act));
        }
        if !["layer_norm", "rms_norm"].contains(&self.norm_type.as_str()) {
            return Err(format!("encoder: norm_type is `{}`, expected: `layer_norm` or `rms_norm`", self.norm_type));
        }
        if self.patch_size[0] != self.patch_size[1] {
            return Err(format!("encoder: patch_size is {:?}, expected: equal sides", self.patch_size));
        }
        if self.use_mean_pooling && self.features.has_norm() {
            return Err(
                "encoder: with use_mean_pooling there is no final norm; use features before_norm, sum_last, layer or \
                 fuse with norm = false"
                    .into(),
            );
        }
        Ok(())
    }
}
