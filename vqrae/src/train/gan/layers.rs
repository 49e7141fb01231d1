//! What the discriminators are made of besides the library's own operations.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

use crate::ops::{self, Conv2d, Window};

/// Leaky ReLU: `x` where it is positive, `slope · x` elsewhere.
pub(super) fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    (x * slope)? + (x.relu()? * (1.0 - slope))?
}

/// Mean zero and (biased) variance one over the last dimension.
pub(super) fn standardize(x: &Tensor, eps: f64) -> Result<Tensor> {
    let n = x.dim(candle_core::D::Minus1)?;
    let (one, zero) = (Tensor::ones(n, x.dtype(), x.device())?, Tensor::zeros(n, x.dtype(), x.device())?);
    ops::layer_norm(x, &one, &zero, eps)
}

/// A convolution of odd size that keeps height and width, zeros beyond the edges; fresh as PyTorch's.
pub(super) fn convolution(vb: VarBuilder, from: usize, to: usize, size: usize) -> Result<Conv2d> {
    Conv2d::load(vb, from, to, size, Window { stride: 1, padding: size / 2 })
}

/// Group normalisation (Wu & He, arXiv 1803.08494).
#[derive(Debug, Clone)]
pub(super) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    /// Loads `weight` and `bias`, `[C]` each; `groups` divides C.
    pub(super) fn load(vb: VarBuilder, channels: usize, groups: usize) -> Result<Self> {
        let weight = vb.get_with_hints(channels, "weight", candle_nn::init::ONE)?;
        Ok(Self { weight, bias: vb.get_with_hints(channels, "bias", candle_nn::init::ZERO)?, groups })
    }

    /// `[B, C, H, W]` to the same.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        const EPS: f64 = 1e-5;
        let (b, c, h, w) = x.dims4()?;
        let x = standardize(&x.reshape((b, self.groups, c / self.groups * h * w))?, EPS)?.reshape((b, c, h, w))?;
        x.broadcast_mul(&self.weight.reshape((1, c, 1, 1))?)?.broadcast_add(&self.bias.reshape((1, c, 1, 1))?)
    }
}

/// The largest value in each of `side` × `side` windows: PyTorch's AdaptiveMaxPool2d. Windows overlap where the size is
/// no multiple of `side`, and repeat where it is smaller.
pub(super) fn adaptive_max_pool(x: &Tensor, side: usize) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if (h, w) == (side, side) {
        return Ok(x.clone());
    }
    let window = |i: usize, n: usize| i * n / side..((i + 1) * n).div_ceil(side);
    let values = x.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut largest = Vec::with_capacity(b * c * side * side);
    for plane in values.chunks_exact(h * w) {
        for (i, j) in (0..side).flat_map(|i| (0..side).map(move |j| (i, j))) {
            let places = window(i, h).flat_map(|row| window(j, w).map(move |column| row * w + column));
            // The first of equals, as PyTorch has it.
            let first = window(i, h).start * w + window(j, w).start;
            largest.push(places.fold(first, |best, at| if plane[at] > plane[best] { at } else { best }) as u32);
        }
    }
    let largest = Tensor::from_vec(largest, (b, c, side * side), x.device())?;
    x.contiguous()?.reshape((b, c, h * w))?.gather(&largest, 2)?.reshape((b, c, side, side))
}
