//! The one vision transformer: pre-norm blocks (Dosovitskiy et al., arXiv 2010.11929), used by encoder and decoder alike.
//!
//! Tensor names are those of Hugging Face's SigLIP (`layers.N.{layer_norm1,self_attn,layer_norm2,mlp}`), so a checkpoint
//! of the hub loads as it is. Whether a parameter is trained is the [`VarBuilder`]'s matter, not this file's.

use std::sync::Arc;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use crate::ops::{self, GeluForm, Linear, Mask, Norm, Precision};

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
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// How the blocks differ from SigLIP's.
    #[serde(default)]
    pub style: Style,
}

/// How the blocks of one family of encoders differ from another's. The default is SigLIP's, and every decoder's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Style {
    /// Root-mean-square norms (Zhang & Sennrich, arXiv 1910.07467) in place of layer norms: InternViT-6B.
    pub rms_norm: bool,
    /// q, k and v have no bias: InternViT-6B.
    pub no_qkv_bias: bool,
    /// q and k pass a root-mean-square norm over their whole width: InternViT-6B.
    pub qk_norm: bool,
    /// What attention and MLP add is scaled by a learned vector each (Touvron et al., arXiv 2103.17239): DINOv2, InternViT.
    pub layer_scale: bool,
    /// What stands between the MLP's two layers.
    pub activation: Activation,
    /// A token sees itself and those before it: generators that draw code after code.
    #[serde(default)]
    pub causal: bool,
}

impl Style {
    /// Which tokens a token sees.
    pub(crate) fn mask(self) -> Mask {
        if self.causal { Mask::Causal } else { Mask::None }
    }
}

/// What stands between the two layers of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// GELU in the tanh form: SigLIP.
    #[default]
    GeluTanh,
    /// GELU as it is: DINOv2, InternViT, MAE.
    Gelu,
    /// `silu(a) · b` of the halves of a first layer twice as wide (Shazeer, arXiv 2002.05202): DINOv2 giant.
    SwiGlu,
}

#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    pub(crate) out_proj: Linear,
    /// q, k and v as one layer, where one product is faster; they are views of it then.
    qkv: Option<Linear>,
    /// The norms of q and k, if any.
    pub(crate) qk_norms: Option<(Norm, Norm)>,
    heads: usize,
    mask: Mask,
}

