//! Encoder, quantizer and decoder with packed weights, an image at a time.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use vqrae_kernels as kernels;
use vqrae_kernels::cpu::{Element, End, Isa, Matrix};

use super::layers::{Linear, Norm, Vit, values};
use crate::quantizer::{Bottleneck, Quantized};
use crate::vit::Positions;
use crate::{decoder, encoder, ops, quantizer};

/// What an encoder's features are made of.
pub(super) struct States {
    /// The shallow state `[N, D]`, where two become one.
    pub(super) shallow: Option<Matrix<f32>>,
    /// The state, or the sum of several, before the final norm, `[N, D]`.
    deep: Matrix<f32>,
}

/// Pixels to features.
pub(super) struct Encoder<T> {
    patch_embedding: Linear<T>,
    position_embedding: Positions,
    /// Tokens before those of the patches, `[P, D]`.
    prefix_tokens: Vec<f32>,
    blocks: Vit<T>,
    norm: Option<Norm>,
    layout: encoder::Layout,
}

impl<T: Element> Encoder<T> {
    pub(super) fn load(vb: VarBuilder, config: &encoder::Config, isa: Isa) -> Result<Self> {
        let (tower, blocks) = config.places(&vb);
        let layout = config.layout();
        let parts = encoder::Surroundings::load(&tower, &layout)?;
        let embedding = &parts.patch_embedding;
        Ok(Self {
            patch_embedding: Linear::of(&embedding.weight, Some(&embedding.bias), isa)?,
            position_embedding: parts.position_embedding,
            prefix_tokens: parts.prefix_tokens.as_ref().map(values).transpose()?.unwrap_or_default(),
            blocks: Vit::load(blocks, &layout.blocks(), isa)?,
            norm: parts.post_layernorm.as_ref().map(Norm::of).transpose()?,
            layout,
        })
    }

    /// The positions of a grid, `[N, D]`.
    pub(super) fn positions(&self, grid: (usize, usize)) -> Result<Vec<f32>> {
        values(&self.position_embedding.at(grid)?)
    }

    /// The states of one image that its features are made of; `seen` is shown every hidden state, `[P + N, D]`.
    ///
    /// # Shapes
    /// - pixels: `[3, h·P, w·P]`
    /// - positions: of the grid (h, w)
    pub(super) fn run(
        &self,
        pixels: &[f32],
        grid: (usize, usize),
        positions: &[f32],
        mut seen: impl FnMut(&Matrix<f32>),
    ) -> States {
        let (n, d, prefix) = (grid.0 * grid.1, self.patch_embedding.width(), self.layout.prefix);
        let mut tokens = Matrix::new(n, d);
        positions.chunks_exact(d).enumerate().for_each(|(i, row)| tokens.set_row(i, row));
        self.patch_embedding.run(&patches(pixels, grid, self.layout.patch), End::Add(&mut tokens));
        let mut x = tokens;
        if prefix > 0 {
            let tokens = std::mem::replace(&mut x, Matrix::new(prefix + n, d));
            self.prefix_tokens.chunks_exact(d).enumerate().for_each(|(i, row)| x.set_row(i, row));
            (0..n).for_each(|i| x.set_row(prefix + i, tokens.row(i)));
        }
        // What is summed: the last state alone, or more of them.
        let (blocks, features) = (self.layout.blocks().depth, self.layout.features);
        let first = features.first_state(blocks);
        let mut sum: Option<Matrix<f32>> = None;
        let mut shallow = None;
        let mut state = 0;
        self.blocks.run(&mut x, |x| {
            seen(x);
            if features.fuse().is_some_and(|fuse| fuse.shallow == state) {
                shallow = Some(self.patches(x));
            }
            if state >= first && first < blocks {
                match &mut sum {
                    Some(sum) => sum.add(x),
                    None => sum = Some(x.clone()),
                }
            }
            state += 1;
        });
        let x = sum.unwrap_or(x);
        States { shallow, deep: if prefix == 0 { x } else { self.patches(&x) } }
    }

    /// The tokens of the patches alone.
    fn patches(&self, x: &Matrix<f32>) -> Matrix<f32> {
        let (n, prefix) = (x.rows() - self.layout.prefix, self.layout.prefix);
        let mut patches = Matrix::new(n, x.columns());
        (0..n).for_each(|i| patches.set_row(i, x.row(prefix + i)));
        patches
    }

    /// What follows the last block.
    pub(super) fn finish<O: Element>(&self, states: &States) -> Matrix<O> {
        let x = &states.deep;
        match &self.norm {
            Some(norm) => {
                let mut out = Matrix::new(x.rows(), x.columns());
                norm.run(x, &mut out);
                out
            }
            None => narrowed(x),
        }
    }
}

