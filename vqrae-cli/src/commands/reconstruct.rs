//! `reconstruct`: images or code files → what the decoder makes of their codes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vqrae::codes::{Codes, Format};
use vqrae::image::{Preprocessor, Rgb};
use vqrae::{Error, Tensor, Vqrae, metrics};

use super::{beside, finish, start, to_images, write_sheet};
use crate::load::{Loaded, each_batch, load, stack};
use crate::output::save_png;
use crate::plan::{ImageArgs, Input, InputArgs, Kind, ModelArgs};
use crate::report::Exit;
use crate::sheet;

/// Turn images, or the code files that tokenize wrote, into reconstructed images
///
/// Writes OUT/reconstructions/<path>.png. Code files need no image, but the model that made them: codes of another model
/// are refused. For images the summary on stdout holds the mean PSNR against the prepared originals, in dB over 8 bits.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// Write one picture that shows originals, reconstructions and errors of the first images
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli reconstruct photos -o out --sheet out/sheet.png
  vqrae-cli reconstruct out/codes -o from-codes
  vqrae-cli reconstruct one.jpg.safetensors -o from-codes --model my-model";

struct Job {
    model: Vqrae,
    preprocessor: Preprocessor,
    output: PathBuf,
    /// Originals and reconstructions for the sheet.
    pairs: Vec<(Rgb, Rgb)>,
    /// The PSNR of every image.
    psnr: Vec<f64>,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::ImagesAndCodes)?;
    let (code_files, images): (Vec<_>, Vec<_>) =
        inputs.files.into_iter().partition(|input| Format::of(&input.path).is_some());
    if args.sheet.is_some() && images.is_empty() {
        bail!("--sheet compares with originals, but the inputs are code files only; leave it out");
    }
    refuse_same_pictures(&code_files, &images)?;
    let model = args.model.open()?;
    let preprocessor = args.images.preprocessor(&model)?;
    let output = args.inputs.output.clone();
    std::fs::create_dir_all(&output).map_err(Error::io(&output))?;
    let mut job = Job { model, preprocessor, output, pairs: Vec::new(), psnr: Vec::new() };

    let mut progress = start(&args.inputs, code_files.len() + images.len(), 0, &inputs.unreadable)?;
    let pace = args.inputs.pace();
    let mut exit = each_batch(&code_files, pace, &mut progress, read_codes, |batch| job.write_codes(batch))?;
    if exit == Exit::Success {
        let (preprocessor, limits) = (job.preprocessor.clone(), args.images.limits());
        let read = |input: &Input| load(input, &preprocessor, &limits);
        exit = each_batch(&images, pace, &mut progress, read, |batch| job.write_images(batch))?;
    }
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &job.pairs, images.len())?;
    }
    finish(progress, exit, job.mean_psnr(), "the same command starts from the beginning")
}

fn read_codes(input: &Input) -> Result<Codes, String> {
    Codes::read(&input.path).map_err(|error| error.to_string())
}

/// What the picture of a file is named after: a code file's own extension is left out.
fn stem(input: &Input) -> PathBuf {
    match Format::of(&input.path) {
        Some(_) => input.relative.with_extension(""),
        None => input.relative.clone(),
    }
}

fn refuse_same_pictures(code_files: &[Input], images: &[Input]) -> Result<()> {
    let mut seen = std::collections::HashMap::new();
    for input in code_files.iter().chain(images) {
        if let Some(other) = seen.insert(stem(input), &input.path) {
            let (a, b) = (other.display(), input.path.display());
            bail!("{a} and {b} would both be reconstructed as {}.png; run them apart", stem(input).display());
        }
    }
    Ok(())
}

impl Job {
    fn write_codes(&mut self, batch: &[(&Input, Codes)]) -> Result<()> {
        for (input, codes) in batch {
            codes.check_model(&input.path, self.model.id())?;
        }
        // A model may take images of several sizes, so codes of several grids can meet in one folder.
        for alike in batch.chunk_by(|(_, a), (_, b)| (a.h, a.w) == (b.h, b.w)) {
            let (h, w) = (alike[0].1.h, alike[0].1.w);
            let indices = alike.iter().flat_map(|(_, codes)| codes.indices.iter().copied()).collect();
            let indices = Tensor::from_vec::<_, u32>(indices, (alike.len(), h, w), self.model.device())?;
            let images = self.decode(&indices)?;
            for ((input, _), image) in alike.iter().zip(&images) {
                save_png(&self.picture(input), image)?;
            }
        }
        Ok(())
    }

    fn write_images(&mut self, batch: &[(&Input, Loaded)]) -> Result<()> {
        let pixels = stack(batch.iter().map(|(_, loaded)| loaded), self.model.device())?;
        let images = self.decode(&self.model.encode_to_indices(&pixels)?)?;
        for ((input, loaded), image) in batch.iter().zip(images) {
            save_png(&self.picture(input), &image)?;
            let original = beside(&loaded.image, &image, &self.preprocessor)?;
            self.psnr.extend(metrics::psnr(&original, &image));
            if self.pairs.len() < sheet::MOST {
                self.pairs.push((original, image));
            }
        }
        Ok(())
    }

    fn decode(&self, indices: &Tensor) -> Result<Vec<Rgb>> {
        to_images(&self.model.decode_from_indices(indices)?, &self.preprocessor)
    }

    fn picture(&self, input: &Input) -> PathBuf {
        picture(&self.output, &stem(input))
    }

    fn mean_psnr(&self) -> Option<f64> {
        (!self.psnr.is_empty()).then(|| self.psnr.iter().sum::<f64>() / self.psnr.len() as f64)
    }
}

fn picture(output: &Path, stem: &Path) -> PathBuf {
    let mut path = output.join("reconstructions").join(stem).into_os_string();
    path.push(".png");
    path.into()
}
