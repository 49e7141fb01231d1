//! JPEG: libjpeg's arithmetic, bit for bit as Pillow (feature `mozjpeg`), or the `image` crate's pure-Rust decoder.

pub(super) use decoder::decode;

/// The JPEG decoder of this build, as a manifest records it: codes depend on it.
pub const DECODER: &str = if cfg!(feature = "mozjpeg") { "mozjpeg" } else { "zune" };

#[cfg(feature = "mozjpeg")]
mod decoder {
    use std::cell::Cell;
    use std::io::{self, BufRead, Read};
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use image::metadata::Orientation;
    use image::{DynamicImage, RgbImage};
    use mozjpeg::{ColorSpace, Decompress, Marker};

    use crate::image::decode::{orientation_of, panic_message};
    use crate::image::{ErrorKind, Limits};

    /// Pixels and orientation of a JPEG. Past the end of the bytes lies an error, not a made-up end marker.
    pub(in crate::image) fn decode(bytes: &[u8], limits: &Limits) -> Result<(DynamicImage, Orientation), ErrorKind> {
        let ran_dry = Cell::new(false);
        let source = Source { rest: bytes, ran_dry: &ran_dry };
        // libjpeg's fatal errors come as unwinding, past the panic hook: nothing is printed.
        let decoded = catch_unwind(AssertUnwindSafe(|| decompress(source, limits)))
            .unwrap_or_else(|payload| Err(ErrorKind::Decode(panic_message(payload.as_ref()))));
        decoded.map_err(|kind| if ran_dry.get() { ErrorKind::Truncated } else { kind })
    }

    fn decompress(source: Source<'_>, limits: &Limits) -> Result<(DynamicImage, Orientation), ErrorKind> {
        const APP1: &[Marker] = &[Marker::APP(1)];
        let header = Decompress::with_markers(APP1).from_reader(source).map_err(refused)?;
        let (width, height) = header.size();
        limits.check(width as u64, height as u64)?;
        let orientation = orientation(&header);
        let pixels = match header.color_space() {
            ColorSpace::JCS_CMYK | ColorSpace::JCS_YCCK => {
                let mut lines = header.to_colorspace(ColorSpace::JCS_CMYK).map_err(refused)?;
                adobe_cmyk_to_rgb(&lines.read_scanlines::<u8>().map_err(refused)?)
            }
            _ => header.rgb().map_err(refused)?.read_scanlines::<u8>().map_err(refused)?,
        };
        // No finish(): like Pillow, ask for nothing after the last row.
        let image = RgbImage::from_raw(width as u32, height as u32, pixels).ok_or(ErrorKind::Truncated)?;
        Ok((DynamicImage::ImageRgb8(image), orientation))
    }

    fn orientation(header: &Decompress<Source<'_>>) -> Orientation {
        let app1 = |prefix: &[u8]| header.markers().find_map(|marker| marker.data.strip_prefix(prefix));
        orientation_of(app1(b"Exif\0\0"), app1(b"http://ns.adobe.com/xap/1.0/\0"))
    }

    /// Adobe stores 255 − ink, so the products below are `(255 − ink)(255 − black) / 255`.
    fn adobe_cmyk_to_rgb(cmyk: &[u8]) -> Vec<u8> {
        cmyk.as_chunks::<4>().0.iter().flat_map(|&[c, m, y, k]| [c, m, y].map(|v| multiply(v, k))).collect()
    }

    /// `round(a · b / 255)` by shift and add, as Pillow's `MULDIV255`.
    fn multiply(a: u8, b: u8) -> u8 {
        let product = u32::from(a) * u32::from(b) + 128;
        (((product >> 8) + product) >> 8) as u8
    }

    fn refused(error: io::Error) -> ErrorKind {
        ErrorKind::Decode(error.to_string())
    }

    /// The bytes of the file. mozjpeg turns a clean end of input into a warning and grey pixels, as libjpeg does;
    /// an error of any other kind stops it, so that is what this reader gives.
    struct Source<'a> {
        rest: &'a [u8],
        ran_dry: &'a Cell<bool>,
    }

    impl BufRead for Source<'_> {
        fn fill_buf(&mut self) -> io::Result<&[u8]> {
            if self.rest.is_empty() {
                self.ran_dry.set(true);
                return Err(io::Error::other("the image is truncated"));
            }
            Ok(self.rest)
        }

        fn consume(&mut self, amount: usize) {
            self.rest = &self.rest[amount..];
        }
    }

    impl Read for Source<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let amount = self.fill_buf()?.read(buffer)?;
            self.consume(amount);
            Ok(amount)
        }
    }
}

#[cfg(not(feature = "mozjpeg"))]
mod decoder {
    use std::io::Cursor;

    use image::DynamicImage;
    use image::codecs::jpeg::JpegDecoder;
    use image::metadata::Orientation;

    use crate::image::decode::{error_kind, read};
    use crate::image::{ErrorKind, Limits};

    /// Pixels and orientation of a JPEG.
    pub(in crate::image) fn decode(bytes: &[u8], limits: &Limits) -> Result<(DynamicImage, Orientation), ErrorKind> {
        let decoder = JpegDecoder::new(Cursor::new(bytes)).map_err(error_kind);
        match decoder.and_then(|decoder| read(decoder, limits)) {
            // This decoder fills what is missing with grey and says nothing.
            Ok(_) | Err(ErrorKind::Decode(_)) if !has_end_marker(bytes) => Err(ErrorKind::Truncated),
            decoded => decoded,
        }
    }

    /// Walks the segments to the end-of-image marker. Thumbnails have one too, but inside a segment.
    fn has_end_marker(bytes: &[u8]) -> bool {
        const START_OF_IMAGE: u8 = 0xD8;
        const END_OF_IMAGE: u8 = 0xD9;
        let mut at = 0;
        while let (Some(&lead), Some(&marker)) = (bytes.get(at), bytes.get(at + 1)) {
            at += match (lead, marker) {
                (0xFF, END_OF_IMAGE) => return true,
                (0xFF, 0x00 | 0x01 | 0xD0..=START_OF_IMAGE) => 2,
                (0xFF, 0x02..=0xFE) => match bytes.get(at + 2..at + 4) {
                    Some(&[high, low]) => 2 + usize::from(u16::from_be_bytes([high, low])),
                    _ => return false,
                },
                _ => 1,
            };
        }
        false
    }
}