/// The same numbers, rounded to others.
pub(super) fn narrowed<O: Element>(x: &Matrix<f32>) -> Matrix<O> {
    let mut out = Matrix::new(x.rows(), x.columns());
    (0..x.rows()).for_each(|i| out.set_row(i, x.row(i)));
    out
}

/// The patches of an image, `[h·w, 3·p·p]`, channel first within a patch, as a convolution's weight is.
fn patches<T: Element>(pixels: &[f32], (h, w): (usize, usize), p: usize) -> Matrix<T> {
    let (height, width) = (h * p, w * p);
    let mut out = Matrix::new(h * w, 3 * p * p);
    let mut patch = vec![0f32; 3 * p * p];
    for (i, j) in (0..h).flat_map(|i| (0..w).map(move |j| (i, j))) {
        for (line, values) in patch.chunks_exact_mut(p).enumerate() {
            let (channel, y) = (line / p, i * p + line % p);
            values.copy_from_slice(&pixels[(channel * height + y) * width + j * p..][..p]);
        }
        out.set_row(i * w + j, &patch);
    }
    out
}

/// Features to codes, and codes to the decoder's tokens: packed projections around what finds and looks up the codes.
pub(super) struct Quantizer<T> {
    linear_in: Linear<T>,
    norm: FeatureNorm,
    /// Whether features are brought to length one.
    unit: bool,
    search: Search,
    linear_out: Linear<T>,
}

/// What follows `linear_in`.
enum FeatureNorm {
    None,
    LayerNorm(Norm),
    Scale(f32),
}

impl FeatureNorm {
    fn of(norm: &quantizer::FeatureNorm) -> Result<Self> {
        Ok(match norm {
            quantizer::FeatureNorm::None => Self::None,
            quantizer::FeatureNorm::LayerNorm(norm) => Self::LayerNorm(Norm::of(&ops::Norm::Layer(norm.clone()))?),
            quantizer::FeatureNorm::Scale(factor) => Self::Scale(values(factor)?[0]),
        })
    }

    fn run(&self, x: Matrix<f32>) -> Vec<f32> {
        match self {
            Self::None => x.to_vec(),
            Self::LayerNorm(norm) => {
                let mut out = Matrix::<f32>::new(x.rows(), x.columns());
                norm.run(&x, &mut out);
                out.to_vec()
            }
            Self::Scale(factor) => x.to_vec().into_iter().map(|x| x * factor).collect(),
        }
    }
}

/// What stands between the projections. All of it treats every token by itself.
enum Search {
    /// One codebook, prepared once: SimVQ and VQ.
    Codebook {
        search: Box<kernels::Codebook>,
        /// The codes with their length, where the search compares without it and the decoder sees it.
        codes: Option<Vec<f32>>,
    },
    /// Every other quantizer, on tensors of f32.
    Tensors(Arc<dyn Bottleneck>),
}

impl<T: Element> Quantizer<T> {
    pub(super) fn load(
        vb: VarBuilder,
        config: &quantizer::Config,
        width_in: usize,
        width_out: usize,
        isa: Isa,
    ) -> Result<Self> {
        let quantizer::Quantizer { linear_in, norm, inner, linear_out } =
            quantizer::Quantizer::load(vb, config, width_in, width_out)?;
        Ok(Self {
            linear_in: Linear::pack(&linear_in, isa)?,
            norm: FeatureNorm::of(&norm)?,
            unit: inner.table().is_some_and(|table| table.metric() == quantizer::Metric::Cosine),
            linear_out: Linear::pack(&linear_out, isa)?,
            search: match inner.table() {
                Some(table) => codebook(table, isa)?,
                None => Search::Tensors(inner),
            },
        })
    }

    /// The vectors that the decoder sees, `[K, e]`.
    pub(super) fn codebook(&self) -> Result<Tensor> {
        match &self.search {
            Search::Codebook { search, codes } => {
                let rows = codes.as_deref().unwrap_or_else(|| search.rows());
                tensor(rows.to_vec(), &[search.len(), search.width()])
            }
            Search::Tensors(inner) => inner.codebook(),
        }
    }

    /// The projected features of one image, `[N, e]`, of length one where SimVQ's metric is cosine.
    pub(super) fn project(&self, features: &Matrix<T>) -> Vec<f32> {
        let width = self.linear_in.width();
        let mut projected = Matrix::<f32>::new(features.rows(), width);
        self.linear_in.run(features, End::Wide(&mut projected));
        let mut projected = self.norm.run(projected);
        if self.unit {
            projected.chunks_exact_mut(width).for_each(unit);
        }
        projected
    }

