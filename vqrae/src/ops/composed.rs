//! The operations again in plain tensor algebra: the reference for values and gradients, and what runs on other devices.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Mask, Precision, Window};

/// `x wᵀ + b`; see [`super::linear`].
pub fn linear(precision: Precision, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let width_out = weight.dim(0)?;
    let mut shape = x.dims().to_vec();
    let width_in = shape.pop().unwrap_or(1);
    shape.push(width_out);
    multiply(precision, &x.reshape(((), width_in))?, &weight.t()?)?.broadcast_add(bias)?.reshape(shape)
}

/// `a b` in the dtype of both, of numbers rounded to `precision` where they have more.
fn multiply(precision: Precision, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match (precision, a.dtype()) {
        (Precision::Bf16, DType::F32) => {
            a.to_dtype(DType::BF16)?.matmul(&b.to_dtype(DType::BF16)?)?.to_dtype(DType::F32)
        }
        _ => a.matmul(b),
    }
}

/// `(x − mean) / √(variance + ε) · weight + bias`; see [`super::layer_norm`].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    normed.broadcast_mul(weight)?.broadcast_add(bias)
}

/// The tanh form of GELU; see [`super::gelu`].
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    let inner = ((x + (x.powf(3.0)? * 0.044715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    (x * 0.5)? * (inner.tanh()? + 1.0)?
}

/// `softmax(q kᵀ / √d) v` for every head; see [`super::attention`].
pub fn attention(precision: Precision, mask: Mask, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, d) = q.dims3()?;
    let split = |x: &Tensor| x.reshape((b, n, heads, d / heads))?.transpose(1, 2)?.contiguous(); // [B,heads,N,d]
    let (q, k, v) = (split(q)?, split(k)?, split(v)?);
    let scores = (multiply(precision, &q, &k.t()?)? * (1.0 / ((d / heads) as f64).sqrt()))?; // [B,heads,N,N]
    let weights = match mask {
        Mask::None => softmax(&scores)?,
        Mask::Causal => softmax(&scores.broadcast_add(&hidden(n, scores.dtype(), scores.device())?)?)?,
    };
    multiply(precision, &weights, &v)?.transpose(1, 2)?.reshape((b, n, d))
}

/// What is added to the scores of `n` tokens, `[N, N]`: −∞ where a token does not see another.
fn hidden(n: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let seen = |i: usize| Mask::Causal.seen(i, n);
    let values = (0..n).flat_map(|i| (0..n).map(move |j| if j < seen(i) { 0.0 } else { f32::NEG_INFINITY }));
    Tensor::from_iter(values, device)?.reshape((n, n))?.to_dtype(dtype)
}

/// The softmax over the last dimension, safe for large scores.
pub fn softmax(scores: &Tensor) -> Result<Tensor> {
    let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
}

/// `Σ weight · −log softmax(x codesᵀ + bias)[target]`; see [`super::linear_cross_entropy`].
pub fn linear_cross_entropy(
    precision: Precision,
    x: &Tensor,
    codes: &Tensor,
    bias: &Tensor,
    targets: &[u32],
    weights: &[f32],
) -> Result<Tensor> {
    let scores = linear(precision, x, codes, bias)?; // [M,K]
    let largest = scores.max_keepdim(D::Minus1)?.detach();
    let sums = scores.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?;
    let chosen = scores.gather(&Tensor::new(targets, x.device())?.unsqueeze(1)?, 1)?;
    let losses = ((sums.log()? + largest)? - chosen)?; // [M,1]
    (losses * Tensor::new(weights, x.device())?.unsqueeze(1)?.to_dtype(x.dtype())?)?.sum_all()
}

/// Cross-correlation with zeros around the image; see [`super::conv2d`].
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window) -> Result<Tensor> {
    const GROUPS: usize = 1;
    convolve(x, weight, bias, window, GROUPS)
}

/// One kernel a channel; see [`super::depthwise_conv2d`].
pub fn depthwise_conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window) -> Result<Tensor> {
    convolve(x, weight, bias, window, x.dim(1)?)
}

fn convolve(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window, groups: usize) -> Result<Tensor> {
    const DILATION: usize = 1;
    let out = x.conv2d(weight, window.padding, window.stride, DILATION, groups)?;
    match bias {
        Some(bias) => out.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        None => Ok(out),
    }
}

/// The largest element under a kernel; see [`super::max_pool2d`]. Equal elements share the gradient.
pub fn max_pool2d(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let places = |side: usize, from: usize| {
        let at: Vec<u32> = (from..=side - kernel + from).step_by(stride).map(|i| i as u32).collect();
        Tensor::new(at, x.device())
    };
    let tap = |tap: usize| x.index_select(&places(h, tap / kernel)?, 2)?.index_select(&places(w, tap % kernel)?, 3);
    (1..kernel * kernel).try_fold(tap(0)?, |largest, next| largest.maximum(&tap(next)?))
}

/// The weighted squared distance of two maps of features after each pixel is brought to length one; see
/// [`super::unit_distance`].
pub fn unit_distance(x: &Tensor, y: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    /// The root's gradient is infinite at zero.
    const LEAST: f64 = 1e-30;
    let unit = |x: &Tensor| {
        let square = x.sqr()?.sum_keepdim(1)?;
        let alive = square.gt(0.0)?.to_dtype(x.dtype())?;
        x.broadcast_mul(&alive)?.broadcast_div(&(square.maximum(LEAST)?.sqrt()? + eps)?)
    };
    let difference = (unit(x)? - unit(y)?)?.sqr()?;
    difference.broadcast_mul(&weight.reshape((1, (), 1, 1))?)?.sum(1)?.mean((1, 2))
}
