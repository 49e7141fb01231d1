//! LPIPS (Zhang et al., arXiv 1801.03924), version 0.1, as PyPI's `lpips` has it.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::{open, width};
use crate::error;
use crate::ops::{Conv2d, Window, max_pool2d, unit_distance};
use crate::weights::{Loader, Store};

/// Added to a feature's length before it is divided by.
const EPS: f64 = 1e-10;

/// What the authors subtract from images in −1..1 …
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];

/// … and then divide by, by channel.
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];

/// The network whose features are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backbone {
    /// VGG16: the usual one of a loss.
    Vgg16,
    /// AlexNet: the usual one of a measure, and ten times as fast.
    Alex,
}

/// A layer of a backbone; convolutions are followed by a ReLU, and named `features.{index}`.
enum Layer {
    Conv { index: usize, kernel: usize, window: Window },
    Pool { kernel: usize, stride: usize },
    Tap,
}

const fn conv(index: usize, kernel: usize, stride: usize, padding: usize) -> Layer {
    Layer::Conv { index, kernel, window: Window { stride, padding } }
}

const HALVE: Layer = Layer::Pool { kernel: 2, stride: 2 };
const OVERLAP: Layer = Layer::Pool { kernel: 3, stride: 2 };

#[rustfmt::skip]
const VGG16: &[Layer] = &[
    conv(0, 3, 1, 1), conv(2, 3, 1, 1), Layer::Tap, HALVE,
    conv(5, 3, 1, 1), conv(7, 3, 1, 1), Layer::Tap, HALVE,
    conv(10, 3, 1, 1), conv(12, 3, 1, 1), conv(14, 3, 1, 1), Layer::Tap, HALVE,
    conv(17, 3, 1, 1), conv(19, 3, 1, 1), conv(21, 3, 1, 1), Layer::Tap, HALVE,
    conv(24, 3, 1, 1), conv(26, 3, 1, 1), conv(28, 3, 1, 1), Layer::Tap,
];

#[rustfmt::skip]
const ALEX: &[Layer] = &[
    conv(0, 11, 4, 2), Layer::Tap, OVERLAP,
    conv(3, 5, 1, 2), Layer::Tap, OVERLAP,
    conv(6, 3, 1, 1), Layer::Tap,
    conv(8, 3, 1, 1), Layer::Tap,
    conv(10, 3, 1, 1), Layer::Tap,
];

impl Backbone {
    /// The smallest side of an image, in pixels, that can be pooled as often.
    pub fn least_side(self) -> usize {
        match self {
            Self::Vgg16 => 16,
            Self::Alex => 31,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Vgg16 => "VGG16",
            Self::Alex => "AlexNet",
        }
    }

    fn layers(self) -> &'static [Layer] {
        match self {
            Self::Vgg16 => VGG16,
            Self::Alex => ALEX,
        }
    }
}

/// A backbone and its heads.
#[derive(Debug, Clone)]
pub struct Lpips {
    backbone: Backbone,
    convolutions: Vec<Conv2d>,
    /// Of each tap, `[C]`.
    heads: Vec<Tensor>,
    shift: Tensor,
    scale: Tensor,
}

impl Lpips {
    /// Reads `lpips_vgg16.safetensors` or `lpips_alex.safetensors`, as `weights/convert_lpips.py` writes them:
    /// `features.{index}.weight` and `.bias` in torchvision's order, `lin{tap}.weight` `[1, C, 1, 1]`. The widths of the
    /// layers are those of the file.
    ///
    /// # Errors
    /// If the file is missing or broken, or a tensor is missing, misshapen or left over.
    pub fn open(path: &Path, backbone: Backbone, device: &Device) -> error::Result<Self> {
        const MAKE: &str = "`python weights/convert_lpips.py FOLDER`";
        let store = open(path, MAKE)?;
        let widths = widths(&store, backbone)?;
        let loader = Loader::new(store);
        let loaded = Self::load(loader.builder(DType::F32, device), backbone, &widths);
        loader.finish(loaded)
    }

    fn load(vb: VarBuilder, backbone: Backbone, widths: &[usize]) -> Result<Self> {
        let (mut convolutions, mut heads): (Vec<Conv2d>, Vec<Tensor>) = (Vec::new(), Vec::new());
        let mut c = 3;
        for layer in backbone.layers() {
            match *layer {
                Layer::Conv { index, kernel, window } => {
                    let e = widths[convolutions.len()];
                    convolutions.push(Conv2d::load(vb.pp("features").pp(index), c, e, kernel, window)?);
                    c = e;
                }
                Layer::Tap => {
                    let head = vb.get((1, c, 1, 1), &format!("lin{}.weight", heads.len()))?;
                    heads.push(head.flatten_all()?);
                }
                Layer::Pool { .. } => {}
            }
        }
        let channels = |values: [f32; 3]| Tensor::new(&values, vb.device())?.reshape((1, 3, 1, 1));
        Ok(Self { backbone, convolutions, heads, shift: channels(SHIFT)?, scale: channels(SCALE)? })
    }

    /// The features of each tap, `[B, C, h, w]`, of images in −1..1, `[B, 3, H, W]`.
    ///
    /// # Errors
    /// If the images are too small to be pooled as often ([`Backbone::least_side`]).
    pub fn features(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = images.broadcast_sub(&self.shift)?.broadcast_div(&self.scale)?;
        let (mut convolutions, mut taps) = (self.convolutions.iter(), Vec::new());
        let small = |e: candle_core::Error| {
            let (least, name) = (self.backbone.least_side(), self.backbone.name());
            e.context(format!(
                "LPIPS of {name} wants images of at least {least} pixels a side, got: {:?}",
                images.dims()
            ))
        };
        for layer in self.backbone.layers() {
            match *layer {
                Layer::Conv { .. } => {
                    if let Some(convolution) = convolutions.next() {
                        x = convolution.forward_relu(&x).map_err(small)?;
                    }
                }
                Layer::Pool { kernel, stride } => x = max_pool2d(&x, kernel, stride).map_err(small)?,
                Layer::Tap => taps.push(x.clone()),
            }
        }
        Ok(taps)
    }

    /// The distance of every image to its partner from the features of both, `[B]`.
    pub fn distance(&self, features: &[Tensor], of_others: &[Tensor]) -> Result<Tensor> {
        let taps = features.iter().zip(of_others).zip(&self.heads);
        let mut distances = taps.map(|((x, y), head)| unit_distance(x, y, head, EPS));
        let first = distances.next().unwrap_or_else(|| candle_core::bail!("LPIPS of no features"))?;
        distances.try_fold(first, |sum, next| sum + next?)
    }

    /// The distance of every image to its partner, `[B]`: [`Lpips::features`] of both, and [`Lpips::distance`].
    ///
    /// # Shapes
    /// - images, others: `[B, 3, H, W]` in −1..1
    pub fn forward(&self, images: &Tensor, others: &Tensor) -> Result<Tensor> {
        self.distance(&self.features(images)?, &self.features(others)?)
    }
}

/// Of each convolution.
fn widths(store: &Store, backbone: Backbone) -> error::Result<Vec<usize>> {
    let of = |layer: &Layer| match layer {
        Layer::Conv { index, .. } => Some(width(store, &format!("features.{index}.weight"))),
        _ => None,
    };
    backbone.layers().iter().filter_map(of).collect()
}
