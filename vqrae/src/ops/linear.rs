//! `x wᵀ + b`, the layer that nearly all the time goes to.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use vqrae_kernels::cpu::{Bf16, Element, Isa, dense};
use vqrae_kernels::matrix::{Into, View};

use super::Precision;
use super::gelu::{Form, Gelu};
#[cfg(feature = "cuda")]
use super::untracked::{self, Last};

/// `x wᵀ + b`.
///
/// # Shapes
/// - x: `[B, N, D]`, or any shape that ends in D
/// - weight: `[E, D]`
/// - bias: `[E]`
/// - output: the shape of x with E for D
pub fn linear(precision: Precision, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if precision_is_dtype(precision, x) && untracked::serves(x, &[weight, bias]) {
        return untracked::linear(x, weight, bias, Last::Nothing);
    }
    if super::fused(x) && x.rank() >= 2 {
        x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LinearOp { precision })
    } else {
        super::composed::linear(precision, x, weight, bias)
    }
}

/// [`linear`] with its parameters, named `weight` and `bias` as in PyTorch.
#[derive(Debug, Clone)]
pub struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    pub(crate) precision: Precision,
}

impl Linear {
    /// Loads `[E, D]` and `[E]`; fresh ones are drawn from N(0, 0.02²) and zero.
    pub fn load(vb: VarBuilder, d: usize, e: usize) -> Result<Self> {
        let weight = vb.get_with_hints((e, d), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        let bias = vb.get_with_hints(e, "bias", candle_nn::init::ZERO)?;
        Ok(Self { weight, bias, precision: Precision::F32 })
    }

    /// Loads `[E, D]` alone; the bias is zero and no parameter.
    pub fn load_without_bias(vb: VarBuilder, d: usize, e: usize) -> Result<Self> {
        let weight = vb.get_with_hints((e, d), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        let bias = Tensor::zeros(e, weight.dtype(), weight.device())?;
        Ok(Self { weight, bias, precision: Precision::F32 })
    }

    /// The same parameters, multiplied in `precision`.
    pub(crate) fn multiply_in(&mut self, precision: Precision) {
        self.precision = precision;
    }

    /// `[…, D]` to `[…, E]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(self.precision, x, &self.weight, &self.bias)
    }

    /// Whether no gradient is asked for and all is on a GPU, where a product's end costs nothing.
    #[cfg(feature = "cuda")]
    pub(super) fn is_untracked(&self, x: &Tensor) -> bool {
        precision_is_dtype(self.precision, x) && untracked::serves(x, &[&self.weight, &self.bias])
    }

    /// GELU of [`Linear::forward`].
    pub(crate) fn then_gelu(&self, form: Form, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if matches!(form, Form::Tanh) && self.is_untracked(x) {
            return untracked::linear(x, &self.weight, &self.bias, Last::Gelu);
        }
        form.plain(&self.forward(x)?)
    }

    /// `residual` plus [`Linear::forward`].
    pub(crate) fn onto(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.is_untracked(x) && untracked::serves(x, &[residual]) {
            return untracked::linear(x, &self.weight, &self.bias, Last::Plus(residual));
        }
        residual + self.forward(x)?
    }

    /// Several layers of one input as one, if nothing is trained and all is on a GPU, where one product is faster than three.
    /// The layers become views of its weights, so nothing is held twice.
    pub(crate) fn side_by_side(parts: [&mut Self; 3]) -> Result<Option<Self>> {
        let first = &parts[0];
        let alike = |part: &&mut Self| {
            part.weight.device().is_cuda()
                && !part.weight.track_op()
                && !part.bias.track_op()
                && part.precision == first.precision
        };
        if !parts.iter().all(alike) {
            return Ok(None);
        }
        let weight = Tensor::cat(&parts.each_ref().map(|part| &part.weight), 0)?;
        let bias = Tensor::cat(&parts.each_ref().map(|part| &part.bias), 0)?;
        let precision = first.precision;
        let mut row = 0;
        for part in parts {
            let rows = part.weight.dim(0)?;
            part.weight = weight.narrow(0, row, rows)?;
            part.bias = bias.narrow(0, row, rows)?;
            row += rows;
        }
        Ok(Some(Self { weight, bias, precision }))
    }

    /// [`Linear::forward`] of GELU of `x`, which is computed again for the gradient rather than kept: of a block's memory in
    /// training a quarter, for little time.
    pub(crate) fn after_gelu(&self, form: Form, x: &Tensor) -> Result<Tensor> {
        if !super::fused(x) || x.rank() < 2 {
            return self.forward(&form.plain(x)?);
        }
        let op = AfterGelu { gelu: Gelu { form }, linear: LinearOp { precision: self.precision } };
        x.contiguous()?.apply_op3(&self.weight.contiguous()?, &self.bias.contiguous()?, op)
    }
}

/// Whether products of `x` read its numbers as they are.
#[cfg(feature = "cuda")]
fn precision_is_dtype(precision: Precision, x: &Tensor) -> bool {
    precision == Precision::F32 || x.dtype() != candle_core::DType::F32
}

struct AfterGelu {
    gelu: Gelu,
    linear: LinearOp,
}

impl CustomOp3 for AfterGelu {
    fn name(&self) -> &'static str {
        "linear-after-gelu"
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
        let (x, shape) = self.gelu.cpu_fwd(x, x_layout)?;
        self.linear.cpu_fwd(&x, &Layout::contiguous(shape), weight, weight_layout, bias, bias_layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let x_is_tracked = x.track_op();
        let x = x.detach();
        let hidden = x.apply_op1_no_bwd(&self.gelu)?;
        let (hidden_grad, weight_grad, bias_grad) =
            self.linear.gradients((&hidden, x_is_tracked), weight, bias, grad)?;
        let x_grad = hidden_grad.map(|grad| self.gelu.bwd(&x, result, &grad)).transpose()?.flatten();
        Ok((x_grad, weight_grad, bias_grad))
    }
}

struct LinearOp {
    precision: Precision,
}

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
        let isa = super::isa()?;
        let out = match self.precision {
            Precision::F32 => forward::<f32>(x, weight, bias, tokens, d, e, isa),
            Precision::Bf16 => forward::<Bf16>(x, weight, bias, tokens, d, e, isa),
        };
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
        self.gradients((x, x.track_op()), weight, bias, grad)
    }
}

