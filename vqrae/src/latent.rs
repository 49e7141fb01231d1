//! Features of mean zero and variance one, by statistics of a data set: what diffusion models on latents need, and what
//! brings channels of unlike size to one scale for a quantizer (RAE, arXiv 2510.11690).
//!
//! `ẑ = (z − mean) / √(var + 1e-5)` right before the quantizer's first layer, and, where the decoder takes latents of the
//! encoder's width and the config asks for it, `ẑ · √(var + 1e-5) + mean` before the decoder. The statistics are two
//! tensors of the model, `latent.mean` and `latent.var`, f32, which training never changes. [`Statistics`] counts them.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::weights::{self, Tensors};

/// Added to the variance, as RAE does.
const EPS: f64 = 1e-5;

/// The `latent` section of `config.json`; without it features go to the quantizer as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What has statistics of its own.
    pub normalize: Normalize,
    /// Whether the decoder sees the quantizer's output with the normalisation undone, as RAE's does. Its input then has
    /// the encoder's width.
    #[serde(default, skip_serializing_if = "is_no")]
    pub denormalize: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_no(denormalize: &bool) -> bool {
    !*denormalize
}

/// What has statistics of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Every channel: `[D]`, for any grid.
    Channel,
    /// Every channel of every place, as RAE has it: `[h·w, D]`, for the encoder's own grid alone.
    Position,
}

impl Normalize {
    /// As `config.json` has it.
    fn name(self) -> &'static str {
        match self {
            Self::Channel => "channel",
            Self::Position => "position",
        }
    }

    fn shape(self, (h, w): (usize, usize), width: usize) -> Vec<usize> {
        match self {
            Self::Channel => vec![width],
            Self::Position => vec![h * w, width],
        }
    }
}

impl Config {
    /// Whether it suits an encoder and a decoder whose inputs are so wide; the error names the field.
    pub(crate) fn check(self, encoder: usize, decoder: usize) -> std::result::Result<(), String> {
        if self.denormalize && encoder != decoder {
            return Err(format!(
                "latent: denormalize is for a decoder that takes what the encoder gives, {encoder} wide, but this one takes \
                 {decoder}; leave it out, or give the decoder the encoder's width"
            ));
        }
        Ok(())
    }
}

/// The statistics of a model.
#[derive(Debug, Clone)]
pub struct Latent {
    /// `[D]` or `[h·w, D]`.
    mean: Tensor,
    /// √(var + ε), `[D]` or `[h·w, D]`.
    deviation: Tensor,
    /// The encoder's own grid.
    grid: (usize, usize),
    config: Config,
}

impl Latent {
    /// Loads `mean` and `var`, f32 whatever else is; fresh ones, zero and one, change next to nothing.
    pub fn load(vb: VarBuilder, config: Config, grid: (usize, usize), width: usize) -> candle_core::Result<Self> {
        let (vb, shape) = (vb.to_dtype(DType::F32), config.normalize.shape(grid, width));
        let mean = vb.get_with_hints(shape.clone(), "mean", candle_nn::init::ZERO)?;
        let var = vb.get_with_hints(shape, "var", candle_nn::init::ONE)?;
        check(&mean, &var).map_err(candle_core::Error::msg)?;
        Ok(Self { mean, deviation: (var + EPS)?.sqrt()?, grid, config })
    }

    /// Features to what the quantizer sees, f32.
    ///
    /// # Shapes
    /// - features and output: `[B, N, D]`, N that of the encoder's own grid if every place has statistics of its own
    pub fn normalize(&self, features: &Tensor) -> candle_core::Result<Tensor> {
        self.check_tokens(features.dim(1)?)?;
        features.to_dtype(DType::F32)?.broadcast_sub(&self.mean)?.broadcast_div(&self.deviation)
    }

    /// The inverse of [`Latent::normalize`], of the same shapes.
    pub fn denormalize(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        self.check_tokens(tokens.dim(1)?)?;
        tokens.to_dtype(DType::F32)?.broadcast_mul(&self.deviation)?.broadcast_add(&self.mean)
    }

    /// Whether the decoder sees tokens with the normalisation undone.
    pub fn denormalizes(&self) -> bool {
        self.config.denormalize
    }

    /// Refuses a grid (h, w) whose places have no statistics.
    pub(crate) fn check_grid(&self, (h, w): (usize, usize)) -> candle_core::Result<()> {
        if (h, w) == self.grid { Ok(()) } else { self.only_own(&format!("a grid of {h}×{w}")) }
    }

