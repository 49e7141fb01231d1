//! Where a model that is trained from scratch starts: as the best linear tokenizer of its photos.
//!
//! Tokens are the principal components of patches, codes are k-means centres of them, and the blocks add nothing yet
//! (their last layers are zero). Step 0 is therefore what vector quantisation of raw patches can do, and every step
//! after it is gained on top; from random weights the same quality takes most of a small training. With `neighbours` the
//! linear tokenizer sees the eight patches around each as well, which is worth another half decibel; see [`neighbours`].

mod neighbours;

use candle_core::{DType, Device, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};
use vqrae_kernels::Metric;

use neighbours::{Tower, put};

use super::data::{self, Crops, Photos, generator};
use crate::encoder::{self, Features};
use crate::error::{Error, Result};
use crate::image::Preprocessor;
use crate::model::Config as ModelConfig;
use crate::quantizer::{self, kmeans};
use crate::weights::Tensors;

/// How much of the photos the start is computed from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Patches that are drawn from random crops.
    pub patches: usize,
    /// Lloyd steps of the k-means that makes the codes.
    pub lloyd_steps: usize,
    /// Whether the first blocks begin by looking at the eight patches around each.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub neighbours: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { patches: 200_000, lloyd_steps: 8, neighbours: false }
    }
}

/// Replaces the tensors of a fresh model; `tell` hears what is being done.
pub fn principal_components(
    tensors: &mut Tensors,
    model: &ModelConfig,
    config: &Config,
    photos: &Photos,
    preprocessor: &Preprocessor,
    seed: u64,
    mut tell: impl FnMut(&str),
) -> Result<()> {
    let sizes = Sizes::check(model)?;
    let towers = config.neighbours.then(|| sizes.towers(model)).transpose()?;
    tell(&format!("start: drawing {} patches", config.patches));
    let mut source = Source::new(sizes.patch, photos, preprocessor, seed);
    let first = source.draw(config.patches.min(OF_COMPONENTS))?;
    tell("start: principal components");
    let basis = Basis::of(&first, sizes.pixels())?;
    let mut coordinates = basis.coordinates(&first, sizes.code)?;
    drop(first);
    while coordinates.len() < config.patches * sizes.code {
        let rest = config.patches - coordinates.len() / sizes.code;
        coordinates.extend(basis.coordinates(&source.draw(rest.min(OF_COMPONENTS))?, sizes.code)?);
    }
    let mut centres = sizes.centres(&coordinates, seed)?;
    for step in 1..=config.lloyd_steps {
        let error = lloyd(&mut centres, &coordinates, sizes.code, seed, step)?;
        tell(&format!("start: k-means {step}/{}, mean squared error {error:.5}", config.lloyd_steps));
    }
    sizes.write(tensors, &basis, centres)?;
    match towers {
        Some(towers) => sizes.look_around(tensors, model, &basis, towers, &mut source, tell),
        None => Ok(()),
    }
}

/// Patches that principal components are computed from, and that stand in memory at a time.
const OF_COMPONENTS: usize = 100_000;

/// The widths that the start has to fit.
struct Sizes {
    patch: usize,
    token: usize,
    code: usize,
    decoder: usize,
    codes: usize,
}

