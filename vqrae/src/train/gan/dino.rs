//! RAE's discriminator (bytetriper/RAE, `DinoDisc`, after StyleGAN-T, arXiv 2301.09515): a frozen DINO sees the images, and
//! a small trained head on each of a few of its states says how real every patch looks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::layers::{leaky_relu, standardize};
use super::resample::resize;
use crate::encoder::{Features, Layout, Tower};
use crate::error::{self, Error};
use crate::ops;
use crate::vit::{self, Activation, Interpolation};
use crate::weights::{self, Tensors};

/// Which states are looked at, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The blocks, counted from 0, behind each of which stands a head; one more head stands behind the last block. Blocks
    /// that a DINO has not are left out.
    pub taps: Vec<usize>,
    /// Patches, an odd number, that a head's second layer sees at once.
    pub kernel_size: usize,
    /// Attention heads of the DINO; 0 for one of every 64 channels, as in all of its authors' models.
    pub heads: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { taps: vec![2, 5, 8, 11], kernel_size: 9, heads: 0 }
    }
}

impl Config {
    /// Whether the sizes make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        if self.kernel_size.is_multiple_of(2) || self.kernel_size > 63 {
            return Err(format!("gan.dino.kernel_size is {}, expected: an odd number up to 63", self.kernel_size));
        }
        if !self.taps.is_sorted_by(|a, b| a < b) {
            return Err(format!("gan.dino.taps are {:?}, expected: blocks in rising order", self.taps));
        }
        Ok(())
    }
}

/// A frozen DINO v1 (Caron et al., arXiv 2104.14294).
#[derive(Debug, Clone)]
pub struct Backbone {
    tower: Tower,
    layout: Layout,
}

impl Backbone {
    /// Reads a file of a DINO ViT (safetensors, or PyTorch's by its ending), under its authors' names or Hugging Face's. Its sizes are those of its
    /// tensors, but for the attention heads.
    ///
    /// # Errors
    /// If the file is missing or broken, or its tensors are not a ViT's.
    pub fn read(path: &Path, config: &Config, device: &Device) -> error::Result<Self> {
        let tensors = weights::read_any(path)?;
        let wrong = |reason: &str| Error::weights(path, format!("{reason}; expected: the tensors of a DINO ViT"));
        let dims = |rank: usize| {
            let is = |dims: &&[usize]| dims.len() == rank && (rank != 3 || dims[0] == 1 && dims[1] > 1);
            tensors.values().map(Tensor::dims).find(is)
        };
        let &[width, 3, patch, columns] = dims(4).unwrap_or_default() else {
            return Err(wrong("no patch embedding [D, 3, p, p]"));
        };
        let positions = dims(3).unwrap_or_default().get(1).copied().unwrap_or_default();
        let side = positions.saturating_sub(1).isqrt();
        if patch != columns || side == 0 || side * side + 1 != positions {
            return Err(wrong(&format!("{positions} positions are no square grid and a class token")));
        }
        let vit = vit::Config {
            width,
            depth: 0,
            heads: if config.heads > 0 { config.heads } else { width.div_ceil(64) },
            mlp_width: 1,
            layer_norm_eps: 1e-6,
            // DINO was trained with the GELU as it is; RAE computes its tanh form, and so do the discriminators trained on it.
            style: vit::Style { activation: Activation::GeluTanh, ..vit::Style::default() },
        };
        let mut layout = Layout {
            vit,
            patch,
            grid: (side, side),
            prefix: 1,
            interpolation: Interpolation::Bicubic,
            features: Features::BeforeNorm,
        };
        let mut tensors = weights::layout_tower(tensors, &layout).map_err(|e| Error::weights(path, e))?;
        tensors.retain(|name, _| !name.starts_with("post_layernorm."));
        let block = |name: &String| name.strip_prefix("layers.")?.split('.').next()?.parse::<usize>().ok();
        layout.vit.depth = tensors.keys().filter_map(block).max().map_or(0, |last| last + 1);
        if layout.vit.depth == 0 {
            return Err(wrong("no blocks (layers.N, blocks.N)"));
        }
        layout.vit.mlp_width = tensors.get("layers.0.mlp.fc1.bias").map_or(1, Tensor::elem_count);
        layout.check(side * patch).map_err(|reason| Error::weights(path, reason))?;
        if let Some(name) = tensors.keys().find(|name| !name.starts_with("layers.") && !name.starts_with("embeddings."))
        {
            return Err(wrong(&format!("it has a tensor `{name}`")));
        }
        for (name, tensor) in &mut tensors {
            *tensor = tensor.to_dtype(DType::F32)?;
            // As RAE does. The bias moves all scores of a query alike, which a softmax ignores, so only rounding differs.
            if name.ends_with("k_proj.bias") {
                *tensor = tensor.zeros_like()?;
            }
        }
        let all = tensors.into_iter().collect();
        let vb = VarBuilder::from_tensors(all, DType::F32, device);
        let tower = Tower::load(&vb, vb.clone(), layout).map_err(|e| Error::weights(path, e))?;
        Ok(Self { tower, layout })
    }