    fn check_tokens(&self, n: usize) -> candle_core::Result<()> {
        if n == self.grid.0 * self.grid.1 { Ok(()) } else { self.only_own(&format!("{n} tokens")) }
    }

    /// Refuses what is not of the own grid, where every place has its own statistics.
    fn only_own(&self, what: &str) -> candle_core::Result<()> {
        let (h, w) = self.grid;
        if self.config.normalize == Normalize::Position {
            candle_core::bail!(
                "the latent statistics are of the places of a grid of {h}×{w}, which {what} does not fit; use images of \
                 the model's own size, or a model with latent.normalize = channel"
            );
        }
        Ok(())
    }

    /// The same for plain arrays.
    pub(crate) fn rows(&self) -> candle_core::Result<Rows> {
        let values = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
        Ok(Rows { mean: values(&self.mean)?, deviation: values(&self.deviation)? })
    }
}

/// [`Latent`] as plain arrays, with the same bits for a result.
#[derive(Debug)]
pub(crate) struct Rows {
    mean: Vec<f32>,
    deviation: Vec<f32>,
}

impl Rows {
    /// Changes row `i` of an image.
    pub(crate) fn normalize(&self, i: usize, row: &mut [f32]) {
        let (mean, deviation) = self.of(i, row.len());
        row.iter_mut().zip(mean).zip(deviation).for_each(|((x, mean), deviation)| *x = (*x - mean) / deviation);
    }

    /// Changes it back.
    pub(crate) fn denormalize(&self, i: usize, row: &mut [f32]) {
        let (mean, deviation) = self.of(i, row.len());
        row.iter_mut().zip(mean).zip(deviation).for_each(|((x, mean), deviation)| *x = *x * deviation + mean);
    }

    fn of(&self, i: usize, width: usize) -> (&[f32], &[f32]) {
        let first = i * width % self.mean.len();
        (&self.mean[first..][..width], &self.deviation[first..][..width])
    }
}

/// Whether numbers can be a mean and a variance.
fn check(mean: &Tensor, var: &Tensor) -> std::result::Result<(), String> {
    let all = |tensor: &Tensor, fits: fn(f32) -> bool| {
        let values = tensor.flatten_all().and_then(|x| x.to_device(&Device::Cpu)?.to_vec1::<f32>());
        values.map(|values| values.into_iter().all(fits)).map_err(|e| e.to_string())
    };
    if !all(mean, f32::is_finite)? {
        return Err("the latent statistics' mean is not finite".to_string());
    }
    if !all(var, |x| x.is_finite() && x >= 0.0)? {
        return Err("the latent statistics' variance is not finite, or below zero".to_string());
    }
    Ok(())
}

/// Mean and variance of features, counted in binary64 one token after the other (Welford, 1962): the same for any batch
/// and any number of threads, as long as images come in their order.
///
/// The variance is that of the features at hand (divided by their number), as RAE has it.
#[derive(Debug)]
pub struct Statistics {
    images: u64,
    channel: Moments,
    /// Of every place, as long as all images have one grid.
    position: Option<((usize, usize), Moments)>,
}

#[derive(Debug, Clone)]
struct Moments {
    count: u64,
    mean: Vec<f64>,
    /// Sum of squared differences from the mean.
    squares: Vec<f64>,
}

impl Moments {
    fn new(len: usize) -> Self {
        Self { count: 0, mean: vec![0.0; len], squares: vec![0.0; len] }
    }

    fn add(&mut self, values: &[f32]) {
        self.count += 1;
        let count = self.count as f64;
        for ((mean, squares), &x) in self.mean.iter_mut().zip(&mut self.squares).zip(values) {
            let difference = f64::from(x) - *mean;
            *mean += difference / count;
            *squares += difference * (f64::from(x) - *mean);
        }
    }

    fn tensors(&self, shape: &[usize]) -> candle_core::Result<[Tensor; 2]> {
        let mean = self.mean.iter().map(|&x| x as f32).collect();
        let var = self.squares.iter().map(|&x| (x / self.count as f64) as f32).collect();
        let tensor = |values: Vec<f32>| Tensor::from_vec(values, shape, &Device::Cpu);
        Ok([tensor(mean)?, tensor(var)?])
    }
}

impl Statistics {
    /// Of no image yet; features are D = `width` wide.
    pub fn new(width: usize) -> Self {
        Self { images: 0, channel: Moments::new(width), position: None }
    }

