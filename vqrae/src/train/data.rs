//! Photos for training: which ones make up a step is a pure function of (seed, step), so that resuming needs no state.

mod photos;

pub use photos::Photos;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::image::{self, Preprocessor, ResizeMode, Rgb};
use crate::{model, vit};

/// The order of the epoch at hand.
#[derive(Debug)]
struct Order {
    seed: u64,
    epoch: Option<usize>,
    photos: Vec<usize>,
}

impl Order {
    /// The photo, of `n`, that stands at `position` of an endless sequence of shuffled epochs.
    fn at(&mut self, position: usize, n: usize) -> usize {
        if self.epoch != Some(position / n) {
            self.photos = (0..n).collect();
            self.photos.shuffle(&mut generator(self.seed, "epoch", position / n));
            self.epoch = Some(position / n);
        }
        self.photos[position % n]
    }
}

/// Which of `count` sizes the images of a step have.
pub fn bucket(seed: u64, step: usize, count: usize) -> usize {
    if count < 2 { 0 } else { generator(seed, "bucket", step).random_range(0..count) }
}

/// A generator for one purpose and one index of it.
pub(super) fn generator(seed: u64, purpose: &str, index: usize) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(&(index as u64).to_le_bytes()).update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// The sizes (height, width) of what the encoder is given and of what the decoder is to paint. They differ where a token
/// paints another patch than it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// The encoder's.
    pub input: (usize, usize),
    /// The decoder's.
    pub target: (usize, usize),
}

impl Sizes {
    /// For images of `input` pixels.
    ///
    /// # Errors
    /// If they do not divide into the encoder's patches.
    pub fn of(input: (usize, usize), config: &model::Config) -> Result<Self> {
        let (h, w) = vit::grid(input.0, input.1, config.encoder.patch())?;
        let patch = config.decoder.sizes(&config.encoder).patch;
        Ok(Self { input, target: (h * patch, w * patch) })
    }

    /// The larger one, which crops have.
    pub fn crop(&self) -> (usize, usize) {
        self.input.max(self.target)
    }

    /// Both views of one crop, resampled as `preprocessor` does.
    pub fn views(&self, crop: Rgb, preprocessor: &Preprocessor) -> std::result::Result<Views, image::ErrorKind> {
        let view = |size: (usize, usize)| match size == self.crop() {
            true => Ok(crop.clone()),
            false => Preprocessor { size, resize_mode: ResizeMode::Squash, ..preprocessor.clone() }.prepare(&crop),
        };
        Ok(Views { input: view(self.input)?, target: view(self.target)? })
    }
}

/// A crop as the encoder is given it and as the decoder is to paint it.
#[derive(Debug, Clone)]
pub struct Views {
    /// The encoder's.
    pub input: Rgb,
    /// The decoder's.
    pub target: Rgb,
}

/// A window of random area and aspect ratio, as torchvision's `RandomResizedCrop` draws it; it is then resized to the crop's
/// size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResizedCrop {
    /// Least and largest share of the photo's area.
    pub scale: [f64; 2],
    /// Least and largest width over height, for a square crop; for others times the crop's own.
    pub ratio: [f64; 2],
}

impl Default for ResizedCrop {
    fn default() -> Self {
        Self { scale: [0.08, 1.0], ratio: [3.0 / 4.0, 4.0 / 3.0] }
    }
}

