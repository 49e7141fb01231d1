//! Several crops of one image, mirrored too, each tokenized by itself: what a generator is trained on in place of one.

use anyhow::{Result, bail};
use clap::Args;
use vqrae::image::{ErrorKind, Preprocessor, ResizeMode, Rgb};

use crate::view::View;

/// Which crops.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct CropArgs {
    /// Tokenize every image as it is and mirrored: two rows an image
    #[arg(long)]
    flip: bool,
    /// Tokenize ten crops of every image, the corners and the centre and each of them mirrored, in torchvision's order: ten
    /// rows an image, as LlamaGen trains on
    #[arg(long, alias = "ten_crop", conflicts_with = "flip")]
    ten_crop: bool,
    /// How much larger than a crop the image is that ten are cut from
    #[arg(long, alias = "crop_range", value_name = "R", default_value = "1.1", value_parser = parse_range)]
    crop_range: f64,
}

fn parse_range(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|range| (1.0..=8.0).contains(range)).ok_or("expected: a number from 1 to 8".to_string())
}

/// One crop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Crop {
    place: Place,
    flip: bool,
    /// How much larger the image is that it is cut from.
    pub(crate) range: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    TopLeft,
    TopRight,
    BottomLeft,
    BottomRight,
    Centre,
}

impl CropArgs {
    /// All crops of each view; the views themselves if none are asked for.
    ///
    /// # Errors
    /// If images have no common size to crop to.
    pub(crate) fn of(&self, views: Vec<View>) -> Result<Vec<View>> {
        let crops = self.crops();
        if crops.is_empty() {
            return Ok(views);
        }
        let unsuited = |view: &View| {
            let preprocessor = &view.preprocessor;
            let size = preprocessor.size;
            preprocessor.resize_mode == ResizeMode::Naflex || !preprocessor.do_resize || view.painted(size) != size
        };
        if views.iter().any(unsuited) {
            bail!("--flip and --ten-crop need images of one size, painted at that size; leave them out for this model");
        }
        let each =
            |view: View| crops.iter().map(move |crop| View { crop: Some(*crop), ..view.clone() }).collect::<Vec<_>>();
        Ok(views.into_iter().flat_map(each).collect())
    }

    fn crops(&self) -> Vec<Crop> {
        use Place::{BottomLeft, BottomRight, Centre, TopLeft, TopRight};
        let (places, range): (&[Place], f64) = match (self.ten_crop, self.flip) {
            (true, _) => (&[TopLeft, TopRight, BottomLeft, BottomRight, Centre], self.crop_range),
            (_, true) => (&[Centre], 1.0),
            _ => return Vec::new(),
        };
        [false, true].iter().flat_map(|&flip| places.iter().map(move |&place| Crop { place, flip, range })).collect()
    }

    /// What a manifest says of them.
    pub(crate) fn names(&self) -> Vec<String> {
        match (self.ten_crop, self.flip) {
            (true, _) => vec![format!("ten-crop-{}", self.crop_range)],
            (_, true) => vec!["flip".to_string()],
            _ => Vec::new(),
        }
    }
}

impl Crop {
    /// What rows and files are marked with: `top-left`, `centre-flip`.
    pub(crate) fn name(&self) -> String {
        let place = match self.place {
            Place::TopLeft => "top-left",
            Place::TopRight => "top-right",
            Place::BottomLeft => "bottom-left",
            Place::BottomRight => "bottom-right",
            Place::Centre => "centre",
        };
        format!("{place}{}", if self.flip { "-flip" } else { "" })
    }

    /// The crop of an image, at the size that a model takes.
    pub(crate) fn prepare(&self, image: &Rgb, preprocessor: &Preprocessor) -> Result<Rgb, ErrorKind> {
        let (h, w) = preprocessor.size;
        let grown = |side: usize| (side as f64 * self.range) as usize;
        let larger = preprocessor.at((grown(h), grown(w))).prepare(image)?;
        let (down, right) = (larger.height.saturating_sub(h), larger.width.saturating_sub(w));
        let (top, left) = match self.place {
            Place::TopLeft => (0, 0),
            Place::TopRight => (0, right),
            Place::BottomLeft => (down, 0),
            Place::BottomRight => (down, right),
            Place::Centre => (down.div_ceil(2), right.div_ceil(2)),
        };
        let mut data = Vec::with_capacity(3 * h * w);
        for y in top..top + h {
            let row = larger.data.get(3 * (y * larger.width + left)..).and_then(|row| row.get(..3 * w));
            let row = row.unwrap_or_default();
            match self.flip {
                true => row.rchunks_exact(3).for_each(|pixel| data.extend_from_slice(pixel)),
                false => data.extend_from_slice(row),
            }
        }
        Rgb::new(w, h, data)
    }
}

#[cfg(test)]
mod tests {
    use vqrae::image::Resample;

    use super::*;

    /// A picture whose red tells the column and whose green tells the row.
    fn ramp(width: usize, height: usize) -> Rgb {
        let data = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 0])).collect();
        Rgb { width, height, data }
    }

    #[test]
    fn ten_crops_are_the_corners_and_the_centre_then_mirrored() {
        let args = CropArgs { flip: false, ten_crop: true, crop_range: 1.5 };
        let preprocessor = Preprocessor::siglip(4, Resample::Bilinear);
        // Of 6 x 6 nothing is resized.
        let first = |crop: &Crop| {
            let cut = crop.prepare(&ramp(6, 6), &preprocessor).unwrap();
            assert_eq!((cut.width, cut.height), (4, 4));
            (cut.data[0], cut.data[1])
        };
        let corners: Vec<_> = args.crops().iter().map(first).collect();
        assert_eq!(corners, [(0, 0), (2, 0), (0, 2), (2, 2), (1, 1), (3, 0), (5, 0), (3, 2), (5, 2), (4, 1)]);
        let names: Vec<_> = args.crops().iter().map(Crop::name).collect();
        assert_eq!((names[0].as_str(), names[9].as_str()), ("top-left", "centre-flip"));
    }

    #[test]
    fn an_image_as_it_is_and_mirrored() {
        let args = CropArgs { flip: true, ten_crop: false, crop_range: 1.1 };
        let preprocessor = Preprocessor::siglip(4, Resample::Bilinear);
        let [plain, mirrored] = [0, 1].map(|i| args.crops()[i].prepare(&ramp(4, 4), &preprocessor).unwrap());
        assert_eq!(plain, ramp(4, 4));
        assert_eq!(mirrored.data[..12].chunks(3).map(|pixel| pixel[0]).collect::<Vec<_>>(), [3, 2, 1, 0]);
    }
}