impl Attention {
    pub(crate) fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (d, style) = (config.width, config.style);
        let input = |name: &str| match style.no_qkv_bias {
            true => Linear::load_without_bias(vb.pp(name), d, d),
            false => Linear::load(vb.pp(name), d, d),
        };
        let norm = |name: &str| Norm::load(vb.pp(name), d, config.layer_norm_eps, true);
        let (mut q_proj, mut k_proj, mut v_proj) = (input("q_proj")?, input("k_proj")?, input("v_proj")?);
        let qkv = match style.qk_norm {
            true => None,
            false => Linear::side_by_side([&mut q_proj, &mut k_proj, &mut v_proj])?,
        };
        Ok(Self {
            q_proj,
            k_proj,
            v_proj,
            qkv,
            out_proj: Linear::load(vb.pp("out_proj"), d, d)?,
            qk_norms: style
                .qk_norm
                .then(|| Ok::<_, candle_core::Error>((norm("q_norm")?, norm("k_norm")?)))
                .transpose()?,
            heads: config.heads,
            mask: style.mask(),
        })
    }

    /// What every token of `x` finds in those of `context`, as many; in self-attention they are the same.
    pub(crate) fn forward(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        self.out_proj.forward(&self.heads_of(x, context)?)
    }

    /// The heads' outputs side by side, `[B, N, D]`.
    fn heads_of(&self, x: &Tensor, context: &Tensor) -> Result<Tensor> {
        let precision = self.out_proj.precision;
        if let Some(qkv) = self.qkv.as_ref().filter(|_| x.id() == context.id()) {
            return ops::attention_of_all(precision, self.mask, &qkv.forward(x)?, self.heads);
        }
        let (mut q, mut k) = (self.q_proj.forward(x)?, self.k_proj.forward(context)?);
        let v = self.v_proj.forward(context)?;
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        ops::attention(precision, self.mask, &q, &k, &v, self.heads)
    }

    fn multiply_in(&mut self, precision: Precision) {
        let Self { q_proj, k_proj, v_proj, qkv, out_proj, .. } = self;
        let all = [q_proj, k_proj, v_proj, out_proj].into_iter().chain(qkv);
        all.for_each(|linear| linear.multiply_in(precision));
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Mlp {
    pub(crate) fc1: Linear,
    pub(crate) fc2: Linear,
    activation: Activation,
}

impl Mlp {
    pub(crate) fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let activation = config.style.activation;
        Ok(Self {
            fc1: Linear::load(vb.pp("fc1"), config.width, activation.width_before(config.mlp_width))?,
            fc2: Linear::load(vb.pp("fc2"), config.mlp_width, config.width)?,
            activation,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if let (Some(form), false) = (self.activation.gelu(), ops::ends(x, &self.fc1)) {
            return self.fc2.after_gelu(form, &self.fc1.forward(x)?);
        }
        self.fc2.forward(&self.hidden(x)?)
    }

    /// What the second layer is given.
    fn hidden(&self, x: &Tensor) -> Result<Tensor> {
        match self.activation.gelu() {
            Some(form) => self.fc1.then_gelu(form, x),
            None => ops::gate(&self.fc1.forward(x)?),
        }
    }
}

impl Mlp {
    fn multiply_in(&mut self, precision: Precision) {
        self.fc1.multiply_in(precision);
        self.fc2.multiply_in(precision);
    }
}

impl Activation {
    /// Its form of GELU, if it is one.
    fn gelu(self) -> Option<GeluForm> {
        match self {
            Self::GeluTanh => Some(GeluForm::Tanh),
            Self::Gelu => Some(GeluForm::Erf),
            Self::SwiGlu => None,
        }
    }

    /// What the MLP's first layer puts out for a second layer that takes `width`.
    pub(crate) fn width_before(self, width: usize) -> usize {
        if self == Self::SwiGlu { 2 * width } else { width }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) layer_norm1: Norm,
    pub(crate) self_attn: Attention,
    pub(crate) layer_norm2: Norm,
    pub(crate) mlp: Mlp,
    /// What attention's and the MLP's outputs are scaled by, `[D]` each, if they are.
    pub(crate) layer_scales: Option<(Tensor, Tensor)>,
}

impl Block {
    fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let (d, style) = (config.width, config.style);
        let norm = |name: &str| Norm::load(vb.pp(name), d, config.layer_norm_eps, style.rms_norm);
        // 0.1 is what InternViT starts from.
        let scale = |name: &str| vb.pp(name).get_with_hints(d, "weight", Init::Const(0.1));
        let scales = || Ok::<_, candle_core::Error>((scale("layer_scale1")?, scale("layer_scale2")?));
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            self_attn: Attention::load(vb.pp("self_attn"), config)?,
            layer_norm2: norm("layer_norm2")?,
            mlp: Mlp::load(vb.pp("mlp"), config)?,
            layer_scales: style.layer_scale.then(scales).transpose()?,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = self.layer_norm1.forward(x)?;
        match &self.layer_scales {
            None if ops::ends(x, &self.mlp.fc2) => {
                let x = self.self_attn.out_proj.onto(x, &self.self_attn.heads_of(&normed, &normed)?)?;
                self.mlp.fc2.onto(&x, &self.mlp.hidden(&self.layer_norm2.forward(&x)?)?)
            }
            None => {
                let x = (x + self.self_attn.forward(&normed, &normed)?)?;
                &x + self.mlp.forward(&self.layer_norm2.forward(&x)?)?
            }
            Some((scale1, scale2)) => {
                let x = ops::add_scaled(x, &self.self_attn.forward(&normed, &normed)?, scale1)?;
                ops::add_scaled(&x, &self.mlp.forward(&self.layer_norm2.forward(&x)?)?, scale2)
            }
        }
    }
}

/// Loads `layers.0 ..` from `vb`, one at a time.
pub(crate) fn blocks(vb: VarBuilder, config: &Config) -> impl Iterator<Item = Result<Block>> {
    let vb = vb.pp("layers");
    (0..config.depth).map(move |i| Block::load(vb.pp(i), config))
}

/// Runs blocks in place of [`Block::forward`]; training computes them again for the gradient rather than keep what they hold.
pub(crate) trait RunBlock: std::fmt::Debug + Send + Sync {
    /// The value and the gradient of `block.forward(x)`.
    fn run(&self, block: &Block, x: &Tensor) -> Result<Tensor>;
}

/// A stack of transformer blocks.
#[derive(Debug, Clone)]
pub struct Vit {
    layers: Vec<Block>,
    runner: Option<Arc<dyn RunBlock>>,
}

impl Vit {
    /// Loads `layers.0 ..` from `vb`.
    pub fn load(vb: VarBuilder, config: &Config) -> Result<Self> {
        let layers = blocks(vb, config).collect::<Result<_>>()?;
        Ok(Self { layers, runner: None })
    }

    /// Has every block run by `runner`.
    pub(crate) fn run_by(&mut self, runner: Arc<dyn RunBlock>) {
        self.runner = Some(runner);
    }

    /// Has the products of every block read numbers of `precision`.
    pub fn multiply_in(&mut self, precision: Precision) {
        for layer in &mut self.layers {
            layer.self_attn.multiply_in(precision);
            layer.mlp.multiply_in(precision);
        }
    }

    fn run(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        self.runner.as_ref().map_or_else(|| block.forward(x), |runner| runner.run(block, x))
    }

    /// Every block in turn.
    ///
    /// # Shapes
    /// - input, output: `[B, N, D]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.layers.iter().try_fold(x.clone(), |x, layer| self.run(layer, &x))
    }

    /// The input and the output of every block, as transformers' `output_hidden_states` counts them: depth + 1 tensors.
    pub fn hidden_states(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let mut states = vec![x.clone()];
        for layer in &self.layers {
            states.push(self.run(layer, &states[states.len() - 1])?);
        }
        Ok(states)
    }
}

