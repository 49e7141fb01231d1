//! `x wᵀ + b`, the layer that nearly all the time goes to.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use vqrae_kernels::matrix::{Into, View, multiply};

/// Tokens of one image that one piece of work covers: enough to keep the processor's matrix loop busy (64 reached the
/// rate of 1,024 where it was measured), few enough that one image occupies several threads.
const TOKENS: usize = 64;

/// `x wᵀ + b`.
///
/// # Shapes
/// - x: `[B, N, D]`, or any shape that ends in D
/// - weight: `[E, D]`
/// - bias: `[E]`
/// - output: the shape of x with E for D
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if super::fused(x) && x.rank() >= 2 {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LinearOp)
    } else {
        super::composed::linear(x, weight, bias)
    }
}

/// [`linear`] with its parameters, named `weight` and `bias` as in PyTorch.
#[derive(Debug, Clone)]
pub struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
}

impl Linear {
    /// Loads `[E, D]` and `[E]`; fresh ones are drawn from N(0, 0.02²) and zero.
    pub fn load(vb: VarBuilder, d: usize, e: usize) -> Result<Self> {
        let weight = vb.get_with_hints((e, d), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        let bias = vb.get_with_hints(e, "bias", candle_nn::init::ZERO)?;
        Ok(Self { weight, bias })
    }

    /// Loads `[E, D]` alone; the bias is zero and no parameter.
    pub fn load_without_bias(vb: VarBuilder, d: usize, e: usize) -> Result<Self> {
        let weight = vb.get_with_hints((e, d), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        Ok(Self { bias: Tensor::zeros(e, weight.dtype(), weight.device())?, weight })
    }

    /// `[…, D]` to `[…, E]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, &self.bias)
    }
}

struct LinearOp;

impl CustomOp3 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (e, d) = weight_layout.shape().dims2()?;
        let mut shape = x_layout.dims().to_vec();
        if shape.pop() != Some(d) || bias_layout.dims() != [e] {
            candle_core::bail!(
                "linear: x {:?} and bias {:?} do not fit weight [{e}, {d}]",
                x_layout.dims(),
                bias_layout.dims()
            );
        }
        let tokens = shape.last().copied().unwrap_or(1);
        shape.push(e);
        let x = super::f32_slice(x, x_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let bias = super::f32_slice(bias, bias_layout)?;
        let out = forward(x, weight, bias, tokens, d, e);
        Ok((CpuStorage::F32(out), Shape::from(shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (e, d) = weight.dims2()?;
        let grad = grad.reshape(((), e))?.contiguous()?; // [M,E]
        // Detached, or the gradient of a parameter would hold the graph of the layer's input until the end of the backward pass.
        let (values, factors) = (x.detach(), weight.detach());
        let x_grad = x.track_op().then(|| grad.matmul(&factors)?.reshape(x.shape())).transpose()?;
        let weight_grad = weight.track_op().then(|| grad.t()?.matmul(&values.reshape(((), d))?)).transpose()?;
        let sum_rows = || Tensor::ones((1, grad.dim(0)?), grad.dtype(), grad.device())?.matmul(&grad)?.reshape(e);
        let bias_grad = bias.track_op().then(sum_rows).transpose()?;
        Ok((x_grad, weight_grad, bias_grad))
    }
}

/// The product, piece by piece within each image of `tokens` rows.
fn forward(x: &[f32], weight: &[f32], bias: &[f32], tokens: usize, d: usize, e: usize) -> Vec<f32> {
    let mut out: Vec<f32> = bias.repeat(x.len() / d.max(1));
    if out.is_empty() || x.is_empty() {
        return out;
    }
    let weight = View::new(weight, e, d, d).t();
    out.par_chunks_mut(tokens * e).zip(x.par_chunks(tokens * d)).for_each(|(out, x)| {
        out.par_chunks_mut(TOKENS * e).zip(x.par_chunks(TOKENS * d)).for_each(|(out, x)| {
            multiply(out, e, View::new(x, x.len() / d, d, d), weight, 1.0, Into::Add);
        });
    });
    out
}
