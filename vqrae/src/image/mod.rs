//! Pixels in and out: from a file of any common format to the tensor values a vision encoder was trained on.
//!
//! 1. [`open`] / [`decode`]: JPEG, PNG, WebP, BMP, GIF, TIFF to upright 8-bit RGB ([`Rgb`]).
//! 2. [`Preprocessor::prepare`]: resize, crop or pad to the encoder's size; with [`Naflex`] to each image's own.
//! 3. [`Preprocessor::normalize`]: to `f32` `[3, H, W]`; [`Preprocessor::denormalize_to_rgb`] is the way back.
//! 4. [`save_png`]: a file that appears whole or not at all.
//!
//! ```no_run
//! use vqrae::image::{self, Limits, Preprocessor};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let preprocessor = Preprocessor::from_file("model/preprocessor_config.json".as_ref())?;
//! let photo = image::open("photo.jpg".as_ref(), &Limits::default())?;
//! let chw = preprocessor.normalize(&preprocessor.prepare(&photo)?);
//! # Ok(()) }
//! ```
//!
//! # Rules
//!
//! One rule each, whatever the format:
//!
//! | input | rule |
//! |---|---|
//! | format | decided by content, never by the file's name |
//! | EXIF orientation | applied, as `PIL.ImageOps.exif_transpose`; without the tag, by XMP's `tiff:Orientation` |
//! | grey | the value in all three channels |
//! | palette | its colours |
//! | alpha (also a PNG's `tRNS`) | composited on white with Pillow's integer arithmetic, as transformers 5's `convert_to_rgb` |
//! | 16 bit | `round(v / 257)` (Pillow clips or drops the low byte, by mode) |
//! | float samples | clamped to 0..1, `round(255 v)` |
//! | CMYK JPEG | taken as Adobe's inverted CMYK, then `R = (255 − C)(255 − K) / 255` rounded, as Pillow |
//! | CMYK TIFF | the same formula, not inverted and not rounded (the `image` crate's: at most 1 below Pillow) |
//! | colour profile | ignored |
//! | animation | first frame |
//! | truncated file | an error, as in Pillow |
//! | pixels | above [`Limits::max_pixels`] an error, from the header, before any allocation |
//!
//! With the feature `mozjpeg` (default) JPEG pixels equal Pillow's bit for bit. Without it the pure-Rust decoder of
//! the `image` crate is used, and 4:2:0 photos differ from Pillow's by a few levels. [`Preprocessor::tag`] tells which.
//!
//! This module knows nothing of tensors, models or candle.

mod config;
mod decode;
mod jpeg;
mod naflex;
mod pillow;
mod preprocess;
mod resize;

use std::io;
use std::path::{Path, PathBuf};

use ::image::ImageEncoder;

pub use config::ConfigError;
pub use decode::decode;
pub use jpeg::DECODER as JPEG_DECODER;
pub use naflex::Naflex;
pub use preprocess::Preprocessor;
pub use resize::{Resample, ResizeMode};

/// What went wrong, and with which file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be opened or read.
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file was read but holds no image that can be used.
    #[error("{}: {kind}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        kind: ErrorKind,
    },
    /// The file could not be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The system's or the encoder's reason.
        source: io::Error,
    },
    /// A `preprocessor_config.json` that cannot be used.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The reason, naming the key.
        source: ConfigError,
    },
}

