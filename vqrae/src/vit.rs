//! The one vision transformer: pre-norm blocks (Dosovitskiy et al., arXiv 2010.11929), used by encoder and decoder alike.
//!
//! Tensor names are those of Hugging Face's SigLIP (`layers.N.{layer_norm1,self_attn,layer_norm2,mlp}`), so a checkpoint
//! of the hub loads as it is. Whether a parameter is trained is the [`VarBuilder`]'s matter, not this file's.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::ops::{self, LayerNorm, Linear};

/// The sizes of a stack of transformer blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Width D of a token.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads; divides `width`.
    pub heads: usize,
    /// Hidden width of the MLP.
    pub mlp_width: usize,
    /// ε of the layer norms.
    pub layer_norm_eps: f64,
}

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) out_proj: Linear,
    heads: usize,
}

impl Attention {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let d = config.width;
        Ok(Self {
            q_proj: Linear::load(vb.pp("q_proj"), d, d)?,
            k_proj: Linear::load(vb.pp("k_proj"), d, d)?,
            v_proj: Linear::load(vb.pp("v_proj"), d, d)?,
            out_proj: Linear::load(vb.pp("out_proj"), d, d)?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.q_proj.forward(x)?, self.k_proj.forward(x)?, self.v_proj.forward(x)?);
        self.out_proj.forward(&ops::attention(&q, &k, &v, self.heads)?)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
}

impl Mlp {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        Ok(Self {
            fc1: Linear::load(vb.pp("fc1"), config.width, config.mlp_width)?,
            fc2: Linear::load(vb.pp("fc2"), config.mlp_width, config.width)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.fc2.forward(&ops::gelu(&self.fc1.forward(x)?)?)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) layer_norm1: LayerNorm,
    pub(crate) self_attn: Attention,
    pub(crate) layer_norm2: LayerNorm,
    pub(crate) mlp: Mlp,
}

impl Block {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        Ok(Self {
            layer_norm1: LayerNorm::load(vb.pp("layer_norm1"), config.width, config.layer_norm_eps)?,
            self_attn: Attention::load(vb.pp("self_attn"), config)?,
            layer_norm2: LayerNorm::load(vb.pp("layer_norm2"), config.width, config.layer_norm_eps)?,
            mlp: Mlp::load(vb.pp("mlp"), config)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.self_attn.forward(&self.layer_norm1.forward(x)?)?)?;
        &x + self.mlp.forward(&self.layer_norm2.forward(&x)?)?
    }
}

/// Loads `layers.0 ..` from `vb`, one at a time.
pub(crate) fn blocks(vb: VarBuilder, config: &Config) -> impl Iterator<Item = Result<Block>> {
    let vb = vb.pp("layers");
    (0..config.depth).map(move |i| Block::load(vb.pp(i), config))
}

/// A stack of transformer blocks.
#[derive(Debug, Clone)]
pub struct Vit {
    layers: Vec<Block>,
}

impl Vit {
    /// Loads `layers.0 ..` from `vb`.
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let layers = blocks(vb, config).collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// Every block in turn.
    ///
    /// # Shapes
    /// - input, output: `[B, N, D]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.layers.iter().try_fold(x.clone(), |x, layer| layer.forward(&x))
    }

    /// The input and the output of every block, as transformers' `output_hidden_states` counts them: depth + 1 tensors.
    pub fn hidden_states(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut states = vec![x.clone()];
        for layer in &self.layers {
            states.push(layer.forward(&states[states.len() - 1])?);
        }
        Ok(states)
    }
}

/// Learned positions of a grid, interpolated for any other grid as transformers does it (bicubic, a = −0.75, half-pixel
/// centres, no antialiasing).
#[derive(Debug, Clone)]
pub struct Positions {
    table: Tensor,
    grid: (usize, usize),
}

impl Positions {
    /// Loads `weight` `[h·w, D]`, the positions of `grid` = (h, w).
    pub fn load(vb: VarBuilder, grid: (usize, usize), width: usize) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let table = vb.get_with_hints((grid.0 * grid.1, width), "weight", init)?;
        Ok(Self { table, grid })
    }

    /// Adds the positions to tokens `[B, h·w, D]` of a grid (h, w).
    pub fn add(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        tokens.broadcast_add(&self.at(grid)?)
    }

    /// `[h·w, D]`.
    pub(crate) fn at(&self, (h, w): (usize, usize)) -> Result<Tensor> {
        if (h, w) == self.grid {
            return Ok(self.table.clone());
        }
        let (h0, w0) = self.grid;
        let width = self.table.dim(1)?;
        let device = self.table.device();
        let rows = bicubic(h, h0, device)?.to_dtype(self.table.dtype())?; // [h,h0]
        let columns = bicubic(w, w0, device)?.to_dtype(self.table.dtype())?; // [w,w0]
        let x = rows.matmul(&self.table.reshape((h0, w0 * width))?)?; // [h,w0·D]
        let x = x.reshape((h, w0, width))?.transpose(0, 1)?.reshape((w0, h * width))?;
        let x = columns.matmul(&x)?.reshape((w, h, width))?; // [w,h,D]
        x.transpose(0, 1)?.reshape((h * w, width))
    }
}

