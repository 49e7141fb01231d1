//! SigLIP (Zhai et al., arXiv 2303.15343) and SigLIP2 of a fixed image size (Tschannen et al., arXiv 2502.14786): the
//! config of Hugging Face's `SiglipVisionModel` and its tensor names; the blocks are [`crate::vit`]'s.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::siglip as stock;
use serde::{Deserialize, Serialize};

use crate::ops::LayerNorm;
use crate::vit::{self, PatchEmbedding, Positions, Vit};

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

/// Which of the encoder's states are its features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    /// After the final norm: transformers' `last_hidden_state`.
    #[default]
    LastHiddenState,
    /// Before the final norm, which is then not part of the model: transformers' `hidden_states[-1]`.
    BeforeNorm,
}

/// Which implementation runs the encoder; both read the same tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Our [`Vit`]: differentiable, batch-invariant on the CPU, any grid.
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
    pub(super) fn vit(&self) -> vit::Config {
        vit::Config {
            width: self.hidden_size,
            depth: self.num_hidden_layers,
            heads: self.num_attention_heads,
            mlp_width: self.intermediate_size,
            layer_norm_eps: self.layer_norm_eps,
        }
    }

    pub(super) fn grid(&self) -> (usize, usize) {
        let side = self.image_size / self.patch_size;
        (side, side)
    }

    pub(super) fn check(&self) -> std::result::Result<(), String> {
        self.vit().check("encoder")?;
        if self.num_channels != 3 {
            return Err(format!("encoder: num_channels is {}, expected: 3", self.num_channels));
        }
        if self.patch_size == 0 || self.patch_size > 256 {
            return Err(format!("encoder: patch_size is {}, expected: 1 to 256", self.patch_size));
        }
        if self.image_size < self.patch_size || self.image_size > 1 << 14 {
            return Err(format!("encoder: image_size is {}, expected: patch_size to 16384", self.image_size));
        }
        if self.hidden_act != ACTIVATION {
            return Err(format!("encoder: hidden_act is `{}`, expected: `{ACTIVATION}`", self.hidden_act));
        }
        if self.backend == Backend::CandleTransformers && self.features == Features::BeforeNorm {
            return Err("encoder: the backend candle_transformers has no features before_norm; use backend vit".into());
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

/// The SigLIP vision tower without its pooling head.
#[derive(Debug, Clone)]
pub enum Siglip {
    /// On our [`Vit`].
    Vit(SiglipVit),
    /// candle-transformers' own.
    Stock(Box<Stock>),
}

impl Siglip {
    /// Loads `vision_model.…`.
    pub fn load(vb: VarBuilder, config: &SiglipConfig) -> Result<Self> {
        match config.backend {
            Backend::Vit => SiglipVit::load(vb.pp("vision_model"), config).map(Self::Vit),
            Backend::CandleTransformers => {
                let vb = vb.pp("vision_model");
                let dtype = vb.dtype();
                let model = stock::VisionModel::new(&config.stock(), false, vb)?;
                Ok(Self::Stock(Box::new(Stock { model, dtype, config: config.clone() })))
            }
        }
    }

    /// `[B, 3, h·P, w·P]` to `[B, h·w, D]`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        match self {
            Self::Vit(model) => model.forward(pixels),
            Self::Stock(stock) => stock.forward(pixels),
        }
    }
}

/// candle-transformers' SigLIP, which takes its own image size alone.
#[derive(Debug, Clone)]
pub struct Stock {
    model: stock::VisionModel,
    dtype: DType,
    config: SiglipConfig,
}

impl Stock {
    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = pixels.dims4()?;
        if vit::grid(height, width, self.config.patch_size)? != self.config.grid() {
            candle_core::bail!(
                "candle-transformers' SigLIP takes {0}×{0} pixels, not {height}×{width}; set backend to vit",
                self.config.image_size
            );
        }
        self.model.forward(&pixels.to_dtype(self.dtype)?)
    }
}

/// What stands around the blocks of a SigLIP.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub(crate) patch_embedding: PatchEmbedding,
    pub(crate) position_embedding: Positions,
    pub(crate) post_layernorm: Option<LayerNorm>,
}

impl Surroundings {
    /// Loads `embeddings.…` and `post_layernorm` of `vision_model`.
    pub(crate) fn load(vb: &VarBuilder, config: &SiglipConfig) -> Result<Self> {
        let (d, embeddings) = (config.hidden_size, vb.pp("embeddings"));
        let post_layernorm = match config.features {
            Features::LastHiddenState => Some(LayerNorm::load(vb.pp("post_layernorm"), d, config.layer_norm_eps)?),
            Features::BeforeNorm => None,
        };
        Ok(Self {
            patch_embedding: PatchEmbedding::load(embeddings.pp("patch_embedding"), config.patch_size, d)?,
            position_embedding: Positions::load(embeddings.pp("position_embedding"), config.grid(), d)?,
            post_layernorm,
        })
    }
}

/// SigLIP on our [`Vit`].
#[derive(Debug, Clone)]
pub struct SiglipVit {
    surroundings: Surroundings,
    encoder: Vit,
    patch: usize,
}

impl SiglipVit {
    fn load(vb: VarBuilder, config: &SiglipConfig) -> Result<Self> {
        Ok(Self {
            surroundings: Surroundings::load(&vb, config)?,
            encoder: Vit::load(vb.pp("encoder"), &config.vit())?,
            patch: config.patch_size,
        })
    }

    fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = pixels.dims4()?;
        let tokens = self.surroundings.patch_embedding.forward(pixels)?;
        self.surroundings.position_embedding.add(&tokens, vit::grid(height, width, self.patch)?)
    }

    fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.encoder.forward(&self.embed(pixels)?)?;
        match &self.surroundings.post_layernorm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    /// The embeddings and the output of every block, `[B, N, D]` each, as transformers' `hidden_states`.
    pub fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        self.encoder.hidden_states(&self.embed(pixels)?)
    }
}
