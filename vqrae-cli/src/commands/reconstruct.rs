//! `reconstruct`: images or code files → what the decoder makes of their codes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vqrae::codes::{Codes, Format};
use vqrae::image::{Preprocessor, Rgb};
use vqrae::{Error, Tensor, Vqrae, metrics};

use super::{beside, finish, start, to_images, write_sheet};
use crate::load::{Loaded, Pace, each_batch, load, stack};
use crate::output::save_pngs;
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
    pace: Pace,
}

/// What is remembered of the images.
#[derive(Default)]
struct Seen {
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
    let pace = args.inputs.pace();
    let job = Job { model, preprocessor, output, pace };
    let mut seen = Seen::default();

    let mut progress = start(&args.inputs, code_files.len() + images.len(), 0, &inputs.unreadable)?;
    let compute = |batch: &[(&Input, Codes)]| job.decode_codes(batch);
    let write = |batch: &[(&Input, Codes)], decoded| job.write_codes(batch, decoded);
    let mut exit = each_batch(&code_files, pace, &mut progress, read_codes, compute, write)?;
    if exit == Exit::Success {
        let limits = args.images.limits();
        let read = |input: &Input| load(input, &job.preprocessor, &limits);
        let compute = |batch: &[(&Input, Loaded)]| job.decode_images(batch);
        let write = |batch: &[(&Input, Loaded)], decoded: Tensor| job.write_images(batch, &decoded, &mut seen);
        exit = each_batch(&images, pace, &mut progress, read, compute, write)?;
    }
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &seen.pairs, images.len())?;
    }
    finish(progress, exit, seen.mean_psnr(), "the same command starts from the beginning")
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
    /// Decodes codes, those of one grid together: a model may take images of several sizes, so codes of several grids can
    /// meet in one folder.
    fn decode_codes(&self, batch: &[(&Input, Codes)]) -> Result<Vec<Tensor>> {
        for (input, codes) in batch {
            codes.check_model(&input.path, self.model.id())?;
            codes.check_shape(&input.path, self.model.codes_per_token(), self.model.codebook_size())?;
        }
        let decode = |alike: &[(&Input, Codes)]| {
            let codes: Vec<&Codes> = alike.iter().map(|(_, codes)| codes).collect();
            let indices = super::stack_codes(&codes, self.model.device())?;
            Ok(self.model.decode_from_indices(&indices)?)
        };
        batch.chunk_by(|(_, a), (_, b)| (a.h, a.w) == (b.h, b.w)).map(decode).collect()
    }

    fn write_codes(&self, batch: &[(&Input, Codes)], decoded: Vec<Tensor>) -> Result<()> {
        let mut images = Vec::new();
        for decoded in decoded {
            images.extend(to_images(&decoded, &self.preprocessor)?);
        }
        save_pngs(batch.iter().map(|(input, _)| self.picture(input)).zip(&images))
    }

    fn decode_images(&self, batch: &[(&Input, Loaded)]) -> Result<Tensor> {
        let pixels = stack(batch.iter().map(|(_, loaded)| loaded), &self.model, self.pace)?;
        Ok(self.model.decode_from_indices(&self.model.encode_to_indices(&pixels)?)?)
    }

    fn write_images(&self, batch: &[(&Input, Loaded)], decoded: &Tensor, seen: &mut Seen) -> Result<()> {
        let images = to_images(decoded, &self.preprocessor)?;
        save_pngs(batch.iter().map(|(input, _)| self.picture(input)).zip(&images))?;
        for ((_, loaded), image) in batch.iter().zip(images) {
            let original = beside(&loaded.image, &image, &self.preprocessor)?;
            seen.psnr.extend(metrics::psnr(&original, &image));
            if seen.pairs.len() < sheet::MOST {
                seen.pairs.push((original, image));
            }
        }
        Ok(())
    }

    fn picture(&self, input: &Input) -> PathBuf {
        picture(&self.output, &stem(input))
    }
}

impl Seen {
    fn mean_psnr(&self) -> Option<f64> {
        (!self.psnr.is_empty()).then(|| self.psnr.iter().sum::<f64>() / self.psnr.len() as f64)
    }
}

fn picture(output: &Path, stem: &Path) -> PathBuf {
    let mut path = output.join("reconstructions").join(stem).into_os_string();
    path.push(".png");
    path.into()
}