    /// Counts the features of one image, row after row.
    ///
    /// # Shapes
    /// - features: `[h·w, D]`, of a grid (h, w)
    ///
    /// # Errors
    /// Features of another width or number, or that are not finite.
    pub fn add(&mut self, features: &[f32], grid: (usize, usize)) -> candle_core::Result<()> {
        let width = self.channel.mean.len();
        if features.is_empty() || features.len() != grid.0 * grid.1 * width {
            candle_core::bail!("{} values are not {}×{} features {width} wide", features.len(), grid.0, grid.1);
        }
        if !features.iter().all(|x| x.is_finite()) {
            candle_core::bail!("the features hold NaN or infinity");
        }
        features.chunks_exact(width).for_each(|row| self.channel.add(row));
        if self.images == 0 {
            self.position = Some((grid, Moments::new(features.len())));
        }
        self.images += 1;
        match &mut self.position {
            Some((first, moments)) if *first == grid => moments.add(features),
            position => *position = None,
        }
        Ok(())
    }

    /// Number of images that were counted.
    pub fn images(&self) -> u64 {
        self.images
    }

    /// `channel.mean` and `channel.var` `[D]` and, where all images had one grid, `position.mean` and `position.var`
    /// `[h·w, D]`, all f32.
    ///
    /// # Errors
    /// If no image was counted.
    pub fn tensors(&self) -> candle_core::Result<Tensors> {
        if self.images == 0 {
            candle_core::bail!("statistics of no image");
        }
        let width = self.channel.mean.len();
        let mut tensors = Tensors::new();
        let mut put = |kind: Normalize, grid: (usize, usize), moments: &Moments| {
            let [mean, var] = moments.tensors(&kind.shape(grid, width))?;
            tensors.insert(format!("{}.mean", kind.name()), mean);
            tensors.insert(format!("{}.var", kind.name()), var);
            candle_core::Result::Ok(())
        };
        put(Normalize::Channel, (0, 0), &self.channel)?;
        if let Some((grid, moments)) = &self.position {
            put(Normalize::Position, *grid, moments)?;
        }
        Ok(tensors)
    }

    /// Writes [`Statistics::tensors`] to a safetensors file with a record of where they came from.
    ///
    /// # Errors
    /// If no image was counted, or the file cannot be written.
    pub fn write(&self, path: &Path, record: HashMap<String, String>) -> Result<()> {
        weights::write(path, &self.tensors()?, record)
    }
}

/// A model's `latent.mean` and `latent.var` from a file: of [`Statistics`], or RAE's `mean` and `var`, `[D, h, w]`,
/// `[h·w, D]` or `[D]`.
///
/// # Errors
/// If the file has no statistics of this kind, or of another width or grid; the error says what it has.
pub(crate) fn read(path: &Path, normalize: Normalize, grid: (usize, usize), width: usize) -> Result<Tensors> {
    let tensors = weights::read_file(path)?;
    let shape = normalize.shape(grid, width);
    let find = |name: &str| {
        let found = tensors.get(&format!("{}.{name}", normalize.name())).or_else(|| tensors.get(name));
        let found = found.filter(|tensor| tensor.dims() == shape || is_image(tensor, normalize, grid, width));
        found.ok_or_else(|| {
            let held = tensors.iter().map(|(name, tensor)| format!("`{name}` {:?}", tensor.dims()));
            let reason = format!(
                "no statistics that fit latent.normalize = {}: `{}.{name}` {shape:?} is not among {}",
                normalize.name(),
                normalize.name(),
                held.take(6).collect::<Vec<_>>().join(", ")
            );
            Error::weights(path, reason)
        })
    };
    let ours = |tensor: &Tensor| {
        let tensor = tensor.to_dtype(DType::F32)?;
        if tensor.rank() == 3 { tensor.flatten_from(1)?.t()?.contiguous() } else { Ok(tensor) }
    };
    let (mean, var) = (ours(find("mean")?)?, ours(find("var")?)?);
    check(&mean, &var).map_err(|reason| Error::weights(path, reason))?;
    Ok(Tensors::from([("latent.mean".to_string(), mean), ("latent.var".to_string(), var)]))
}

