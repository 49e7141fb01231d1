//! Convolution in two dimensions, as the networks of perceptual losses and discriminators have it.
//!
//! Forwards, a piece of one image (some of its output rows) is laid out as columns, a block of input channels at a time,
//! and multiplied by the weights; neither the columns of a whole image nor those of a whole layer ever stand in memory.
//! Backwards the same is done with the weights turned around, where the stride allows it.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use vqrae_kernels::matrix::{Into, View, multiply};
use vqrae_kernels::vector::sum;
use vqrae_kernels::vectorised;

use super::window::{Plane, Window};

/// Output pixels that one piece of work covers, about: a whole number of rows, at least one.
const PIXELS: usize = 512;

/// Rows of the columns' matrix that are laid out at a time, about: whole input channels, at least one.
const ROWS: usize = 512;

/// Cross-correlation, as PyTorch's `conv2d` of one group, with zeros around the image.
///
/// # Shapes
/// - x: `[B, C, H, W]`
/// - weight: `[E, C, kh, kw]`
/// - bias: `[E]`
/// - output: `[B, E, h, w]`, h = ⌊(H + 2·padding − kh) / stride⌋ + 1
///
/// # Errors
/// If the shapes do not fit, or the kernel is larger than the padded image.
pub fn conv2d(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window) -> Result<Tensor> {
    convolution(x, weight, bias, Conv { window, relu: false })
}

/// [`conv2d`], and zero in place of what is negative: one pass over memory less each way, and half the memory in training.
///
/// # Errors
/// As [`conv2d`].
pub fn conv2d_relu(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, window: Window) -> Result<Tensor> {
    convolution(x, weight, bias, Conv { window, relu: true })
}

fn convolution(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, op: Conv) -> Result<Tensor> {
    let window = op.window;
    let sizes = Sizes::new(x.shape(), weight.shape(), window)?;
    if let Some(bias) = bias.filter(|bias| bias.dims() != [sizes.e]) {
        candle_core::bail!("conv2d: bias {:?}, expected: [{}]", bias.dims(), sizes.e);
    }
    if !super::fused(x) {
        let out = super::composed::conv2d(x, weight, bias, window)?;
        return if op.relu { out.relu() } else { Ok(out) };
    }
    let bias = match bias {
        Some(bias) => bias.contiguous()?,
        None => Tensor::zeros(sizes.e, x.dtype(), x.device())?,
    };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias, op)
}

/// [`conv2d`] with its parameters, named `weight` and `bias` as in PyTorch.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    window: Window,
}

impl Conv2d {
    /// Loads `[E, C, kernel, kernel]` and `[E]`; fresh ones are uniform in ±1/√(C · kernel²), as PyTorch's.
    pub fn load(vb: VarBuilder, c: usize, e: usize, kernel: usize, window: Window) -> Result<Self> {
        let bound = 1.0 / ((c * kernel * kernel) as f64).sqrt();
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = vb.get_with_hints((e, c, kernel, kernel), "weight", init)?;
        Ok(Self { weight, bias: vb.get_with_hints(e, "bias", init)?, window })
    }

    /// `[B, C, H, W]` to `[B, E, h, w]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        conv2d(x, &self.weight, Some(&self.bias), self.window)
    }

    /// The same, and zero in place of what is negative.
    pub fn forward_relu(&self, x: &Tensor) -> Result<Tensor> {
        conv2d_relu(x, &self.weight, Some(&self.bias), self.window)
    }
}

struct Conv {
    window: Window,
    relu: bool,
}

