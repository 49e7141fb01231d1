//! `reconstruct`: images or code files → what the decoder makes of their codes.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vqrae::codes::Codes;
use vqrae::image::Rgb;
use vqrae::{Device, Error, Tensor, Vqrae, metrics};

use super::{finish, start, to_images, write_sheet};
use crate::alike::Alike;
use crate::device;
use crate::inputs::{Input, Kind};
use crate::load::{Loaded, Reading, stack_alike, upload};
use crate::memory;
use crate::output::save_pngs;
use crate::pipeline::{Pace, each_batch};
use crate::plan::{InputArgs, ModelArgs};
use crate::report::{Exit, Progress, Quality};
use crate::sheet;
use crate::view::{ImageArgs, View};

/// Turn images, or the code files that tokenize wrote, into reconstructed images
///
/// Writes OUT/reconstructions/<path>.png. Code files need no image, but the model that made them: codes of another model
/// are refused. For images the summary on stdout holds the mean PSNR in dB over 8 bits, against the originals prepared at
/// the size of their reconstructions; at several resolutions also that of each.
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
  vqrae-cli reconstruct photos -o out --resolution 256,512
  vqrae-cli reconstruct out/codes -o from-codes
  vqrae-cli reconstruct one.jpg.safetensors -o from-codes --model my-model";

struct Job {
    model: Vqrae,
    reading: Reading,
    output: PathBuf,
    pace: Pace,
}

/// What is remembered of the images.
#[derive(Default)]
struct Seen {
    /// Originals and reconstructions for the sheet.
    pairs: Vec<(Rgb, Rgb)>,
    /// The resolution, if it is marked, and the PSNR of every image.
    psnr: Vec<(Option<(usize, usize)>, f64)>,
}

/// The views of an image and, for each, the original at the size of its reconstruction.
type Views = Vec<(Loaded, Rgb)>;

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::ImagesAndCodes)?;
    let (code_files, images): (Vec<_>, Vec<_>) = inputs.files.into_iter().partition(Input::is_codes);
    if args.sheet.is_some() && images.is_empty() {
        bail!("--sheet compares with originals, but the inputs are code files only; leave it out");
    }
    let model = args.model.open()?;
    let reading = Reading::new(&args.images, &model)?;
    refuse_same_pictures(&code_files, &images, &reading.views)?;
    let output = args.inputs.output.clone();
    std::fs::create_dir_all(&output).map_err(Error::io(&output))?;
    let pace = args.inputs.pace();
    let job = Job { model, reading, output, pace };
    let mut seen = Seen::default();

    let mut progress = start(&args.inputs, code_files.len() + images.len(), 0, &inputs.unreadable)?;
    let prepare = |batch: &mut [(&Input, Codes)]| job.stack_codes(batch);
    let compute = |batch| job.decode_codes(batch);
    let write = |_: &mut Progress, batch: &[(&Input, Codes)], decoded| job.write_codes(batch, decoded);
    let mut exit = each_batch(&code_files, pace, &mut progress, Input::codes, prepare, vec![compute], write)?;
    if exit == Exit::Success {
        let read = |input: &Input| job.reading.load_beside(input);
        let prepare = |batch: &mut [(&Input, Views)]| {
            let images = batch.iter_mut().flat_map(|(_, views)| views.iter_mut().map(|(loaded, _)| loaded));
            stack_alike(images, &job.model, pace)
        };
        let compute = |batch| job.decode_images(batch);
        let write = |_: &mut Progress, batch: &[(&Input, Views)], decoded| job.write_images(batch, decoded, &mut seen);
        exit = each_batch(&images, pace, &mut progress, read, prepare, vec![compute], write)?;
    }
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &seen.pairs, images.len() * job.reading.views.len())?;
    }
    let device = device::name(job.model.device());
    finish(progress, exit, device, Quality::of(&seen.psnr), "the same command starts from the beginning")
}

