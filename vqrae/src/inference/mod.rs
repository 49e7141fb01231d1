//! The network on a processor, for inference alone: weights packed once, an image at a time, no gradients.
//!
//! The layers and their names are those of [`crate::vit`], [`crate::encoder`], [`crate::fusion`], [`crate::quantizer`] and
//! [`crate::decoder`], which carry gradients and run on other devices; the tests tie the two. What computes is
//! [`vqrae_kernels::cpu`], in f32 or bf16.
//!
//! **Batch invariance.** Every image goes its own way, and no sum depends on what else there is: the same image gives the
//! same bits alone, in any batch, and on any number of threads.
//!
//! A stage is read when it is first needed: to tokenize takes no memory for the decoder.
//!
//! What is public are its parts, for other networks of the same blocks: see [`Blocks`].

mod blocks;
mod fusion;
mod layers;
mod stages;

use std::sync::OnceLock;

pub use blocks::{Blocks, Dense, LayerNorm, Sequence};
use candle_core::{DType, Device, Result, Tensor};
use fusion::Fusion;
use rayon::prelude::*;
use stages::{Decoder, Encoder, Quantizer, States, array, narrowed, tensor};
pub use vqrae_kernels::cpu::{Bf16, Element};
use vqrae_kernels::cpu::{Isa, Matrix};

use crate::latent::{Latent, Rows};
use crate::model::Config;
use crate::quantizer::Quantized;
use crate::vit;
use crate::weights::Loader;

/// What [`crate::Vqrae`] asks of a network, whatever numbers it computes in.
pub(crate) trait Inference: Send + Sync {
    /// `[B, 3, H, W]` to features `[B, N, D]`.
    fn encode(&self, pixels: &Tensor) -> Result<Tensor>;
    /// `[B, 3, H, W]` to the hidden states `[B, P + N, D]`, one more than blocks.
    fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>>;
    /// `[B, 3, H, W]` to codes u32 `[B, h·w]`, with C > 1 codes a token `[B, h·w, C]`.
    fn encode_to_indices(&self, pixels: &Tensor) -> Result<Tensor>;
    /// Features `[B, N, D]` to codes and the decoder's tokens.
    fn quantize(&self, features: &Tensor) -> Result<Quantized>;
    /// Codes as [`Inference::encode_to_indices`] gives them to pixels `[B, 3, H', W']`.
    fn decode_from_indices(&self, indices: &Tensor, grid: (usize, usize)) -> Result<Tensor>;
    /// Tokens `[B, h·w, D']` to pixels `[B, 3, H', W']`.
    fn decode(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor>;
    /// `[K, e]`.
    fn codebook(&self) -> Result<Tensor>;
}

/// The three stages, each read when it is first needed.
pub(crate) struct Network<T> {
    loader: Loader,
    config: Config,
    isa: Isa,
    encoder: OnceLock<Encoder<T>>,
    fusion: OnceLock<Option<Fusion<T>>>,
    latent: OnceLock<Option<(Latent, Rows)>>,
    quantizer: OnceLock<Quantizer<T>>,
    decoder: OnceLock<Decoder<T>>,
}

impl<T: Element> Network<T> {
    /// A network whose names and shapes were checked before.
    pub(crate) fn new(loader: Loader, config: Config, isa: Isa) -> Self {
        let (encoder, fusion, latent, quantizer, decoder) = Default::default();
        Self { loader, config, isa, encoder, fusion, latent, quantizer, decoder }
    }

    fn encoder(&self) -> Result<&Encoder<T>> {
        let vb = || self.loader.builder(DType::F32, &Device::Cpu).pp("encoder");
        once(&self.encoder, || Encoder::load(vb(), &self.config.encoder, self.isa))
    }

    fn fusion(&self) -> Result<Option<&Fusion<T>>> {
        let vb = || self.loader.builder(DType::F32, &Device::Cpu).pp("fusion");
        let load = |fuse| Fusion::load(vb(), fuse, self.config.encoder.width(), self.isa);
        let fusion = once(&self.fusion, || self.config.encoder.features().fuse().map(load).transpose())?;
        Ok(fusion.as_ref())
    }

