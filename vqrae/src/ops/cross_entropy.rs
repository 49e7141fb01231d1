//! The cross-entropy of codes predicted by a linear layer, without the M×K scores in memory: a piece of tokens at a time, whose
//! gradient is computed while its scores are at hand (Wijmans et al., arXiv 2411.09009; Hsu et al., arXiv 2410.10989).

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use vqrae_kernels::cpu::{Bf16, Element, Isa, dense};
use vqrae_kernels::matrix::{Into, View};
use vqrae_kernels::vector::{exp, max};
use vqrae_kernels::vectorised;

use super::Precision;

/// Tokens whose scores are held at a time.
const TOKENS: usize = 512;

/// `Σᵢ weightᵢ · −log softmax(xᵢ codesᵀ + bias)[targetᵢ]`: the loss of M tokens that should each be one of K codes.
///
/// # Shapes
/// - x: `[M, D]`
/// - codes: `[K, D]`
/// - bias: `[K]`
/// - targets, weights: a number a token; targets below K
/// - output: `[]`
///
/// # Errors
/// If the shapes do not fit, or a target is no code.
pub fn linear_cross_entropy(
    precision: Precision,
    x: &Tensor,
    codes: &Tensor,
    bias: &Tensor,
    targets: &[u32],
    weights: &[f32],
) -> Result<Tensor> {
    let ((m, d), (k, width)) = (x.dims2()?, codes.dims2()?);
    if d != width || bias.dims() != [k] || targets.len() != m || weights.len() != m {
        candle_core::bail!(
            "cross-entropy: x {:?}, codes {:?}, bias {:?}, {} targets, {} weights",
            x.dims(),
            codes.dims(),
            bias.dims(),
            targets.len(),
            weights.len()
        );
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= k) {
        candle_core::bail!("cross-entropy: the target {target} is not among {k} codes");
    }
    if !super::fused(x) {
        return super::composed::linear_cross_entropy(precision, x, codes, bias, targets, weights);
    }
    let op = CrossEntropy {
        precision,
        targets: targets.to_vec(),
        weights: weights.to_vec(),
        is_tracked: [x, codes, bias].iter().any(|tensor| tensor.track_op()),
        gradients: Mutex::default(),
    };
    x.contiguous()?.apply_op3(&codes.contiguous()?, &bias.contiguous()?, op)
}

struct CrossEntropy {
    precision: Precision,
    targets: Vec<u32>,
    weights: Vec<f32>,
    is_tracked: bool,
    /// Of x, codes and bias, from the forward pass, where scores were at hand.
    gradients: Mutex<Option<[Vec<f32>; 3]>>,
}

impl CustomOp3 for CrossEntropy {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        codes: &CpuStorage,
        codes_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [
            super::f32_slice(x, x_layout)?,
            super::f32_slice(codes, codes_layout)?,
            super::f32_slice(bias, bias_layout)?,
        ];
        let isa = super::isa()?;
        let (loss, gradients) = match self.precision {
            Precision::F32 => self.run::<f32>(inputs, isa),
            Precision::Bf16 => self.run::<Bf16>(inputs, isa),
        };
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = gradients;
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        codes: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some([of_x, of_codes, of_bias]) = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take()
        else {
            candle_core::bail!("cross-entropy: its gradient was asked for twice, or of tensors that are not trained")
        };
        let factor = f64::from(grad.to_scalar::<f32>()?);
        let tensor = |values: Vec<f32>, like: &Tensor| {
            like.track_op().then(|| Tensor::from_vec(values, like.shape(), like.device())? * factor).transpose()
        };
        Ok((tensor(of_x, x)?, tensor(of_codes, codes)?, tensor(of_bias, bias)?))
    }
}

impl CrossEntropy {
    /// The loss and, if anything is trained, the gradients of `[x, codes, bias]`.
    fn run<T: Element>(&self, [x, codes, bias]: [&[f32]; 3], isa: Isa) -> (f32, Option<[Vec<f32>; 3]>) {
        let k = bias.len();
        let d = codes.len() / k.max(1);
        let mut gradients = self.is_tracked.then(|| [x, codes, bias].map(|values| vec![0f32; values.len()]));
        let mut scores = vec![0f32; TOKENS.min(self.targets.len()) * k];
        let mut loss = 0f64;
        let codes = View::new(codes, k, d, d);
        for (piece, (targets, weights)) in self.targets.chunks(TOKENS).zip(self.weights.chunks(TOKENS)).enumerate() {
            let (m, first) = (targets.len(), piece * TOKENS * d);
            let (x, scores) = (View::new(&x[first..], m, d, d), &mut scores[..m * k]);
            scores.par_chunks_exact_mut(k).for_each(|row| row.copy_from_slice(bias));
            dense::multiply::<T>(scores, k, x, codes.t(), Into::Add, isa);
            let rows = scores.par_chunks_exact_mut(k).zip(targets).zip(weights);
            let losses: Vec<f32> = rows.map(|((row, &target), &weight)| token(row, target as usize, weight)).collect();
            loss += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
            let Some([of_x, of_codes, of_bias]) = &mut gradients else { continue };
            let of_scores = View::new(scores, m, k, k);
            dense::multiply::<T>(&mut of_x[first..][..m * d], d, of_scores, codes, Into::Replace, isa);
            dense::multiply::<T>(of_codes, d, of_scores.t(), x, Into::Add, isa);
            scores.chunks_exact(k).for_each(|row| add(of_bias, row));
        }
        (loss as f32, gradients)
    }
}

/// A token's loss; its scores become their gradient.
fn token(scores: &mut [f32], target: usize, weight: f32) -> f32 {
    let chosen = scores[target];
    let (largest, sum) = soften(scores);
    scale(scores, weight / sum);
    scores[target] -= weight;
    weight * (largest + sum.ln() - chosen)
}

vectorised! {
    /// `exp(score − largest)`; the largest, and the sum of what is written.
    fn soften(scores: &mut [f32]) -> (f32, f32) {
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        (largest, vqrae_kernels::vector::sum(scores, scores, |x, _| x))
    }

    fn scale(values: &mut [f32], factor: f32) {
        for value in values.iter_mut() {
            *value *= factor;
        }
    }

    fn add(sums: &mut [f32], values: &[f32]) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
}
