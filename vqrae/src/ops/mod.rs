//! The operations of a transformer, and those of the convolutional networks that judge images in training: a fast forward,
//! each with its gradient.
//!
//! candle's own fused `softmax_last_dim`, `layer_norm` and `rms_norm` end the gradient without a word
//! (`apply_op*_no_bwd`), so model code calls only what stands here. Every operation has a plain sibling in
//! [`composed`], written in tensor algebra: it runs where there is no fused path, and the tests compare values and gradients
//! with it. Fused are f32 on the CPU, and on a GPU what no gradient is asked of (`untracked`).
//!
//! **Batch invariance.** On the CPU an element of a product is a sum of its own, in an order that no other row changes, and
//! attention cuts its work into pieces whose shapes depend on one image alone. An image therefore gives the same bits alone
//! and in any batch, on any number of threads, which is what makes codes reproducible.

mod attention;
pub(crate) mod averages;
mod chosen;
pub mod composed;
mod conv;
mod cross_entropy;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod depthwise;
mod gelu;
mod layer_norm;
mod linear;
mod norm;
mod pool;
mod search;
mod unit_distance;
#[cfg(feature = "cuda")]
mod untracked;
mod window;

pub use attention::attention;
pub(crate) use attention::attention_of_all;
pub(crate) use chosen::{commitment, transformed_rows};
pub use conv::{Conv2d, conv2d, conv2d_relu};
pub use cross_entropy::linear_cross_entropy;
pub use depthwise::depthwise_conv2d;
pub(crate) use gelu::Form as GeluForm;
pub use gelu::{gelu, gelu_erf};
pub use layer_norm::{LayerNorm, layer_norm};
pub use linear::{Linear, linear};
pub use norm::Norm;
pub use pool::max_pool2d;
pub(crate) use search::Search;
pub use unit_distance::unit_distance;
pub use window::Window;

use candle_core::{CpuStorage, DType, Layout, Result, Tensor};
use serde::{Deserialize, Serialize};
use vqrae_kernels::cpu::Isa;
pub use vqrae_kernels::cpu::Mask;

/// What products of f32 tensors read: the numbers as they are, or rounded to bf16, half as wide and twice as fast where the
/// processor has instructions for it. Tensors, sums and gradients are f32 either way, as are the weights that an optimizer
/// sees: what PyTorch calls autocast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to 8 bits of mantissa.
    Bf16,
}

/// Whether `x` is where the fused paths with gradients are: f32 on the CPU.
fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// Whose arithmetic tensor operations use on a device: GPUs of one compute capability give the same sums.
pub(crate) fn arithmetic(device: &candle_core::Device) -> Result<String> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = device {
        let capability = device.cuda_stream().context().compute_capability();
        let (major, minor) = capability.map_err(candle_core::Error::wrap)?;
        return Ok(format!("cuda-{major}.{minor}"));
    }
    let _ = device;
    Ok("candle".to_string())
}

/// Whether products end in what follows them, so that [`Linear::then_gelu`] and [`Linear::onto`] save passes over memory: on a
/// GPU without gradients.
pub(crate) fn ends(x: &Tensor, linear: &Linear) -> bool {
    #[cfg(feature = "cuda")]
    return linear.is_untracked(x);
    #[cfg(not(feature = "cuda"))]
    {
        let _ = (x, linear);
        false
    }
}

/// `residual + scale · x`, scale over the last dimension.
pub(crate) fn add_scaled(residual: &Tensor, x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if untracked::serves(x, &[residual, scale]) {
        return untracked::add_scaled(residual, x, scale);
    }
    residual + x.broadcast_mul(scale)?
}

/// `silu(a) · b` of the halves of the last dimension.
pub(crate) fn gate(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if untracked::serves(x, &[]) {
        return untracked::gate(x);
    }
    let halves = x.chunk(2, candle_core::D::Minus1)?;
    halves[0].silu()? * &halves[1]
}

/// Bytes of images to normalised pixels: value v of channel c becomes `levels[c][v]`, on any device to the same bits.
///
/// # Shapes
/// - bytes: u8 `[B, H, W, 3]`
/// - levels: f32 `[3, 256]`, on the same device
/// - output: f32 `[B, 3, H, W]`
pub fn pixels(bytes: &Tensor, levels: &Tensor) -> Result<Tensor> {
    let (b, h, w, c) = bytes.dims4()?;
    if c != 3 || levels.dims() != [3, 256] {
        candle_core::bail!(
            "pixels: bytes {:?} and levels {:?}, expected [B, H, W, 3] and [3, 256]",
            bytes.dims(),
            levels.dims()
        );
    }
    #[cfg(feature = "cuda")]
    if bytes.device().is_cuda() && bytes.elem_count() > 0 {
        return untracked::normalise(bytes, levels);
    }
    let planes = bytes.permute((0, 3, 1, 2))?; // [B,3,H,W]
    let plane = |c: usize| {
        let values = planes.narrow(1, c, 1)?.flatten_all()?.to_dtype(DType::U32)?;
        levels.get(c)?.index_select(&values, 0)?.reshape((b, 1, h, w))
    };
    Tensor::cat(&[plane(0)?, plane(1)?, plane(2)?], 1)
}

/// The instructions that products use.
fn isa() -> Result<Isa> {
    Isa::detect().map_err(candle_core::Error::wrap)
}

/// The elements of a contiguous f32 tensor, as a custom op sees them.
fn f32_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::msg("a fused op was given a tensor that is not contiguous"))?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}
