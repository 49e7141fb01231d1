//! Inception v3 as the FID uses it: the network of 2015-12-05 up to its last pooling, under pytorch-fid's names.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use rayon::prelude::*;

use crate::error::{self, Error};
use crate::image::Rgb;
use crate::ops::{Window, conv2d_relu, depthwise_conv2d, max_pool2d};
use crate::weights::{Loader, Store, Tensors, read_any};

/// Side of the images that the network takes.
const SIDE: usize = 299;

/// Added to a variance before its root is taken.
const EPS: f64 = 1e-3;

/// How an 8-bit image comes to 299×299, and its levels to about −1..1: two conventions that are both called FID and do not give
/// the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FidInput {
    /// As TensorFlow 1 did it, and torch-fidelity and ADM's evaluator do: bilinear from the top left corner of each pixel,
    /// without antialiasing, then (x − 128) / 128.
    #[default]
    TensorFlow,
    /// As pytorch-fid does it: bilinear from the centre of each pixel, without antialiasing, then 2 x / 255 − 1.
    PyTorch,
}

/// A layer; convolutions are followed by a norm and a ReLU, and named.
enum Layer {
    Conv {
        name: &'static str,
        kernel: (usize, usize),
        stride: usize,
        padding: (usize, usize),
    },
    /// The mean of the 3×3 pixels around each, of those inside the image.
    Mean,
    /// The largest of 3×3 pixels.
    Largest {
        stride: usize,
        padding: usize,
    },
    /// Several rows of layers on one input, their outputs side by side.
    Fork(&'static [&'static [Layer]]),
}

const fn conv(name: &'static str, kernel: (usize, usize), padding: (usize, usize)) -> Layer {
    Layer::Conv { name, kernel, stride: 1, padding }
}

/// At every second pixel, without padding.
const fn halve(name: &'static str) -> Layer {
    Layer::Conv { name, kernel: (3, 3), stride: 2, padding: (0, 0) }
}

const fn point(name: &'static str) -> Layer {
    conv(name, (1, 1), (0, 0))
}

const fn square(name: &'static str) -> Layer {
    conv(name, (3, 3), (1, 1))
}

/// 1×7 and 7×1.
const fn wide(name: &'static str) -> Layer {
    conv(name, (1, 7), (0, 3))
}

const fn tall(name: &'static str) -> Layer {
    conv(name, (7, 1), (3, 0))
}

const POOL: Layer = Layer::Largest { stride: 2, padding: 0 };

#[rustfmt::skip]
const STEM: &[Layer] = &[
    halve("Conv2d_1a_3x3"), conv("Conv2d_2a_3x3", (3, 3), (0, 0)), square("Conv2d_2b_3x3"), POOL,
    point("Conv2d_3b_1x1"), conv("Conv2d_4a_3x3", (3, 3), (0, 0)), POOL,
];

const DOUBLE: &[Layer] = &[point("branch3x3dbl_1"), square("branch3x3dbl_2"), square("branch3x3dbl_3")];

const A: &[Layer] = &[Layer::Fork(&[
    &[point("branch1x1")],
    &[point("branch5x5_1"), conv("branch5x5_2", (5, 5), (2, 2))],
    DOUBLE,
    &[Layer::Mean, point("branch_pool")],
])];

const B: &[Layer] = &[Layer::Fork(&[
    &[halve("branch3x3")],
    &[point("branch3x3dbl_1"), square("branch3x3dbl_2"), halve("branch3x3dbl_3")],
    &[POOL],
])];

#[rustfmt::skip]
const C: &[Layer] = &[Layer::Fork(&[
    &[point("branch1x1")],
    &[point("branch7x7_1"), wide("branch7x7_2"), tall("branch7x7_3")],
    &[
        point("branch7x7dbl_1"), tall("branch7x7dbl_2"), wide("branch7x7dbl_3"), tall("branch7x7dbl_4"),
        wide("branch7x7dbl_5"),
    ],
    &[Layer::Mean, point("branch_pool")],
])];

const D: &[Layer] = &[Layer::Fork(&[
    &[point("branch3x3_1"), halve("branch3x3_2")],
    &[point("branch7x7x3_1"), wide("branch7x7x3_2"), tall("branch7x7x3_3"), halve("branch7x7x3_4")],
    &[POOL],
])];

