//! Encoder, quantizer and decoder with packed weights, an image at a time.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use vqrae_kernels as kernels;
use vqrae_kernels::cpu::{Element, End, Isa, Matrix};

use super::layers::{Linear, Norm, Vit, values};
use crate::quantizer::{Parts, Quantized};
use crate::vit::Positions;
use crate::{decoder, encoder, quantizer};

/// Pixels to features.
pub(super) struct Encoder<T> {
    patch_embedding: Linear<T>,
    position_embedding: Positions,
    blocks: Vit<T>,
    norm: Option<Norm>,
    patch: usize,
}

impl<T: Element> Encoder<T> {
    pub(super) fn load(vb: VarBuilder, config: &encoder::Config, isa: Isa) -> Result<Self> {
        let encoder::Config::Siglip(siglip) = config;
        let vb = vb.pp("vision_model");
        let parts = encoder::Surroundings::load(&vb, siglip)?;
        let embedding = &parts.patch_embedding;
        Ok(Self {
            patch_embedding: Linear::of(&embedding.weight, Some(&embedding.bias), isa)?,
            position_embedding: parts.position_embedding,
            blocks: Vit::load(vb.pp("encoder"), &config.vit(), isa)?,
            norm: parts.post_layernorm.as_ref().map(Norm::of).transpose()?,
            patch: config.patch(),
        })
    }

    /// The positions of a grid, `[N, D]`.
    pub(super) fn positions(&self, grid: (usize, usize)) -> Result<Vec<f32>> {
        values(&self.position_embedding.at(grid)?)
    }

    /// The features of one image before the final norm, `[N, D]`; `seen` is shown every hidden state.
    ///
    /// # Shapes
    /// - pixels: `[3, h·P, w·P]`
    /// - positions: of the grid (h, w)
    pub(super) fn run(
        &self,
        pixels: &[f32],
        grid: (usize, usize),
        positions: &[f32],
        seen: impl FnMut(&Matrix<f32>),
    ) -> Matrix<f32> {
        let (n, d) = (grid.0 * grid.1, self.patch_embedding.width());
        let mut x = Matrix::new(n, d);
        positions.chunks_exact(d).enumerate().for_each(|(i, row)| x.set_row(i, row));
        self.patch_embedding.run(&patches(pixels, grid, self.patch), End::Add(&mut x));
        self.blocks.run(&mut x, seen);
        x
    }

    /// What follows the last block.
    pub(super) fn finish<O: Element>(&self, x: &Matrix<f32>) -> Matrix<O> {
        let mut out = Matrix::new(x.rows(), x.columns());
        match &self.norm {
            Some(norm) => norm.run(x, &mut out),
            None => (0..x.rows()).for_each(|i| out.set_row(i, x.row(i))),
        }
        out
    }
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
    search: Search,
    linear_out: Linear<T>,
}

/// What stands between the projections. All of it treats every token by itself.
enum Search {
    /// One codebook, prepared once: SimVQ.
    Codebook(kernels::Codebook),
    /// Every other quantizer, as tensors of f32.
    Tensors(quantizer::Quantizer),
}

impl<T: Element> Quantizer<T> {
    pub(super) fn load(
        vb: VarBuilder,
        config: &quantizer::Config,
        width_in: usize,
        width_out: usize,
        isa: Isa,
    ) -> Result<Self> {
        let quantizer = quantizer::Quantizer::load(vb, config, width_in, width_out)?;
        let (linear_in, linear_out) = match quantizer.parts() {
            Parts::SimVq(parts) => (&parts.linear_in, &parts.linear_out),
            Parts::Between(linear_in, _, linear_out) => (linear_in, linear_out),
        };
        let (linear_in, linear_out) = (Linear::pack(linear_in, isa)?, Linear::pack(linear_out, isa)?);
        let search = match (quantizer, config) {
            (quantizer::Quantizer::SimVq(parts), quantizer::Config::SimVq(config)) => codebook(&parts, config, isa)?,
            (quantizer, _) => Search::Tensors(quantizer),
        };
        Ok(Self { linear_in, search, linear_out })
    }

    /// The vectors that features are compared with, `[K, e]`.
    pub(super) fn codebook(&self) -> Result<Tensor> {
        match &self.search {
            Search::Codebook(search) => tensor(search.rows().to_vec(), &[search.len(), search.width()]),
            Search::Tensors(quantizer) => quantizer.codebook(),
        }
    }

    /// The projected features of one image, `[N, e]`, of length one where SimVQ's metric is cosine.
    pub(super) fn project(&self, features: &Matrix<T>) -> Vec<f32> {
        let width = self.linear_in.width();
        let mut projected = Matrix::<f32>::new(features.rows(), width);
        self.linear_in.run(features, End::Wide(&mut projected));
        let mut projected = projected.to_vec();
        match &self.search {
            Search::Codebook(search) if search.metric() == kernels::Metric::Cosine => {
                projected.chunks_exact_mut(width).for_each(unit);
            }
            _ => {}
        }
        projected
    }

