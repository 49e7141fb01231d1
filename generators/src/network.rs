//! Codes so far → scores of the codes to come, with gradients: what training sees.
//!
//! A code is not a number without meaning here. Its vector in the tokenizer's codebook, and that vector's squares, stand beside
//! what is learned of it, on the way in and on the way out: codes that paint alike start out alike, and a score can be a
//! Gaussian around a vector. So few photos go a long way, and the weights hold little of the 16,384 codes.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use vqrae::ops::{LayerNorm, Linear, Precision, linear_cross_entropy};
use vqrae::vit::Vit;

use crate::config::Config;

/// What a code that is not known yet is written as.
pub const UNKNOWN: u32 = u32::MAX;

/// The layers of a generator.
#[derive(Debug, Clone)]
pub struct Network {
    pub(crate) codes: Codes,
    /// From a code's features to a token, `[D, F]`.
    pub(crate) embed: Linear,
    /// What stands where no code is known: a mask, or what precedes the first code. `[D]`
    pub(crate) unknown: Tensor,
    /// `[h, D]` and `[w, D]`, added.
    pub(crate) rows: Tensor,
    pub(crate) columns: Tensor,
    /// A row a class and, last, one for none, `[C + 1, D]`.
    pub(crate) classes: Tensor,
    pub(crate) blocks: Vit,
    pub(crate) norm: LayerNorm,
    /// From a token to what is compared with features of codes, `[F, D]`.
    pub(crate) head: Linear,
    /// `[K]`
    pub(crate) bias: Tensor,
    precision: Precision,
}

/// The features of codes: F numbers each.
#[derive(Debug, Clone)]
pub(crate) struct Codes {
    /// The codebook's vectors and their squares, each column with mean zero and variance one, `[K, 2 e]`.
    fixed: Tensor,
    /// `[K, code_width]`
    learned: Tensor,
}

impl Codes {
    /// Those of all codes, `[K, F]`.
    pub(crate) fn all(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.fixed, &self.learned], 1)
    }

    /// Those of some codes, `[M, F]`.
    fn some(&self, indices: &Tensor) -> Result<Tensor> {
        Tensor::cat(&[&self.fixed.index_select(indices, 0)?, &self.learned.index_select(indices, 0)?], 1)
    }
}

/// The codebook's vectors and their squares, each column with mean zero and variance one.
fn fixed(codebook: &Tensor) -> Result<Tensor> {
    let codebook = codebook.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    let standard = |x: Tensor| {
        let centred = x.broadcast_sub(&x.mean_keepdim(0)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(0)?.sqrt()? + 1e-12)?;
        centred.broadcast_div(&deviation)
    };
    let vectors = standard(codebook)?;
    let squares = standard(vectors.sqr()?)?;
    Tensor::cat(&[vectors, squares], 1)
}

impl Network {
    /// Loads the layers.
    ///
    /// # Shapes
    /// - codebook: `[K, e]`, of the tokenizer, on any device
    ///
    /// # Errors
    /// If a tensor is missing or does not fit.
    pub fn load(vb: VarBuilder, config: &Config, codebook: &Tensor) -> Result<Self> {
        let (k, e) = codebook.dims2()?;
        if k != config.tokenizer.codebook_size {
            candle_core::bail!("the codebook has {k} codes, the generator {}", config.tokenizer.codebook_size);
        }
        let (d, (h, w)) = (config.width, config.tokenizer.grid);
        let features = 2 * e + config.code_width;
        let normal = Init::Randn { mean: 0.0, stdev: 0.02 };
        Ok(Self {
            codes: Codes {
                fixed: fixed(codebook)?,
                learned: vb.pp("codes").get_with_hints((k, config.code_width), "weight", normal)?,
            },
            embed: Linear::load(vb.pp("embed"), features, d)?,
            unknown: vb.get_with_hints(d, "unknown", normal)?,
            rows: vb.pp("rows").get_with_hints((h, d), "weight", normal)?,
            columns: vb.pp("columns").get_with_hints((w, d), "weight", normal)?,
            classes: vb.pp("classes").get_with_hints((config.classes.len() + 1, d), "weight", normal)?,
            blocks: Vit::load(vb.clone(), &config.blocks())?,
            norm: LayerNorm::load(vb.pp("norm"), d, 1e-6)?,
            head: Linear::load(vb.pp("head"), d, features)?,
            bias: vb.get_with_hints(k, "bias", candle_nn::init::ZERO)?,
            precision: Precision::F32,
        })
    }

    /// The same, with products that read numbers of `precision`.
    #[must_use]
    pub fn multiplied_in(mut self, precision: Precision) -> Self {
        self.blocks.multiply_in(precision);
        self.precision = precision;
        self
    }

    /// The positions of a grid, `[N, D]`.
    pub(crate) fn positions(&self) -> Result<Tensor> {
        let (h, w, d) = (self.rows.dim(0)?, self.columns.dim(0)?, self.rows.dim(1)?);
        self.rows.unsqueeze(1)?.broadcast_add(&self.columns.unsqueeze(0)?)?.reshape((h * w, d))
    }

    /// What is compared with the features of codes, a row a token.
    ///
    /// # Shapes
    /// - inputs: B · N codes or [`UNKNOWN`]
    /// - classes: B numbers below C + 1
    /// - output: `[B · N, F]`
    ///
    /// # Errors
    /// If the numbers do not fit.
    pub fn forward(&self, inputs: &[u32], classes: &[u32]) -> Result<Tensor> {
        let (b, d, device) = (classes.len(), self.rows.dim(1)?, Device::Cpu);
        let n = inputs.len() / b.max(1);
        let known: Vec<f32> = inputs.iter().map(|&code| f32::from(code != UNKNOWN)).collect();
        let indices: Vec<u32> = inputs.iter().map(|&code| if code == UNKNOWN { 0 } else { code }).collect();
        let codes = self.embed.forward(&self.codes.some(&Tensor::new(indices, &device)?)?)?; // [B·N,D]
        let known = Tensor::new(known, &device)?.unsqueeze(1)?;
        let unknown = known.affine(-1.0, 1.0)?.broadcast_mul(&self.unknown)?;
        let x = (codes.broadcast_mul(&known)? + unknown)?.reshape((b, n, d))?;
        let classes = self.classes.index_select(&Tensor::new(classes, &device)?, 0)?.unsqueeze(1)?; // [B,1,D]
        let x = x.broadcast_add(&self.positions()?)?.broadcast_add(&classes)?;
        let x = self.norm.forward(&self.blocks.forward(&x)?)?;
        self.head.forward(&x.reshape((b * n, d))?)
    }

    /// `Σ weight · −log p(target)` over tokens.
    ///
    /// # Shapes
    /// - tokens: what [`Network::forward`] gives, `[M, F]`
    /// - targets, weights: M
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn loss(&self, tokens: &Tensor, targets: &[u32], weights: &[f32]) -> Result<Tensor> {
        linear_cross_entropy(self.precision, tokens, &self.codes.all()?, &self.bias, targets, weights)
    }

    /// The table of tokens that codes come in as, `[K, D]`.
    pub(crate) fn table(&self) -> Result<Tensor> {
        self.embed.forward(&self.codes.all()?)
    }

    /// Scores of every code, `[M, K]`; the plain form of what [`Network::loss`] compares.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn scores(&self, tokens: &Tensor) -> Result<Tensor> {
        tokens.matmul(&self.codes.all()?.t()?)?.broadcast_add(&self.bias)
    }
}
