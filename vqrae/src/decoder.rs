//! Codes to pixels: a ViT that mirrors the encoder, and a linear head per token (VQRAE, arXiv 2511.23386, §3).

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::ops::{Linear, Norm};
use crate::vit::{self, Positions, RunBlock, Vit};

/// The `decoder` section of `config.json`. A missing field takes the encoder's value: the symmetric decoder of the paper.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Width D of a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_size: Option<usize>,
    /// Number of blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_hidden_layers: Option<usize>,
    /// Attention heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_attention_heads: Option<usize>,
    /// Hidden width of the MLP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intermediate_size: Option<usize>,
    /// Side of the square of pixels that a token paints; another one than the encoder's changes the image's size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patch_size: Option<usize>,
    /// Whether a layer norm stands before the head; yes unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_norm: Option<bool>,
}

/// [`Config`] with every gap filled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// The blocks.
    pub vit: vit::Config,
    /// The grid that the positions were made for.
    pub grid: (usize, usize),
    /// Side of the square of pixels that a token paints.
    pub patch: usize,
    /// Whether a layer norm stands before the head.
    pub final_norm: bool,
}

impl Config {
    /// Fills the gaps with the encoder's sizes.
    pub fn sizes(&self, encoder: &crate::encoder::Config) -> Sizes {
        let mirror = encoder.vit();
        Sizes {
            vit: vit::Config {
                width: self.hidden_size.unwrap_or(mirror.width),
                depth: self.num_hidden_layers.unwrap_or(mirror.depth),
                heads: self.num_attention_heads.unwrap_or(mirror.heads),
                mlp_width: self.intermediate_size.unwrap_or(mirror.mlp_width),
                layer_norm_eps: mirror.layer_norm_eps,
                style: vit::Style::default(),
            },
            grid: encoder.grid(),
            patch: self.patch_size.unwrap_or(encoder.patch()),
            final_norm: self.final_norm.unwrap_or(true),
        }
    }
}

impl Sizes {
    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.vit.check("decoder")?;
        if self.patch == 0 || self.patch > 256 {
            return Err(format!("decoder: patch_size is {}, expected: 1 to 256", self.patch));
        }
        Ok(())
    }
}

/// What stands around the blocks of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub(crate) position_embedding: Positions,
    pub(crate) final_layernorm: Option<Norm>,
    pub(crate) head: Linear,
}

impl Surroundings {
    /// Loads `position_embedding`, `post_layernorm` and `head`.
    pub(crate) fn load(vb: &VarBuilder, sizes: &Sizes) -> Result<Self> {
        let d = sizes.vit.width;
        let norm = || Norm::load(vb.pp("post_layernorm"), d, sizes.vit.layer_norm_eps, false);
        Ok(Self {
            position_embedding: Positions::load(vb.pp("position_embedding"), sizes.grid, d)?,
            final_layernorm: sizes.final_norm.then(norm).transpose()?,
            head: Linear::load(vb.pp("head"), d, sizes.patch * sizes.patch * 3)?,
        })
    }
}

/// The decoder with its weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    surroundings: Surroundings,
    layers: Vit,
    patch: usize,
}

impl Decoder {
    /// Loads `position_embedding`, `layers.N`, `post_layernorm` and `head`.
    pub fn load(vb: VarBuilder, sizes: &Sizes) -> Result<Self> {
        let surroundings = Surroundings::load(&vb, sizes)?;
        Ok(Self { surroundings, layers: Vit::load(vb, &sizes.vit)?, patch: sizes.patch })
    }

    /// Has every block run by `runner`.
    pub(crate) fn run_by(&mut self, runner: Arc<dyn RunBlock>) {
        self.layers.run_by(runner);
    }

    /// Tokens of a grid to pixels, in the normalised range of the encoder's input.
    ///
    /// # Shapes
    /// - tokens: `[B, h·w, D]`
    /// - output: `[B, 3, h·P', w·P']`, P' the output patch
    pub fn forward(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        self.head(&self.hidden(tokens, grid)?, grid)
    }

    /// What the head is given for these tokens. `[B, h·w, D]` to the same.
    pub fn hidden(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let Surroundings { position_embedding, final_layernorm, .. } = &self.surroundings;
        let x = self.layers.forward(&position_embedding.add(tokens, grid)?)?;
        match final_layernorm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    /// The last layer: [`Decoder::hidden`] to pixels.
    pub fn head(&self, hidden: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        vit::unpatchify(&self.surroundings.head.forward(hidden)?, grid, self.patch)
    }
}
