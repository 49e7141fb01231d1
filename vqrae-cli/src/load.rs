//! One image, decoded and prepared, and batches of them as the model takes them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, bail};
use vqrae::codes::Row;
use vqrae::image::{self, Limits, Preprocessor, Rgb};
use vqrae::samples::Sample;
use vqrae::{DType, Device, Tensor, Vqrae};

use crate::alike::Alike;
use crate::crop::CropArgs;
use crate::inputs::Input;
use crate::pipeline::Pace;
use crate::view::{ImageArgs, View};

/// An image as the model takes it.
pub(crate) struct Loaded {
    /// Rows and columns.
    pub(crate) size: (usize, usize),
    pixels: Pixels,
}

/// Of an image, or of several of one size, one after the other.
enum Pixels {
    /// `[3, H, W]`, as the encoder takes them.
    Normalised(Vec<f32>),
    /// `[H, W, 3]`, as the file has them, a quarter as long: a GPU is sent these and normalises them itself.
    Levels(Vec<u8>),
}

/// What the pixels of a [`Loaded`] are.
#[derive(Debug, Clone, Copy)]
enum Form {
    Normalised,
    Levels,
}

/// An image as the model takes it, and its row of a shard, which lacks the codes.
pub(crate) struct Item {
    pub(crate) row: Row,
    /// None where the row has an error.
    pub(crate) views: Vec<Loaded>,
}

/// BLAKE3 of an image file's bytes, its first 16 bytes as hexadecimal digits.
pub(crate) fn content_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_string()
}

/// How images are read: for which views, up to which size, and for which device.
pub(crate) struct Reading {
    pub(crate) views: Vec<View>,
    limits: Limits,
    form: Form,
}

impl Reading {
    /// For a model's own device.
    pub(crate) fn new(images: &ImageArgs, model: &Vqrae) -> Result<Self> {
        Self::of_crops(images, &CropArgs::default(), model)
    }

    /// The same of several crops of each image.
    pub(crate) fn of_crops(images: &ImageArgs, crops: &CropArgs, model: &Vqrae) -> Result<Self> {
        Ok(Self::with(crops.of(images.views(model)?)?, images.limits(), model))
    }

    /// For these views.
    pub(crate) fn with(views: Vec<View>, limits: Limits, model: &Vqrae) -> Self {
        let form = if model.device().is_cpu() { Form::Normalised } else { Form::Levels };
        Self { views, limits, form }
    }

    /// Decodes one image and prepares it for each view, or says what is wrong with it.
    pub(crate) fn load(&self, input: &Input) -> Result<Vec<Loaded>, String> {
        self.each_view(input, |image, view| Ok(self.prepare(image, view)?.0))
    }

    /// [`load`](Self::load) with all that a row of a shard says of the image; what is wrong with it is in the row.
    pub(crate) fn load_row(&self, input: &Input) -> Item {
        let mut item = Item { row: Row { path: input.source(), ..Row::default() }, views: Vec::new() };
        // Whatever a decoder does with a hostile file, the image has its row.
        let loaded = catch_unwind(AssertUnwindSafe(|| self.fill(&mut item.row, input)));
        match loaded.unwrap_or_else(|_| Err("the decoder failed on it".to_string())) {
            Ok(views) => item.views = views,
            Err(reason) => item.row.error = Some(reason),
        }
        item
    }

    fn fill(&self, row: &mut Row, input: &Input) -> Result<Vec<Loaded>, String> {
        let Sample { bytes, class, label, caption } = input.read()?;
        (row.class, row.label, row.caption) = (class, label, caption);
        row.content_hash = Some(content_hash(&bytes));
        let image = self.decode(&bytes)?;
        drop(bytes);
        (row.width, row.height) = (u32::try_from(image.width).ok(), u32::try_from(image.height).ok());
        let load = |view: &View| Ok(self.prepare(&image, view)?.0);
        self.views.iter().map(load).collect::<Result<_, image::ErrorKind>>().map_err(|error| error.to_string())
    }

    /// [`load`](Self::load), and the same views at the sizes of their reconstructions, to compare with; of a view that has
    /// a reference, that.
    pub(crate) fn load_beside(&self, input: &Input) -> Result<Vec<(Loaded, Rgb)>, String> {
        self.each_view(input, |image, view| {
            if let Some(reference) = &view.reference {
                let reference = reference.prepare(image)?;
                return Ok((self.prepare(&reference, view)?.0, reference));
            }
            let (loaded, prepared) = self.prepare(image, view)?;
            let painted = view.painted(loaded.size);
            let same = painted == loaded.size;
            Ok((loaded, if same { prepared } else { view.preprocessor.prepare_at(image, painted)? }))
        })
    }

    /// Decodes an image file that is in memory.
    pub(crate) fn decode(&self, bytes: &[u8]) -> Result<Rgb, String> {
        image::decode(bytes, &self.limits).map_err(|error| error.to_string())
    }

