//! A block's operations on a GPU where no gradient is asked for: few kernels, each with what follows it at its end.
//!
//! [`serves`] says whether a tensor and the parameters that it meets are such. Where they are not, callers go their usual way,
//! so nothing but time depends on it (and, in 16 bits, roundings: sums are f32 to their end here).

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};
use half::{bf16, f16};
use vqrae_kernels::cuda::attention;
use vqrae_kernels::cuda::elementwise;
use vqrae_kernels::cuda::linear::{self, End};
use vqrae_kernels::cuda::norm::{Centre, Norm};
use vqrae_kernels::cuda::{Gpu, Half, pixels};

use super::GeluForm;
use super::cuda::{self, hold};

/// Whether `x` and the parameters are on a GPU, of one dtype that kernels know, and no gradient is asked for.
pub(crate) fn serves(x: &Tensor, parameters: &[&Tensor]) -> bool {
    let known = |tensor: &Tensor| tensor.device().is_cuda() && tensor.dtype() == x.dtype() && !tensor.track_op();
    let dtype = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    dtype && x.elem_count() > 0 && known(x) && parameters.iter().all(|parameter| known(parameter))
}

/// Runs `$body` with `$T` as the type of a dtype's elements.
macro_rules! typed {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            other => candle_core::bail!("no kernel for {}", other.as_str()),
        }
    };
}

/// What a product ends in.
#[derive(Clone, Copy)]
pub(crate) enum Last<'a> {
    Nothing,
    /// The tanh form.
    Gelu,
    /// The output's shape.
    Plus(&'a Tensor),
}

/// `x wᵀ + b` and its end; shapes as [`super::linear`].
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor, last: Last<'_>) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    if shape.pop() != Some(inputs) {
        candle_core::bail!("linear: x {:?} does not fit weight [{outputs}, {inputs}]", x.dims());
    }
    let sizes = linear::Shape { rows: shape.iter().product(), inputs, outputs };
    shape.push(outputs);
    let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
    let residual = if let Last::Plus(residual) = last { Some(residual.contiguous()?) } else { None };
    typed!(x.dtype(), T => run("linear", x, Shape::from(shape), |gpu, x| {
        let (weight, bias) = (hold(&weight), hold(&bias));
        let residual = residual.as_ref().map(hold);
        let residual = residual.as_ref().map(|held| held.view::<T>()).transpose()?;
        let end = match (&residual, last) {
            (Some(residual), _) => End::Residual(residual),
            (None, Last::Gelu) => End::Gelu,
            (None, _) => End::Plain,
        };
        linear::linear::<T>(gpu, x, &weight.view()?, Some(&bias.view()?), sizes, end).map_err(candle_core::Error::wrap)
    }))
}

/// Whether there is a kernel for attention of `heads` heads over `width` in a dtype.
pub(crate) fn attends(dtype: DType, width: usize, heads: usize) -> bool {
    let whole = heads > 0 && width.is_multiple_of(heads);
    matches!(dtype, DType::BF16 | DType::F16) && whole && attention::serves(width / heads)
}

/// Attention within each image, from q, k and v side by side: `[B, N, 3·D]` to `[B, N, D]`.
pub(crate) fn attention_of_all(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, all) = qkv.dims3()?;
    let width = all / 3;
    let shape = Shape::from((b, n, width));
    fn attend<T: Half + CudaDType>(qkv: &Tensor, shape: Shape, heads: usize) -> Result<Tensor> {
        let (b, n, d) = shape.dims3()?;
        run("attention", qkv, shape, |gpu, qkv| {
            attention::fused_attention::<T>(gpu, qkv, b, n, heads, d / heads).map_err(candle_core::Error::wrap)
        })
    }
    match qkv.dtype() {
        DType::BF16 => attend::<bf16>(qkv, shape, heads),
        DType::F16 => attend::<f16>(qkv, shape, heads),
        other => candle_core::bail!("no attention kernel for {}", other.as_str()),
    }
}

/// Attention of queries, keys and values each by itself, `[B, N, D]`, as [`super::attention`].
pub(crate) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    // Side by side once: rows of three times the width are what the kernel reads fastest.
    attention_of_all(&Tensor::cat(&[q, k, v], 2)?, heads)
}

