//! SigLIP (Zhai et al., arXiv 2303.15343) and SigLIP2 of a fixed image size (Tschannen et al., arXiv 2502.14786): the
//! config of Hugging Face's `SiglipVisionModel` and its tensor names; the blocks are [`crate::vit`]'s.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::siglip as stock;
use serde::{Deserialize, Serialize};

use super::{Features, Layout};
use crate::vit::{self, Interpolation};

/// Hugging Face's `SiglipVisionConfig`, key by key, and two keys of ours. A missing key takes Hugging Face's default.
///
/// | checkpoint | hidden | MLP | layers | heads |
/// |---|---|---|---|---|
/// | base | 768 | 3072 | 12 | 12 |
/// | large | 1024 | 4096 | 24 | 16 |
/// | so400m | 1152 | 4304 | 27 | 16 |
/// | giant-opt (SigLIP2) | 1536 | 6144 | 40 | 16 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiglipConfig {
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
    /// Side in pixels of the images that it was trained on.
    pub image_size: usize,
    /// Side P of a patch in pixels.
    pub patch_size: usize,
    /// The MLP's activation: `gelu_pytorch_tanh`.
    pub hidden_act: String,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
    /// Which features are handed on.
    pub features: Features,
    /// Which implementation runs it.
    pub backend: Backend,
}

/// Which implementation runs the encoder; both read the same tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Our [`super::Tower`]: differentiable, batch-invariant on the CPU, any grid.
    #[default]
    Vit,
    /// candle-transformers' `siglip`: frozen, its own grid only.
    CandleTransformers,
}

impl Default for SiglipConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: ACTIVATION.to_string(),
            layer_norm_eps: 1e-6,
            features: Features::default(),
            backend: Backend::default(),
        }
    }
}

const ACTIVATION: &str = "gelu_pytorch_tanh";

impl SiglipConfig {
    pub(super) fn layout(&self) -> Layout {
        let side = self.image_size / self.patch_size.max(1);
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
            interpolation: Interpolation::Bicubic,
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
        if self.backend == Backend::CandleTransformers && self.features != Features::LastHiddenState {
            return Err(
                "encoder: the backend candle_transformers has its last_hidden_state alone; use backend vit".into()
            );
        }
        Ok(())
    }

    fn stock(&self) -> stock::VisionConfig {
        stock::VisionConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_channels: self.num_channels,
            image_size: self.image_size,
            patch_size: self.patch_size,
            hidden_act: candle_nn::Activation::GeluPytorchTanh,
            layer_norm_eps: self.layer_norm_eps,
        }
    }
}

/// The SigLIP vision tower without its pooling head, as candle-transformers has it: frozen, its own image size alone.
#[derive(Debug, Clone)]
pub struct Stock {
    model: stock::VisionModel,
    dtype: DType,
    config: SiglipConfig,
}

impl Stock {
    pub(super) fn load(vb: VarBuilder, config: &SiglipConfig) -> Result<Self> {
        let dtype = vb.dtype();
        let model = stock::VisionModel::new(&config.stock(), false, vb)?;
        Ok(Self { model, dtype, config: config.clone() })
    }

    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = pixels.dims4()?;
        if vit::grid(height, width, self.config.patch_size)? != self.config.layout().grid {
            candle_core::bail!(
                "candle-transformers' SigLIP takes {0}×{0} pixels, not {height}×{width}; set backend to vit",
                self.config.image_size
            );
        }
        self.model.forward(&pixels.to_dtype(self.dtype)?)
    }
}