impl ResizedCrop {
    /// Whether the numbers make sense; the error names the key.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let rises = |[low, high]: [f64; 2]| low > 0.0 && low <= high && high.is_finite();
        if !rises(self.scale) || self.scale[1] > 1.0 {
            return Err(format!(
                "train.crop.scale is {:?}, expected: two shares of the area, the smaller first",
                self.scale
            ));
        }
        if !rises(self.ratio) {
            return Err(format!(
                "train.crop.ratio is {:?}, expected: two numbers above 0, the smaller first",
                self.ratio
            ));
        }
        Ok(())
    }

    /// Top, left, height and width of a window in a photo for a crop of `crop` pixels. Where ten draws do not fit, the largest
    /// window in the middle.
    fn window(&self, photo: (usize, usize), crop: (usize, usize), random: &mut ChaCha8Rng) -> [usize; 4] {
        let (height, width) = photo;
        let own = crop.1 as f64 / crop.0 as f64;
        let [low, high] = self.ratio.map(|ratio| (ratio * own).ln());
        for _ in 0..10 {
            let area = (height * width) as f64 * random.random_range(self.scale[0]..=self.scale[1]);
            let ratio = random.random_range(low..=high).exp();
            let (w, h) = ((area * ratio).sqrt().round() as usize, (area / ratio).sqrt().round() as usize);
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                return [random.random_range(0..=height - h), random.random_range(0..=width - w), h, w];
            }
        }
        let w = width.min((height as f64 * own).round() as usize).max(1);
        let h = height.min((width as f64 / own).round() as usize).max(1);
        [(height - h) / 2, (width - w) / 2, h, w]
    }
}

/// Random crops, half of them mirrored, of a [`Photos`].
#[derive(Debug)]
pub struct Crops<'a> {
    photos: &'a Photos,
    preprocessor: &'a Preprocessor,
    resized: Option<ResizedCrop>,
    order: Order,
}

/// One photo that could not be used.
#[derive(Debug, Clone)]
pub struct Skipped {
    /// The photo and the reason.
    pub reason: String,
}

/// Several crops, normalised.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The sizes of all of them.
    pub sizes: Sizes,
    /// For the encoder, `[B, 3, H, W]` in one vector.
    pub inputs: Vec<f32>,
    /// For the decoder to paint, `[B, 3, H', W']`; empty where its size is the encoder's, for these are then the inputs.
    pub targets: Vec<f32>,
    /// Which photos they are of, by their places in the list.
    pub photos: Vec<usize>,
    /// Photos that could not be used.
    pub skipped: Vec<Skipped>,
}

/// One crop, and which photo it is of.
struct Normalized {
    photo: usize,
    input: Vec<f32>,
    /// Empty where it is the input.
    target: Vec<f32>,
}

impl<'a> Crops<'a> {
    /// Crops of photos whose short side is brought to the crop's, or `resized` ones.
    pub fn new(photos: &'a Photos, preprocessor: &'a Preprocessor, resized: Option<ResizedCrop>, seed: u64) -> Self {
        Self { photos, preprocessor, resized, order: Order { seed, epoch: None, photos: Vec::new() } }
    }

    /// The crops of these sizes at positions `first .. first + count`. A photo that cannot be used is replaced by the next of
    /// the order, and told.
    pub fn batch(&mut self, first: usize, count: usize, sizes: Sizes) -> Result<Batch> {
        let (inputs, targets, skipped) = Default::default();
        let mut batch = Batch { sizes, inputs, targets, photos: Vec::with_capacity(count), skipped };
        let photos: Vec<_> = (first..first + count).map(|at| (at, self.order.at(at, self.photos.len()))).collect();
        // Decoded and normalised on all threads; what cannot be used is replaced afterwards, in order.
        let attempts: Vec<_> = photos.into_par_iter().map(|(at, photo)| self.prepare(at, photo, sizes)).collect();
        for (position, attempt) in (first..).zip(attempts) {
            let crop = match attempt {
                Ok(crop) => crop,
                Err(error) => {
                    batch.skipped.push(Skipped { reason: error.to_string() });
                    self.replace(position, sizes, &mut batch.skipped)?
                }
            };
            batch.photos.push(crop.photo);
            batch.inputs.extend(crop.input);
            batch.targets.extend(crop.target);
        }
        Ok(batch)
    }

    /// The next photo of the order that can be used, after the one at `position`, which could not.
    fn replace(&mut self, position: usize, sizes: Sizes, skipped: &mut Vec<Skipped>) -> Result<Normalized> {
        for attempt in 1..self.photos.len() {
            let photo = self.order.at(position + attempt, self.photos.len());
            match self.prepare(position, photo, sizes) {
                Ok(crop) => return Ok(crop),
                Err(error) => skipped.push(Skipped { reason: error.to_string() }),
            }
        }
        Err(Error::Training(format!("not one photo of {} can be used", self.photos.asked())))
    }