/// How positions of one grid become those of another; each is what transformers does for the encoders named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Interpolation {
    /// Bicubic, a = −0.75, half-pixel centres, no antialiasing: SigLIP, DINOv2, InternViT, MAE.
    #[default]
    Bicubic,
    /// Bicubic, a = −0.5, the filter widened where the grid shrinks: DINOv2 with registers.
    Antialiased,
    /// Bilinear, the filter widened where the grid shrinks: SigLIP2 NaFlex.
    AntialiasedBilinear,
}

/// Learned positions of a grid, interpolated for any other grid.
#[derive(Debug, Clone)]
pub struct Positions {
    table: Tensor,
    grid: (usize, usize),
    interpolation: Interpolation,
}

impl Positions {
    /// Loads `weight` `[h·w, D]`, the positions of `grid` = (h, w).
    pub fn load(vb: VarBuilder, grid: (usize, usize), width: usize) -> Result<Self> {
        let init = Init::Randn { mean: 0.0, stdev: 0.02 };
        let table = vb.get_with_hints((grid.0 * grid.1, width), "weight", init)?;
        Ok(Self { table, grid, interpolation: Interpolation::default() })
    }

    /// The same with another interpolation.
    #[must_use]
    pub fn interpolated(self, interpolation: Interpolation) -> Self {
        Self { interpolation, ..self }
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
        // As transformers does: half precision would round the weights.
        let table = match self.table.dtype() {
            DType::BF16 | DType::F16 => self.table.to_dtype(DType::F32)?,
            _ => self.table.clone(),
        };
        let weights = |output: usize, input: usize| {
            Tensor::from_vec(self.interpolation.weights(output, input), (output, input), table.device())?
                .to_dtype(table.dtype())
        };
        let x = weights(h, h0)?.matmul(&table.reshape((h0, w0 * width))?)?; // [h,w0·D]
        let x = x.reshape((h, w0, width))?.transpose(0, 1)?.reshape((w0, h * width))?;
        let x = weights(w, w0)?.matmul(&x)?.reshape((w, h, width))?; // [w,h,D]
        x.transpose(0, 1)?.reshape((h * w, width))?.to_dtype(self.table.dtype())
    }
}