    /// The codes of the projected features of `b` images: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`.
    pub(super) fn indices(&self, projected: Vec<f32>, b: usize) -> Result<Tensor> {
        let Search::Codebook(search) = &self.search else { return Ok(self.quantize(projected, b)?.indices) };
        let indices = search.nearest(&projected).map_err(candle_core::Error::wrap)?;
        let n = indices.len() / b.max(1);
        Tensor::from_vec(indices, (b, n), &Device::Cpu)
    }

    /// The same with all that is known of them; what it says of tokens is [`Quantizer::embed`]'s.
    pub(super) fn quantize(&self, projected: Vec<f32>, b: usize) -> Result<Quantized> {
        let e = self.linear_in.width();
        let n = projected.len() / e / b.max(1);
        match &self.search {
            Search::Codebook(_) => {
                let indices = self.indices(projected.clone(), b)?;
                let projected = tensor(projected, &[b, n, e])?;
                let codes = tensor(self.embed(&indices)?, &[b, n, e])?;
                Ok(Quantized { tokens: codes.clone(), indices, projected, codes })
            }
            Search::Tensors(quantizer) => inner(quantizer)?.quantize(&tensor(projected, &[b, n, e])?, None),
        }
    }

    /// The vectors `[B · N, e]` of codes.
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`
    pub(super) fn embed(&self, indices: &Tensor) -> Result<Vec<f32>> {
        let search = match &self.search {
            Search::Tensors(quantizer) => return array(&inner(quantizer)?.lookup(indices)?),
            Search::Codebook(search) => search,
        };
        indices.dims2()?;
        let (k, e) = (search.len(), search.width());
        let indices = indices.flatten_all()?.to_vec1::<u32>()?;
        let mut codes = Vec::with_capacity(indices.len() * e);
        for index in indices {
            match search.rows().get(index as usize * e..(index as usize + 1) * e) {
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

/// What stands between the projections of a quantizer that is held as tensors.
fn inner(quantizer: &quantizer::Quantizer) -> Result<&dyn quantizer::Bottleneck> {
    match quantizer.parts() {
        Parts::Between(_, inner, _) => Ok(inner),
        Parts::SimVq(_) => candle_core::bail!("a SimVQ is searched in its packed form"),
    }
}

/// SimVQ's transformed codebook, prepared for searching.
fn codebook(parts: &quantizer::SimVq, config: &quantizer::SimVqConfig, isa: Isa) -> Result<Search> {
    let metric = match config.metric {
        quantizer::Metric::Euclidean => kernels::Metric::Euclidean,
        quantizer::Metric::Cosine => kernels::Metric::Cosine,
    };
    let codes = transformed(parts, isa)?;
    kernels::Codebook::new(codes, config.codebook_dim, metric).map(Search::Codebook).map_err(candle_core::Error::wrap)
}

/// Ĉ = C Wᵀ (+ w), in f32 whatever the rest computes in, and in an order of sums that most processors share.
fn transformed(parts: &quantizer::SimVq, isa: Isa) -> Result<Vec<f32>> {
    /// Codes at a time, so that no second codebook stands in memory.
    const CODES: usize = 1024;
    let layer = Linear::<f32>::of(&parts.transform, parts.transform_bias.as_ref(), isa)?;
    let width = layer.width();
    let mut codes = Vec::with_capacity(parts.codebook.elem_count());
    for rows in values(&parts.codebook)?.chunks(CODES * width) {
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
    position_embedding: Positions,
    blocks: Vit<T>,
    norm: Option<Norm>,
    head: Linear<T>,
    patch: usize,
}

impl<T: Element> Decoder<T> {
    pub(super) fn load(vb: VarBuilder, sizes: &decoder::Sizes, isa: Isa) -> Result<Self> {
        let parts = decoder::Surroundings::load(&vb, sizes)?;
        Ok(Self {
            position_embedding: parts.position_embedding,
            blocks: Vit::load(vb, &sizes.vit, isa)?,
            norm: parts.final_layernorm.as_ref().map(Norm::of).transpose()?,
            head: Linear::pack(&parts.head, isa)?,
            patch: sizes.patch,
        })
    }

    /// The positions of a grid, `[N, D']`.
    pub(super) fn positions(&self, grid: (usize, usize)) -> Result<Vec<f32>> {
        values(&self.position_embedding.at(grid)?)
    }

    /// Side of the square of pixels that a token paints.
    pub(super) fn patch(&self) -> usize {
        self.patch
    }

    /// The pixels `[3, h·P', w·P']` of one image's tokens `[N, D']`.
    pub(super) fn run(&self, mut x: Matrix<f32>, (h, w): (usize, usize), positions: &[f32], pixels: &mut [f32]) {
        for (i, row) in positions.chunks_exact(x.columns()).enumerate() {
            x.row_mut(i).iter_mut().zip(row).for_each(|(x, p)| *x += p);
        }
        self.blocks.run(&mut x, |_| ());
        let mut normed = Matrix::<T>::new(x.rows(), x.columns());
        match &self.norm {
            Some(norm) => norm.run(&x, &mut normed),
            None => (0..x.rows()).for_each(|i| normed.set_row(i, x.row(i))),
        }
        let mut patches = Matrix::<f32>::new(x.rows(), self.head.width());
        self.head.run(&normed, End::Wide(&mut patches));
        unpatchify(&patches, (h, w), self.patch, pixels);
    }
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