impl Sizes {
    fn check(model: &ModelConfig) -> Result<Self> {
        let decoder = model.decoder.sizes(&model.encoder);
        let needs = |what: &str| Error::Training(format!("start = \"principal-components\" needs {what}"));
        let wish = |holds: bool, what: &str| if holds { Ok(()) } else { Err(needs(what)) };
        let quantizer::Config::SimVq(simvq) = &model.quantizer else {
            return Err(needs("model.quantizer.type = \"simvq\"; or set start.from = \"random\""));
        };
        let sizes = Self {
            patch: model.encoder.patch(),
            token: model.encoder.width(),
            code: simvq.codebook_dim,
            decoder: decoder.vit.width,
            codes: simvq.codebook_size,
        };
        wish(model.encoder.layout().features == Features::BeforeNorm, "model.encoder.features = \"before_norm\"")?;
        wish(matches!(model.encoder, encoder::Config::Siglip(_)), "an encoder of model_type siglip_vision_model")?;
        wish(!decoder.final_norm, "model.decoder.final_norm = false")?;
        let plain = decoder.input.is_none() && decoder.prefix == 0;
        wish(plain, "a decoder without model.decoder.input_size and num_prefix_tokens")?;
        wish(decoder.patch == sizes.patch, "the same patch size in encoder and decoder")?;
        wish(simvq.metric == quantizer::Metric::Euclidean, "model.quantizer.metric = \"euclidean\"")?;
        wish(simvq.norm == quantizer::Norm::None, "model.quantizer.norm = \"none\"")?;
        wish(!simvq.transform_bias, "model.quantizer.transform_bias = false")?;
        wish(sizes.code <= sizes.token.min(sizes.decoder), "codes no wider than tokens")?;
        wish(sizes.token.max(sizes.decoder) <= sizes.pixels(), "tokens no wider than a patch has values")?;
        Ok(sizes)
    }

    fn pixels(&self) -> usize {
        3 * self.patch * self.patch
    }

    /// Codes live on this scale of the components, so that their mean squared error is that of the pixels.
    fn scale(&self) -> f64 {
        (self.code as f64 / self.pixels() as f64).sqrt()
    }

    /// K different patches to start the k-means from.
    fn centres(&self, coordinates: &[f32], seed: u64) -> Result<Vec<f32>> {
        let n = coordinates.len() / self.code;
        if n < self.codes {
            return Err(Error::Training(format!("{n} patches cannot make {} codes; raise start.patches", self.codes)));
        }
        let mut random = generator(seed, "centres", 0);
        let chosen = rand::seq::index::sample(&mut random, n, self.codes);
        Ok(chosen.into_iter().flat_map(|i| coordinates[i * self.code..][..self.code].iter().copied()).collect())
    }

    fn write(&self, tensors: &mut Tensors, basis: &Basis, centres: Vec<f32>) -> Result<()> {
        for (name, tensor) in tensors.iter_mut() {
            let silent = ["self_attn.out_proj.weight", "mlp.fc2.weight", "position_embedding.weight"];
            if silent.iter().any(|end| name.ends_with(end)) {
                *tensor = tensor.zeros_like()?;
            }
        }
        let scale = self.scale();
        let centres: Vec<f32> = centres.iter().map(|&v| (f64::from(v) * scale) as f32).collect();
        let mut put = |name: &str, values: Vec<f32>| put(tensors, name, values);
        let (embedding, embedding_bias) = basis.embedding(self.token);
        put("encoder.vision_model.embeddings.patch_embedding.weight", embedding)?;
        put("encoder.vision_model.embeddings.patch_embedding.bias", embedding_bias)?;
        put("quantizer.linear_in.weight", diagonal(self.code, self.token, |i| basis.damping(i) * scale))?;
        put("quantizer.codebook", centres)?;
        put("quantizer.transform.weight", diagonal(self.code, self.code, |_| 1.0))?;
        put("quantizer.linear_out.weight", diagonal(self.decoder, self.code, |i| 1.0 / (basis.damping(i) * scale)))?;
        let (head, head_bias) = basis.head(self.decoder, self.patch);
        put("decoder.head.weight", head)?;
        put("decoder.head.bias", head_bias)
    }