    /// The crop of a photo that the position draws.
    fn prepare(&self, position: usize, photo: usize, sizes: Sizes) -> Result<Normalized> {
        let mut random = generator(self.order.seed, "crop", position);
        let Views { input, target } = self.crop(photo, &self.photos.open(photo)?, sizes, &mut random)?;
        let normalized = |image: &Rgb| self.preprocessor.normalize(image);
        let target = if sizes.input == sizes.target { Vec::new() } else { normalized(&target) };
        Ok(Normalized { photo, input: normalized(&input), target })
    }

    /// A random window, mirrored half of the time.
    fn crop(&self, photo: usize, image: &Rgb, sizes: Sizes, random: &mut ChaCha8Rng) -> Result<Views> {
        let crop = match self.resized {
            Some(resized) => {
                let [top, left, h, w] = resized.window((image.height, image.width), sizes.crop(), random);
                let mirrored = random.random::<bool>();
                self.resize(&window(image, top, left, (h, w), mirrored), sizes.crop())
            }
            None => self.short_side(image, sizes.crop(), random),
        };
        let views = |crop: Rgb| sizes.views(crop, self.preprocessor);
        crop.and_then(views).map_err(|kind| self.photos.unusable(photo, kind))
    }

    /// The short side to the crop's, then a window.
    fn short_side(
        &self,
        image: &Rgb,
        (h, w): (usize, usize),
        random: &mut ChaCha8Rng,
    ) -> std::result::Result<Rgb, image::ErrorKind> {
        let factor = (h as f64 / image.height as f64).max(w as f64 / image.width as f64);
        let scaled = |side: usize, least: usize| ((side as f64 * factor).round() as usize).max(least);
        let image = self.resize(image, (scaled(image.height, h), scaled(image.width, w)))?;
        let top = random.random_range(0..=image.height - h);
        let left = random.random_range(0..=image.width - w);
        let mirrored = random.random::<bool>();
        Ok(window(&image, top, left, (h, w), mirrored))
    }

    fn resize(&self, image: &Rgb, size: (usize, usize)) -> std::result::Result<Rgb, image::ErrorKind> {
        if size == (image.height, image.width) {
            return Ok(image.clone());
        }
        Preprocessor { size, resize_mode: ResizeMode::Squash, ..self.preprocessor.clone() }.prepare(image)
    }
}

fn window(image: &Rgb, top: usize, left: usize, (h, w): (usize, usize), mirrored: bool) -> Rgb {
    let mut data = Vec::with_capacity(h * w * 3);
    for y in top..top + h {
        for x in 0..w {
            let x = left + if mirrored { w - 1 - x } else { x };
            data.extend_from_slice(&image.data[(y * image.width + x) * 3..][..3]);
        }
    }
    Rgb { width: w, height: h, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_have_the_area_and_the_ratio_asked_for() {
        let crop = ResizedCrop { scale: [0.25, 0.5], ratio: [0.8, 1.25] };
        let mut random = generator(1, "test", 0);
        for _ in 0..500 {
            let [top, left, h, w] = crop.window((300, 400), (64, 64), &mut random);
            assert!(top + h <= 300 && left + w <= 400);
            let (share, ratio) = ((h * w) as f64 / 120_000.0, w as f64 / h as f64);
            assert!((0.245..0.51).contains(&share) && (0.78..1.28).contains(&ratio), "{share} {ratio}");
        }
        // A strip that no draw fits: the largest window in the middle.
        assert_eq!(
            ResizedCrop { scale: [1.0, 1.0], ..crop }.window((10, 400), (64, 64), &mut random),
            [0, 195, 10, 10]
        );
    }

    #[test]
    fn the_bucket_of_a_step_follows_from_the_seed_and_all_are_used() {
        let buckets: Vec<usize> = (0..60).map(|step| bucket(3, step, 3)).collect();
        assert_eq!(buckets, (0..60).map(|step| bucket(3, step, 3)).collect::<Vec<_>>());
        (0..3).for_each(|i| assert!(buckets.iter().filter(|&&b| b == i).count() > 8, "{buckets:?}"));
        assert_eq!(bucket(3, 5, 1), 0);
    }
}