    /// The codes of the projected features of `b` images: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`.
    pub(super) fn indices(&self, projected: Vec<f32>, b: usize) -> Result<Tensor> {
        let Search::Codebook { search, .. } = &self.search else { return Ok(self.quantize(projected, b)?.indices) };
        let indices = search.nearest(&projected).map_err(candle_core::Error::wrap)?;
        let n = indices.len() / b.max(1);
        Tensor::from_vec(indices, (b, n), &Device::Cpu)
    }

    /// The same with all that is known of them; what it says of tokens is [`Quantizer::embed`]'s.
    pub(super) fn quantize(&self, projected: Vec<f32>, b: usize) -> Result<Quantized> {
        let e = self.linear_in.width();
        let n = projected.len() / e / b.max(1);
        match &self.search {
            Search::Codebook { .. } => {
                let indices = self.indices(projected.clone(), b)?;
                let projected = tensor(projected, &[b, n, e])?;
                let codes = tensor(self.embed(&indices)?, &[b, n, e])?;
                Ok(Quantized { tokens: codes.clone(), indices, projected, codes })
            }
            Search::Tensors(inner) => inner.quantize(&tensor(projected, &[b, n, e])?, None),
        }
    }

    /// The vectors `[B · N, e]` of codes.
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`
    pub(super) fn embed(&self, indices: &Tensor) -> Result<Vec<f32>> {
        let (search, rows) = match &self.search {
            Search::Tensors(inner) => return array(&inner.lookup(indices)?),
            Search::Codebook { search, codes } => (search, codes.as_deref().unwrap_or_else(|| search.rows())),
        };
        indices.dims2()?;
        let (k, e) = (search.len(), search.width());
        let indices = indices.flatten_all()?.to_vec1::<u32>()?;
        let mut codes = Vec::with_capacity(indices.len() * e);
        for index in indices {
            match rows.get(index as usize * e..(index as usize + 1) * e) {
                Some(code) => codes.extend_from_slice(code),
                None => candle_core::bail!(
                    "code {index} is outside the codebook of {k} codes; decode with the model that made the codes"
                ),
            }
        }
        Ok(codes)
    }

    /// The decoder's tokens `[N, D']` of the vectors `[N, e]` of one image.
    pub(super) fn finish(&self, vectors: &[f32]) -> Matrix<f32> {
        let e = self.linear_in.width();
        let n = vectors.len() / e;
        let mut codes = Matrix::<T>::new(n, e);
        vectors.chunks_exact(e).enumerate().for_each(|(i, row)| codes.set_row(i, row));
        let mut tokens = Matrix::new(n, self.linear_out.width());
        self.linear_out.run(&codes, End::Wide(&mut tokens));
        tokens
    }
}

/// A table's codes, prepared for searching.
fn codebook(table: &quantizer::Table, isa: Isa) -> Result<Search> {
    let e = table.codebook.dim(1)?;
    let codes = match &table.transform {
        None => values(&table.codebook)?,
        Some(transform) => transformed(&table.codebook, &Linear::of(&transform.weight, transform.bias.as_ref(), isa)?)?,
    };
    let with_length = (table.metric() == quantizer::Metric::Hsq).then(|| codes.clone());
    let search = kernels::Codebook::new(codes, e, table.metric().ranking()).map_err(candle_core::Error::wrap)?;
    Ok(Search::Codebook { search: Box::new(search), codes: with_length })
}

/// Ĉ = C Wᵀ (+ w), in f32 whatever the rest computes in, and in an order of sums that most processors share.
fn transformed(codebook: &Tensor, layer: &Linear<f32>) -> Result<Vec<f32>> {
    /// Codes at a time, so that no second codebook stands in memory.
    const CODES: usize = 1024;
    let width = layer.width();
    let mut codes = Vec::with_capacity(codebook.elem_count());
    for rows in values(codebook)?.chunks(CODES * width) {
        let mut x = Matrix::new(rows.len() / width, width);
        rows.chunks_exact(width).enumerate().for_each(|(i, row)| x.set_row(i, row));
        let mut out = Matrix::new(x.rows(), width);
        layer.run(&x, End::Wide(&mut out));
        codes.extend(out.to_vec());
    }
    Ok(codes)
}

/// Divides a row by its length; a zero row stays zero.
fn unit(row: &mut [f32]) {
    const SMALLEST: f32 = 1e-12;
    let length = kernels::vector::sum(row, row, |x, _| x * x).max(SMALLEST * SMALLEST).sqrt();
    row.iter_mut().for_each(|x| *x /= length);
}

/// Tokens to pixels.
pub(super) struct Decoder<T> {
    /// From the width of the tokens that it takes to its own.
    embed: Option<Linear<T>>,
    position_embedding: Positions,
    /// Tokens before those of the patches, `[P, D]`.
    prefix_tokens: Vec<f32>,
    blocks: Vit<T>,
    norm: Option<Norm>,
    head: Linear<T>,
    patch: usize,
}

impl<T: Element> Decoder<T> {
    pub(super) fn load(vb: VarBuilder, sizes: &decoder::Sizes, isa: Isa) -> Result<Self> {
        let parts = decoder::Surroundings::load(&vb, sizes)?;
        Ok(Self {
            embed: parts.embed.as_ref().map(|embed| Linear::pack(embed, isa)).transpose()?,
            position_embedding: parts.position_embedding,
            prefix_tokens: parts.prefix_tokens.as_ref().map(values).transpose()?.unwrap_or_default(),
            blocks: Vit::load(vb, &sizes.vit, isa)?,
            norm: parts.final_layernorm.as_ref().map(Norm::of).transpose()?,
            head: Linear::pack(&parts.head, isa)?,
            patch: sizes.patch,
        })
    }

