//! How an image is prepared for the model: at one resolution or several, each a [`View`].

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use vqrae::Vqrae;
use vqrae::image::{ErrorKind, Limits, Naflex, Preprocessor, Resample, ResizeMode, Rgb};

use crate::crop::Crop;

/// How an image is prepared for the model; what is not given stays as the model's folder says.
#[derive(Args, Debug)]
pub(crate) struct ImageArgs {
    /// Size that images are brought to: one number for a square, or HxW; several, as in 256,384x256, give every image a
    /// result at each, in files that are marked NAME@256x256
    ///
    /// Both sides are multiples of the encoder's patch; positions are interpolated as the encoder's authors do it. Where
    /// images keep their aspect ratio (naflex), an image gets at most as many patches as this size holds.
    #[arg(long, aliases = ["image-size", "image_size"], value_name = "N|HxW", value_parser = parse_size)]
    #[arg(value_delimiter = ',')]
    resolution: Vec<(usize, usize)>,
    /// How another shape is brought to that size: squash, center-crop, adm-crop or pad; naflex keeps the aspect ratio
    /// instead, so every image has its own size
    #[arg(long, alias = "resize_mode", value_name = "MODE")]
    resize_mode: Option<ResizeMode>,
    /// Resampling filter
    #[arg(long, value_enum)]
    resample: Option<Filter>,
    /// Refuse images of more pixels than this before decoding them
    #[arg(long, alias = "max_pixels", value_name = "N")]
    max_pixels: Option<u64>,
}

impl ImageArgs {
    /// The model's own preparation with what the command line changes, once for every resolution.
    pub(crate) fn views(&self, model: &Vqrae) -> Result<Vec<View>> {
        let encoder = &model.config().encoder;
        let patches = (encoder.patch(), model.config().decoder.sizes(encoder).patch);
        let mut own = model.preprocessor().clone();
        own.resample = self.resample.map_or(own.resample, Resample::from);
        if let Some(mode) = self.resize_mode {
            own = own.by(mode, patches.0);
        }
        if let (ResizeMode::Naflex, Some(Naflex { patch_size: p, .. })) = (own.resize_mode, own.naflex) {
            model.grid_of(p, p).context("the preprocessor's patch_size does not suit this model")?;
        }
        for (i, size) in self.resolution.iter().enumerate() {
            model.grid_of(size.0, size.1).with_context(|| does_not_suit(*size))?;
            if self.resolution[..i].contains(size) {
                bail!("--resolution names {}x{} twice", size.0, size.1);
            }
        }
        let several = self.resolution.len() > 1;
        let view = |size: &(usize, usize)| View {
            preprocessor: own.at(*size),
            mark: several.then_some(*size),
            reference: None,
            patches,
            crop: None,
        };
        if self.resolution.is_empty() {
            model.grid_of(own.size.0, own.size.1).with_context(|| does_not_suit(own.size))?;
            return Ok(vec![View { preprocessor: own, mark: None, reference: None, patches, crop: None }]);
        }
        Ok(self.resolution.iter().map(view).collect())
    }

    /// Whether the command line says anything of size, mode or filter.
    pub(crate) fn says_anything(&self) -> bool {
        !self.resolution.is_empty() || self.resize_mode.is_some() || self.resample.is_some()
    }

    /// Images prepared by `reference` first, then brought to the model's own size whatever its mode.
    pub(crate) fn by_way_of(&self, reference: Preprocessor, model: &Vqrae) -> Result<View> {
        let encoder = &model.config().encoder;
        let patches = (encoder.patch(), model.config().decoder.sizes(encoder).patch);
        let own = Preprocessor { resample: Resample::Bicubic, do_resize: true, ..model.preprocessor().clone() };
        let preprocessor = own.by(ResizeMode::Squash, patches.0);
        model.grid_of(preprocessor.size.0, preprocessor.size.1).with_context(|| does_not_suit(preprocessor.size))?;
        Ok(View { preprocessor, mark: None, reference: Some(reference), patches, crop: None })
    }