    /// Encoder and decoder with room for what their first blocks bring from neighbours: the encoder's are its first
    /// components, the decoder's are the code, which stands beside what is painted.
    fn towers(&self, model: &ModelConfig) -> Result<[Tower; 2]> {
        let decoder = model.decoder.sizes(&model.encoder);
        let encoder = Tower {
            positions: "encoder.vision_model.embeddings.position_embedding",
            layers: "encoder.vision_model.encoder.layers",
            vit: model.encoder.vit(),
            grid: model.encoder.grid(),
            first: 0,
            brought: self.code,
            length: 1.0,
        };
        let mut decoder = Tower {
            positions: "decoder.position_embedding",
            layers: "decoder.layers",
            vit: decoder.vit,
            grid: decoder.grid,
            ..encoder
        };
        decoder.first = decoder.places().saturating_sub(self.code);
        let needs = |what: String| Error::Training(format!("start.neighbours needs {what}"));
        [&encoder, &decoder].into_iter().try_for_each(Tower::check).map_err(needs)?;
        Ok([encoder, decoder])
    }

    fn look_around(
        &self,
        tensors: &mut Tensors,
        model: &ModelConfig,
        basis: &Basis,
        [encoder, decoder]: [Tower; 2],
        source: &mut Source,
        mut tell: impl FnMut(&str),
    ) -> Result<()> {
        tell("start: neighbours");
        let length = |components: usize| basis.deviations[..components].iter().sum::<f64>().sqrt();
        let painted = decoder.first;
        let encoder = Tower { length: length(encoder.places()), ..encoder };
        let decoder = Tower { length: (2.0 * length(self.code).powi(2)).sqrt(), ..decoder };
        let scale = self.scale();
        // Components that the position vectors now stand in the place of are the last and least.
        let cut = |values: Vec<f32>, rows: usize, keep: usize| {
            let columns = values.len() / rows;
            values.into_iter().enumerate().map(|(i, v)| if i / columns < keep { v } else { 0.0 }).collect::<Vec<_>>()
        };
        let (embedding, embedding_bias) = basis.embedding(self.token);
        let name = "encoder.vision_model.embeddings.patch_embedding";
        put(tensors, &format!("{name}.weight"), cut(embedding, self.token, encoder.places()))?;
        put(tensors, &format!("{name}.bias"), cut(embedding_bias, self.token, encoder.places()))?;
        let mut linear_out = diagonal(self.decoder, self.code, |i| 1.0 / (basis.damping(i) * scale));
        for i in 0..self.code {
            linear_out[(painted + i) * self.code + i] = linear_out[i * self.code + i];
        }
        put(tensors, "quantizer.linear_out.weight", linear_out)?;
        let (mut head, _) = basis.head(self.decoder, self.patch);
        head.chunks_exact_mut(self.decoder).for_each(|row| row[painted..].fill(0.0));
        put(tensors, "decoder.head.weight", head)?;
        encoder.write(tensors)?;
        decoder.write(tensors)?;
        let tokens = decoder.grid.0 * decoder.grid.1;
        let batches = source.crops(FITTED.min(FITTED_TOKENS / tokens.max(1)).max(1))?;
        let (weight, bias) = basis.embedding(painted);
        let weight = Tensor::from_vec(weight, (painted, self.pixels()), &Device::Cpu)?;
        let bias = Tensor::new(bias, &Device::Cpu)?;
        let true_tokens = |pixels: &Tensor| neighbours::embedded(pixels, &weight, &bias, self.patch);
        decoder.fit(tensors, model, painted, &batches, &true_tokens)
    }
}

/// Crops that the neighbours' part is fitted to; of large ones fewer, since all stand in memory.
const FITTED: usize = 2000;
const FITTED_TOKENS: usize = 512_000;

fn diagonal(rows: usize, columns: usize, value: impl Fn(usize) -> f64) -> Vec<f32> {
    let mut matrix = vec![0f32; rows * columns];
    for i in 0..rows.min(columns) {
        matrix[i * columns + i] = value(i) as f32;
    }
    matrix
}

/// Random crops, one after the other.
struct Source<'a> {
    patch: usize,
    size: (usize, usize),
    crops: Crops<'a>,
    next: usize,
    seed: u64,
}

impl<'a> Source<'a> {
    fn new(patch: usize, photos: &'a Photos, preprocessor: &'a Preprocessor, seed: u64) -> Self {
        Self { patch, size: preprocessor.size, crops: Crops::new(photos, preprocessor, None, seed), next: 0, seed }
    }