impl Interpolation {
    /// The weights with which `input` samples make `output` samples, `[output, input]`.
    fn weights(self, output: usize, input: usize) -> Vec<f32> {
        let scale = input as f32 / output as f32;
        let mut weights = vec![0f32; output * input];
        for (o, row) in weights.chunks_exact_mut(input).enumerate() {
            let centre = scale * (o as f32 + 0.5);
            match self {
                Self::Bicubic => {
                    let (centre, last) = (centre - 0.5, input as isize - 1);
                    for tap in -1..3 {
                        let source = centre.floor() as isize + tap;
                        row[source.clamp(0, last) as usize] += cubic(centre - source as f32, -0.75);
                    }
                }
                Self::Antialiased | Self::AntialiasedBilinear => {
                    let bilinear = self == Self::AntialiasedBilinear;
                    let stretch = scale.max(1.0);
                    let reach = if bilinear { stretch } else { 2.0 * stretch };
                    let first = ((centre - reach + 0.5) as isize).max(0) as usize;
                    let end = ((centre + reach + 0.5) as usize).min(input);
                    let tap = |i: usize| {
                        let x = (i as f32 + 0.5 - centre) / stretch;
                        if bilinear { (1.0 - x.abs()).max(0.0) } else { cubic(x, -0.5) }
                    };
                    let sum: f32 = (first..end).map(tap).sum();
                    (first..end).for_each(|i| row[i] = tap(i) / sum);
                }
            }
        }
        weights
    }
}

/// Keys' cubic convolution kernel.
fn cubic(x: f32, a: f32) -> f32 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
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
        let near = |side: usize| match side / p.max(1) * p {
            below if below == side || below == 0 => vec![side.max(1).next_multiple_of(p.max(1))],
            below => vec![below, below + p],
        };
        let sizes: Vec<_> =
            near(height).iter().flat_map(|h| near(width).into_iter().map(move |w| format!("{h}×{w}"))).collect();
        candle_core::bail!(
            "an image of {height}×{width} pixels does not divide into patches of {p}×{p}; the nearest sizes that do: {}",
            sizes.join(", ")
        );
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
        ops::linear(Precision::F32, &patches, &self.weight.flatten_from(1)?, &self.bias)
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
    use candle_core::Device;

    use super::*;

    const ALL: [Interpolation; 3] =
        [Interpolation::Bicubic, Interpolation::Antialiased, Interpolation::AntialiasedBilinear];

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

    /// PyTorch 2.15 repeats the first of a column's positions on a CPU, so this one grid is not compared with it.
    #[test]
    fn positions_of_a_column_are_those_of_the_transposed_row() -> Result<()> {
        for interpolation in ALL {
            let table = Tensor::arange(0f32, 16., &Device::Cpu)?.sqr()?.reshape((4, 4))?;
            let at = |table: Tensor, grid| Positions { table, grid: (4, 4), interpolation }.at(grid)?.flatten_all();
            let column = at(table.reshape((16, 1))?, (7, 1))?.to_vec1::<f32>()?;
            let row = at(table.t()?.reshape((16, 1))?, (1, 7))?.to_vec1::<f32>()?;
            assert!(column.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-4), "{column:?} {row:?}");
            assert!(column.is_sorted_by(|a, b| a < b), "{column:?}");
        }
        Ok(())
    }

    #[test]
    fn weights_of_a_row_sum_to_one() {
        for interpolation in ALL {
            for (output, input) in [(1, 4), (7, 3), (16, 24), (3, 1)] {
                for row in interpolation.weights(output, input).chunks_exact(input) {
                    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
                }
            }
        }
    }
}
