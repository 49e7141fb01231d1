//! The blocks of [`crate::vit`] with packed weights.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;
use vqrae_kernels::cpu::{
    Cache, Element, End, Isa, Matrix, Packed, attention, layer_norm, linear, rms_norm, rms_norm_columns, swiglu,
};

use crate::{ops, vit};

/// A linear layer.
pub(super) struct Linear<T> {
    weight: Packed<T>,
    bias: Vec<f32>,
}

impl<T: Element> Linear<T> {
    pub(super) fn pack(layer: &ops::Linear, isa: Isa) -> Result<Self> {
        Self::stack(&[layer], isa)
    }

    /// A layer whose output is multiplied by `scale` `[E]`, if there is one.
    fn scaled(layer: &ops::Linear, scale: Option<&Tensor>, isa: Isa) -> Result<Self> {
        let Some(scale) = scale else { return Self::pack(layer, isa) };
        let weight = layer.weight.broadcast_mul(&scale.unsqueeze(1)?)?;
        Self::of(&weight, Some(&(&layer.bias * scale)?), isa)
    }

    /// Several layers of one input as one layer, whose output is theirs side by side.
    pub(super) fn stack(layers: &[&ops::Linear], isa: Isa) -> Result<Self> {
        let d = layers[0].weight.dim(1)?;
        let weights: Vec<_> = layers.iter().map(|layer| values(&layer.weight)).collect::<Result<_>>()?;
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        let mut bias = Vec::new();
        for layer in layers {
            bias.extend(values(&layer.bias)?);
        }
        Ok(Self { weight: Packed::stacked(&weights, d, isa), bias })
    }

    /// Of a weight `[E, …]` and a bias `[E]`.
    pub(super) fn of(weight: &Tensor, bias: Option<&Tensor>, isa: Isa) -> Result<Self> {
        let weight = weight.flatten_from(1)?;
        let (e, d) = weight.dims2()?;
        let bias = bias.map_or_else(|| Ok(vec![0.0; e]), values)?;
        Ok(Self { weight: Packed::new(&values(&weight)?, d, isa), bias })
    }

    /// The input's width.
    pub(super) fn inner(&self) -> usize {
        self.weight.inner()
    }

    /// The output's width.
    pub(super) fn width(&self) -> usize {
        self.bias.len()
    }

    pub(super) fn run(&self, x: &Matrix<T>, end: End<T>) {
        linear(x, &self.weight, &self.bias, end);
    }
}

/// A norm.
pub(super) struct Norm {
    weight: Vec<f32>,
    /// `None` for a root-mean-square norm.
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl Norm {
    pub(super) fn of(norm: &ops::Norm) -> Result<Self> {
        Ok(match norm {
            ops::Norm::Layer(norm) => {
                Self { weight: values(&norm.weight)?, bias: Some(values(&norm.bias)?), eps: norm.eps as f32 }
            }
            ops::Norm::Rms { weight, eps } => Self { weight: values(weight)?, bias: None, eps: *eps as f32 },
        })
    }

    pub(super) fn run<T: Element>(&self, x: &Matrix<f32>, out: &mut Matrix<T>) {
        match &self.bias {
            Some(bias) => layer_norm(x, &self.weight, bias, self.eps, out),
            None => rms_norm(x, &self.weight, self.eps, out),
        }
    }
}

/// The elements of a tensor, in f32.
pub(super) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

struct Block<T> {
    norm1: Norm,
    qkv: Linear<T>,
    /// The norms of q and k, if any.
    qk_norms: Option<(Norm, Norm)>,
    out: Linear<T>,
    norm2: Norm,
    fc1: Linear<T>,
    fc2: Linear<T>,
}

impl<T: Element> Block<T> {
    fn pack(block: &vit::Block, isa: Isa) -> Result<Self> {
        let vit::Block { layer_norm1, self_attn, layer_norm2, mlp, layer_scales } = block;
        let (scale1, scale2) = layer_scales.as_ref().map(|(a, b)| (a, b)).unzip();
        let qk_norms = |(q, k): &(ops::Norm, ops::Norm)| Ok::<_, candle_core::Error>((Norm::of(q)?, Norm::of(k)?));
        Ok(Self {
            norm1: Norm::of(layer_norm1)?,
            qkv: Linear::stack(&[&self_attn.q_proj, &self_attn.k_proj, &self_attn.v_proj], isa)?,
            qk_norms: self_attn.qk_norms.as_ref().map(qk_norms).transpose()?,
            out: Linear::scaled(&self_attn.out_proj, scale1, isa)?,
            norm2: Norm::of(layer_norm2)?,
            fc1: Linear::pack(&mlp.fc1, isa)?,
            fc2: Linear::scaled(&mlp.fc2, scale2, isa)?,
        })
    }
}

/// A stack of transformer blocks.
pub(super) struct Vit<T> {
    blocks: Vec<Block<T>>,
    config: vit::Config,
    isa: Isa,
    /// What images done before have left, for those to come: fresh memory costs time.
    spare: Mutex<Vec<Scratch<T>>>,
}

/// What the blocks need besides the tokens of an image, used again from block to block.
struct Scratch<T> {
    normed: Matrix<T>,
    qkv: Matrix<T>,
    hidden: Matrix<T>,
    /// What a SwiGLU makes its hidden values of; without rows for other activations.
    halves: Matrix<T>,
}

impl<T: Element> Vit<T> {
    /// Loads `layers.0 ..` from `vb`; of the tensors themselves, one block's are in memory at a time.
    pub(super) fn load(vb: VarBuilder, config: &vit::Config, isa: Isa) -> Result<Self> {
        let blocks = vit::blocks(vb, config).map(|block| Block::pack(&block?, isa)).collect::<Result<_>>()?;
        Ok(Self { blocks, config: *config, isa, spare: Mutex::default() })
    }