/// The weights with which `input` samples make `output` samples, `[output, input]`.
fn bicubic(output: usize, input: usize, device: &Device) -> Result<Tensor> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = input as f32 / output as f32;
    let mut weights = vec![0f32; output * input];
    for o in 0..output {
        let centre = scale * (o as f32 + 0.5) - 0.5;
        let t = centre - centre.floor();
        let taps = [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)];
        for (i, tap) in taps.into_iter().enumerate() {
            let source = (centre.floor() as isize - 1 + i as isize).clamp(0, input as isize - 1) as usize;
            weights[o * input + source] += tap;
        }
    }
    Tensor::from_vec(weights, (output, input), device)
}

/// Images to patches: `[B, 3, h·p, w·p]` to `[B, h·w, 3·p·p]`, channel first within a patch, as a convolution's weight is.
pub fn patchify(pixels: &Tensor, p: usize) -> Result<Tensor> {
    let (b, c, height, width) = pixels.dims4()?;
    let (h, w) = grid(height, width, p)?;
    pixels
        .reshape(vec![b, c, h, p, w, p])?
        .permute(vec![0, 2, 4, 1, 3, 5])? // [B,h,w,C,p,p]
        .reshape((b, h * w, c * p * p))
}

/// Patches to images: `[B, h·w, p·p·3]` to `[B, 3, h·p, w·p]`, channel last within a patch, as MAE and RAE have it.
pub fn unpatchify(patches: &Tensor, (h, w): (usize, usize), p: usize) -> Result<Tensor> {
    let b = patches.dim(0)?;
    patches
        .reshape(vec![b, h, w, p, p, 3])?
        .permute(vec![0, 5, 1, 3, 2, 4])? // [B,3,h,p,w,p]
        .reshape((b, 3, h * p, w * p))
}

/// The grid (h, w) that patches of side `p` make of `height` × `width` pixels.
pub fn grid(height: usize, width: usize, p: usize) -> Result<(usize, usize)> {
    if p == 0 || height == 0 || width == 0 || !height.is_multiple_of(p) || !width.is_multiple_of(p) {
        candle_core::bail!("an image of {height}×{width} pixels does not divide into patches of {p}×{p}");
    }
    Ok((height / p, width / p))
}

/// The parameters of a patch embedding: a convolution whose stride is its size, computed as a matrix product.
#[derive(Debug, Clone)]
pub struct PatchEmbedding {
    pub(crate) weight: Tensor,
    pub(crate) bias: Tensor,
    patch: usize,
}

impl PatchEmbedding {
    /// Loads `weight` `[D, 3, p, p]` and `bias` `[D]`.
    pub fn load(vb: VarBuilder, patch: usize, width: usize) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let weight = vb.get_with_hints((width, 3, patch, patch), "weight", init)?;
        let bias = vb.get_with_hints(width, "bias", candle_nn::init::ZERO)?;
        Ok(Self { weight, bias, patch })
    }

    /// `[B, 3, H, W]` to `[B, h·w, D]`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let patches = patchify(pixels, self.patch)?.to_dtype(self.weight.dtype())?;
        ops::linear(&patches, &self.weight.flatten_from(1)?, &self.bias)
    }
}

impl Config {
    /// Whether the sizes make sense and stay within what a machine can hold; the error names the field.
    pub fn check(&self, what: &str) -> std::result::Result<(), String> {
        let sizes = [
            ("width", self.width, 1 << 16),
            ("depth", self.depth, 1 << 10),
            ("heads", self.heads, 1 << 10),
            ("mlp width", self.mlp_width, 1 << 18),
        ];
        for (name, size, limit) in sizes {
            let may_be_zero = name == "depth";
            if size > limit || (size == 0 && !may_be_zero) {
                return Err(format!("{what}: {name} is {size}, expected: 1 to {limit}"));
            }
        }
        if !self.width.is_multiple_of(self.heads) {
            return Err(format!("{what}: {} heads do not divide the width {}", self.heads, self.width));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpatchify_puts_channels_last_within_a_patch() -> Result<()> {
        let patches = Tensor::arange(0f32, 24., &Device::Cpu)?.reshape((1, 2, 12))?;
        let image = unpatchify(&patches, (1, 2), 2)?;
        assert_eq!(image.dims(), [1, 3, 2, 4]);
        let red = image.get(0)?.get(0)?.to_vec2::<f32>()?;
        assert_eq!(red, [[0., 3., 12., 15.], [6., 9., 18., 21.]]);
        Ok(())
    }

    #[test]
    fn patchify_reads_rows_then_columns() -> Result<()> {
        let image = Tensor::arange(0f32, 24., &Device::Cpu)?.reshape((1, 3, 2, 4))?;
        let patches = patchify(&image, 2)?.get(0)?.to_vec2::<f32>()?;
        assert_eq!(patches[1], [2., 3., 6., 7., 10., 11., 14., 15., 18., 19., 22., 23.]);
        Ok(())
    }

    #[test]
    fn bicubic_weights_of_a_row_sum_to_one() -> Result<()> {
        for (output, input) in [(1, 4), (7, 3), (16, 24), (3, 1)] {
            for row in bicubic(output, input, &Device::Cpu)?.to_vec2::<f32>()? {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
        }
        Ok(())
    }
}