/// The last two blocks, which differ in how they pool.
macro_rules! last {
    ($pool:expr) => {
        &[Layer::Fork(&[
            &[point("branch1x1")],
            &[
                point("branch3x3_1"),
                Layer::Fork(&[&[conv("branch3x3_2a", (1, 3), (0, 1))], &[conv("branch3x3_2b", (3, 1), (1, 0))]]),
            ],
            &[
                point("branch3x3dbl_1"),
                square("branch3x3dbl_2"),
                Layer::Fork(&[&[conv("branch3x3dbl_3a", (1, 3), (0, 1))], &[conv("branch3x3dbl_3b", (3, 1), (1, 0))]]),
            ],
            &[$pool, point("branch_pool")],
        ])]
    };
}

const E_1: &[Layer] = last!(Layer::Mean);

/// What TensorFlow's graph of 2015 does, unlike torchvision.
const E_2: &[Layer] = last!(Layer::Largest { stride: 1, padding: 1 });

/// Blocks in their order, with the prefix of their layers' names.
#[rustfmt::skip]
const BLOCKS: &[(&str, &[Layer])] = &[
    ("", STEM), ("Mixed_5b", A), ("Mixed_5c", A), ("Mixed_5d", A), ("Mixed_6a", B), ("Mixed_6b", C), ("Mixed_6c", C),
    ("Mixed_6d", C), ("Mixed_6e", C), ("Mixed_7a", D), ("Mixed_7b", E_1), ("Mixed_7c", E_2),
];

/// A [`Layer`] with its weights.
#[derive(Debug, Clone)]
enum Loaded {
    /// With the norm in its weight and bias.
    Conv {
        weight: Tensor,
        bias: Tensor,
        stride: usize,
        padding: (usize, usize),
    },
    Mean,
    Largest {
        stride: usize,
        padding: usize,
    },
    Fork(Vec<Vec<Self>>),
}

/// Inception v3 of the FID, up to its features.
#[derive(Debug, Clone)]
pub struct Inception {
    layers: Vec<Loaded>,
    width: usize,
    device: Device,
}

impl Inception {
    /// Reads the file that `weights/convert_inception.py` writes, or pytorch-fid's or torch-fidelity's own `.pth`: of each
    /// layer `conv.weight` and, of its norm, `bn.weight`, `bn.bias`, `bn.running_mean` and `bn.running_var`; what follows the
    /// features (`fc`) is left out. The widths of the layers are those of the file.
    ///
    /// # Errors
    /// If the file is missing or broken, or a tensor is missing, misshapen or left over.
    pub fn open(path: &Path, device: &Device) -> error::Result<Self> {
        if !path.exists() {
            let reason = "there is no such file; make it with `python weights/convert_inception.py FILE`";
            return Err(Error::weights(path, reason));
        }
        let mut tensors = read_any(path)?;
        tensors.retain(|name, _| !(name.starts_with("fc.") || name.ends_with(".num_batches_tracked")));
        let widths = widths(&tensors);
        let loader = Loader::new(Store::of_tensors(tensors, path));
        let loaded = Self::load(&loader.builder(DType::F32, device), &widths);
        loader.finish(loaded)
    }

    fn load(vb: &VarBuilder, widths: &BTreeMap<String, usize>) -> Result<Self> {
        let (mut layers, mut width) = (Vec::new(), 3);
        for &(block, of_block) in BLOCKS {
            let vb = if block.is_empty() { vb.clone() } else { vb.pp(block) };
            let (loaded, out) = load(&vb, of_block, width, widths)?;
            layers.extend(loaded);
            width = out;
        }
        Ok(Self { layers, width, device: vb.device().clone() })
    }

    /// Numbers of a feature: 2,048.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Features `[B, D]` of 8-bit images of any sizes, each brought to 299×299.
    pub fn features(&self, images: &[&Rgb], input: FidInput) -> Result<Tensor> {
        let whole = |image: &&Rgb| !image.data.is_empty() && image.data.len() == 3 * image.width * image.height;
        if !images.iter().all(whole) {
            candle_core::bail!("an image without pixels has no features");
        }
        let pixels: Vec<Vec<f32>> = images.par_iter().map(|image| input.pixels(image)).collect();
        let pixels = Tensor::from_vec(pixels.concat(), (images.len(), 3, SIDE, SIDE), &Device::Cpu)?;
        self.forward(&pixels.to_device(&self.device)?)
    }