    fn crop(&mut self) -> Result<Vec<f32>> {
        let sizes = data::Sizes { input: self.size, target: self.size };
        self.next += 1;
        Ok(self.crops.batch(self.next - 1, 1, sizes)?.inputs)
    }

    /// The next crops, `[B, 3, H, W]` each.
    fn crops(&mut self, n: usize) -> Result<Vec<Tensor>> {
        const BATCH: usize = 16;
        let (h, w) = self.size;
        let batch = |_| {
            let pixels = (0..BATCH).map(|_| self.crop()).collect::<Result<Vec<_>>>()?.concat();
            Ok(Tensor::from_vec(pixels, (BATCH, 3, h, w), &Device::Cpu)?)
        };
        (0..n.div_ceil(BATCH)).map(batch).collect()
    }

    /// The next patches, `[n, 3·p·p]` in one vector, normalised as the encoder sees them.
    fn draw(&mut self, n: usize) -> Result<Vec<f32>> {
        /// Patches of one crop: few, since neighbours are alike.
        const OF_A_CROP: usize = 64;
        let ((h, w), p) = (self.size, self.patch);
        let mut random = generator(self.seed, "patches", self.next);
        let mut patches = Vec::with_capacity(n * 3 * p * p);
        for done in (0..n).step_by(OF_A_CROP) {
            let pixels = self.crop()?;
            for _ in 0..OF_A_CROP.min(n - done) {
                let (top, left) = (random.random_range(0..=h - p), random.random_range(0..=w - p));
                for row in (0..3).flat_map(|c| (0..p).map(move |y| c * h * w + (top + y) * w + left)) {
                    patches.extend_from_slice(&pixels[row..][..p]);
                }
            }
        }
        Ok(patches)
    }
}

/// Principal components, the largest first.
struct Basis {
    mean: Vec<f64>,
    /// Row i is component i.
    vectors: Vec<f64>,
    deviations: Vec<f64>,
}

impl Basis {
    fn of(patches: &[f32], pixels: usize) -> Result<Self> {
        let x = Tensor::from_slice(patches, (patches.len() / pixels, pixels), &Device::Cpu)?;
        let n = x.dim(0)? as f64;
        let mean = x.mean_keepdim(0)?;
        let centred = x.broadcast_sub(&mean)?;
        let covariance = (centred.t()?.matmul(&centred)? / n)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let (values, vectors) = eigen(covariance, pixels);
        let mut order: Vec<usize> = (0..pixels).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        Ok(Self {
            mean: mean.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?,
            vectors: order
                .iter()
                .flat_map(|&i| (0..pixels).map(move |j| (i, j)))
                .map(|(i, j)| vectors[j * pixels + i])
                .collect(),
            deviations: order.iter().map(|&i| values[i].max(0.0).sqrt()).collect(),
        })
    }

    fn pixels(&self) -> usize {
        self.mean.len()
    }

    /// Tokens hold component i divided by this: large components must not drown small ones in the layer norms.
    fn damping(&self, i: usize) -> f64 {
        self.deviations[i].max(1e-4).sqrt()
    }