/// Why bytes or pixels cannot be used, whatever file they came from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ErrorKind {
    /// No bytes at all.
    #[error("the file is empty")]
    EmptyFile,
    /// The content has none of the known signatures.
    #[error("not a JPEG, PNG, WebP, BMP, GIF or TIFF image (the content decides, not the name)")]
    NotAnImage,
    /// The content ends before the image does.
    #[error("the image is truncated")]
    Truncated,
    /// A width or height of zero.
    #[error("the image has no pixels: {width}x{height}")]
    EmptyImage {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// More pixels than the limit, in the file or on the way to the encoder's size.
    #[error("too many pixels: {width}x{height}, limit: {limit}")]
    TooManyPixels {
        /// Width in pixels.
        width: u64,
        /// Height in pixels.
        height: u64,
        /// The limit on their product.
        limit: u64,
    },
    /// The decoder refused the content.
    #[error("cannot be decoded: {0}")]
    Decode(String),
    /// A buffer that does not hold its image.
    #[error("{width}x{height} RGB pixels need {} bytes, got: {got}", 3 * width * height)]
    WrongLength {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Length of the buffer in bytes.
        got: usize,
    },
    /// An image that cannot be brought to the preprocessor's size.
    #[error("cannot be brought to {}x{} (width x height) by {mode}: {reason}", size.1, size.0)]
    Resize {
        /// Height and width wanted.
        size: (usize, usize),
        /// The mode asked for.
        mode: ResizeMode,
        /// What stands in the way.
        reason: String,
    },
}

/// An 8-bit RGB image: interleaved, row by row from the top left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `3 · width · height` bytes.
    pub data: Vec<u8>,
}

impl Rgb {
    /// Checks that there is at least one pixel and that `data` holds them all.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Result<Self, ErrorKind> {
        let image = Self { width, height, data };
        image.check().map(|()| image)
    }

    /// The fields are public, so whoever computes with their sizes asks again.
    fn check(&self) -> Result<(), ErrorKind> {
        let Self { width, height, ref data } = *self;
        if width == 0 || height == 0 {
            return Err(ErrorKind::EmptyImage { width, height });
        }
        let expected = width.checked_mul(height).and_then(|n| n.checked_mul(3));
        if expected != Some(data.len()) {
            return Err(ErrorKind::WrongLength { width, height, got: data.len() });
        }
        Ok(())
    }
}

/// Bounds on what a file may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most pixels (width × height) of one image. Default: 178,956,970, where Pillow too calls an image a
    /// decompression bomb.
    pub max_pixels: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_pixels: 2 * 89_478_485 }
    }
}

impl Limits {
    fn check(&self, width: u64, height: u64) -> Result<(), ErrorKind> {
        match width.checked_mul(height) {
            Some(pixels) if pixels <= self.max_pixels => Ok(()),
            _ => Err(ErrorKind::TooManyPixels { width, height, limit: self.max_pixels }),
        }
    }
}

/// Reads and [`decode`]s a file.
pub fn open(path: &Path, limits: &Limits) -> Result<Rgb, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Unreadable { path: path.into(), source })?;
    decode(&bytes, limits).map_err(|kind| Error::Image { path: path.into(), kind })
}

/// Writes a PNG to a temporary sibling and renames it: the file appears whole or not at all.
pub fn save_png(path: &Path, image: &Rgb) -> Result<(), Error> {
    write_png(path, image).map_err(|source| Error::Unwritable { path: path.into(), source })
}

/// A JPEG of a quality from 1 to 100, for a page or a preview: no code is ever made of it.
///
/// # Errors
/// If the image has no pixels, or more on a side than a JPEG can have.
pub fn encode_jpeg(image: &Rgb, quality: u8) -> io::Result<Vec<u8>> {
    image.check().map_err(io::Error::other)?;
    let too_large = |_| io::Error::other("a JPEG has at most 65,535 pixels a side");
    let width = u16::try_from(image.width).map_err(too_large)?;
    let height = u16::try_from(image.height).map_err(too_large)?;
    let mut bytes = Vec::new();
    ::image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100))
        .write_image(&image.data, width.into(), height.into(), ::image::ExtendedColorType::Rgb8)
        .map_err(io::Error::other)?;
    Ok(bytes)
}

fn write_png(path: &Path, image: &Rgb) -> io::Result<()> {
    image.check().map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    let (width, height) = (image.width as u32, image.height as u32);
    ::image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(&image.data, width, height, ::image::ExtendedColorType::Rgb8)
        .map_err(io::Error::other)?;
    crate::files::write_whole(path, &bytes)
}