    /// Width of its states.
    pub fn width(&self) -> usize {
        self.layout.vit.width
    }

    /// The states that have a head, the last one first, `[B, N, D]` each, the class token left out.
    fn states(&self, images: &Tensor, taps: &[usize]) -> Result<Vec<Tensor>> {
        /// Of ImageNet, for images in [−1, 1].
        const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
        const STD: [f64; 3] = [0.229, 0.224, 0.225];
        let ((h, w), p) = (self.layout.grid, self.layout.patch);
        let by_channel = |f: fn(f64, f64) -> f64| {
            Tensor::new(std::array::from_fn::<_, 3, _>(|c| f(MEAN[c], STD[c]) as f32).as_slice(), images.device())?
                .reshape((1, 3, 1, 1))
        };
        let x = resize(images, (h * p, w * p))?.broadcast_mul(&by_channel(|_, std| 0.5 / std)?)?;
        let x = x.broadcast_add(&by_channel(|mean, std| (0.5 - mean) / std)?)?;
        let states = self.tower.hidden_states(&x)?;
        let last = states.len() - 1;
        [last].into_iter().chain(taps.iter().map(|tap| tap + 1)).map(|i| states[i].narrow(1, 1, h * w)).collect()
    }

    /// The taps that it has.
    fn taps(&self, config: &Config) -> Vec<usize> {
        config.taps.iter().copied().filter(|&tap| tap < self.layout.vit.depth).collect()
    }
}

/// A convolution along the tokens, circular, with spectral norm (Miyato et al., arXiv 1802.05957): its weight is divided
/// by its largest singular value, which one power iteration a forward pass of training follows.
#[derive(Debug, Clone)]
struct SpectralConvolution {
    weight: Tensor,
    bias: Tensor,
    u: Tensor,
    v: Tensor,
}

/// What the vectors of a spectral norm are called, after the name of the layer, as in PyTorch.
const WEIGHT: &str = "weight_orig";
const LEFT: &str = "weight_u";
const RIGHT: &str = "weight_v";

impl SpectralConvolution {
    fn load(vb: VarBuilder, from: usize, to: usize, size: usize) -> Result<Self> {
        let bound = 1.0 / ((from * size) as f64).sqrt();
        let (init, normal) = (Init::Uniform { lo: -bound, up: bound }, Init::Randn { mean: 0.0, stdev: 1.0 });
        Ok(Self {
            weight: vb.get_with_hints((to, from, size), WEIGHT, init)?,
            bias: vb.get_with_hints(to, "bias", init)?,
            u: vb.get_with_hints(to, LEFT, normal)?,
            v: vb.get_with_hints(from * size, RIGHT, normal)?,
        })
    }

    /// `[B, N, from]` to `[B, N, to]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (to, from, size) = self.weight.dims3()?;
        // Copies, since a power iteration between this and the backward pass would change them.
        let (u, v) = (self.u.copy()?.unsqueeze(0)?, self.v.copy()?.unsqueeze(1)?);
        let norm = u.matmul(&self.weight.flatten_from(1)?)?.matmul(&v)?.reshape((1, 1))?;
        let weight = self.weight.transpose(1, 2)?.reshape((to, size * from))?.broadcast_div(&norm)?;
        ops::linear(ops::Precision::F32, &neighbours(x, size)?, &weight, &self.bias)
    }
}

/// Every token with its `size` − 1 neighbours beside it, the row of tokens being a ring: `[B, N, D]` to `[B, N, size·D]`.
fn neighbours(x: &Tensor, size: usize) -> Result<Tensor> {
    let (n, reach) = (x.dim(1)?, size / 2);
    if reach == 0 {
        return x.contiguous();
    }
    if reach > n {
        candle_core::bail!("a kernel of {size} does not fit {n} tokens");
    }
    let ring = Tensor::cat(&[&x.narrow(1, n - reach, reach)?, x, &x.narrow(1, 0, reach)?], 1)?;
    Tensor::cat(&(0..size).map(|i| ring.narrow(1, i, n)).collect::<Result<Vec<_>>>()?, 2)
}

/// Each image's own batch norm: mean zero and variance one of every channel over its tokens, then weight and bias.
#[derive(Debug, Clone)]
struct LocalNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LocalNorm {
    fn load(vb: VarBuilder, width: usize) -> Result<Self> {
        let weight = vb.get_with_hints(width, "weight", candle_nn::init::ONE)?;
        Ok(Self { weight, bias: vb.get_with_hints(width, "bias", candle_nn::init::ZERO)? })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        const EPS: f64 = 1e-6;
        let x = standardize(&x.transpose(1, 2)?.contiguous()?, EPS)?.transpose(1, 2)?.contiguous()?;
        x.broadcast_mul(&self.weight)?.broadcast_add(&self.bias)
    }
}