    /// The positions of a grid, `[N, D]`.
    pub(super) fn positions(&self, grid: (usize, usize)) -> Result<Vec<f32>> {
        values(&self.position_embedding.at(grid)?)
    }

    /// Side of the square of pixels that a token paints.
    pub(super) fn patch(&self) -> usize {
        self.patch
    }

    /// The pixels `[3, h·P', w·P']` of one image's tokens `[N, D']`.
    pub(super) fn run(&self, mut x: Matrix<f32>, (h, w): (usize, usize), positions: &[f32], pixels: &mut [f32]) {
        if let Some(embed) = &self.embed {
            let mut tokens = Matrix::<T>::new(x.rows(), x.columns());
            (0..x.rows()).for_each(|i| tokens.set_row(i, x.row(i)));
            x = Matrix::new(x.rows(), embed.width());
            embed.run(&tokens, End::Wide(&mut x));
        }
        let (n, d) = (x.rows(), x.columns());
        for (i, row) in positions.chunks_exact(d).enumerate() {
            x.row_mut(i).iter_mut().zip(row).for_each(|(x, p)| *x += p);
        }
        let prefix = self.prefix_tokens.len() / d;
        if prefix > 0 {
            x = with_prefix(&self.prefix_tokens, &x);
        }
        self.blocks.run(&mut x, |_| ());
        if prefix > 0 {
            x = without_prefix(prefix, &x);
        }
        let mut normed = Matrix::<T>::new(n, d);
        match &self.norm {
            Some(norm) => norm.run(&x, &mut normed),
            None => (0..n).for_each(|i| normed.set_row(i, x.row(i))),
        }
        let mut patches = Matrix::<f32>::new(x.rows(), self.head.width());
        self.head.run(&normed, End::Wide(&mut patches));
        unpatchify(&patches, (h, w), self.patch, pixels);
    }
}

/// Tokens `[P, D]` before others.
fn with_prefix(prefix: &[f32], tokens: &Matrix<f32>) -> Matrix<f32> {
    let (n, d) = (tokens.rows(), tokens.columns());
    let mut x = Matrix::new(prefix.len() / d + n, d);
    let rows = prefix.chunks_exact(d).chain((0..n).map(|i| tokens.row(i)));
    rows.enumerate().for_each(|(i, row)| x.set_row(i, row));
    x
}

/// The tokens that follow the first `prefix`.
fn without_prefix(prefix: usize, x: &Matrix<f32>) -> Matrix<f32> {
    let mut tokens = Matrix::new(x.rows() - prefix, x.columns());
    (0..tokens.rows()).for_each(|i| tokens.set_row(i, x.row(prefix + i)));
    tokens
}

/// Patches `[h·w, p·p·3]`, channel last within a patch, to the pixels of an image `[3, h·p, w·p]`.
fn unpatchify(patches: &Matrix<f32>, (h, w): (usize, usize), p: usize, pixels: &mut [f32]) {
    let (height, width) = (h * p, w * p);
    for (i, j) in (0..h).flat_map(|i| (0..w).map(move |j| (i, j))) {
        for (line, values) in patches.row(i * w + j).chunks_exact(3 * p).enumerate() {
            for channel in 0..3 {
                let out = &mut pixels[(channel * height + i * p + line) * width + j * p..][..p];
                out.iter_mut().zip(values.iter().skip(channel).step_by(3)).for_each(|(out, &x)| *out = x);
            }
        }
    }
}

/// A tensor of rows that stand in a plain array.
pub(super) fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The elements of a tensor of f32, whatever its layout.
pub(super) fn array(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}
