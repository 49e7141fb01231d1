//! The distance of two maps of features that LPIPS takes of each of its layers.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use vqrae_kernels::vectorised;

/// Pixels whose channels are walked together, so that their sums stay in the cache.
const PIXELS: usize = 1024;

/// Every pixel's features are divided by their length (plus `eps`); of the differences the weighted sum of squares is
/// taken over the channels and the mean over the pixels (Zhang et al., arXiv 1801.03924, equation 1).
///
/// A pixel whose features are all zero has no direction and gets no gradient (PyTorch's is not a number there). The weight
/// has no gradient either.
///
/// # Shapes
/// - x, y: `[B, C, H, W]`
/// - weight: `[C]`
/// - output: `[B]`
///
/// # Errors
/// If the shapes do not fit, or the weight is a variable.
pub fn unit_distance(x: &Tensor, y: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    if y.dims() != x.dims() || weight.dims() != [c] || weight.track_op() || h * w == 0 {
        candle_core::bail!("unit_distance: x {:?}, y {:?}, frozen weight {:?}", x.dims(), y.dims(), weight.dims());
    }
    if !super::fused(x) {
        return super::composed::unit_distance(x, y, weight, eps);
    }
    let op = Distance { sizes: Sizes { b, c, pixels: h * w }, weight: weight.to_vec1()?, eps: eps as f32 };
    x.contiguous()?.apply_op3(&y.contiguous()?, weight, op)
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    c: usize,
    pixels: usize,
}

#[derive(Clone)]
struct Distance {
    sizes: Sizes,
    weight: Vec<f32>,
    eps: f32,
}

impl CustomOp3 for Distance {
    fn name(&self) -> &'static str {
        "unit-distance"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { b, c, pixels } = self.sizes;
        let (x, y) = (super::f32_slice(x, x_layout)?, super::f32_slice(y, y_layout)?);
        let in_image = pixels.div_ceil(PIXELS);
        let piece = |index: usize| {
            let (image, first) = (index / in_image, index % in_image * PIXELS);
            let (start, count) = (image * c * pixels + first, PIXELS.min(pixels - first));
            distance(&x[start..], &y[start..], &self.weight, pixels, count, self.eps)
        };
        let parts: Vec<f64> = (0..b * in_image).into_par_iter().map(piece).collect();
        let mean = |parts: &[f64]| (parts.iter().sum::<f64>() / pixels as f64) as f32;
        Ok((CpuStorage::F32(parts.chunks_exact(in_image).map(mean).collect()), Shape::from(b)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        // The distance is symmetric: each has the gradient that it would have in the other's place.
        let of = |x: &Tensor, y: &Tensor| {
            let gradient =
                || x.contiguous()?.apply_op3_no_bwd(&y.contiguous()?, &grad, &DistanceGradient(self.clone()));
            x.track_op().then(gradient).transpose()
        };
        Ok((of(x, y)?, of(y, x)?, None))
    }
}

/// The gradient of x from x, y and the gradient of the distances.
struct DistanceGradient(Distance);

impl CustomOp3 for DistanceGradient {
    fn name(&self) -> &'static str {
        "unit-distance-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Distance { sizes: Sizes { c, pixels, .. }, weight, eps } = &self.0;
        let (x, y) = (super::f32_slice(x, x_layout)?, super::f32_slice(y, y_layout)?);
        let grad = super::f32_slice(grad, grad_layout)?;
        let mut out = vec![0f32; x.len()];
        for (image, out) in out.chunks_exact_mut(c * pixels).enumerate() {
            let scale = grad[image] * 2.0 / *pixels as f32;
            let mut of_pixels = vec![[0f32; 3]; *pixels];
            of_pixels.par_chunks_mut(PIXELS).enumerate().for_each(|(piece, of_pixels)| {
                let start = image * c * pixels + piece * PIXELS;
                scales(of_pixels, &x[start..], &y[start..], weight, *pixels, *eps);
            });
            out.par_chunks_mut(*pixels).enumerate().for_each(|(channel, out)| {
                let at = (image * c + channel) * pixels;
                channel_gradient(out, &x[at..][..*pixels], &y[at..][..*pixels], &of_pixels, weight[channel], scale);
            });
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

vectorised! {
    /// Of some pixels of an image, given from the first of them on in the first channel: their lengths.
    fn lengths(x: &[f32], channels: usize, stride: usize, pixels: usize) -> Vec<f32> {
        let mut out = vec![0f32; pixels];
        for channel in 0..channels {
            out.iter_mut().zip(&x[channel * stride..][..pixels]).for_each(|(sum, &x)| *sum += x * x);
        }
        out.iter_mut().for_each(|sum| *sum = sum.sqrt());
        out
    }

    /// The distance of some pixels, summed.
    fn distance(x: &[f32], y: &[f32], weight: &[f32], stride: usize, pixels: usize, eps: f32) -> f64 {
        let x_lengths = lengths(x, weight.len(), stride, pixels);
        let y_lengths = lengths(y, weight.len(), stride, pixels);
        let mut sums = vec![0f32; pixels];
        for (channel, &weight) in weight.iter().enumerate() {
            let (x, y) = (&x[channel * stride..][..pixels], &y[channel * stride..][..pixels]);
            for p in 0..pixels {
                let difference = x[p] / (x_lengths[p] + eps) - y[p] / (y_lengths[p] + eps);
                sums[p] += weight * difference * difference;
            }
        }
        sums.iter().map(|&sum| f64::from(sum)).sum()
    }

    /// Of some pixels: 1/(length + ε) of x and of y, and what the gradient of x takes of x itself.
    fn scales(out: &mut [[f32; 3]], x: &[f32], y: &[f32], weight: &[f32], stride: usize, eps: f32) {
        let pixels = out.len();
        let x_lengths = lengths(x, weight.len(), stride, pixels);
        let y_lengths = lengths(y, weight.len(), stride, pixels);
        let mut along = vec![0f32; pixels];
        for (channel, &weight) in weight.iter().enumerate() {
            let (x, y) = (&x[channel * stride..][..pixels], &y[channel * stride..][..pixels]);
            for p in 0..pixels {
                along[p] += weight * (x[p] / (x_lengths[p] + eps) - y[p] / (y_lengths[p] + eps)) * x[p];
            }
        }
        for p in 0..pixels {
            out[p] = [0.0; 3];
            if x_lengths[p] > 0.0 {
                let inverse = 1.0 / (x_lengths[p] + eps);
                out[p] = [inverse, 1.0 / (y_lengths[p] + eps), along[p] * inverse * inverse / x_lengths[p]];
            }
        }
    }

    fn channel_gradient(out: &mut [f32], x: &[f32], y: &[f32], scales: &[[f32; 3]], weight: f32, scale: f32) {
        for (((out, &x), &y), &[of_x, of_y, own]) in out.iter_mut().zip(x).zip(y).zip(scales) {
            *out = scale * (weight * (x * of_x - y * of_y) * of_x - x * own);
        }
    }
}
