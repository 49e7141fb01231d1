//! Depthwise convolution: every channel has a kernel of its own.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use vqrae_kernels::vector::sum;
use vqrae_kernels::vectorised;

use super::conv::BiasGradient;
use super::window::{Plane, Window};

/// Cross-correlation, as PyTorch's `conv2d` of as many groups as channels, with zeros around the image.
///
/// # Shapes
/// - x: `[B, C, H, W]`
/// - weight: `[C, 1, kh, kw]`
/// - bias: `[C]`
/// - output: `[B, C, h, w]`, h = ⌊(H + 2·padding − kh) / stride⌋ + 1
///
/// # Errors
/// If the shapes do not fit, or the kernel is larger than the padded image.
pub fn depthwise_conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window) -> Result<Tensor> {
    let sizes = Sizes::new(x.shape(), weight.shape(), window)?;
    if let Some(bias) = bias.filter(|bias| bias.dims() != [sizes.c]) {
        candle_core::bail!("depthwise_conv2d: bias {:?}, expected: [{}]", bias.dims(), sizes.c);
    }
    if !super::fused(x) {
        return super::composed::depthwise_conv2d(x, weight, bias, window);
    }
    let bias = match bias {
        Some(bias) => bias.contiguous()?,
        None => Tensor::zeros(sizes.c, x.dtype(), x.device())?,
    };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias, Depthwise { sizes })
}

struct Depthwise {
    sizes: Sizes,
}

impl CustomOp3 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise-conv2d"
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
        let Sizes { b, c, plane } = self.sizes;
        let x = super::f32_slice(x, x_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let bias = super::f32_slice(bias, bias_layout)?;
        let mut out = vec![0f32; b * c * plane.area()];
        let planes = out.par_chunks_mut(plane.area()).zip(x.par_chunks(plane.pixels())).enumerate();
        planes.for_each(|(index, (out, x))| {
            out.fill(bias[index % c]);
            convolve(out, x, &weight[index % c * plane.taps()..][..plane.taps()], &plane);
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c, plane.out.0, plane.out.1))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_x = || grad.apply_op2_no_bwd(weight, &InputGradient { sizes: self.sizes });
        let of_weight = || x.apply_op2_no_bwd(&grad, &WeightGradient { sizes: self.sizes });
        Ok((
            x.track_op().then(of_x).transpose()?,
            weight.track_op().then(of_weight).transpose()?,
            bias.track_op().then(|| grad.apply_op1_no_bwd(&BiasGradient)).transpose()?,
        ))
    }
}

/// The gradient of x from that of the output and the weight.
struct InputGradient {
    sizes: Sizes,
}

impl CustomOp2 for InputGradient {
    fn name(&self) -> &'static str {
        "depthwise-conv2d-input-gradient"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { b, c, plane } = self.sizes;
        let grad = super::f32_slice(grad, grad_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let mut out = vec![0f32; b * c * plane.pixels()];
        let planes = out.par_chunks_mut(plane.pixels()).zip(grad.par_chunks(plane.area())).enumerate();
        planes.for_each(|(index, (out, grad))| {
            let kernel = &weight[index % c * plane.taps()..][..plane.taps()];
            scatter(out, grad, kernel, &plane);
        });
        Ok((CpuStorage::F32(out), Shape::from((b, c, plane.h, plane.w))))
    }
}

/// The gradient of the weight from x and the gradient of the output.
struct WeightGradient {
    sizes: Sizes,
}

impl CustomOp2 for WeightGradient {
    fn name(&self) -> &'static str {
        "depthwise-conv2d-weight-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Sizes { b, c, plane } = self.sizes;
        let x = super::f32_slice(x, x_layout)?;
        let grad = super::f32_slice(grad, grad_layout)?;
        let mut out = vec![0f32; c * plane.taps()];
        out.par_chunks_mut(plane.taps()).enumerate().for_each(|(channel, out)| {
            for index in (0..b).map(|image| image * c + channel) {
                let x = &x[index * plane.pixels()..][..plane.pixels()];
                correlate(out, x, &grad[index * plane.area()..][..plane.area()], &plane);
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((c, 1, plane.kh, plane.kw))))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    c: usize,
    plane: Plane,
}

impl Sizes {
    fn new(x: &Shape, weight: &Shape, window: Window) -> Result<Self> {
        let (b, c, h, w) = x.dims4()?;
        let (c_of_weight, of_group, kh, kw) = weight.dims4()?;
        let Some(plane) = Plane::new((h, w), (kh, kw), window).filter(|_| c == c_of_weight && of_group == 1) else {
            candle_core::bail!("depthwise_conv2d: x {x:?} does not fit weight {weight:?}, {window:?}");
        };
        Ok(Self { b, c, plane })
    }
}

/// Calls `f` with every tap, and the parts of an output row and of an input row that meet under it; these begin with the
/// first pair, and the input's are `stride` apart.
#[inline(always)]
fn rows(plane: &Plane, mut f: impl FnMut(usize, std::ops::Range<usize>, std::ops::Range<usize>)) {
    for tap in 0..plane.taps() {
        let (inside, first) = plane.inside(tap % plane.kw);
        for i in 0..plane.out.0 {
            if let Some(y) = plane.source_row(i, tap / plane.kw) {
                let row = i * plane.out.1;
                f(tap, row + inside.start..row + inside.end, y * plane.w + first..(y + 1) * plane.w);
            }
        }
    }
}

vectorised! {
    fn convolve(out: &mut [f32], x: &[f32], kernel: &[f32], plane: &Plane) {
        rows(plane, |tap, to, from| {
            let (out, x, weight) = (&mut out[to], &x[from], kernel[tap]);
            if plane.stride == 1 {
                out.iter_mut().zip(x).for_each(|(out, &x)| *out += weight * x);
            } else {
                out.iter_mut().zip(x.iter().step_by(plane.stride)).for_each(|(out, &x)| *out += weight * x);
            }
        });
    }

    fn scatter(x_grad: &mut [f32], grad: &[f32], kernel: &[f32], plane: &Plane) {
        rows(plane, |tap, to, from| {
            let (grad, x_grad, weight) = (&grad[to], &mut x_grad[from], kernel[tap]);
            if plane.stride == 1 {
                x_grad.iter_mut().zip(grad).for_each(|(x, &g)| *x += weight * g);
            } else {
                x_grad.iter_mut().step_by(plane.stride).zip(grad).for_each(|(x, &g)| *x += weight * g);
            }
        });
    }

    fn correlate(kernel_grad: &mut [f32], x: &[f32], grad: &[f32], plane: &Plane) {
        rows(plane, |tap, to, from| {
            let (grad, x) = (&grad[to], &x[from]);
            kernel_grad[tap] += if plane.stride == 1 {
                sum(&x[..grad.len()], grad, |x, g| x * g)
            } else {
                x.iter().step_by(plane.stride).zip(grad).map(|(x, g)| x * g).sum()
            };
        });
    }
}