    /// What the command line says by itself, where there is no model: `None` where it says nothing.
    pub(crate) fn without_model(&self) -> Result<Option<Preprocessor>> {
        if !self.says_anything() {
            return Ok(None);
        }
        let (&[(height, width)], mode) = (self.resolution.as_slice(), self.resize_mode) else {
            bail!("without a model one --resolution is wanted, with --resize-mode and --resample if need be");
        };
        if mode == Some(ResizeMode::Naflex) {
            bail!("--resize-mode naflex keeps to a model's patches; without a model choose another");
        }
        let resample = self.resample.map_or(Resample::Bicubic, Resample::from);
        let squash = Preprocessor { size: (height, width), ..Preprocessor::siglip(height, resample) };
        Ok(Some(Preprocessor { resize_mode: mode.unwrap_or(ResizeMode::CenterCrop), ..squash }))
    }

    pub(crate) fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.max_pixels = self.max_pixels.unwrap_or(limits.max_pixels);
        limits
    }
}

fn does_not_suit((h, w): (usize, usize)) -> String {
    format!("images of {h}x{w} do not suit this model")
}

/// One way of preparing images.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) preprocessor: Preprocessor,
    /// The resolution asked for, where there are several: it is added to the names of files.
    pub(crate) mark: Option<(usize, usize)>,
    /// What images are prepared by before, and reconstructions are compared with the result of; without it, with the
    /// model's view.
    pub(crate) reference: Option<Preprocessor>,
    /// Sides of the encoder's patch and of the decoder's.
    pub(crate) patches: (usize, usize),
    /// Which part of the image, where there are several.
    pub(crate) crop: Option<Crop>,
}

impl View {
    /// What tells it from other views of an image: `384x256`, `centre-flip`, `384x256-centre-flip`; nothing where it is the only
    /// one.
    pub(crate) fn label(&self) -> Option<String> {
        let size = self.mark.map(|(h, w)| format!("{h}x{w}"));
        let parts: Vec<String> = size.into_iter().chain(self.crop.map(|crop| crop.name())).collect();
        (!parts.is_empty()).then(|| parts.join("-"))
    }

    /// What a file is named after: `cats/tom.jpg`, where there are several views `cats/tom.jpg@256x256`.
    pub(crate) fn name(&self, relative: &Path) -> PathBuf {
        let Some(label) = self.label() else { return relative.to_path_buf() };
        let mut name = relative.as_os_str().to_os_string();
        name.push(format!("@{label}"));
        name.into()
    }

    /// The image as the model takes it.
    pub(crate) fn prepare(&self, image: &Rgb) -> Result<Rgb, ErrorKind> {
        match &self.crop {
            Some(crop) => crop.prepare(image, &self.preprocessor),
            None => self.preprocessor.prepare(image),
        }
    }

    /// All of the preparation that decides the model's input, size and crop included.
    pub(crate) fn preprocessing(&self) -> String {
        let crop = self.crop.map(|crop| format!("+{}-of-{}", crop.name(), crop.range)).unwrap_or_default();
        format!("{}{crop}", preprocessing(&self.preprocessor))
    }

    /// The size (rows, columns) of what the decoder makes of an image of this size.
    pub(crate) fn painted(&self, (h, w): (usize, usize)) -> (usize, usize) {
        let (read, painted) = self.patches;
        (h / read * painted, w / read * painted)
    }
}

/// All of a preprocessor that decides the model's input, the size included.
pub(crate) fn preprocessing(preprocessor: &Preprocessor) -> String {
    let (h, w) = preprocessor.size;
    format!("{h}x{w}-{}", preprocessor.tag())
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let (h, w) = text.split_once(['x', 'X']).unwrap_or((text, text));
    match (h.parse(), w.parse()) {
        (Ok(h @ 1..=65_536), Ok(w @ 1..=65_536)) => Ok((h, w)),
        _ => Err("expected: a number of pixels or HxW, each from 1 to 65536".to_string()),
    }
}

#[derive(ValueEnum, Debug, Clone, Copy)]
enum Filter {
    Bilinear,
    Bicubic,
}

impl From<Filter> for Resample {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Bilinear => Self::Bilinear,
            Filter::Bicubic => Self::Bicubic,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_one_number_or_two() {
        assert_eq!(parse_size("224"), Ok((224, 224)));
        assert_eq!(parse_size("32x48"), Ok((32, 48)));
        for wrong in ["0", "x", "-1", "99999999", "1x2x3", "ten"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
