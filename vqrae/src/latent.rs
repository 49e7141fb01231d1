//! Features of mean zero and variance one, by statistics of a data set: what diffusion models on latents need, and what
//! brings channels of unlike size to one scale for a quantizer (RAE, arXiv 2510.11690).
//!
//! `ẑ = (z − mean) / √(var + 1e-5)` right before the quantizer's first layer, and, where the decoder takes latents of the
//! encoder's width and the config asks for it, `ẑ · √(var + 1e-5) + mean` before the decoder. The statistics are two
//! tensors of the model, `latent.mean` and `latent.var`, f32, which training never changes. [`Statistics`] counts them.

mod statistics;

pub use statistics::Statistics;
pub(crate) use statistics::read;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

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
    /// The grid (h, w) of places that have statistics; without it the encoder's own. DINOv2's positions were made for 37×37,
    /// RAE's statistics for the 16×16 of 224 pixels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<[usize; 2]>,
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
    /// Every channel of every place, as RAE has it: `[h·w, D]`, for one grid alone.
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
        match (self.grid, self.normalize) {
            (Some(_), Normalize::Channel) => {
                Err("latent: grid is for statistics by position; remove it where normalize is `channel`".into())
            }
            (Some([h, w]), _) if h == 0 || w == 0 || h.saturating_mul(w) > 1 << 20 => {
                Err(format!("latent: grid is {h}×{w}, expected: 1×1 to 1024×1024"))
            }
            _ => Ok(()),
        }
    }

    /// The grid (h, w) of places that have statistics, for an encoder whose own grid is this.
    pub fn grid(self, own: (usize, usize)) -> (usize, usize) {
        self.grid.map_or(own, |[h, w]| (h, w))
    }
}

/// The statistics of a model.
#[derive(Debug, Clone)]
pub struct Latent {
    /// `[D]` or `[h·w, D]`.
    mean: Tensor,
    /// √(var + ε), `[D]` or `[h·w, D]`.
    deviation: Tensor,
    /// The grid that statistics by position are of.
    grid: (usize, usize),
    config: Config,
}

impl Latent {
    /// Loads `mean` and `var`, f32 whatever else is; fresh ones, zero and one, change next to nothing. `own` is the
    /// encoder's grid, `width` its width.
    pub fn load(vb: VarBuilder, config: Config, own: (usize, usize), width: usize) -> candle_core::Result<Self> {
        let grid = config.grid(own);
        let (vb, shape) = (vb.to_dtype(DType::F32), config.normalize.shape(grid, width));
        let mean = vb.get_with_hints(shape.clone(), "mean", candle_nn::init::ZERO)?;
        let var = vb.get_with_hints(shape, "var", candle_nn::init::ONE)?;
        check(&mean, &var).map_err(candle_core::Error::msg)?;
        Ok(Self { mean, deviation: (var + EPS)?.sqrt()?, grid, config })
    }

    /// Features to what the quantizer sees, f32.
    ///
    /// # Shapes
    /// - features and output: `[B, N, D]`, N that of the statistics' grid if every place has its own
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::Cpu).unwrap()
    }

    fn latent(config: Config, grid: (usize, usize), mean: &[f32], var: &[f32]) -> Latent {
        let shape = config.normalize.shape(grid, 2);
        let tensors = HashMap::from([("mean".into(), tensor(mean, &shape)), ("var".into(), tensor(var, &shape))]);
        Latent::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), config, grid, 2).unwrap()
    }

    const CHANNEL: Config = Config { normalize: Normalize::Channel, denormalize: false, grid: None };
    const POSITION: Config = Config { normalize: Normalize::Position, denormalize: true, grid: None };

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
}