    /// Every block in turn, on the tokens `[N, D]` of one image; `seen` is shown what goes into the first block and what
    /// comes out of each.
    pub(super) fn run(&self, x: &mut Matrix<f32>, mut seen: impl FnMut(&Matrix<f32>)) {
        let mut scratch = self.scratch(x.rows());
        seen(x);
        for block in &self.blocks {
            self.look(block, x, &mut scratch);
            attention(&scratch.qkv, self.config.heads, self.config.style.mask(), self.isa, &mut scratch.normed);
            self.think(block, x, &mut scratch);
            seen(x);
        }
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }

    /// Caches of all blocks for a sequence of up to `tokens` tokens, empty.
    pub(super) fn caches(&self, tokens: usize) -> Vec<Cache<T>> {
        let vit::Config { heads, width, .. } = self.config;
        vec![Cache::new(heads, width / heads, tokens, self.isa); self.blocks.len()]
    }

    /// Every block in turn, on the next token of each of B sequences, `[B, D]`: what [`Vit::run`] with a causal mask gives them
    /// among the tokens before, bit for bit.
    pub(super) fn step(&self, x: &mut Matrix<f32>, sequences: &mut [&mut Vec<Cache<T>>]) {
        let mut scratch = self.scratch(x.rows());
        for (i, block) in self.blocks.iter().enumerate() {
            self.look(block, x, &mut scratch);
            let attend = |(row, caches): (usize, &mut &mut Vec<Cache<T>>)| {
                let mut out = vec![T::default(); self.config.width];
                caches[i].attend(&scratch.qkv, row, &mut out);
                out
            };
            let found: Vec<Vec<T>> = sequences.par_iter_mut().enumerate().map(attend).collect();
            for (row, found) in found.iter().enumerate() {
                scratch.normed.row_mut(row).copy_from_slice(found);
            }
            self.think(block, x, &mut scratch);
        }
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
    }

    /// A block's q, k and v.
    fn look(&self, block: &Block<T>, x: &Matrix<f32>, Scratch { normed, qkv, .. }: &mut Scratch<T>) {
        block.norm1.run(x, normed);
        block.qkv.run(normed, End::Store(qkv));
        if let Some((q, k)) = &block.qk_norms {
            rms_norm_columns(qkv, 0, &q.weight, q.eps);
            rms_norm_columns(qkv, self.config.width, &k.weight, k.eps);
        }
    }

    /// What a block does with what attention found, which is in `normed`.
    fn think(&self, block: &Block<T>, x: &mut Matrix<f32>, scratch: &mut Scratch<T>) {
        let Scratch { normed, hidden, halves, .. } = scratch;
        block.out.run(normed, End::Add(x));
        block.norm2.run(x, normed);
        match self.config.style.activation {
            vit::Activation::GeluTanh => block.fc1.run(normed, End::Gelu(hidden)),
            vit::Activation::Gelu => block.fc1.run(normed, End::GeluErf(hidden)),
            vit::Activation::SwiGlu => {
                block.fc1.run(normed, End::Store(halves));
                swiglu(halves, hidden);
            }
        }
        block.fc2.run(hidden, End::Add(x));
    }

    fn scratch(&self, n: usize) -> Scratch<T> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        // Images of another size come in their turn: what fits none of them any more goes.
        spare.retain(|scratch| scratch.normed.rows() == n);
        let has_halves = self.config.style.activation == vit::Activation::SwiGlu;
        spare.pop().unwrap_or_else(|| Scratch {
            halves: Matrix::new(if has_halves { n } else { 0 }, 2 * self.config.mlp_width),
            normed: Matrix::new(n, self.config.width),
            qkv: Matrix::new(n, 3 * self.config.width),
            hidden: Matrix::new(n, self.config.mlp_width),
        })
    }
}
