//! Mean and variance of a data set's features: counted, written, and read into a model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::{Normalize, check};
use crate::error::{Error, Result};
use crate::weights::{self, Tensors};

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

    /// The grid (h, w) of all images, if they had one.
    pub fn grid(&self) -> Option<(usize, usize)> {
        self.position.as_ref().map(|(grid, _)| *grid)
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

    /// Writes [`Statistics::tensors`] to a safetensors file, with a record of where they came from as JSON in the header's
    /// `origin`.
    ///
    /// # Errors
    /// If no image was counted, or the file cannot be written.
    pub fn write(&self, path: &Path, record: &BTreeMap<&str, String>) -> Result<()> {
        // One entry: a header of several has no fixed order, and the same statistics should be the same file.
        let origin = serde_json::to_string(record).map_err(|e| Error::weights(path, e))?;
        weights::write(path, &self.tensors()?, HashMap::from([("origin".to_string(), origin)]))
    }
}

/// A model's `latent.mean` and `latent.var` from a file: of [`Statistics`], or RAE's `mean` and `var` (safetensors or its .pt),
/// `[D, h, w]`, `[h·w, D]` or `[D]`.
///
/// # Errors
/// If the file has no statistics of this kind, or of another width or grid; the error says what it has.
pub(crate) fn read(path: &Path, normalize: Normalize, grid: (usize, usize), width: usize) -> Result<Tensors> {
    let tensors = weights::read_any(path)?;
    let shape = normalize.shape(grid, width);
    let find = |name: &str| {
        let found = tensors.get(&format!("{}.{name}", normalize.name())).or_else(|| tensors.get(name));
        let found = found.filter(|tensor| tensor.dims() == shape || is_image(tensor, normalize, grid, width));
        found.ok_or_else(|| {
            let held = tensors.iter().map(|(name, tensor)| format!("`{name}` {:?}", tensor.dims()));
            let reason = format!(
                "no statistics that fit latent.normalize = {}: `{}.{name}` {shape:?} is not among {}; for places of another \
                 grid set latent.grid = [h, w]",
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
