//! ConvNeXt (Liu et al., arXiv 2201.03545) in torchvision's layout, whose logits TiTok compares.

use std::path::Path;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::{open, width};
use crate::error;
use crate::ops::{Conv2d, LayerNorm, Linear, Window, depthwise_conv2d, gelu_erf};
use crate::weights::{Loader, Store};

/// Side of the images that the network sees.
const SIDE: usize = 224;

const EPS: f64 = 1e-6;

/// ImageNet's mean and standard deviation, by channel.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];

/// A ConvNeXt classifier. TiTok's loss takes ConvNeXt-S, `convnext_small(weights="IMAGENET1K_V1")` of torchvision; the
/// file decides, so the other sizes work too.
#[derive(Debug, Clone)]
pub struct ConvNext {
    stem: (Conv2d, LayerNorm),
    stages: Vec<Stage>,
    norm: LayerNorm,
    head: Linear,
    mean: Tensor,
    std: Tensor,
}

#[derive(Debug, Clone)]
struct Stage {
    blocks: Vec<Block>,
    /// To the next stage's grid and width; the last one has none.
    down: Option<(LayerNorm, Conv2d)>,
}

#[derive(Debug, Clone)]
struct Block {
    weight: Tensor,
    bias: Tensor,
    norm: LayerNorm,
    fc1: Linear,
    /// With the layer scale in its weights.
    fc2: Linear,
}

/// Widths and depths of the stages, and the number of classes.
struct Shape {
    stages: Vec<(usize, usize)>,
    classes: usize,
}

impl Shape {
    /// As a file has them.
    fn of(store: &Store) -> error::Result<Self> {
        const STAGES: usize = 4;
        let stage = |stage: usize| {
            let block = |block: usize| format!("features.{}.{block}.layer_scale", 2 * stage + 1);
            let depth = (0..).take_while(|&i| store.shape(&block(i)).is_some()).count();
            Ok((width(store, &block(0))?, depth))
        };
        let stages = (0..STAGES).map(stage).collect::<error::Result<_>>()?;
        Ok(Self { stages, classes: width(store, "classifier.2.weight")? })
    }
}

impl ConvNext {
    /// Reads a file of torchvision's names, as `weights/convert_convnext.py` writes it.
    ///
    /// # Errors
    /// If the file is missing or broken, or a tensor is missing, misshapen or left over.
    pub fn open(path: &Path, device: &Device) -> error::Result<Self> {
        let store = open(path, "`python weights/convert_convnext.py FILE`")?;
        let shape = Shape::of(&store)?;
        let loader = Loader::new(store);
        let loaded = Self::load(&loader.builder(DType::F32, device), &shape);
        loader.finish(loaded)
    }

    fn load(vb: &VarBuilder, shape: &Shape) -> Result<Self> {
        let (features, classifier) = (vb.pp("features"), vb.pp("classifier"));
        let first = shape.stages.first().map_or(0, |&(width, _)| width);
        let stem = features.pp(0);
        let stem = (
            Conv2d::load(stem.pp(0), 3, first, 4, Window { stride: 4, padding: 0 })?,
            LayerNorm::load(stem.pp(1), first, EPS)?,
        );
        let (mut stages, mut last) = (Vec::new(), first);
        for (i, &(width, depth)) in shape.stages.iter().enumerate() {
            let vb = features.pp(2 * i + 1);
            let blocks = (0..depth).map(|block| Block::load(&vb.pp(block), width)).collect::<Result<_>>()?;
            let down = |&(next, _): &(usize, usize)| {
                let vb = features.pp(2 * i + 2);
                let conv = Conv2d::load(vb.pp(1), width, next, 2, Window { stride: 2, padding: 0 })?;
                Ok::<_, candle_core::Error>((LayerNorm::load(vb.pp(0), width, EPS)?, conv))
            };
            stages.push(Stage { blocks, down: shape.stages.get(i + 1).map(down).transpose()? });
            last = width;
        }
        let channels = |values: [f32; 3]| Tensor::new(&values, vb.device())?.reshape((1, 3, 1, 1));
        Ok(Self {
            stem,
            stages,
            norm: LayerNorm::load(classifier.pp(0), last, EPS)?,
            head: Linear::load(classifier.pp(2), last, shape.classes)?,
            mean: channels(MEAN)?,
            std: channels(STD)?,
        })
    }