#[derive(Debug, Clone)]
struct Head {
    first: (SpectralConvolution, LocalNorm),
    second: (SpectralConvolution, LocalNorm),
    logits: SpectralConvolution,
}

impl Head {
    fn load(vb: VarBuilder, width: usize, kernel_size: usize) -> Result<Self> {
        let block = |vb: VarBuilder, size| {
            Ok::<_, candle_core::Error>((
                SpectralConvolution::load(vb.pp(0), width, width, size)?,
                LocalNorm::load(vb.pp(1), width)?,
            ))
        };
        Ok(Self {
            first: block(vb.pp(0), 1)?,
            second: block(vb.pp("1.fn"), kernel_size)?,
            logits: SpectralConvolution::load(vb.pp(2), width, 1, 1)?,
        })
    }

    /// `[B, N, D]` to `[B, N]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        const SLOPE: f64 = 0.2;
        let block = |(convolution, norm): &(SpectralConvolution, LocalNorm), x: &Tensor| {
            leaky_relu(&norm.forward(&convolution.forward(x)?)?, SLOPE)
        };
        let x = block(&self.first, x)?;
        let x = ((block(&self.second, &x)? + x)? * std::f64::consts::FRAC_1_SQRT_2)?;
        self.logits.forward(&x)?.squeeze(2)
    }
}

/// The discriminator: a frozen [`Backbone`] and its heads, by RAE's names.
#[derive(Debug, Clone)]
pub struct Dino {
    backbone: Backbone,
    heads: Vec<Head>,
    taps: Vec<usize>,
}

impl Dino {
    /// Loads `heads.N` onto a backbone.
    pub fn load(vb: VarBuilder, backbone: Backbone, config: &Config) -> Result<Self> {
        let (vb, taps) = (vb.pp("heads"), backbone.taps(config));
        let head = |i| Head::load(vb.pp(i), backbone.width(), config.kernel_size);
        let heads = (0..=taps.len()).map(head).collect::<Result<_>>()?;
        Ok(Self { backbone, heads, taps })
    }

    /// How real each patch looks, to each head.
    ///
    /// # Shapes
    /// - images: `[B, 3, H, W]` in [−1, 1]; they are brought to the size that the backbone was trained on
    /// - output: `[B, heads · N]`, N patches
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let states = self.backbone.states(images, &self.taps)?;
        let logits = self.heads.iter().zip(&states).map(|(head, state)| head.forward(state));
        Tensor::cat(&logits.collect::<Result<Vec<_>>>()?, 1)
    }
}

/// Whether a tensor is a vector of a spectral norm, which no gradient moves.
pub(super) fn is_vector(name: &str) -> bool {
    name.ends_with(LEFT) || name.ends_with(RIGHT)
}

/// Brings fresh vectors to length one, as PyTorch does.
pub(super) fn normalize_vectors(tensors: &mut Tensors) -> Result<()> {
    for (name, tensor) in tensors {
        if is_vector(name) {
            *tensor = unit(tensor)?;
        }
    }
    Ok(())
}

fn unit(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&x.sqr()?.sum_all()?.sqrt()?.maximum(1e-12)?)
}

/// One power iteration of every spectral norm.
pub(super) fn iterate(parameters: &BTreeMap<String, Var>, vectors: &BTreeMap<String, Var>) -> Result<()> {
    for (name, left) in vectors.iter().filter(|(name, _)| name.ends_with(LEFT)) {
        let layer = name.trim_end_matches(LEFT);
        let (weight, right) = (parameters.get(&format!("{layer}{WEIGHT}")), vectors.get(&format!("{layer}{RIGHT}")));
        let (Some(weight), Some(right)) = (weight, right) else {
            candle_core::bail!("the spectral norm `{layer}` has no weight");
        };
        let weight = weight.as_detached_tensor().flatten_from(1)?;
        let v = unit(&weight.t()?.matmul(&left.as_detached_tensor().unsqueeze(1)?)?.squeeze(1)?)?;
        let u = unit(&weight.matmul(&v.unsqueeze(1)?)?.squeeze(1)?)?;
        right.set(&v)?;
        left.set(&u)?;
    }
    Ok(())
}

/// Where a DINO's weights are missing from a config.
pub(super) fn weights_of(weights: Option<&PathBuf>) -> std::result::Result<&PathBuf, String> {
    weights.ok_or_else(|| "gan.weights is missing, expected: the DINO that gan.discriminator = \"dino\" looks with, such as dino_vit_small_patch8_224.pth".to_string())
}
