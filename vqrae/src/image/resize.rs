//! Resizing with the rounding of torchvision's uint8 antialias kernels.

use std::fmt;
use std::str::FromStr;

use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};
use serde::{Deserialize, Serialize};

use super::{Limits, Rgb};

/// How an image of any shape comes to a size that the encoder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResizeMode {
    /// Both sides to the size, the aspect ratio given up: SigLIP's own way.
    #[default]
    Squash,
    /// The short side to the size, then the centre: CLIP's way (`do_center_crop`).
    CenterCrop,
    /// `center_crop_arr` of ADM, also of LlamaGen and DiT: halved by box while it can be, then bicubic, then the
    /// centre. Pillow 13's rounding, and bicubic whatever `resample` says.
    AdmCrop,
    /// The whole image inside the size, centred on white.
    Pad,
    /// The aspect ratio is kept, and the size is the image's own, within a budget of patches ([`Naflex`](super::Naflex)):
    /// SigLIP2 NaFlex.
    Naflex,
}

impl ResizeMode {
    const ALL: [Self; 5] = [Self::Squash, Self::CenterCrop, Self::AdmCrop, Self::Pad, Self::Naflex];

    /// All names, for messages.
    pub(super) const NAMES: &str = "squash, center-crop, adm-crop, pad or naflex";

    fn name(self) -> &'static str {
        match self {
            Self::Squash => "squash",
            Self::CenterCrop => "center-crop",
            Self::AdmCrop => "adm-crop",
            Self::Pad => "pad",
            Self::Naflex => "naflex",
        }
    }
}

impl fmt::Display for ResizeMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ResizeMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|mode| mode.name() == text);
        found.ok_or_else(|| format!("unknown resize mode, expected: {}, got: {text}", Self::NAMES))
    }
}

/// Interpolation, written in configs as Pillow's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub enum Resample {
    /// 2: SigLIP 2.
    Bilinear,
    /// 3: SigLIP.
    Bicubic,
}

impl Resample {
    fn filter(self) -> FilterType {
        match self {
            Self::Bilinear => FilterType::Bilinear,
            // a = -0.5, the bicubic of Pillow and of torch with antialias.
            Self::Bicubic => FilterType::CatmullRom,
        }
    }
}

impl TryFrom<u64> for Resample {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        match number {
            2 => Ok(Self::Bilinear),
            3 => Ok(Self::Bicubic),
            _ => Err(format!("unknown resample, expected: 2 (bilinear) or 3 (bicubic), got: {number}")),
        }
    }
}

impl From<Resample> for u64 {
    fn from(resample: Resample) -> u64 {
        match resample {
            Resample::Bilinear => 2,
            Resample::Bicubic => 3,
        }
    }
}

impl fmt::Display for Resample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
        })
    }
}

/// Resizes to `width` × `height`, bit for bit as `torchvision.transforms.v2.functional.resize` on uint8.
///
/// Each axis is a pass of its own, width first: torch rounds to 8 bits in between, and one call of
/// `fast_image_resize` would start with the height. An axis that keeps its length is not touched.
pub(super) fn resize(image: &Rgb, width: usize, height: usize, resample: Resample) -> Result<Rgb, String> {
    affordable(image, width, height)?;
    let wide = pass(image, width, image.height, resample)?;
    pass(wide.as_ref().unwrap_or(image), width, height, resample)
        .map(|tall| tall.or(wide).unwrap_or_else(|| image.clone()))
}

/// A sliver of an image, scaled up by its short side, would need memory without bound: the buffers after the first and
/// the second pass are held to the default limit.
pub(super) fn affordable(image: &Rgb, width: usize, height: usize) -> Result<(), String> {
    let after_both = Limits::default().check(width as u64, height as u64);
    let after_first = Limits::default().check(width as u64, image.height as u64);
    after_both.and(after_first).map_err(|kind| format!("on the way there are {kind}"))
}

/// One axis; `None` where the size is there already.
fn pass(image: &Rgb, width: usize, height: usize, resample: Resample) -> Result<Option<Rgb>, String> {
    if (image.width, image.height) == (width, height) {
        return Ok(None);
    }
    let side = |n: usize| u32::try_from(n).map_err(|_| format!("a side of {n} pixels"));
    // Of one type of pixels: for images of any type all of them would be compiled, a third of this library.
    let source = TypedImageRef::<U8x3>::from_buffer(side(image.width)?, side(image.height)?, &image.data)
        .map_err(|error| error.to_string())?;
    let mut data = vec![0; 3 * width * height];
    let mut target =
        TypedImage::<U8x3>::from_buffer(side(width)?, side(height)?, &mut data).map_err(|error| error.to_string())?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(resample.filter()));
    Resizer::new().resize_typed(&source, &mut target, &options).map_err(|error| error.to_string())?;
    Ok(Some(Rgb { width, height, data }))
}

/// The window of `width` × `height` whose top left corner is at `left`, `top`.
pub(super) fn crop(image: &Rgb, left: usize, top: usize, width: usize, height: usize) -> Rgb {
    let rows = image.data.chunks_exact(3 * image.width).skip(top).take(height);
    let data = rows.flat_map(|row| &row[3 * left..3 * (left + width)]).copied().collect();
    Rgb { width, height, data }
}

/// `image` in the centre of a white `width` × `height`; a spare odd row or column goes below and to the right.
pub(super) fn pad(image: &Rgb, width: usize, height: usize) -> Rgb {
    const WHITE: u8 = 255;
    let (left, top) = ((width - image.width) / 2, (height - image.height) / 2);
    let mut data = vec![WHITE; 3 * width * height];
    let rows = data.chunks_exact_mut(3 * width).skip(top);
    for (target, source) in rows.zip(image.data.chunks_exact(3 * image.width)) {
        target[3 * left..3 * (left + image.width)].copy_from_slice(source);
    }
    Rgb { width, height, data }
}
