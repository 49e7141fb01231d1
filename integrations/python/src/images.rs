//! What Python hands over as an image, and batches of them as the model takes them.

use std::path::PathBuf;

use pyo3::FromPyObject;
use pyo3::pybacked::PyBackedBytes;
use rayon::prelude::*;
use vqrae::image::{self, Limits, Preprocessor, Rgb};
use vqrae::{Device, Tensor, Vqrae};

use crate::error::{Failure, guard};

/// Images that go through the model at once, as by the command line's default.
pub(crate) const BATCH: usize = 16;

/// An image as Python hands it over. Bytes objects never change, so they can be read without the interpreter's lock.
#[derive(FromPyObject)]
pub(crate) enum Source {
    /// The content of an image file.
    #[pyo3(transparent)]
    File(PyBackedBytes),
    /// Rows, columns, and pixels u8 `[H, W, 3]`.
    #[pyo3(transparent)]
    Pixels((usize, usize, PyBackedBytes)),
    /// Where an image file is.
    #[pyo3(transparent)]
    Path(PathBuf),
}

/// An image as the model takes it.
pub(crate) struct Loaded {
    /// Rows and columns of the image itself, upright.
    pub(crate) original: (usize, usize),
    /// Rows and columns that the model sees.
    size: (usize, usize),
    /// `[3, H, W]`, normalised.
    pixels: Vec<f32>,
}

impl Source {
    fn read(&self) -> Result<Rgb, Failure> {
        let limits = Limits::default();
        Ok(match self {
            Self::File(bytes) => image::decode(bytes, &limits)?,
            Self::Pixels((height, width, bytes)) => Rgb::new(*width, *height, bytes.to_vec())?,
            Self::Path(path) => image::open(path, &limits)?,
        })
    }

    fn load(&self, preprocessor: &Preprocessor) -> Result<Loaded, Failure> {
        let image = self.read()?;
        let prepared = preprocessor.prepare(&image)?;
        Ok(Loaded {
            original: (image.height, image.width),
            size: (prepared.height, prepared.width),
            pixels: preprocessor.normalize(&prepared),
        })
    }
}

/// Reads and prepares images, each on a thread; an image that cannot be used fails alone.
pub(crate) fn load(sources: &[Source], preprocessor: &Preprocessor) -> Vec<Result<Loaded, Failure>> {
    sources.par_iter().map(|source| guard(|| source.load(preprocessor))).collect()
}

/// What `compute` makes of pixels f32 `[B, 3, H, W]` of several images, a tensor each; images of one size go together.
pub(crate) fn each(
    images: &[Result<Loaded, Failure>],
    model: &Vqrae,
    compute: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Vec<Option<Tensor>>, Failure> {
    let mut made = vec![None; images.len()];
    let mut left: Vec<(usize, &Loaded)> =
        images.iter().enumerate().filter_map(|(i, image)| Some((i, image.as_ref().ok()?))).collect();
    while let Some((_, first)) = left.first() {
        let size = first.size;
        let (alike, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|(_, image)| image.size == size);
        let computed = compute(&stack(&alike, size, model)?)?.to_device(&Device::Cpu)?;
        for (row, (place, _)) in alike.iter().enumerate() {
            made[*place] = Some(computed.get(row)?);
        }
        left = others;
    }
    Ok(made)
}

/// Images of one size, on the model's device. Where results could depend on the batch, it is filled up with zeros.
fn stack(images: &[(usize, &Loaded)], (h, w): (usize, usize), model: &Vqrae) -> candle_core::Result<Tensor> {
    let count = if model.is_batch_invariant() { images.len() } else { images.len().max(BATCH) };
    let mut values = Vec::with_capacity(count * 3 * h * w);
    images.iter().for_each(|(_, image)| values.extend_from_slice(&image.pixels));
    values.resize(count * 3 * h * w, 0.0);
    Tensor::from_vec(values, (count, 3, h, w), model.device())
}