    fn latent(&self) -> Result<Option<&(Latent, Rows)>> {
        let vb = || self.loader.builder(DType::F32, &Device::Cpu).pp("latent");
        let (grid, width) = (self.config.encoder.grid(), self.config.encoder.width());
        let load = |config| {
            let latent = Latent::load(vb(), config, grid, width)?;
            let rows = latent.rows()?;
            Ok::<_, candle_core::Error>((latent, rows))
        };
        Ok(once(&self.latent, || self.config.latent.map(load).transpose())?.as_ref())
    }

    fn quantizer(&self) -> Result<&Quantizer<T>> {
        let vb = || self.loader.builder(DType::F32, &Device::Cpu).pp("quantizer");
        let width_out = self.config.width_out();
        let width_in = self.config.encoder.width();
        once(&self.quantizer, || Quantizer::load(vb(), &self.config.quantizer, width_in, width_out, self.isa))
    }

    fn decoder(&self) -> Result<&Decoder<T>> {
        let vb = || self.loader.builder(DType::F32, &Device::Cpu).pp("decoder");
        let sizes = self.config.decoder.sizes(&self.config.encoder);
        once(&self.decoder, || Decoder::load(vb(), &sizes, self.isa))
    }

    /// Runs `each` on the states of every image.
    fn each_image<R: Send>(&self, pixels: &Tensor, each: impl Fn(&Encoder<T>, &States) -> R + Sync) -> Result<Vec<R>> {
        let (_, channels, height, width) = pixels.dims4()?;
        if channels != 3 {
            candle_core::bail!("pixels have {channels} channels, expected: 3");
        }
        let grid = vit::grid(height, width, self.config.encoder.patch())?;
        let encoder = self.encoder()?;
        let positions = encoder.positions(grid)?;
        let run = |pixels: &[f32]| each(encoder, &encoder.run(pixels, grid, &positions, |_| ()));
        Ok(array(pixels)?.par_chunks(3 * height * width).map(run).collect())
    }

    /// The pixels of several images, from the tokens that `tokens` gives for each.
    fn paint(
        &self,
        images: usize,
        grid: (usize, usize),
        tokens: impl Fn(usize) -> Matrix<f32> + Sync,
    ) -> Result<Tensor> {
        let decoder = self.decoder()?;
        let latent = self.latent()?.filter(|(latent, _)| latent.denormalizes());
        latent.map_or(Ok(()), |(latent, _)| latent.check_grid(grid))?;
        let tokens = |i: usize| {
            let mut tokens = tokens(i);
            if let Some((_, rows)) = latent {
                (0..tokens.rows()).for_each(|i| rows.denormalize(i, tokens.row_mut(i)));
            }
            tokens
        };
        let positions = decoder.positions(grid)?;
        let (height, width) = (grid.0 * decoder.patch(), grid.1 * decoder.patch());
        let mut pixels = vec![0f32; images * 3 * height * width];
        pixels
            .par_chunks_mut((3 * height * width).max(1))
            .enumerate()
            .for_each(|(i, pixels)| decoder.run(tokens(i), grid, &positions, pixels));
        tensor(pixels, &[images, 3, height, width])
    }
}

/// `cell`'s contents, made by `load` the first time; two threads may both load, and one result is kept.
fn once<V>(cell: &OnceLock<V>, load: impl FnOnce() -> Result<V>) -> Result<&V> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = load()?;
    Ok(cell.get_or_init(|| value))
}

/// The features `[N, D]` of one image.
fn features<T: Element, O: Element>(encoder: &Encoder<T>, fusion: Option<&Fusion<T>>, states: &States) -> Matrix<O> {
    match (&states.shallow, fusion) {
        (Some(shallow), Some(fusion)) => narrowed(&fusion.run(shallow, encoder.finish(states))),
        _ => encoder.finish(states),
    }
}

impl<T: Element> Inference for Network<T> {
    fn encode(&self, pixels: &Tensor) -> Result<Tensor> {
        let (b, n) = (pixels.dim(0)?, self.tokens(pixels)?);
        let fusion = self.fusion()?;
        let features =
            self.each_image(pixels, |encoder, states| features::<T, f32>(encoder, fusion, states).to_vec())?;
        tensor(features.concat(), &[b, n, self.config.encoder.width()])
    }

