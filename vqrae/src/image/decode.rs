//! From the bytes of a file to upright 8-bit RGB. The rules stand in the [module's table](super).

use std::any::Any;
use std::io::{self, Cursor};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};

use super::{ErrorKind, Limits, Rgb, jpeg};

/// Decodes an image of any supported format, applies its orientation and converts it to RGB.
///
/// Bad input of any kind is an error, never a panic.
pub fn decode(bytes: &[u8], limits: &Limits) -> Result<Rgb, ErrorKind> {
    if bytes.is_empty() {
        return Err(ErrorKind::EmptyFile);
    }
    // A hostile file must not take a whole run with it, should a decoder ever panic.
    catch_unwind(AssertUnwindSafe(|| decode_any(bytes, limits)))
        .unwrap_or_else(|payload| Err(ErrorKind::Decode(panic_message(payload.as_ref()))))
}

fn decode_any(bytes: &[u8], limits: &Limits) -> Result<Rgb, ErrorKind> {
    let (mut image, orientation) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => jpeg::decode(bytes, limits)?,
        Ok(
            format @ (ImageFormat::Png | ImageFormat::WebP | ImageFormat::Bmp | ImageFormat::Gif | ImageFormat::Tiff),
        ) => decode_other(bytes, format, limits)?,
        _ => return Err(ErrorKind::NotAnImage),
    };
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    Rgb::new(width, height, into_rgb(image))
}

fn decode_other(bytes: &[u8], format: ImageFormat, limits: &Limits) -> Result<(DynamicImage, Orientation), ErrorKind> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(decoder_limits(limits));
    read(reader.into_decoder().map_err(error_kind)?, limits)
}

/// Checks the header's size, then reads pixels and orientation.
pub(super) fn read(mut decoder: impl ImageDecoder, limits: &Limits) -> Result<(DynamicImage, Orientation), ErrorKind> {
    let (width, height) = decoder.dimensions();
    limits.check(width.into(), height.into())?;
    let orientation = match decoder.orientation() {
        Ok(Orientation::NoTransforms) | Err(_) => {
            let exif = decoder.exif_metadata().ok().flatten();
            let xmp = decoder.xmp_metadata().ok().flatten();
            orientation_of(exif.as_deref(), xmp.as_deref())
        }
        Ok(orientation) => orientation,
    };
    Ok((DynamicImage::from_decoder(decoder).map_err(error_kind)?, orientation))
}

/// Room for the largest allowed image at 16-bit RGBA, twice, whatever sizes are written inside the file.
fn decoder_limits(limits: &Limits) -> image::Limits {
    const BYTES_PER_PIXEL: u64 = 16;
    const SMALL_FILES: u64 = 64 << 20;
    let mut bounds = image::Limits::no_limits();
    bounds.max_alloc = Some(limits.max_pixels.saturating_mul(BYTES_PER_PIXEL).saturating_add(SMALL_FILES));
    bounds
}

/// Orientation from EXIF, or else from XMP, in Pillow's order.
pub(super) fn orientation_of(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    exif.and_then(Orientation::from_exif_chunk)
        .or_else(|| xmp.and_then(xmp_orientation))
        .unwrap_or(Orientation::NoTransforms)
}

/// The digit of `tiff:Orientation="6"` or `<tiff:Orientation>6`.
fn xmp_orientation(xmp: &[u8]) -> Option<Orientation> {
    const TAG: &[u8] = b"tiff:Orientation";
    let after = xmp.windows(TAG.len()).position(|window| window == TAG)? + TAG.len();
    let rest = &xmp[after..];
    let value = rest.strip_prefix(b"=\"").or_else(|| rest.strip_prefix(b">"))?;
    Orientation::from_exif(value.first()?.checked_sub(b'0')?)
}

fn into_rgb(image: DynamicImage) -> Vec<u8> {
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        image if image.color().has_alpha() => composite_on_white(&image.into_rgba8()),
        image => image.into_rgb8().into_raw(),
    }
}

fn composite_on_white(rgba: &[u8]) -> Vec<u8> {
    rgba.as_chunks::<4>()
        .0
        .iter()
        .flat_map(|&[r, g, b, a]| [over_white(r, a), over_white(g, a), over_white(b, a)])
        .collect()
}

/// `colour · alpha + 255 · (1 − alpha)` with the rounding of Pillow's `alpha_composite` on an opaque background:
/// 7 extra bits, and the shift-and-add division by 255.
fn over_white(colour: u8, alpha: u8) -> u8 {
    const EXTRA_BITS: u32 = 7;
    let own = u32::from(alpha) << EXTRA_BITS;
    let white = (255 << EXTRA_BITS) - own;
    let sum = u32::from(colour) * own + 255 * white + (0x80 << EXTRA_BITS);
    ((((sum >> 8) + sum) >> 8) >> EXTRA_BITS) as u8
}

/// Tells a file that ends too early from one that is wrong inside.
pub(super) fn error_kind(error: ImageError) -> ErrorKind {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::UnexpectedEof
        {
            return ErrorKind::Truncated;
        }
        cause = current.source();
    }
    // png's error prints its io::Error but does not hand it out.
    match error.to_string() {
        message if message.contains("unexpected end of file") => ErrorKind::Truncated,
        message => ErrorKind::Decode(message),
    }
}

pub(super) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let message = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    message.unwrap_or("the decoder failed").trim_start_matches("libjpeg fatal error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PIL.Image.alpha_composite(white, Image.new("RGBA", (1, 1), (v, v, v, a))).getpixel((0, 0))[0]`
    #[test]
    fn alpha_is_composited_on_white_as_pillow_does() {
        for (colour, alpha, expected) in
            [(0, 255, 0), (0, 0, 255), (0, 128, 127), (100, 1, 254), (37, 77, 189), (255, 9, 255)]
        {
            assert_eq!(over_white(colour, alpha), expected, "colour {colour}, alpha {alpha}");
        }
    }

    #[test]
    fn xmp_orientation_is_read_in_both_spellings() {
        assert_eq!(xmp_orientation(b"<x tiff:Orientation=\"6\"/>"), Some(Orientation::Rotate90));
        assert_eq!(xmp_orientation(b"<tiff:Orientation>3<"), Some(Orientation::Rotate180));
        assert_eq!(xmp_orientation(b"tiff:Orientation"), None);
        assert_eq!(xmp_orientation(b"tiff:Orientation=\"!\""), None);
    }
}
