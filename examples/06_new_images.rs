//! Are new images like the photos, and are they new? Fréchet distances, and each image's nearest photo of the training.
//!
//! `cargo run --release --workspace --example 06_new_images -- CODES PHOTOS INCEPTION OUT IMAGES…`
//!
//! CODES: what the generator was trained on, made of the photos below PHOTOS. INCEPTION: `python weights/convert_inception.py
//! INCEPTION`. IMAGES: what `vqrae-cli generate` wrote (its images/), one folder or several to compare.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::D;
use vqrae::image::{self, Limits, Rgb};
use vqrae::metrics::{Statistics, fid};
use vqrae::perceptual::{FidInput, Inception};
use vqrae::train::data::Photos;
use vqrae::{DType, Device, Tensor, Vqrae};
use vqrae_examples::generator::{APART, paint};
use vqrae_examples::understanding::unit;
use vqrae_generators::data::Sequences;

/// Images of the sheet.
const SHOWN: usize = 8;
/// White pixels between images.
const GAP: usize = 4;

/// Images and what Inception makes of them.
struct Set {
    images: Vec<Rgb>,
    /// `[M, 2048]`
    features: Tensor,
}

impl Set {
    #[allow(clippy::print_stderr, reason = "an example says how far it is")]
    fn new(inception: &Inception, what: &str, images: Vec<Rgb>) -> anyhow::Result<Self> {
        /// Images at a time.
        const BATCH: usize = 8;
        let mut features = Vec::new();
        for (i, batch) in images.chunks(BATCH).enumerate() {
            features.push(inception.features(&batch.iter().collect::<Vec<_>>(), FidInput::default())?);
            if i % 16 == 15 {
                eprintln!("  {what}: {} of {}", (i + 1) * BATCH, images.len());
            }
        }
        Ok(Self { features: Tensor::cat(&features, 0)?, images })
    }

    fn statistics(&self) -> anyhow::Result<Statistics> {
        let mut statistics = Statistics::new(self.features.dim(1)?);
        statistics.add(&self.features)?;
        Ok(statistics)
    }

    /// Each image's nearest of another set by the cosine of features, and that cosine.
    fn nearest(&self, other: &Self) -> anyhow::Result<Vec<(usize, f32)>> {
        let cosines = unit(&self.features)?.matmul(&unit(&other.features)?.t()?)?;
        let nearest = cosines.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let cosines = cosines.max(D::Minus1)?.to_vec1::<f32>()?;
        Ok(nearest.into_iter().map(|i| i as usize).zip(cosines).collect())
    }
}

#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn main() -> anyhow::Result<()> {
    let words: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [codes, photos, inception, output, images @ ..] = &words[..] else {
        anyhow::bail!("say 06_new_images CODES PHOTOS INCEPTION OUT IMAGES…");
    };
    anyhow::ensure!(!images.is_empty(), "name a folder of images");
    let tokenizer = Vqrae::shipped(&Device::Cpu, DType::F32)?;
    let inception = Inception::open(inception, &Device::Cpu)?;
    let [train, apart] = Sequences::read(codes, APART)?;

    let photos_of = |sequences| prepared(&tokenizer, photos, sequences);
    let trained = Set::new(&inception, "photos of the training", photos_of(&train)?)?;
    let held_out = Set::new(&inception, "photos kept apart", photos_of(&apart)?)?;
    let grid = apart.tokenizer.grid;
    let again = (0..apart.len()).map(|i| paint(&tokenizer, apart.codes(i), grid)).collect::<anyhow::Result<_>>()?;
    let again = Set::new(&inception, "photos kept apart, by their codes", again)?;

    println!("| | images | FID to the training's | FID to those kept apart | cosine to the nearest of the training |");
    println!("|---|---|---|---|---|");
    let references = [trained.statistics()?, held_out.statistics()?];
    row("photos kept apart", &held_out, &trained, &references)?;
    row("photos kept apart, by their codes", &again, &trained, &references)?;
    std::fs::create_dir_all(output)?;
    let mut sheets = Vec::new();
    for (i, folder) in images.iter().enumerate() {
        let drawn = Photos::list(std::slice::from_ref(folder))?;
        let drawn = (0..drawn.len()).map(|i| drawn.open(i)).collect::<vqrae::Result<_>>()?;
        let drawn = Set::new(&inception, "new images", drawn)?;
        row(&folder.display().to_string(), &drawn, &trained, &references)?;
        sheets.push(output.join(format!("neighbours-{i}.png")));
        image::save_png(&sheets[i], &sheet(&drawn, &trained)?)?;
    }
    println!("\nAbove, new images; below each, its nearest photo of the training:");
    sheets.iter().for_each(|path| println!("{}", path.display()));
    Ok(())
}

/// Prints how near a set is to others.
#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn row(what: &str, set: &Set, trained: &Set, [of_train, of_apart]: &[Statistics; 2]) -> anyhow::Result<()> {
    let (statistics, nearest) = (set.statistics()?, set.nearest(trained)?);
    let mean = nearest.iter().map(|(_, cosine)| cosine).sum::<f32>() / nearest.len() as f32;
    let distances = [fid(&statistics, of_train)?, fid(&statistics, of_apart)?];
    println!("| {what} | {} | {:.1} | {:.1} | {mean:.3} |", set.images.len(), distances[0], distances[1]);
    Ok(())
}

/// The photos of sequences, each once, as the tokenizer saw them.
fn prepared(tokenizer: &Vqrae, folder: &Path, sequences: &Sequences) -> anyhow::Result<Vec<Rgb>> {
    let paths: BTreeSet<&str> = (0..sequences.len()).map(|i| sequences.path(i)).collect();
    let preprocessor = tokenizer.preprocessor();
    let photo = |path: &str| Ok(preprocessor.prepare(&image::open(&folder.join(path), &Limits::default())?)?);
    paths.into_iter().map(photo).collect()
}

/// Some of the images, spread over all, each above its nearest.
fn sheet(drawn: &Set, trained: &Set) -> anyhow::Result<Rgb> {
    let nearest = drawn.nearest(trained)?;
    let chosen: Vec<usize> = (0..SHOWN).map(|i| i * drawn.images.len() / SHOWN).collect();
    let side = drawn.images[0].width.max(drawn.images[0].height) + GAP;
    let (width, height) = (SHOWN * side + GAP, 2 * side + GAP);
    let mut sheet = Rgb { width, height, data: vec![255; 3 * width * height] };
    for (column, &i) in chosen.iter().enumerate() {
        for (row, image) in [&drawn.images[i], &trained.images[nearest[i].0]].into_iter().enumerate() {
            for (y, line) in image.data.chunks_exact(3 * image.width).enumerate().take(side - GAP) {
                let at = 3 * ((GAP + row * side + y) * width + GAP + column * side);
                let line = &line[..line.len().min(3 * (side - GAP))];
                sheet.data[at..at + line.len()].copy_from_slice(line);
            }
        }
    }
    Ok(sheet)
}