    fn hidden_states(&self, pixels: &Tensor) -> Result<Vec<Tensor>> {
        let (b, _, height, width) = pixels.dims4()?;
        let grid = vit::grid(height, width, self.config.encoder.patch())?;
        let encoder = self.encoder()?;
        let positions = encoder.positions(grid)?;
        let mut states: Vec<Vec<f32>> = vec![Vec::new(); self.config.encoder.layout().blocks().depth + 1];
        for pixels in array(pixels)?.chunks(3 * height * width) {
            let mut layer = states.iter_mut();
            encoder.run(pixels, grid, &positions, |x| {
                layer.next().into_iter().for_each(|state| state.extend(x.to_vec()));
            });
        }
        let shape = [b, self.config.encoder.layout().prefix + grid.0 * grid.1, self.config.encoder.width()];
        states.into_iter().map(|state| tensor(state, &shape)).collect()
    }

    fn encode_to_indices(&self, pixels: &Tensor) -> Result<Tensor> {
        // Read before the images go their own ways, so that no two of them read the same.
        let (fusion, latent, quantizer) = (self.fusion()?, self.latent()?, self.quantizer()?);
        if let Some((latent, _)) = latent {
            let (_, _, height, width) = pixels.dims4()?;
            latent.check_grid(vit::grid(height, width, self.config.encoder.patch())?)?;
        }
        let projected = self.each_image(pixels, |encoder, states| {
            let Some((_, rows)) = latent else { return quantizer.project(&features(encoder, fusion, states)) };
            let mut features: Matrix<f32> = features(encoder, fusion, states);
            (0..features.rows()).for_each(|i| rows.normalize(i, features.row_mut(i)));
            quantizer.project(&narrowed(&features))
        })?;
        quantizer.indices(projected.concat(), projected.len())
    }

    fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        let (b, n, d) = features.dims3()?;
        let quantizer = self.quantizer()?;
        let normalized = self.latent()?.map(|(latent, _)| latent.normalize(features)).transpose()?;
        let mut projected = Vec::new();
        for image in array(normalized.as_ref().unwrap_or(features))?.chunks(n * d) {
            let mut x = Matrix::<T>::new(n, d);
            image.chunks_exact(d).enumerate().for_each(|(i, row)| x.set_row(i, row));
            projected.extend(quantizer.project(&x));
        }
        let quantized = quantizer.quantize(projected, b)?;
        let vectors = array(&quantized.tokens)?;
        let images = vectors.chunks((vectors.len() / b.max(1)).max(1));
        let tokens: Vec<f32> = images.flat_map(|vectors| quantizer.finish(vectors).to_vec()).collect();
        Ok(Quantized { tokens: tensor(tokens, &[b, n, self.config.width_out()])?, ..quantized })
    }

    fn decode_from_indices(&self, indices: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let b = indices.dim(0)?;
        let quantizer = self.quantizer()?;
        let vectors = quantizer.embed(indices)?;
        let each = vectors.len() / b.max(1);
        self.paint(b, grid, |i| quantizer.finish(&vectors[i * each..][..each]))
    }

    fn decode(&self, tokens: &Tensor, grid: (usize, usize)) -> Result<Tensor> {
        let (b, n, d) = tokens.dims3()?;
        if n != grid.0 * grid.1 || d != self.config.width_out() {
            candle_core::bail!("tokens {:?} do not fit a grid of {}×{}", tokens.dims(), grid.0, grid.1);
        }
        let tokens = array(tokens)?;
        self.paint(b, grid, |i| {
            let mut x = Matrix::new(n, d);
            let tokens = tokens[i * n * d..][..n * d].chunks_exact(d);
            tokens.enumerate().for_each(|(row, token)| x.set_row(row, token));
            x
        })
    }

    fn codebook(&self) -> Result<Tensor> {
        self.quantizer()?.codebook()
    }
}

impl<T: Element> Network<T> {
    /// Number N of tokens of such pixels.
    fn tokens(&self, pixels: &Tensor) -> Result<usize> {
        let (_, _, height, width) = pixels.dims4()?;
        vit::grid(height, width, self.config.encoder.patch()).map(|(h, w)| h * w)
    }
}