    /// Features `[B, D]` of images as the network takes them, `[B, 3, 299, 299]` in about −1..1.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        forward(&self.layers, images)?.mean((2, 3))
    }
}

/// How wide each convolution of a file is, by its name.
fn widths(tensors: &Tensors) -> BTreeMap<String, usize> {
    let width =
        |(name, tensor): (&String, &Tensor)| Some((name.strip_suffix(".conv.weight")?.into(), tensor.dim(0).ok()?));
    tensors.iter().filter_map(width).collect()
}

/// Layers on an input of `c` channels, and how many come out of them.
fn load(
    vb: &VarBuilder,
    layers: &[Layer],
    mut c: usize,
    widths: &BTreeMap<String, usize>,
) -> Result<(Vec<Loaded>, usize)> {
    let mut loaded = Vec::with_capacity(layers.len());
    for layer in layers {
        loaded.push(match *layer {
            Layer::Mean => Loaded::Mean,
            Layer::Largest { stride, padding } => Loaded::Largest { stride, padding },
            Layer::Conv { name, kernel, stride, padding } => {
                let vb = vb.pp(name);
                let Some(&e) = widths.get(&vb.prefix()) else {
                    candle_core::bail!("tensor `{}.conv.weight` is missing", vb.prefix());
                };
                let (weight, bias) = with_norm(&vb, (e, c, kernel.0, kernel.1))?;
                c = e;
                Loaded::Conv { weight, bias, stride, padding }
            }
            Layer::Fork(rows) => {
                let rows = rows.iter().map(|row| load(vb, row, c, widths)).collect::<Result<Vec<_>>>()?;
                c = rows.iter().map(|(_, e)| e).sum();
                Loaded::Fork(rows.into_iter().map(|(row, _)| row).collect())
            }
        });
    }
    Ok((loaded, c))
}

/// A convolution's weight `[E, C, kh, kw]` and bias `[E]` that do what it and its norm do.
fn with_norm(vb: &VarBuilder, shape: (usize, usize, usize, usize)) -> Result<(Tensor, Tensor)> {
    let (e, norm) = (shape.0, vb.pp("bn"));
    let of_norm = |name: &str| norm.get(e, name)?.to_dtype(DType::F64);
    let scale = (of_norm("weight")? / (of_norm("running_var")? + EPS)?.sqrt()?)?;
    let bias = (of_norm("bias")? - (of_norm("running_mean")? * &scale)?)?;
    let weight = vb.pp("conv").get(shape, "weight")?;
    let scale = scale.to_dtype(DType::F32)?.reshape((e, 1, 1, 1))?;
    Ok((weight.broadcast_mul(&scale)?, bias.to_dtype(DType::F32)?))
}

/// `[B, C, H, W]` to `[B, E, h, w]`.
fn forward(layers: &[Loaded], x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for layer in layers {
        x = match layer {
            Loaded::Conv { weight, bias, stride, padding } => {
                let window = |padding| Window { stride: *stride, padding };
                match padding {
                    (rows, columns) if rows == columns => conv2d_relu(&x, weight, Some(bias), window(*rows))?,
                    padding => conv2d_relu(&padded(&x, *padding)?, weight, Some(bias), window(0))?,
                }
            }
            Loaded::Mean => mean_around(&x)?,
            // Zeros are no larger than what comes out of a ReLU.
            Loaded::Largest { stride, padding } => max_pool2d(&padded(&x, (*padding, *padding))?, 3, *stride)?,
            Loaded::Fork(rows) => {
                let outputs = rows.iter().map(|row| forward(row, &x)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&outputs, 1)?
            }
        };
    }
    Ok(x)
}

/// Zeros around `[B, C, H, W]`.
fn padded(x: &Tensor, (rows, columns): (usize, usize)) -> Result<Tensor> {
    x.pad_with_zeros(2, rows, rows)?.pad_with_zeros(3, columns, columns)
}