    fn each_view<T>(
        &self,
        input: &Input,
        load: impl Fn(&Rgb, &View) -> Result<T, image::ErrorKind>,
    ) -> Result<Vec<T>, String> {
        let image = self.decode(&input.read()?.bytes)?;
        self.views.iter().map(|view| load(&image, view)).collect::<Result<_, _>>().map_err(|error| error.to_string())
    }

    fn prepare(&self, image: &Rgb, view: &View) -> Result<(Loaded, Rgb), image::ErrorKind> {
        let prepared = view.prepare(image)?;
        let size = (prepared.height, prepared.width);
        let pixels = match self.form {
            Form::Normalised => Pixels::Normalised(view.preprocessor.normalize(&prepared)),
            Form::Levels => Pixels::Levels(prepared.data.clone()),
        };
        Ok((Loaded { size, pixels }, prepared))
    }
}

impl Loaded {
    /// The pixels, of which none are left behind: a batch that is put together is not held twice.
    fn take(&mut self) -> Self {
        let none = match &self.pixels {
            Pixels::Normalised(_) => Pixels::Normalised(Vec::new()),
            Pixels::Levels(_) => Pixels::Levels(Vec::new()),
        };
        Self { size: self.size, pixels: std::mem::replace(&mut self.pixels, none) }
    }
}

/// The pixels of a batch's images, those of one size together, on the host.
pub(crate) fn stack_alike<'a>(
    images: impl Iterator<Item = &'a mut Loaded>,
    model: &Vqrae,
    pace: Pace,
) -> Result<Alike<Tensor>> {
    let images: Vec<Loaded> = images.map(Loaded::take).collect();
    Alike::of(&images, pace.batch_size, |image| image.size, |alike| stack(alike, model, pace))
}

/// One batch of images of one size, on the host: f32 `[B, 3, H, W]`, or u8 `[B, H, W, 3]`. Where results could depend on
/// the batch, the last one is filled up with zeros to the size of the others: take the first images of what comes out.
fn stack(images: &[&Loaded], model: &Vqrae, pace: Pace) -> Result<Tensor> {
    let count = if model.is_batch_invariant() { images.len() } else { images.len().max(pace.batch_size) };
    let Some(first) = images.first() else { bail!("a batch of no images") };
    let (h, w) = first.size;
    let (mut values, mut levels) = (Vec::new(), Vec::new());
    for image in images {
        match &image.pixels {
            Pixels::Normalised(pixels) => values.extend_from_slice(pixels),
            Pixels::Levels(pixels) => levels.extend_from_slice(pixels),
        }
    }
    Ok(match first.pixels {
        Pixels::Normalised(_) => {
            values.resize(count * 3 * h * w, 0.0);
            Tensor::from_vec(values, (count, 3, h, w), &Device::Cpu)?
        }
        Pixels::Levels(_) => {
            levels.resize(count * 3 * h * w, 0);
            Tensor::from_vec(levels, (count, h, w, 3), &Device::Cpu)?
        }
    })
}

/// A [`stack`] on the model's device, normalised: f32 `[B, 3, H, W]`.
pub(crate) fn upload(stack: &Tensor, model: &Vqrae) -> Result<Tensor> {
    let pixels = stack.to_device(model.device())?;
    Ok(match pixels.dtype() {
        DType::U8 => normalised(&pixels, model.preprocessor())?,
        _ => pixels,
    })
}

/// What [`Preprocessor::normalize`] makes of pixels u8 `[B, H, W, 3]`, on their device: f32 `[B, 3, H, W]`, the same bits.
fn normalised(pixels: &Tensor, preprocessor: &Preprocessor) -> candle_core::Result<Tensor> {
    // Every level in every channel.
    let levels = Rgb { width: 256, height: 1, data: (0..=255).flat_map(|level| [level; 3]).collect() };
    let levels = Tensor::from_vec(preprocessor.normalize(&levels), (3, 256), pixels.device())?;
    vqrae::ops::pixels(pixels, &levels)
}

#[cfg(test)]
mod tests {
    use vqrae::image::Resample;

    use super::*;

    #[test]
    fn a_device_normalises_to_the_bits_of_the_host() {
        let uneven = Preprocessor {
            image_mean: [0.485, 0.456, 0.406],
            image_std: [0.229, 0.224, 0.225],
            ..Preprocessor::siglip(32, Resample::Bicubic)
        };
        let plain = Preprocessor { do_normalize: false, ..uneven.clone() };
        let data: Vec<u8> = (0..16 * 20 * 3).map(|i| (i * 7 % 256) as u8).collect();
        let image = Rgb { width: 20, height: 16, data: data.clone() };
        for preprocessor in [uneven, plain] {
            let host = preprocessor.normalize(&image);
            let pixels = Tensor::from_vec([data.clone(), data.clone()].concat(), (2, 16, 20, 3), &Device::Cpu).unwrap();
            let device = normalised(&pixels, &preprocessor).unwrap();
            assert_eq!(device.dims(), [2, 3, 16, 20]);
            assert_eq!(device.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [host.clone(), host].concat());
        }
    }
}
