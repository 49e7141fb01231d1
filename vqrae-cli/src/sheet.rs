//! A contact sheet: original, reconstruction and what differs, side by side for many images.

use vqrae::image::Rgb;

/// Images on one sheet; what is more is left out, and said so.
pub(crate) const MOST: usize = 32;

/// Images on one sheet where each stands alone.
pub(crate) const MOST_ALONE: usize = 64;

/// White pixels between the images of one triplet, and around each triplet.
const GAP: usize = 4;

/// Differences are shown this many times as large.
const GAIN: u32 = 4;

/// Lays out triplets of original, reconstruction and error, several across, in cells of the largest image; `None` for no
/// images.
pub(crate) fn compose(pairs: &[(Rgb, Rgb)]) -> Option<Rgb> {
    let h = pairs.iter().map(|(_, reconstruction)| reconstruction.height).max()?;
    let w = pairs.iter().map(|(_, reconstruction)| reconstruction.width).max()?;
    // Half as many across as down, square, makes about a landscape page of triplets.
    let across = ((pairs.len() as f64 / 2.0).sqrt().round() as usize).max(1);
    let (triplet, row) = (3 * (w + GAP) + GAP, h + 2 * GAP);
    let (width, height) = (across * triplet, pairs.len().div_ceil(across) * row);
    let mut sheet = Rgb { width, height, data: vec![255; 3 * width * height] };
    for (i, (original, reconstruction)) in pairs.iter().enumerate() {
        let (x, y) = (i % across * triplet + GAP, i / across * row + GAP);
        let error = error_map(original, reconstruction);
        for (cell, image) in [original, reconstruction, &error].into_iter().enumerate() {
            paste(&mut sheet, image, x + cell * (w + GAP), y);
        }
    }
    Some(sheet)
}

/// Lays out images row by row, about as many across as down; `None` for no images.
pub(crate) fn grid(images: &[Rgb]) -> Option<Rgb> {
    let h = images.iter().map(|image| image.height).max()? + GAP;
    let w = images.iter().map(|image| image.width).max()? + GAP;
    let across = (images.len() as f64).sqrt().ceil() as usize;
    let (width, height) = (across * w + GAP, images.len().div_ceil(across) * h + GAP);
    let mut sheet = Rgb { width, height, data: vec![255; 3 * width * height] };
    for (i, image) in images.iter().enumerate() {
        paste(&mut sheet, image, i % across * w + GAP, i / across * h + GAP);
    }
    Some(sheet)
}

/// Copies `image` onto `sheet`, its top left pixel at `x`, `y`.
pub(crate) fn paste(sheet: &mut Rgb, image: &Rgb, x: usize, y: usize) {
    for (i, line) in image.data.chunks_exact(3 * image.width).enumerate() {
        let at = 3 * ((y + i) * sheet.width + x);
        sheet.data[at..at + line.len()].copy_from_slice(line);
    }
}

/// The mean absolute difference of the channels, from black through red and yellow to white.
pub(crate) fn error_map(a: &Rgb, b: &Rgb) -> Rgb {
    let pixels = a.data.as_chunks::<3>().0.iter().zip(b.data.as_chunks::<3>().0);
    let heat = |(a, b): (&[u8; 3], &[u8; 3])| {
        let sum: u32 = a.iter().zip(b).map(|(&a, &b)| u32::from(a.abs_diff(b))).sum();
        let level = (GAIN * sum).min(3 * 255);
        [0, 255, 510].map(|start| level.saturating_sub(start).min(255) as u8)
    };
    Rgb { width: b.width, height: b.height, data: pixels.flat_map(heat).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(width: usize, height: usize, value: u8) -> Rgb {
        Rgb { width, height, data: vec![value; 3 * width * height] }
    }

    #[test]
    fn a_sheet_holds_images_of_several_sizes() {
        let pairs = [(plain(5, 3, 10), plain(5, 3, 20)), (plain(2, 7, 10), plain(2, 7, 20))];
        let sheet = compose(&pairs).expect("a sheet");
        let pixels = sheet.data.as_chunks::<3>().0;
        for value in [[10; 3], [20; 3], [120, 0, 0]] {
            assert_eq!(pixels.iter().filter(|&&pixel| pixel == value).count(), 15 + 14, "{value:?}");
        }
    }

    #[test]
    fn a_sheet_holds_every_pair_with_gaps() {
        assert!(compose(&[]).is_none());
        for count in 1..=MOST {
            let pairs: Vec<_> = (0..count).map(|_| (plain(5, 3, 10), plain(5, 3, 20))).collect();
            let sheet = compose(&pairs).expect("a sheet");
            let pixels = sheet.data.as_chunks::<3>().0;
            for value in [[10; 3], [20; 3], [120, 0, 0]] {
                assert_eq!(pixels.iter().filter(|&&pixel| pixel == value).count(), count * 15, "{value:?} of {count}");
            }
            assert!(pixels[..sheet.width].iter().all(|&pixel| pixel == [255; 3]));
        }
    }
}