impl CustomOp3 for Conv {
    fn name(&self) -> &'static str {
        "conv2d"
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
        let sizes = Sizes::new(x_layout.shape(), weight_layout.shape(), self.window)?;
        let x = super::f32_slice(x, x_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let out = sizes.convolve(x, weight, super::f32_slice(bias, bias_layout)?, self.relu);
        Ok((CpuStorage::F32(out), sizes.output()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::new(x.shape(), weight.shape(), self.window)?;
        let mut grad = grad.contiguous()?;
        if self.relu {
            grad = out.apply_op2_no_bwd(&grad, &ReluGradient)?;
        }
        let of_x = || grad.apply_op2_no_bwd(weight, &InputGradient { sizes });
        let of_weight = || x.apply_op2_no_bwd(&grad, &WeightGradient { sizes });
        let of_bias = || grad.apply_op1_no_bwd(&BiasGradient);
        Ok((
            x.track_op().then(of_x).transpose()?,
            weight.track_op().then(of_weight).transpose()?,
            bias.track_op().then(of_bias).transpose()?,
        ))
    }
}

/// The gradient before a ReLU from the ReLU's output and the gradient after it.
struct ReluGradient;

impl CustomOp2 for ReluGradient {
    fn name(&self) -> &'static str {
        "relu-gradient"
    }

    fn cpu_fwd(
        &self,
        out: &CpuStorage,
        out_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        const PIECE: usize = 16_384;
        let (out, grad) = (super::f32_slice(out, out_layout)?, super::f32_slice(grad, grad_layout)?);
        let mut passed = vec![0f32; grad.len()];
        let pieces = passed.par_chunks_mut(PIECE).zip(out.par_chunks(PIECE)).zip(grad.par_chunks(PIECE));
        pieces.for_each(|((passed, out), grad)| {
            for ((passed, &out), &grad) in passed.iter_mut().zip(out).zip(grad) {
                *passed = if out > 0.0 { grad } else { 0.0 };
            }
        });
        Ok((CpuStorage::F32(passed), grad_layout.shape().clone()))
    }
}

/// The gradient of a bias `[E]` from that of the output `[B, E, h, w]`.
pub(super) struct BiasGradient;

impl CustomOp1 for BiasGradient {
    fn name(&self) -> &'static str {
        "conv2d-bias-gradient"
    }

    fn cpu_fwd(&self, grad: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (b, e, h, w) = layout.shape().dims4()?;
        let grad = super::f32_slice(grad, layout)?;
        let of_channel = |e_index| (0..b).map(|image| total(&grad[(image * e + e_index) * h * w..][..h * w])).sum();
        Ok((CpuStorage::F32((0..e).into_par_iter().map(of_channel).collect()), Shape::from(e)))
    }
}

vectorised! {
    fn total(x: &[f32]) -> f32 {
        sum(x, x, |x, _| x)
    }
}

/// The gradient of x from that of the output and the weight.
struct InputGradient {
    sizes: Sizes,
}

impl CustomOp2 for InputGradient {
    fn name(&self) -> &'static str {
        "conv2d-input-gradient"
    }

    fn cpu_fwd(
        &self,
        grad: &CpuStorage,
        grad_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let grad = super::f32_slice(grad, grad_layout)?;
        let weight = super::f32_slice(weight, weight_layout)?;
        let sizes = &self.sizes;
        let out = match sizes.turned() {
            Some(turned) => turned.convolve(grad, &sizes.turn(weight), &vec![0.0; sizes.c], false),
            None => sizes.scatter(grad, weight),
        };
        Ok((CpuStorage::F32(out), Shape::from((sizes.b, sizes.c, sizes.plane.h, sizes.plane.w))))
    }
}

/// The gradient of the weight from x and the gradient of the output.
struct WeightGradient {
    sizes: Sizes,
}

impl CustomOp2 for WeightGradient {
    fn name(&self) -> &'static str {
        "conv2d-weight-gradient"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = &self.sizes;
        let out = sizes.correlate(super::f32_slice(x, x_layout)?, super::f32_slice(grad, grad_layout)?);
        Ok((CpuStorage::F32(out), Shape::from((sizes.e, sizes.c, sizes.plane.kh, sizes.plane.kw))))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    c: usize,
    e: usize,
    plane: Plane,
}

impl Sizes {
    fn new(x: &Shape, weight: &Shape, window: Window) -> Result<Self> {
        let (b, c, h, w) = x.dims4()?;
        let (e, c_of_weight, kh, kw) = weight.dims4()?;
        let Some(plane) = Plane::new((h, w), (kh, kw), window).filter(|_| c == c_of_weight && weight.elem_count() > 0)
        else {
            candle_core::bail!("conv2d: x {x:?} does not fit weight {weight:?}, {window:?}");
        };
        Ok(Self { b, c, e, plane })
    }

    fn output(&self) -> Shape {
        Shape::from((self.b, self.e, self.plane.out.0, self.plane.out.1))
    }

    fn depth(&self) -> usize {
        self.c * self.plane.taps()
    }

