//! A shallow and a deep state of the encoder to one: details and meaning in one feature (IDEAL, arXiv 2606.11096).
//!
//! Trained with the quantizer even where the encoder is frozen, so it is a module of its own, `fusion.…`. As IDEAL's code
//! has it, the shallow state passes a layer norm without parameters (ε 1e-6) and the deep one the encoder's final norm;
//! then, with s and d what comes of them,
//! - `linear`: `W [s; d] + b`, 2·D → D (their paper's ablation; their code has attention alone);
//! - `attention`: `x = d + MHA(LN(d), LN(s), LN(s))`, `x + MLP(LN(x))`: 8 heads, an MLP of width 2·D with GELU as it is,
//!   ε 1e-5. Their dropout of 0.1 is left out.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use crate::encoder::{By, Fuse};
use crate::ops::{Linear, Norm};
use crate::vit::{self, Activation, Attention, Mlp};

/// ε of the norm that the shallow state passes.
const SHALLOW_EPS: f64 = 1e-6;

/// What makes two states one, with its weights.
#[derive(Debug, Clone)]
pub struct Fusion {
    pub(crate) shallow_norm: Norm,
    pub(crate) parts: Parts,
    width: usize,
}

/// What follows the norm of the shallow state.
#[derive(Debug, Clone)]
pub(crate) enum Parts {
    Linear(Linear),
    Attention(Box<Cross>),
}

/// Cross-attention and an MLP, with their norms.
#[derive(Debug, Clone)]
pub(crate) struct Cross {
    pub(crate) query_norm: Norm,
    pub(crate) kv_norm: Norm,
    pub(crate) attn: Attention,
    pub(crate) ffn_norm: Norm,
    pub(crate) ffn: Mlp,
}

impl Cross {
    fn load(vb: &VarBuilder, width: usize) -> Result<Self> {
        let config = vit::Config {
            width,
            depth: 1,
            heads: By::HEADS,
            mlp_width: 2 * width,
            layer_norm_eps: 1e-5,
            style: vit::Style { activation: Activation::Gelu, ..vit::Style::default() },
        };
        let norm = |name: &str| Norm::load(vb.pp(name), width, config.layer_norm_eps, false);
        Ok(Self {
            query_norm: norm("query_norm")?,
            kv_norm: norm("kv_norm")?,
            attn: Attention::load(vb.pp("attn"), &config)?,
            ffn_norm: norm("ffn_norm")?,
            ffn: Mlp::load(vb.pp("ffn"), &config)?,
        })
    }

    fn forward(&self, shallow: &Tensor, deep: &Tensor) -> Result<Tensor> {
        let attended = self.attn.forward(&self.query_norm.forward(deep)?, &self.kv_norm.forward(shallow)?)?;
        let x = (deep + attended)?;
        &x + self.ffn.forward(&self.ffn_norm.forward(&x)?)?
    }
}

impl Fusion {
    /// Loads `linear`, or `query_norm`, `kv_norm`, `attn.{q,k,v,out}_proj`, `ffn_norm` and `ffn.{fc1,fc2}`.
    pub fn load(vb: VarBuilder, fuse: Fuse, width: usize) -> Result<Self> {
        let shallow_norm = Norm::plain(width, SHALLOW_EPS, vb.dtype(), vb.device())?;
        let parts = match fuse.by {
            By::Linear => Parts::Linear(Linear::load(vb.pp("linear"), 2 * width, width)?),
            By::Attention => Parts::Attention(Box::new(Cross::load(&vb, width)?)),
        };
        Ok(Self { shallow_norm, parts, width })
    }

    /// Two states of every token to one.
    ///
    /// # Shapes
    /// - states: `[B, N, 2·D]`, the shallow one first, as [`crate::encoder::Encoder::forward`] gives them
    /// - output: `[B, N, D]`
    pub fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let d = self.width;
        let shallow = self.shallow_norm.forward(&states.narrow(2, 0, d)?.contiguous()?)?;
        let deep = states.narrow(2, d, d)?.contiguous()?;
        match &self.parts {
            Parts::Linear(linear) => linear.forward(&Tensor::cat(&[&shallow, &deep], 2)?),
            Parts::Attention(cross) => cross.forward(&shallow, &deep),
        }
    }
}