/// Whether a tensor is RAE's, channel first.
fn is_image(tensor: &Tensor, normalize: Normalize, (h, w): (usize, usize), width: usize) -> bool {
    normalize == Normalize::Position && tensor.dims() == [width, h, w]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap()
    }

    fn latent(config: Config, grid: (usize, usize), mean: &[f32], var: &[f32]) -> Latent {
        let shape = config.normalize.shape(grid, 2);
        let tensors = HashMap::from([("mean".into(), tensor(mean, &shape)), ("var".into(), tensor(var, &shape))]);
        Latent::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), config, grid, 2).unwrap()
    }

    const CHANNEL: Config = Config { normalize: Normalize::Channel, denormalize: false };
    const POSITION: Config = Config { normalize: Normalize::Position, denormalize: true };

    #[test]
    fn features_lose_their_mean_and_variance_and_get_them_back() {
        // √(4 − 1e-5 + 1e-5) = 2, √(0.25 − 1e-5 + 1e-5) = 0.5.
        let latent = latent(CHANNEL, (1, 2), &[1.0, -3.0], &[4.0 - 1e-5, 0.25 - 1e-5]);
        let features = tensor(&[5.0, -3.0, 1.0, -2.0], &[1, 2, 2]);
        let normal = latent.normalize(&features).unwrap();
        let close = |got: &Tensor, expected: &[f32]| {
            let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(got.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{got:?}");
        };
        close(&normal, &[2.0, 0.0, 0.0, 2.0]);
        close(&latent.denormalize(&normal).unwrap(), &[5.0, -3.0, 1.0, -2.0]);
        assert!(latent.check_grid((7, 9)).is_ok());
    }

    #[test]
    fn plain_arrays_give_the_same_bits() {
        let values = [0.3, -7.1, 2.9, 1e-3, 55.0, 0.1, -0.7, 3.3];
        for (config, n) in [(CHANNEL, 1), (POSITION, 4)] {
            let latent = latent(config, (2, 2), &values[..2 * n], &values.map(f32::abs)[..2 * n]);
            let features = tensor(&values, &[1, 4, 2]);
            let (mut rows, arrays) = (values, latent.rows().unwrap());
            rows.chunks_exact_mut(2).enumerate().for_each(|(i, row)| arrays.normalize(i, row));
            let normal = latent.normalize(&features).unwrap();
            assert_eq!(normal.flatten_all().unwrap().to_vec1::<f32>().unwrap(), rows);
            rows.chunks_exact_mut(2).enumerate().for_each(|(i, row)| arrays.denormalize(i, row));
            let back = latent.denormalize(&normal).unwrap();
            assert_eq!(back.flatten_all().unwrap().to_vec1::<f32>().unwrap(), rows);
        }
    }

    #[test]
    fn places_without_statistics_are_refused() {
        let latent = latent(POSITION, (1, 2), &[0.0; 4], &[1.0; 4]);
        let error = latent.check_grid((2, 1)).unwrap_err().to_string();
        assert!(error.contains("of a grid of 1×2, which a grid of 2×1") && error.contains("channel"), "{error}");
        assert!(latent.normalize(&tensor(&[0.0; 6], &[1, 3, 2])).is_err());
        assert!(latent.denormalize(&tensor(&[0.0; 6], &[1, 3, 2])).is_err());
    }

    #[test]
    fn statistics_by_hand() {
        let mut statistics = Statistics::new(2);
        assert!(statistics.tensors().is_err());
        statistics.add(&[1.0, 10.0, 3.0, 10.0], (1, 2)).unwrap();
        statistics.add(&[5.0, 10.0, 7.0, 30.0], (1, 2)).unwrap();
        let values = |name: &str| statistics.tensors().unwrap()[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values("channel.mean"), [4.0, 15.0]);
        assert_eq!(values("channel.var"), [5.0, 75.0]); // (9+1+1+9)/4, (25+25+25+225)/4
        assert_eq!(values("position.mean"), [3.0, 10.0, 5.0, 20.0]);
        assert_eq!(values("position.var"), [4.0, 0.0, 4.0, 100.0]);
    }

    #[test]
    fn images_of_several_grids_have_statistics_by_channel_alone() {
        let mut statistics = Statistics::new(1);
        for (features, grid) in [(&[1.0, 2.0][..], (1, 2)), (&[3.0, 6.0], (2, 1)), (&[0.0, 0.0], (1, 2))] {
            statistics.add(features, grid).unwrap();
        }
        let tensors = statistics.tensors().unwrap();
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["channel.mean", "channel.var"]);
        assert_eq!(tensors["channel.mean"].to_vec1::<f32>().unwrap(), [2.0]);
        assert!(statistics.add(&[f32::NAN], (1, 1)).unwrap_err().to_string().contains("NaN"));
        assert!(statistics.add(&[1.0], (1, 2)).is_err());
    }
}
