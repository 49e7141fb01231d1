//! GELU: in the tanh form that SigLIP uses (`gelu_pytorch_tanh`), and as it is.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use vqrae_kernels::vector::{self, GELU_CUBIC, GELU_LINEAR, sigmoid};
use vqrae_kernels::vectorised;

/// Elements that one piece of work covers.
const PIECE: usize = 16_384;

/// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, element by element.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::untracked::serves(x, &[]) {
        return super::untracked::gelu(Form::Tanh, x);
    }
    if super::fused(x) { x.contiguous()?.apply_op1(Gelu { form: Form::Tanh }) } else { super::composed::gelu(x) }
}

/// `x/2 · (1 + erf(x/√2))`, element by element, to 2e-7·|x|.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if super::untracked::serves(x, &[]) {
        return super::untracked::gelu(Form::Erf, x);
    }
    if super::fused(x) { x.contiguous()?.apply_op1(Gelu { form: Form::Erf }) } else { x.gelu_erf() }
}

/// The two forms.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// [`gelu`].
    Tanh,
    /// [`gelu_erf`].
    Erf,
}

impl Form {
    pub(super) fn plain(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Tanh => gelu(x),
            Self::Erf => gelu_erf(x),
        }
    }
}

pub(super) struct Gelu {
    pub(super) form: Form,
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = super::f32_slice(x, layout)?;
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(out, x)| match self.form {
            Form::Tanh => gelu_piece(out, x),
            Form::Erf => gelu_erf_piece(out, x),
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&grad.contiguous()?, &GeluGradient { form: self.form }).map(Some)
    }
}

/// `grad · d gelu(x)/dx`.
struct GeluGradient {
    form: Form,
}

impl CustomOp2 for GeluGradient {
    fn name(&self) -> &'static str {
        "gelu-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = super::f32_slice(x, x_layout)?;
        let grad = super::f32_slice(grad, grad_layout)?;
        let mut out = vec![0f32; x.len()];
        let pieces = out.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).zip(grad.par_chunks(PIECE));
        pieces.for_each(|((out, x), grad)| match self.form {
            Form::Tanh => gradient_piece(out, x, grad),
            Form::Erf => erf_gradient_piece(out, x, grad),
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

vectorised! {
    fn gelu_piece(out: &mut [f32], x: &[f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = vector::gelu(x);
        }
    }

    fn gelu_erf_piece(out: &mut [f32], x: &[f32]) {
        for (out, &x) in out.iter_mut().zip(x) {
            *out = vector::gelu_erf(x);
        }
    }

    fn erf_gradient_piece(out: &mut [f32], x: &[f32], grad: &[f32]) {
        for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
            *out = grad * vector::gelu_erf_gradient(x);
        }
    }

    fn gradient_piece(out: &mut [f32], x: &[f32], grad: &[f32]) {
        for ((out, &x), &grad) in out.iter_mut().zip(x).zip(grad) {
            let s = sigmoid(GELU_LINEAR * (x + GELU_CUBIC * x * x * x));
            *out = grad * (s + x * s * (1.0 - s) * GELU_LINEAR * (1.0 + 3.0 * GELU_CUBIC * x * x));
        }
    }
}