fn refuse_same_pictures(code_files: &[Input], images: &[Input], views: &[View]) -> Result<()> {
    let mut seen = std::collections::HashMap::new();
    let of_images = images.iter().flat_map(|input| views.iter().map(move |view| (input, view.name(&input.relative))));
    for (input, name) in code_files.iter().map(|input| (input, input.pictured())).chain(of_images) {
        let shown = name.display().to_string();
        if let Some(other) = seen.insert(name, &input.path) {
            let (a, b) = (other.display(), input.path.display());
            bail!("{a} and {b} would both be reconstructed as {shown}.png; run them apart");
        }
    }
    Ok(())
}

impl Job {
    /// Codes u32 `[B, h, w]` or `[B, h, w, c]`, those of one grid together: a model may take images of several sizes, so codes
    /// of several grids can meet in one folder.
    fn stack_codes(&self, batch: &[(&Input, Codes)]) -> Result<Alike<Tensor>> {
        for (input, codes) in batch {
            codes.check_model(&input.path, self.model.id())?;
            codes.check_shape(&input.path, self.model.codes_per_token(), self.model.codebook_size())?;
        }
        let grid = |(_, codes): &(&Input, Codes)| (codes.h, codes.w);
        Alike::of(batch, self.pace.batch_size, grid, |alike| {
            let codes: Vec<&Codes> = alike.iter().map(|(_, codes)| codes).collect();
            super::stack_codes(&codes, &Device::Cpu)
        })
    }

    /// The pixels that codes decode to, f32 `[B, 3, H, W]` on the model's device.
    fn decode_codes(&self, batch: Alike<Tensor>) -> Result<Alike<Tensor>> {
        let decode = |codes: &Tensor| Ok(self.model.decode_from_indices(&codes.to_device(self.model.device())?)?);
        batch.map(|codes| memory::within(self.model.device(), &codes, decode))
    }

    fn write_codes(&self, batch: &[(&Input, Codes)], decoded: Alike<Tensor>) -> Result<()> {
        let decoded = self.images(decoded)?;
        save_pngs(batch.iter().map(|(input, _)| picture(&self.output, &input.pictured())).zip(&decoded))
    }

    /// The reconstruction of every view of every image, f32 `[B, 3, H, W]` on the model's device.
    fn decode_images(&self, batch: Alike<Tensor>) -> Result<Alike<Tensor>> {
        let decode = |pixels: &Tensor| {
            Ok(self.model.decode_from_indices(&self.model.encode_to_indices(&upload(pixels, &self.model)?)?)?)
        };
        batch.map(|pixels| memory::within(self.model.device(), &pixels, decode))
    }

    fn images(&self, decoded: Alike<Tensor>) -> Result<Vec<Rgb>> {
        decoded.into_items(|decoded| to_images(&decoded, &self.reading.views[0].preprocessor))
    }

    fn write_images(&self, batch: &[(&Input, Views)], decoded: Alike<Tensor>, seen: &mut Seen) -> Result<()> {
        let decoded = self.images(decoded)?;
        let name = |input: &Input, view: &View| picture(&self.output, &view.name(&input.relative));
        let names = batch.iter().flat_map(|(input, _)| self.reading.views.iter().map(|view| name(input, view)));
        save_pngs(names.zip(&decoded))?;
        let originals = batch.iter().flat_map(|(_, views)| self.reading.views.iter().zip(views));
        for ((view, (_, original)), image) in originals.zip(decoded) {
            seen.psnr.extend(metrics::psnr(original, &image).map(|psnr| (view.mark, psnr)));
            if seen.pairs.len() < sheet::MOST {
                seen.pairs.push((original.clone(), image));
            }
        }
        Ok(())
    }
}

fn picture(output: &Path, stem: &Path) -> PathBuf {
    let mut path = output.join("reconstructions").join(stem).into_os_string();
    path.push(".png");
    path.into()
}