    /// Logits `[B, classes]` of images in 0..1, `[B, 3, H, W]`, which are brought to 224×224 first: bilinear with
    /// antialiasing, as PyTorch's `interpolate`.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let images = resize(images, SIDE)?;
        let x = images.broadcast_sub(&self.mean)?.broadcast_div(&self.std)?;
        let mut x = norm_channels(&self.stem.1, &self.stem.0.forward(&x)?)?;
        for stage in &self.stages {
            for block in &stage.blocks {
                x = block.forward(&x)?;
            }
            if let Some((norm, conv)) = &stage.down {
                x = conv.forward(&norm_channels(norm, &x)?)?;
            }
        }
        let pooled = x.mean((2, 3))?; // [B,C]
        self.head.forward(&self.norm.forward(&pooled)?)
    }
}

impl Block {
    fn load(vb: &VarBuilder, width: usize) -> Result<Self> {
        const KERNEL: usize = 7;
        let block = vb.pp("block");
        let scale = vb.get((width, 1, 1), "layer_scale")?.flatten_all()?;
        let fc2 = Linear::load(block.pp(5), 4 * width, width)?;
        let weight = fc2.weight.broadcast_mul(&scale.reshape((width, 1))?)?;
        Ok(Self {
            weight: block.pp(0).get((width, 1, KERNEL, KERNEL), "weight")?,
            bias: block.pp(0).get(width, "bias")?,
            norm: LayerNorm::load(block.pp(2), width, EPS)?,
            fc1: Linear::load(block.pp(3), width, 4 * width)?,
            fc2: Linear { weight, bias: (fc2.bias * scale)?, ..fc2 },
        })
    }

    /// `[B, C, h, w]` to the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let mixed = depthwise_conv2d(x, &self.weight, Some(&self.bias), Window { stride: 1, padding: 3 })?;
        let tokens = self.norm.forward(&to_tokens(&mixed)?)?;
        let tokens = self.fc2.forward(&gelu_erf(&self.fc1.forward(&tokens)?)?)?;
        x + to_planes(&tokens, h, w)?
    }
}

/// `[B, C, h, w]` to `[B, h·w, C]`.
fn to_tokens(x: &Tensor) -> Result<Tensor> {
    x.flatten_from(2)?.transpose(1, 2)?.contiguous()
}

/// `[B, h·w, C]` to `[B, C, h, w]`.
fn to_planes(x: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, _, c) = x.dims3()?;
    x.transpose(1, 2)?.contiguous()?.reshape((b, c, h, w))
}

/// A layer norm over the channels of `[B, C, h, w]`.
fn norm_channels(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    to_planes(&norm.forward(&to_tokens(x)?)?, h, w)
}

/// `[B, C, H, W]` to `[B, C, side, side]`, bilinear with antialiasing, as PyTorch's `interpolate` without aligned corners.
fn resize(images: &Tensor, side: usize) -> Result<Tensor> {
    let (b, c, h, w) = images.dims4()?;
    let along =
        |from: usize| Tensor::from_vec(weights(from, side), (from, side), images.device())?.to_dtype(images.dtype());
    let wide = images.reshape((b * c * h, w))?.matmul(&along(w)?)?; // [B·C·H, side]
    let turned = wide.reshape((b * c, h, side))?.transpose(1, 2)?.reshape((b * c * side, h))?;
    turned.matmul(&along(h)?)?.reshape((b, c, side, side))?.transpose(D::Minus2, D::Minus1)?.contiguous()
}

/// What each of `from` pixels gives to each of `to`, `[from, to]`: a triangle as wide as the step from pixel to pixel,
/// never narrower than a pixel.
fn weights(from: usize, to: usize) -> Vec<f32> {
    let step = from as f64 / to as f64;
    let reach = step.max(1.0);
    let mut out = vec![0f32; from * to];
    for i in 0..to {
        let centre = step * (i as f64 + 0.5);
        let first = (centre - reach + 0.5).max(0.0) as usize;
        let end = ((centre + reach + 0.5) as usize).min(from);
        let weight = |j: usize| (1.0 - ((j as f64 - centre + 0.5) / reach).abs()).max(0.0);
        let sum: f64 = (first..end).map(weight).sum();
        (first..end).for_each(|j| out[j * to + i] = (weight(j) / sum) as f32);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resizing_by_hand() {
        let images = Tensor::new(&[[[[0f32, 8.0, 0.0, 8.0], [0.0, 8.0, 0.0, 8.0]]]], &Device::Cpu).unwrap();
        // torch.nn.functional.interpolate(…, (2, 2), mode="bilinear", antialias=True): weights 3/7, 3/7, 1/7 across.
        let half = resize(&images, 2).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let expected = [24.0 / 7.0, 32.0 / 7.0];
        for (i, value) in half.iter().enumerate() {
            assert!((value - expected[i % 2]).abs() < 1e-5, "{half:?}");
        }
        let same = resize(&Tensor::new(&[[[[1f32, 2.0], [3.0, 5.0]]]], &Device::Cpu).unwrap(), 2).unwrap();
        assert_eq!(same.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0, 5.0]);
    }
}
