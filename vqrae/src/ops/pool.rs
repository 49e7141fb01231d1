//! Max pooling in two dimensions.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::window::{Plane, Window};

/// The largest element under a square kernel of `kernel` pixels, as PyTorch's `max_pool2d` without padding. Of equal
/// elements the first one has the gradient; rows and columns that the last window does not reach have none.
///
/// # Shapes
/// - x: `[B, C, H, W]`
/// - output: `[B, C, h, w]`, h = ⌊(H − kernel) / stride⌋ + 1
///
/// # Errors
/// If the kernel is larger than the image or nothing, or the stride is zero.
pub fn max_pool2d(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let sizes = Sizes::new(x.shape(), kernel, stride)?;
    if super::fused(x) {
        x.contiguous()?.apply_op1(MaxPool { sizes })
    } else {
        super::composed::max_pool2d(x, kernel, stride)
    }
}

struct MaxPool {
    sizes: Sizes,
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool2d"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let sizes = &self.sizes;
        let x = super::f32_slice(x, layout)?;
        let mut out = vec![0f32; sizes.planes * sizes.plane.area()];
        let planes = out.par_chunks_mut(sizes.plane.area()).zip(x.par_chunks(sizes.plane.pixels()));
        planes.for_each(|(out, x)| {
            out.iter_mut().enumerate().for_each(|(place, out)| *out = x[sizes.largest(x, place)]);
        });
        let (b, c, _, _) = layout.shape().dims4()?;
        Ok((CpuStorage::F32(out), Shape::from((b, c, sizes.plane.out.0, sizes.plane.out.1))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&grad.contiguous()?, &MaxPoolGradient { sizes: self.sizes }).map(Some)
    }
}

struct MaxPoolGradient {
    sizes: Sizes,
}

impl CustomOp2 for MaxPoolGradient {
    fn name(&self) -> &'static str {
        "max-pool2d-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = &self.sizes;
        let (x, grad) = (super::f32_slice(x, x_layout)?, super::f32_slice(grad, grad_layout)?);
        let area = sizes.plane.pixels();
        let mut out = vec![0f32; x.len()];
        let planes = out.par_chunks_mut(area).zip(x.par_chunks(area)).zip(grad.par_chunks(sizes.plane.area()));
        planes.for_each(|((out, x), grad)| {
            grad.iter().enumerate().for_each(|(place, grad)| out[sizes.largest(x, place)] += grad);
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    planes: usize,
    plane: Plane,
}

impl Sizes {
    fn new(x: &Shape, kernel: usize, stride: usize) -> Result<Self> {
        let (b, c, h, w) = x.dims4()?;
        let Some(plane) = Plane::new((h, w), (kernel, kernel), Window { stride, padding: 0 }) else {
            candle_core::bail!("max_pool2d: a kernel of {kernel} pixels at a stride of {stride} does not fit x {x:?}");
        };
        Ok(Self { planes: b * c, plane })
    }

    /// Where in a plane the largest element under the kernel stands; not a number counts as largest.
    #[inline(always)]
    fn largest(&self, x: &[f32], place: usize) -> usize {
        let Plane { w, kh, kw, stride, out, .. } = self.plane;
        let corner = place / out.1 * stride * w + place % out.1 * stride;
        let mut best = corner;
        for i in 0..kh {
            for at in corner + i * w..corner + i * w + kw {
                if x[at] > x[best] || x[at].is_nan() {
                    best = at;
                }
            }
        }
        best
    }
}
