//! Photos for training: which ones make up a step is a pure function of (seed, step), so that resuming needs no state.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::image::{self, Limits, Preprocessor, ResizeMode, Rgb};
use crate::{model, vit};

/// Photos in a folder (with its folders) or a tar.
#[derive(Debug)]
pub struct Photos {
    path: PathBuf,
    entries: Vec<Entry>,
    tar: Option<Mutex<File>>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    /// First byte and length within the tar; unused for a folder.
    range: (u64, u64),
}

/// Endings of the files that are taken from a folder or tar.
const ENDINGS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"];

fn is_photo(path: &Path) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    ENDINGS.contains(&ending.as_str())
}

impl Photos {
    /// Lists the photos of a folder or of a tar, in the order of their names' bytes.
    pub fn list(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        let (mut entries, tar) = if metadata.is_dir() {
            let mut entries = Vec::new();
            walk(path, path, &mut entries)?;
            (entries, None)
        } else {
            (list_tar(path)?, Some(Mutex::new(File::open(path).map_err(Error::io(path))?)))
        };
        entries.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
        if entries.is_empty() {
            return Err(Error::Training(format!("no photos under {}", path.display())));
        }
        Ok(Self { path: path.to_path_buf(), entries, tar })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none; [`Photos::list`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Reads and decodes one.
    pub fn open(&self, index: usize) -> Result<Rgb> {
        let entry = &self.entries[index];
        let path = self.path.join(&entry.name);
        let Some(tar) = &self.tar else { return Ok(image::open(&path, &Limits::default())?) };
        let mut bytes = vec![0; entry.range.1 as usize];
        let mut file = tar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.seek(SeekFrom::Start(entry.range.0))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(&path))?;
        drop(file);
        image::decode(&bytes, &Limits::default()).map_err(|kind| self.unusable(index, kind))
    }

    /// The error that names a photo.
    pub(super) fn unusable(&self, index: usize, kind: image::ErrorKind) -> Error {
        image::Error::Image { path: self.path.join(&self.entries[index].name), kind }.into()
    }

    /// The photo that stands at `position` of an endless sequence of shuffled epochs.
    fn at(&self, order: &mut Order, position: usize) -> usize {
        let n = self.len();
        if order.epoch != Some(position / n) {
            order.photos = (0..n).collect();
            order.photos.shuffle(&mut generator(order.seed, "epoch", position / n));
            order.epoch = Some(position / n);
        }
        order.photos[position % n]
    }
}

fn walk(root: &Path, folder: &Path, entries: &mut Vec<Entry>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() {
            walk(root, &path, entries)?;
        } else if is_photo(&path) {
            let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
            entries.push(Entry { name, range: (0, 0) });
        }
    }
    Ok(())
}

fn list_tar(path: &Path) -> Result<Vec<Entry>> {
    let mut archive = tar::Archive::new(File::open(path).map_err(Error::io(path))?);
    let mut entries = Vec::new();
    for entry in archive.entries_with_seek().map_err(Error::io(path))? {
        let entry = entry.map_err(Error::io(path))?;
        let name = entry.path().map_err(Error::io(path))?.into_owned();
        if entry.header().entry_type().is_file() && is_photo(&name) {
            let range = (entry.raw_file_position(), entry.size());
            entries.push(Entry { name: name.to_string_lossy().into_owned(), range });
        }
    }
    Ok(entries)
}

/// The order of the epoch at hand.
#[derive(Debug)]
struct Order {
    seed: u64,
    epoch: Option<usize>,
    photos: Vec<usize>,
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

/// Random crops, half of them mirrored, of a [`Photos`].
#[derive(Debug)]
pub struct Crops<'a> {
    photos: &'a Photos,
    preprocessor: &'a Preprocessor,
    sizes: Sizes,
    order: Order,
}

/// One photo that could not be used.
#[derive(Debug, Clone)]
pub struct Skipped {
    /// The photo and the reason.
    pub reason: String,
}

/// Several crops, normalised.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// For the encoder, `[B, 3, H, W]` in one vector.
    pub inputs: Vec<f32>,
    /// For the decoder to paint, `[B, 3, H', W']`; empty where its size is the encoder's, for these are then the inputs.
    pub targets: Vec<f32>,
    /// Photos that could not be used.
    pub skipped: Vec<Skipped>,
}

impl<'a> Crops<'a> {
    /// Crops of these sizes.
    pub fn new(photos: &'a Photos, preprocessor: &'a Preprocessor, sizes: Sizes, seed: u64) -> Self {
        Self { photos, preprocessor, sizes, order: Order { seed, epoch: None, photos: Vec::new() } }
    }

    /// The crops at positions `first .. first + count`. A photo that cannot be used is replaced by the next of the order,
    /// and told.
    pub fn batch(&mut self, first: usize, count: usize) -> Result<Batch> {
        let mut batch = Batch::default();
        for position in first..first + count {
            let Views { input, target } = self.usable(position, &mut batch.skipped)?;
            batch.inputs.extend(self.preprocessor.normalize(&input));
            if self.sizes.input != self.sizes.target {
                batch.targets.extend(self.preprocessor.normalize(&target));
            }
        }
        Ok(batch)
    }

    fn usable(&mut self, position: usize, skipped: &mut Vec<Skipped>) -> Result<Views> {
        for attempt in 0..self.photos.len() {
            let photo = self.photos.at(&mut self.order, position + attempt);
            let mut random = generator(self.order.seed, "crop", position);
            match self.photos.open(photo).and_then(|image| self.crop(photo, &image, &mut random)) {
                Ok(views) => return Ok(views),
                Err(error) => skipped.push(Skipped { reason: error.to_string() }),
            }
        }
        Err(Error::Training(format!("not one photo of {} can be used", self.photos.path.display())))
    }

    /// The short side to the crop's, then a random window, mirrored half of the time.
    fn crop(&self, photo: usize, image: &Rgb, random: &mut ChaCha8Rng) -> Result<Views> {
        let (h, w) = self.sizes.crop();
        let factor = (h as f64 / image.height as f64).max(w as f64 / image.width as f64);
        let scaled = |side: usize, least: usize| ((side as f64 * factor).round() as usize).max(least);
        let size = (scaled(image.height, h), scaled(image.width, w));
        let unusable = |kind| self.photos.unusable(photo, kind);
        let image = if size == (image.height, image.width) {
            image.clone()
        } else {
            let resize = Preprocessor { size, resize_mode: ResizeMode::Squash, ..self.preprocessor.clone() };
            resize.prepare(image).map_err(unusable)?
        };
        let top = random.random_range(0..=image.height - h);
        let left = random.random_range(0..=image.width - w);
        let mirrored = random.random::<bool>();
        self.sizes.views(window(&image, top, left, (h, w), mirrored), self.preprocessor).map_err(unusable)
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