    /// Whether the columns are the image as it stands.
    fn pointwise(&self) -> bool {
        (self.plane.taps(), self.plane.stride, self.plane.padding) == (1, 1, (0, 0))
    }

    /// Output pixels of a piece.
    fn piece(&self) -> usize {
        (PIXELS / self.plane.out.1).clamp(1, self.plane.out.0) * self.plane.out.1
    }

    /// Input channels that are laid out at a time.
    fn channels(&self) -> usize {
        (ROWS / self.plane.taps()).clamp(1, self.c)
    }

    fn convolve(&self, x: &[f32], weight: &[f32], bias: &[f32], relu: bool) -> Vec<f32> {
        let (area, piece) = (self.plane.area(), self.piece());
        let mut out = vec![0f32; self.b * self.e * area];
        let mut pieces: Vec<Vec<&mut [f32]>> = Vec::with_capacity(self.b * area.div_ceil(piece));
        for image in out.chunks_exact_mut(self.e * area) {
            let first = pieces.len();
            pieces.extend((0..area.div_ceil(piece)).map(|_| Vec::with_capacity(self.e)));
            for plane in image.chunks_exact_mut(area) {
                pieces[first..].iter_mut().zip(plane.chunks_mut(piece)).for_each(|(piece, rows)| piece.push(rows));
            }
        }
        let in_image = area.div_ceil(piece);
        let scratch = || (vec![0f32; self.e * piece], vec![0f32; self.channels() * self.plane.taps() * piece]);
        pieces.into_par_iter().enumerate().for_each_init(scratch, |(sums, columns), (index, out)| {
            let image = &x[index / in_image * self.c * self.plane.pixels()..][..self.c * self.plane.pixels()];
            let first = index % in_image * piece;
            let pixels = out.first().map_or(0, |rows| rows.len());
            let sums = &mut sums[..self.e * pixels];
            sums.chunks_exact_mut(pixels).zip(bias).for_each(|(sums, &bias)| sums.fill(bias));
            for c in (0..self.c).step_by(self.channels()) {
                let channels = self.channels().min(self.c - c);
                let rows = channels * self.plane.taps();
                let weight = View::new(&weight[c * self.plane.taps()..], self.e, rows, self.depth());
                let columns = self.columns(columns, image, c, channels, first, pixels);
                multiply(sums, pixels, weight, columns, 1.0, Into::Add);
            }
            if relu {
                sums.iter_mut().for_each(|x| *x = if *x < 0.0 { 0.0 } else { *x });
            }
            out.into_iter().zip(sums.chunks_exact(pixels)).for_each(|(out, sums)| out.copy_from_slice(sums));
        });
        out
    }