    /// The first `width` components of every patch, `[n, width]` in one vector.
    fn coordinates(&self, patches: &[f32], width: usize) -> Result<Vec<f32>> {
        let d = self.pixels();
        let x = Tensor::from_slice(patches, (patches.len() / d, d), &Device::Cpu)?;
        let mean = Tensor::from_slice(&self.mean, d, &Device::Cpu)?.to_dtype(DType::F32)?;
        let vectors = Tensor::from_slice(&self.vectors[..width * d], (width, d), &Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(x.broadcast_sub(&mean)?.matmul(&vectors.t()?)?.flatten_all()?.to_vec1()?)
    }

    /// Weight `[width, 3, p, p]` and bias `[width]` of the patch embedding.
    fn embedding(&self, width: usize) -> (Vec<f32>, Vec<f32>) {
        let row = |i: usize| &self.vectors[i * self.pixels()..][..self.pixels()];
        let weight = (0..width).flat_map(|i| row(i).iter().map(move |v| (v / self.damping(i)) as f32)).collect();
        let dot = |i: usize| row(i).iter().zip(&self.mean).map(|(v, m)| v * m).sum::<f64>();
        (weight, (0..width).map(|i| (-dot(i) / self.damping(i)) as f32).collect())
    }

    /// Weight `[p·p·3, width]` and bias `[p·p·3]` of the decoder's head, whose channels come last within a patch.
    fn head(&self, width: usize, p: usize) -> (Vec<f32>, Vec<f32>) {
        let source = |pixel: usize| pixel % 3 * p * p + pixel / 3;
        let value = |pixel: usize, i: usize| self.vectors[i * self.pixels() + source(pixel)] * self.damping(i);
        let pixels = 0..self.pixels();
        let weight = pixels.clone().flat_map(|pixel| (0..width).map(move |i| value(pixel, i) as f32)).collect();
        (weight, pixels.map(|pixel| self.mean[source(pixel)] as f32).collect())
    }
}

/// Eigenvalues and eigenvectors (columns) of a symmetric matrix, by cyclic Jacobi rotations (Golub & Van Loan, §8.5).
fn eigen(mut a: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    // Rows of `v` are rotated (they are contiguous); the caller reads columns, so the transpose is returned.
    let mut v = diagonal(n, n, |_| 1.0).into_iter().map(f64::from).collect::<Vec<f64>>();
    let total: f64 = a.iter().map(|x| x * x).sum();
    for _sweep in 0..30 {
        let off: f64 = (0..n).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| a[i * n + j].powi(2)).sum();
        if off <= 1e-20 * total {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                rotate(&mut a, &mut v, n, p, q);
            }
        }
    }
    let values = (0..n).map(|i| a[i * n + i]).collect();
    let vectors = (0..n * n).map(|ij| v[ij % n * n + ij / n]).collect();
    (values, vectors)
}

/// One Jacobi rotation: makes a[p, q] zero.
fn rotate(a: &mut [f64], v: &mut [f64], n: usize, p: usize, q: usize) {
    let apq = a[p * n + q];
    if apq.abs() < 1e-300 {
        return;
    }
    let theta = (a[q * n + q] - a[p * n + p]) / (2.0 * apq);
    let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let c = 1.0 / (t * t + 1.0).sqrt();
    let s = t * c;
    for matrix in [&mut *a, v] {
        let (upper, lower) = matrix.split_at_mut(q * n);
        for (x, y) in upper[p * n..][..n].iter_mut().zip(&mut lower[..n]) {
            (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
        }
    }
    for row in a.chunks_exact_mut(n) {
        (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
    }
}

/// One Lloyd step; returns the mean squared error per value before it. A centre without points moves to a random point.
fn lloyd(centres: &mut [f32], points: &[f32], width: usize, seed: u64, step: usize) -> Result<f64> {
    let found = kmeans::step(centres, points, width, Metric::Euclidean)?;
    let mut random = generator(seed, "empty centres", step);
    let empty = centres.chunks_exact_mut(width).zip(&found.sizes).filter(|(_, size)| **size == 0);
    for (centre, _) in empty {
        let point = random.random_range(0..points.len() / width);
        centre.copy_from_slice(&points[point * width..][..width]);
    }
    Ok(found.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_of_a_symmetric_matrix_by_hand() {
        // [[2, 1], [1, 2]]: 3 along (1, 1), 1 along (1, −1)
        let (values, vectors) = eigen(vec![2., 1., 1., 2.], 2);
        let largest = if values[0] > values[1] { 0 } else { 1 };
        assert!((values[largest] - 3.0).abs() < 1e-12 && (values[1 - largest] - 1.0).abs() < 1e-12);
        assert!((vectors[largest] - vectors[2 + largest]).abs() < 1e-12);
    }
}
