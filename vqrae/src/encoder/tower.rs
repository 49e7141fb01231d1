//! The one vision tower: patches, positions, tokens of its own, blocks, norm. Every encoder is a [`Layout`] of it.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};

use super::Features;
use crate::ops::{Norm, Precision};
use crate::vit::{self, Interpolation, PatchEmbedding, Positions, RunBlock, Vit};

/// What tells one encoder from another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layout {
    /// The blocks.
    pub vit: vit::Config,
    /// Side P of a patch in pixels.
    pub patch: usize,
    /// The grid (h, w) that the positions were made for.
    pub grid: (usize, usize),
    /// Number of tokens before those of the patches (class token, registers); they are no features.
    pub prefix: usize,
    /// How positions become those of another grid.
    pub interpolation: Interpolation,
    /// Which states are the features.
    pub features: Features,
}

impl Layout {
    /// The blocks that are part of the model: all up to the last one that the features need.
    pub fn blocks(&self) -> vit::Config {
        vit::Config { depth: self.features.blocks(self.vit.depth), ..self.vit }
    }

    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self, image_size: usize) -> std::result::Result<(), String> {
        self.vit.check("encoder")?;
        if self.patch == 0 || self.patch > 256 {
            return Err(format!("encoder: patch_size is {}, expected: 1 to 256", self.patch));
        }
        if image_size < self.patch || image_size > 1 << 14 {
            return Err(format!("encoder: image_size is {image_size}, expected: patch_size to 16384"));
        }
        self.features.check(self.vit.depth, self.vit.width)
    }
}

/// What stands around the blocks.
#[derive(Debug, Clone)]
pub(crate) struct Surroundings {
    pub(crate) patch_embedding: PatchEmbedding,
    pub(crate) position_embedding: Positions,
    /// `[P, D]`: tokens before those of the patches, their positions added.
    pub(crate) prefix_tokens: Option<Tensor>,
    pub(crate) post_layernorm: Option<Norm>,
}

impl Surroundings {
    /// Loads `embeddings.…` and `post_layernorm`.
    pub(crate) fn load(vb: &VarBuilder, layout: &Layout) -> Result<Self> {
        let (d, embeddings) = (layout.vit.width, vb.pp("embeddings"));
        let norm = || Norm::load(vb.pp("post_layernorm"), d, layout.vit.layer_norm_eps, layout.vit.style.rms_norm);
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let prefix = || embeddings.get_with_hints((layout.prefix, d), "prefix_tokens", init);
        let positions = || Positions::load(embeddings.pp("position_embedding"), layout.grid, d);
        Ok(Self {
            patch_embedding: PatchEmbedding::load(embeddings.pp("patch_embedding"), layout.patch, d)?,
            position_embedding: positions()?.interpolated(layout.interpolation),
            prefix_tokens: (layout.prefix > 0).then(prefix).transpose()?,
            post_layernorm: layout.features.has_norm().then(norm).transpose()?,
        })
    }
}

/// A vision tower with its weights.
#[derive(Debug, Clone)]
pub struct Tower {
    surroundings: Surroundings,
    blocks: Vit,
    layout: Layout,
}

impl Tower {
    /// Loads `embeddings.…`, `post_layernorm` from `vb` and `layers.N` from `blocks`.
    pub fn load(vb: &VarBuilder, blocks: VarBuilder, layout: Layout) -> Result<Self> {
        let surroundings = Surroundings::load(vb, &layout)?;
        Ok(Self { surroundings, blocks: Vit::load(blocks, &layout.blocks())?, layout })
    }

    /// Has every block run by `runner`.
    pub(crate) fn run_by(&mut self, runner: Arc<dyn RunBlock>) {
        self.blocks.run_by(runner);
    }

    /// Has the products of the blocks read numbers of `precision`.
    pub(crate) fn multiply_in(&mut self, precision: Precision) {
        self.blocks.multiply_in(precision);
    }

    fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let (b, _, height, width) = pixels.dims4()?;
        let tokens = self.surroundings.patch_embedding.forward(pixels)?;
        let tokens = self.surroundings.position_embedding.add(&tokens, vit::grid(height, width, self.layout.patch)?)?;
        match &self.surroundings.prefix_tokens {
            Some(prefix) => Tensor::cat(&[&prefix.unsqueeze(0)?.repeat((b, 1, 1))?, &tokens], 1),
            None => Ok(tokens),
        }
    }

    /// Normalised pixels `[B, 3, h·P, w·P]` to features `[B, h·w, D]`; where two states are to become one, to both side by
    /// side, the shallow one first, `[B, h·w, 2·D]`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = self.embed(pixels)?;
        match self.layout.features {
            Features::SumLast(_) => {
                let states = self.blocks.hidden_states(&x)?;
                let first = self.layout.features.first_state(self.layout.blocks().depth);
                let sum = states[first + 1..].iter().try_fold(states[first].clone(), |sum, state| sum + state)?;
                self.finish(&sum)
            }
            Features::Fuse(fuse) => {
                let states = self.blocks.hidden_states(&x)?;
                Tensor::cat(&[&self.patches(&states[fuse.shallow])?, &self.finish(&states[fuse.deep])?], 2)
            }
            _ => self.finish(&self.blocks.forward(&x)?),
        }
    }

    /// The tokens of the patches alone.
    fn patches(&self, x: &Tensor) -> Result<Tensor> {
        x.narrow(1, self.layout.prefix, x.dim(1)? - self.layout.prefix)?.contiguous()
    }

    /// What follows the last block.
    fn finish(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.patches(x)?;
        match &self.surroundings.post_layernorm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }

    /// The embeddings and the output of every block of the model, `[B, P + N, D]` each, as transformers' `hidden_states`.
    pub fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        self.blocks.hidden_states(&self.embed(pixels)?)
    }
}