    /// What the kernel sees of `channels` channels at `pixels` output pixels from `first` on: `[channels·kh·kw, pixels]`.
    fn columns<'a>(
        &self,
        scratch: &'a mut [f32],
        image: &'a [f32],
        c: usize,
        channels: usize,
        first: usize,
        pixels: usize,
    ) -> View<'a> {
        if self.pointwise() {
            return View::new(&image[c * self.plane.area() + first..], channels, pixels, self.plane.area());
        }
        let (first_row, width) = (first / self.plane.out.1, self.plane.out.1);
        for (row, columns) in scratch.chunks_exact_mut(pixels).take(channels * self.plane.taps()).enumerate() {
            let (channel, tap) = (c + row / self.plane.taps(), row % self.plane.taps());
            let plane = &image[channel * self.plane.pixels()..][..self.plane.pixels()];
            let (di, dj) = (tap / self.plane.kw, tap % self.plane.kw);
            for (i, columns) in columns.chunks_exact_mut(width).enumerate() {
                match self.plane.source_row(first_row + i, di) {
                    Some(y) => self.gather(columns, &plane[y * self.plane.w..][..self.plane.w], dj),
                    None => columns.fill(0.0),
                }
            }
        }
        View::new(scratch, channels * self.plane.taps(), pixels, pixels)
    }

    /// One row of columns from one row of the image.
    fn gather(&self, columns: &mut [f32], row: &[f32], dj: usize) {
        let (inside, first) = self.plane.inside(dj);
        columns[..inside.start].fill(0.0);
        columns[inside.end..].fill(0.0);
        let columns = &mut columns[inside];
        if self.plane.stride == 1 {
            columns.copy_from_slice(&row[first..][..columns.len()]);
        } else {
            columns
                .iter_mut()
                .zip(row[first.min(row.len())..].iter().step_by(self.plane.stride))
                .for_each(|(to, &x)| *to = x);
        }
    }

    /// The convolution that brings the output's gradient back to x, where it is one.
    fn turned(&self) -> Option<Self> {
        Some(Self { c: self.e, e: self.c, plane: self.plane.turned()?, ..*self })
    }

    /// The weights of [`Sizes::turned`]: `[E, C, kh, kw]` to `[C, E, kh, kw]`, every kernel turned by half a circle.
    fn turn(&self, weight: &[f32]) -> Vec<f32> {
        let taps = self.plane.taps();
        let mut out = vec![0f32; weight.len()];
        out.par_chunks_mut(self.e * taps).enumerate().for_each(|(c, out)| {
            for (e, out) in out.chunks_exact_mut(taps).enumerate() {
                let kernel = &weight[(e * self.c + c) * taps..][..taps];
                out.iter_mut().zip(kernel.iter().rev()).for_each(|(out, &w)| *out = w);
            }
        });
        out
    }

    /// The gradient of x for any stride: channel by channel, every tap's part is added where it came from.
    fn scatter(&self, grad: &[f32], weight: &[f32]) -> Vec<f32> {
        let (area, piece, taps) = (self.plane.area(), self.piece(), self.plane.taps());
        let mut out = vec![0f32; self.b * self.c * self.plane.pixels()];
        let scratch = || vec![0f32; taps * piece];
        let planes = out.par_chunks_mut(self.plane.pixels()).enumerate();
        planes.for_each_init(scratch, |columns, (index, out)| {
            let (image, c) = (index / self.c, index % self.c);
            let grad = &grad[image * self.e * area..][..self.e * area];
            let weight = View::new(&weight[c * taps..], self.e, taps, self.depth()).t();
            for first in (0..area).step_by(piece) {
                let pixels = piece.min(area - first);
                let columns = &mut columns[..taps * pixels];
                multiply(columns, pixels, weight, View::new(&grad[first..], self.e, pixels, area), 1.0, Into::Replace);
                for (tap, columns) in columns.chunks_exact(pixels).enumerate() {
                    let (di, dj) = (tap / self.plane.kw, tap % self.plane.kw);
                    let (inside, from) = self.plane.inside(dj);
                    for (i, columns) in columns.chunks_exact(self.plane.out.1).enumerate() {
                        let Some(y) = self.plane.source_row(first / self.plane.out.1 + i, di) else { continue };
                        let row =
                            out[y * self.plane.w..][..self.plane.w].iter_mut().skip(from).step_by(self.plane.stride);
                        row.zip(&columns[inside.clone()]).for_each(|(x, &g)| *x += g);
                    }
                }
            }
        });
        out
    }

    /// The gradient of the weight: for a block of input channels, image after image and piece after piece.
    fn correlate(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        let (area, piece, taps) = (self.plane.area(), self.piece(), self.plane.taps());
        let channels = self.channels();
        let mut turned = vec![0f32; self.depth() * self.e]; // [C·kh·kw, E]
        turned.par_chunks_mut(channels * taps * self.e).enumerate().for_each(|(block, out)| {
            let mut scratch = vec![0f32; channels * taps * piece];
            let (c, rows) = (block * channels, out.len() / self.e);
            for image in 0..self.b {
                let x = &x[image * self.c * self.plane.pixels()..][..self.c * self.plane.pixels()];
                let grad = &grad[image * self.e * area..][..self.e * area];
                for first in (0..area).step_by(piece) {
                    let pixels = piece.min(area - first);
                    let columns = self.columns(&mut scratch, x, c, rows / taps, first, pixels);
                    let grad = View::new(&grad[first..], self.e, pixels, area).t();
                    multiply(out, self.e, columns, grad, 1.0, Into::Add);
                }
            }
        });
        let mut out = vec![0f32; turned.len()];
        out.par_chunks_mut(self.depth()).enumerate().for_each(|(e, out)| {
            out.iter_mut().enumerate().for_each(|(row, out)| *out = turned[row * self.e + e]);
        });
        out
    }
}
