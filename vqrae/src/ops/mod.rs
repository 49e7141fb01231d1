//! The operations of a transformer, and those of the convolutional networks that judge images in training: a fast forward,
//! each with its gradient.
//!
//! candle's own fused `softmax_last_dim`, `layer_norm` and `rms_norm` end the gradient without a word
//! (`apply_op*_no_bwd`), so model code calls only what stands here. Every operation has a plain sibling in
//! [`composed`], written in tensor algebra: it runs on devices and dtypes without a fused path (anything but f32 on the
//! CPU), and the tests compare values and gradients with it.
//!
//! **Batch invariance.** On the CPU an element of a product is a sum of its own, in an order that no other row changes, and
//! attention cuts its work into pieces whose shapes depend on one image alone. An image therefore gives the same bits alone
//! and in any batch, on any number of threads, which is what makes codes reproducible.

mod attention;
pub mod composed;
mod conv;
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
mod window;

pub use attention::attention;
pub use conv::{Conv2d, conv2d, conv2d_relu};
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

/// Whether `x` is where the fused paths are: f32 on the CPU.
fn fused(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
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