/// The mean of the 3×3 pixels around each, of those inside the image.
fn mean_around(x: &Tensor) -> Result<Tensor> {
    let (_, c, h, w) = x.dims4()?;
    let inside = |i: usize, side: usize| 3 - usize::from(i == 0) - usize::from(i + 1 == side);
    let share = |at: usize| 1.0 / (inside(at / w, h) * inside(at % w, w)) as f32;
    let shares = Tensor::from_vec((0..h * w).map(share).collect(), (1, 1, h, w), x.device())?;
    let ones = Tensor::ones((c, 1, 3, 3), x.dtype(), x.device())?;
    depthwise_conv2d(x, &ones, None, Window { stride: 1, padding: 1 })?.broadcast_mul(&shares)
}

/// A place between two pixels of a row or column: the two, and how far from the first.
type Between = (usize, usize, f32);

impl FidInput {
    /// `[3, 299, 299]`.
    fn pixels(self, image: &Rgb) -> Vec<f32> {
        let (rows, columns) = (self.places(image.height), self.places(image.width));
        let mut out = Vec::with_capacity(3 * SIDE * SIDE);
        for c in 0..3 {
            let at = |y: usize, x: usize| self.level(image.data[3 * (y * image.width + x) + c]);
            for &(top, bottom, down) in &rows {
                for &(left, right, across) in &columns {
                    let along = |y: usize| {
                        let (a, b) = (at(y, left), at(y, right));
                        a + (b - a) * across
                    };
                    let (a, b) = (along(top), along(bottom));
                    out.push(self.normalised(a + (b - a) * down));
                }
            }
        }
        out
    }

    /// Where each of 299 pixels stands among `side`.
    fn places(self, side: usize) -> Vec<Between> {
        let scale = side as f32 / SIDE as f32;
        let place = |i: usize| {
            let at = match self {
                Self::TensorFlow => i as f32 * scale,
                Self::PyTorch => ((i as f32 + 0.5) * scale - 0.5).max(0.0),
            };
            let first = (at as usize).min(side - 1);
            (first, (first + 1).min(side - 1), at - first as f32)
        };
        (0..SIDE).map(place).collect()
    }

    fn level(self, level: u8) -> f32 {
        match self {
            Self::TensorFlow => f32::from(level),
            Self::PyTorch => f32::from(level) / 255.0,
        }
    }

    fn normalised(self, x: f32) -> f32 {
        match self {
            Self::TensorFlow => (x - 128.0) / 128.0,
            Self::PyTorch => 2.0 * x - 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_resizes_by_hand() {
        // A row of 0 and 254: from the corner pixel i stands at 2 i / 299, from the centre at that less half a pixel and more.
        let image = Rgb { width: 2, height: 1, data: vec![0, 0, 0, 254, 254, 254] };
        let corner = FidInput::TensorFlow.pixels(&image);
        let expected = |i: usize| (254.0 * (2.0 * i as f32 / 299.0).min(1.0) - 128.0) / 128.0;
        for i in [0, 1, 100, 149, 150, 298] {
            assert!((corner[i] - expected(i)).abs() < 1e-5, "{i}: {}", corner[i]);
        }
        let centre = FidInput::PyTorch.pixels(&image);
        let place = |i: usize| ((2 * i + 1) as f32 / 299.0 - 0.5).clamp(0.0, 1.0);
        for i in [0, 1, 100, 149, 150, 298] {
            assert!((centre[i] - (2.0 * place(i) * 254.0 / 255.0 - 1.0)).abs() < 1e-5, "{i}: {}", centre[i]);
        }
        assert_eq!((corner.len(), centre.len()), (3 * SIDE * SIDE, 3 * SIDE * SIDE));
    }

    #[test]
    fn a_mean_at_the_edge_counts_what_is_there() {
        // torch.nn.functional.avg_pool2d([[1, 2], [3, 6]], 3, stride=1, padding=1, count_include_pad=False) → all 3
        let x = Tensor::new(&[[[[1f32, 2.0], [3.0, 6.0]]]], &Device::Cpu).unwrap();
        let mean = mean_around(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(mean.iter().all(|x| (x - 3.0).abs() < 1e-6), "{mean:?}");
    }
}
