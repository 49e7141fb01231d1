//! Layer normalisation over the last dimension (Ba et al., arXiv 1607.06450).

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use vqrae_kernels::vector::{moments, sum};
use vqrae_kernels::vectorised;

/// Rows that one piece of work covers.
const ROWS: usize = 64;

/// `(x − mean) / √(variance + ε) · weight + bias`, mean and (biased) variance over the last dimension.
///
/// # Shapes
/// - x and output: `[…, D]`
/// - weight, bias: `[D]`
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::untracked::serves(x, &[weight, bias]) {
        return super::untracked::norm(x, weight, Some(bias), eps);
    }
    if super::fused(x) {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNormOp { eps: eps as f32 })
    } else {
        super::composed::layer_norm(x, weight, bias, eps)
    }
}

/// [`layer_norm`] with its parameters, named `weight` and `bias` as in PyTorch.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) eps: f64,
}

impl LayerNorm {
    /// Loads `[D]` and `[D]`; fresh ones are one and zero.
    pub fn load(vb: VarBuilder, d: usize, eps: f64) -> Result<Self> {
        let weight = vb.get_with_hints(d, "weight", candle_nn::init::ONE)?;
        let bias = vb.get_with_hints(d, "bias", candle_nn::init::ZERO)?;
        Ok(Self { weight, bias, eps })
    }

    /// `[…, D]` to `[…, D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

struct LayerNormOp {
    eps: f32,
}

impl CustomOp3 for LayerNormOp {
    fn name(&self) -> &'static str {
        "layer-norm"
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
        let d = width(x_layout, weight_layout)?;
        if bias_layout.dims() != [d] {
            candle_core::bail!("layer_norm: bias {:?}, expected: [{d}]", bias_layout.dims());
        }
        let x = super::f32_slice(x, x_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let bias = super::f32_slice(bias, bias_layout)?;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(ROWS * d).zip(x.par_chunks(ROWS * d)).for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                norm_row(out, x, weight, bias, self.eps);
            }
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let d = weight.dim(0)?;
        let op = LayerNormGradient { eps: self.eps, weight: weight.clone() };
        let all = x.apply_op2_no_bwd(&grad.contiguous()?, &op)?; // [M+2,D]
        let rows = all.dim(0)? - 2;
        let x_grad = all.narrow(0, 0, rows)?.reshape(x.shape())?;
        let weight_grad = all.narrow(0, rows, 1)?.reshape(d)?;
        let bias_grad = all.narrow(0, rows + 1, 1)?.reshape(d)?;
        Ok((Some(x_grad), Some(weight_grad), Some(bias_grad)))
    }
}

/// The gradients of x (M rows), of the weight (one row) and of the bias (one row), in one tensor.
struct LayerNormGradient {
    eps: f32,
    weight: Tensor,
}

impl CustomOp2 for LayerNormGradient {
    fn name(&self) -> &'static str {
        "layer-norm-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = self.weight.to_vec1::<f32>()?;
        let d = weight.len();
        let x = super::f32_slice(x, x_layout)?;
        let grad = super::f32_slice(grad, grad_layout)?;
        let mut out = vec![0f32; x.len() + 2 * d];
        let (x_grad, parameters) = out.split_at_mut(x.len());
        let pieces = x_grad.par_chunks_mut(ROWS * d).zip(x.par_chunks(ROWS * d)).zip(grad.par_chunks(ROWS * d));
        // The pieces are fixed and added in order: the sums do not depend on the number of threads.
        let sums: Vec<Vec<f32>> =
            pieces.map(|((x_grad, x), grad)| piece_gradient(x_grad, x, grad, &weight, self.eps)).collect();
        for piece in sums {
            parameters.iter_mut().zip(piece).for_each(|(total, part)| *total += part);
        }
        Ok((CpuStorage::F32(out), Shape::from((x.len() / d.max(1) + 2, d))))
    }
}

vectorised! {
    fn norm_row(out: &mut [f32], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let (mean, scale) = moments(x, eps);
        for i in 0..x.len() {
            out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
    }

    /// Writes the gradient of some rows of x; returns their part of the gradients of weight and bias, `[2·D]`.
    fn piece_gradient(x_grad: &mut [f32], x: &[f32], grad: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
        let d = weight.len();
        let mut parameters = vec![0f32; 2 * d];
        let (weight_grad, bias_grad) = parameters.split_at_mut(d);
        let mut normed = vec![0f32; d];
        let mut weighted = vec![0f32; d];
        for ((x_grad, x), grad) in x_grad.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(grad.chunks_exact(d)) {
            let (mean, scale) = moments(x, eps);
            for i in 0..d {
                normed[i] = (x[i] - mean) * scale;
                weighted[i] = grad[i] * weight[i];
                weight_grad[i] += grad[i] * normed[i];
                bias_grad[i] += grad[i];
            }
            let mean_weighted = sum(&weighted, &weighted, |w, _| w) / d as f32;
            let mean_product = sum(&weighted, &normed, |w, n| w * n) / d as f32;
            for i in 0..d {
                x_grad[i] = scale * (weighted[i] - mean_weighted - normed[i] * mean_product);
            }
        }
        parameters
    }
}

fn width(x: &Layout, weight: &Layout) -> Result<usize> {
    let d = weight.shape().dims1()?;
    if x.dims().last() != Some(&d) || d == 0 {
        candle_core::bail!("layer_norm: x {:?} does not end in the weight's width {d}", x.dims());
    }
    Ok(d)
}
