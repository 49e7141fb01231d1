//! Codes to pixels: a ViT that mirrors the encoder, and a linear head per token (VQRAE, arXiv 2511.23386, §3).
//!
//! The optional keys of [`Config`] make it the decoder of RAE (arXiv 2510.11690), which is that of MAE: a layer from the
//! latent's width to its own, a class token, exact GELU. On a grid other than its own our positions are interpolated; RAE
//! has the latent itself interpolated to its one grid, so only images of the size that it was trained on come out alike.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::ops::{Linear, Norm, Precision};
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
    /// The MLP's activation; `gelu_pytorch_tanh` unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden_act: Option<HiddenAct>,
    /// ε of the layer norms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_norm_eps: Option<f64>,
    /// Number P of tokens of its own before those of the patches, which are dropped before the final norm; none unless
    /// said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_prefix_tokens: Option<usize>,
    /// Width of the tokens that it takes, with a layer `embed` to its own width before its positions; without this key
    /// they have its own width, and there is no such layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_size: Option<usize>,
    /// The grid `[h, w]` that its positions were made for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grid_size: Option<[usize; 2]>,
}

/// The activation of a decoder's MLP, under Hugging Face's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// GELU in the tanh form.
    GeluPytorchTanh,
    /// GELU as it is.
    Gelu,
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
    /// Number P of tokens of its own.
    pub prefix: usize,
    /// Width of the tokens that it takes, where a layer brings them to its own.
    pub input: Option<usize>,
}

impl Config {
    /// Fills the gaps with the encoder's sizes.
    pub fn sizes(&self, encoder: &crate::encoder::Config) -> Sizes {
        let mirror = encoder.vit();
        let activation = match self.hidden_act {
            Some(HiddenAct::Gelu) => vit::Activation::Gelu,
            Some(HiddenAct::GeluPytorchTanh) | None => vit::Activation::GeluTanh,
        };
        Sizes {
            vit: vit::Config {
                width: self.hidden_size.unwrap_or(mirror.width),
                depth: self.num_hidden_layers.unwrap_or(mirror.depth),
                heads: self.num_attention_heads.unwrap_or(mirror.heads),
                mlp_width: self.intermediate_size.unwrap_or(mirror.mlp_width),
                layer_norm_eps: self.layer_norm_eps.unwrap_or(mirror.layer_norm_eps),
                style: vit::Style { activation, ..vit::Style::default() },
            },
            grid: self.grid_size.map_or(encoder.grid(), |[h, w]| (h, w)),
            patch: self.patch_size.unwrap_or(encoder.patch()),
            final_norm: self.final_norm.unwrap_or(true),
            prefix: self.num_prefix_tokens.unwrap_or(0),
            input: self.input_size,
        }
    }
}

impl Sizes {
    /// Width D' of the tokens that it takes.
    pub fn width_in(&self) -> usize {
        self.input.unwrap_or(self.vit.width)
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        self.vit.check("decoder")?;
        if self.patch == 0 || self.patch > 256 {
            return Err(format!("decoder: patch_size is {}, expected: 1 to 256", self.patch));
        }
        if self.prefix > 1024 {
            return Err(format!("decoder: num_prefix_tokens is {}, expected: up to 1024", self.prefix));
        }
        if let Some(input @ (0 | 65_537..)) = self.input {
            return Err(format!("decoder: input_size is {input}, expected: 1 to 65536"));
        }
        if [self.grid.0, self.grid.1].iter().any(|side| !(1..=4096).contains(side)) {
            return Err(format!("decoder: grid_size is {:?}, expected: 1 to 4096 each", self.grid));
        }
        let eps = self.vit.layer_norm_eps;
        if !(eps.is_finite() && eps > 0.0) {
            return Err(format!("decoder: layer_norm_eps is {eps}, expected: more than 0"));
        }
        Ok(())
    }
}

/// What stands around the blocks of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    /// From the width of the tokens that it takes to its own.
    pub(crate) embed: Option<Linear>,
    pub(crate) position_embedding: Positions,
    /// `[P, D]`: tokens before those of the patches, their positions added.
    pub(crate) prefix_tokens: Option<Tensor>,
    pub(crate) final_layernorm: Option<Norm>,
    pub(crate) head: Linear,
}

impl Surroundings {
    /// Loads `position_embedding`, `post_layernorm` and `head`, `embed` and `prefix_tokens` if there are any.
    pub(crate) fn load(vb: &VarBuilder, sizes: &Sizes) -> Result<Self> {
        let d = sizes.vit.width;
        let norm = || Norm::load(vb.pp("post_layernorm"), d, sizes.vit.layer_norm_eps, false);
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let prefix = || vb.get_with_hints((sizes.prefix, d), "prefix_tokens", init);
        Ok(Self {
            embed: sizes.input.map(|input| Linear::load(vb.pp("embed"), input, d)).transpose()?,
            position_embedding: Positions::load(vb.pp("position_embedding"), sizes.grid, d)?,
            prefix_tokens: (sizes.prefix > 0).then(prefix).transpose()?,
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
    /// Loads `position_embedding`, `layers.N`, `post_layernorm` and `head`, `embed` and `prefix_tokens` if there are any.
    pub fn load(vb: VarBuilder, sizes: &Sizes) -> Result<Self> {
        let surroundings = Surroundings::load(&vb, sizes)?;
        Ok(Self { surroundings, layers: Vit::load(vb, &sizes.vit)?, patch: sizes.patch })
    }

    /// Has every block run by `runner`.
    pub(crate) fn run_by(&mut self, runner: Arc<dyn RunBlock>) {
        self.layers.run_by(runner);
    }

    /// Has the products of the blocks read numbers of `precision`.
    pub(crate) fn multiply_in(&mut self, precision: Precision) {
        self.layers.multiply_in(precision);
    }

    /// Tokens of a grid to pixels, in the normalised range of the encoder's input.
    ///
    /// # Shapes
    /// - tokens: `[B, h·w, D']`, D' the [width that it takes](Sizes::width_in)
    /// - output: `[B, 3, h·P', w·P']`, P' the output patch
    pub fn forward(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        self.head(&self.hidden(tokens, grid)?, grid)
    }

    /// What the head is given for these tokens. `[B, h·w, D']` to `[B, h·w, D]`.
    pub fn hidden(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let Surroundings { embed, position_embedding, prefix_tokens, final_layernorm, .. } = &self.surroundings;
        let x = match embed {
            Some(embed) => position_embedding.add(&embed.forward(tokens)?, grid)?,
            None => position_embedding.add(tokens, grid)?,
        };
        let x = match prefix_tokens {
            Some(prefix) => {
                let repeated = prefix.unsqueeze(0)?.repeat((x.dim(0)?, 1, 1))?;
                let x = self.layers.forward(&Tensor::cat(&[&repeated, &x], 1)?)?;
                x.narrow(1, prefix.dim(0)?, grid.0 * grid.1)?.contiguous()?
            }
            None => self.layers.forward(&x)?,
        };
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