impl LinearOp {
    /// The gradients of the input, if it is tracked, and of the parameters that are.
    fn gradients(
        &self,
        (x, x_is_tracked): (&Tensor, bool),
        weight: &Tensor,
        bias: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (e, d) = weight.dims2()?;
        // No tensor made here is part of a graph: a gradient must not hold what its layer's input came from.
        let grad = grad.reshape(((), e))?.contiguous()?; // [M,E]
        let x_rows = x.detach().reshape(((), d))?.contiguous()?; // [M,D]
        let m = grad.dim(0)?;
        let matrix = |values: Vec<f32>, shape: &Shape| Tensor::from_vec(values, shape, grad.device());
        with_values([&grad, &x_rows, weight], |[g, x_values, w]| {
            let isa = super::isa()?;
            let (g_view, w_view) = (View::new(g, m, e, e), View::new(w, e, d, d));
            let product = |rows: usize, a: View, b: View| {
                let mut out = vec![0f32; rows * d];
                match self.precision {
                    Precision::F32 => dense::multiply::<f32>(&mut out, d, a, b, Into::Replace, isa),
                    Precision::Bf16 => dense::multiply::<Bf16>(&mut out, d, a, b, Into::Replace, isa),
                }
                out
            };
            let x_grad = x_is_tracked.then(|| matrix(product(m, g_view, w_view), x.shape())).transpose()?;
            let x_view = View::new(x_values, m, d, d);
            let weight_grad =
                weight.track_op().then(|| matrix(product(e, g_view.t(), x_view), weight.shape())).transpose()?;
            let bias_grad = bias.track_op().then(|| matrix(column_sums(g, e), bias.shape())).transpose()?;
            Ok((x_grad, weight_grad, bias_grad))
        })
    }
}

/// Runs `f` on the elements of contiguous tensors of f32 on the CPU.
fn with_values<const N: usize, R>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> Result<R>) -> Result<R> {
    let held = tensors.map(Tensor::storage_and_layout);
    let mut values = [&[] as &[f32]; N];
    for (values, (storage, layout)) in values.iter_mut().zip(&held) {
        let Storage::Cpu(storage) = &**storage else { candle_core::bail!("linear: a gradient is not on the CPU") };
        *values = super::f32_slice(storage, layout)?;
    }
    f(values)
}

/// The sum of every column of rows `e` wide, each in the order of the rows.
fn column_sums(rows: &[f32], e: usize) -> Vec<f32> {
    /// Columns of a piece of work.
    const COLUMNS: usize = 64;
    let mut sums = vec![0f32; e];
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
        for row in rows.chunks_exact(e) {
            sums.iter_mut().zip(&row[i * COLUMNS..]).for_each(|(sum, x)| *sum += x);
        }
    });
    sums
}

/// The product. Rows are sums of their own, so batches cannot change a bit; where they are not (any processor's way, which
/// sums as a block's shape suits it), blocks begin anew with each image of `tokens` rows.
fn forward<T: Element>(
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
    tokens: usize,
    d: usize,
    e: usize,
    isa: Isa,
) -> Vec<f32> {
    let mut out: Vec<f32> = bias.repeat(x.len() / d.max(1));
    if out.is_empty() || x.is_empty() {
        return out;
    }
    let weight = View::new(weight, e, d, d).t();
    let tokens = if isa == Isa::PORTABLE { tokens } else { x.len() / d };
    out.par_chunks_mut(tokens * e).zip(x.par_chunks(tokens * d)).for_each(|(out, x)| {
        dense::multiply::<T>(out, e, View::new(x, x.len() / d, d, d), weight, Into::Add, isa);
    });
    out
}