/// A norm over the last dimension; a layer norm has a bias, a root mean square has none.
pub(crate) fn norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let weight = weight.contiguous()?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    typed!(x.dtype(), T => run("norm", x, x.shape().clone(), |gpu, x| {
        let held = hold(&weight);
        let held_bias = bias.as_ref().map(hold);
        let centre = if bias.is_some() { Centre::Mean } else { Centre::Zero };
        let bias = held_bias.as_ref().map(|held| held.view::<T>()).transpose()?;
        let norm = Norm::<T> { centre, weight: held.view()?, bias, eps: eps as f32 };
        norm.of(gpu, x).map_err(candle_core::Error::wrap)
    }))
}

/// GELU in either form.
pub(crate) fn gelu(form: GeluForm, x: &Tensor) -> Result<Tensor> {
    let form = match form {
        GeluForm::Tanh => elementwise::Gelu::Tanh,
        GeluForm::Erf => elementwise::Gelu::Erf,
    };
    typed!(x.dtype(), T => run("gelu", x, x.shape().clone(), |gpu, x| {
        elementwise::gelu::<T>(gpu, x, None, form).map_err(candle_core::Error::wrap)
    }))
}

/// `silu(a) · b` of the halves of the last dimension.
pub(crate) fn gate(x: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let Some(twice) = shape.pop().filter(|twice| twice.is_multiple_of(2)) else {
        candle_core::bail!("gate: {:?} has no halves", x.dims())
    };
    shape.push(twice / 2);
    typed!(x.dtype(), T => run("gate", x, Shape::from(shape), |gpu, x| {
        elementwise::gate_silu::<T>(gpu, x, twice / 2).map_err(candle_core::Error::wrap)
    }))
}

/// `residual + scale · x`, scale over the last dimension.
pub(crate) fn add_scaled(residual: &Tensor, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let (residual, scale) = (residual.contiguous()?, scale.contiguous()?);
    typed!(x.dtype(), T => run("add", x, x.shape().clone(), |gpu, x| {
        let (residual, scale) = (hold(&residual), hold(&scale));
        let (residual, scale) = (residual.view::<T>()?, scale.view::<T>()?);
        elementwise::add::<T>(gpu, x, None, Some(&scale), Some(&residual)).map_err(candle_core::Error::wrap)
    }))
}

/// Bytes `[B, H, W, 3]` to normalised pixels f32 `[B, 3, H, W]`; see [`super::pixels`].
pub(crate) fn normalise(bytes: &Tensor, levels: &Tensor) -> Result<Tensor> {
    let (b, h, w, _) = bytes.dims4()?;
    run("pixels", bytes, Shape::from((b, 3, h, w)), |gpu, bytes| {
        let levels = hold(levels);
        let layout = pixels::Layout::Planes;
        pixels::normalise::<f32>(gpu, bytes, &levels.view()?, (h, w), layout).map_err(candle_core::Error::wrap)
    })
}

/// The tensor of `shape` that `kernel` makes of `x`.
fn run<X: CudaDType, Y: CudaDType, F>(name: &'static str, x: &Tensor, shape: Shape, kernel: F) -> Result<Tensor>
where
    F: Fn(&Gpu, &CudaView<'_, X>) -> Result<CudaSlice<Y>> + Send + Sync,
{
    struct Op<F, X, Y> {
        name: &'static str,
        shape: Shape,
        kernel: F,
        types: std::marker::PhantomData<fn(X) -> Y>,
    }

    impl<F, X: CudaDType, Y: CudaDType> CustomOp1 for Op<F, X, Y>
    where
        F: Fn(&Gpu, &CudaView<'_, X>) -> Result<CudaSlice<Y>> + Send + Sync,
    {
        fn name(&self) -> &'static str {
            self.name
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            candle_core::bail!("{}: the tensor is not on a GPU", self.name)
        }

        fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            let gpu = cuda::gpu_of(x)?;
            let made = (self.kernel)(&gpu, &cuda::slice(x, layout)?)?;
            Ok((CudaStorage::wrap_cuda_slice(made, x.device().clone()), self.shape.clone()))
        }
    }

    let op = Op { name, shape, kernel, types: std::marker::PhantomData };
    x.contiguous()?.apply_op1_no_bwd(&op)
}
