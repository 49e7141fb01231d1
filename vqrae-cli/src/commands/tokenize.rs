//! `tokenize`: images → indices → code files, with reconstructions on request.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use vqrae::codes::{Codes, Format};
use vqrae::image::Rgb;
use vqrae::{Device, Tensor, Vqrae};

use super::{RUN_AGAIN, finish, start, to_images, write_sheet};
use crate::alike::Alike;
use crate::device;
use crate::load::{Loaded, Reading, stack_alike, upload};
use crate::memory;
use crate::output::{IfExists, Origin, Output, save_pngs, split_done};
use crate::pipeline::{Pace, each_batch};
use crate::plan::{Input, InputArgs, Kind, ModelArgs};
use crate::report::{Exit, Quality};
use crate::sheet;
use crate::view::{ImageArgs, View};

/// Turn images into codes, one code file an image
///
/// Writes OUT/codes/<path>.safetensors for every image (at several resolutions OUT/codes/<path>@256x256.safetensors and so
/// on), OUT/manifest.json, and OUT/errors.jsonl when files could not be read. Run again, it goes on where it stopped: files that are whole and were made by the same model from images
/// prepared the same way are kept. The last line on stdout is a summary in JSON.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// Format of the code files
    #[arg(long, alias = "output_format", value_enum, default_value_t = CodeFormat::Safetensors)]
    output_format: CodeFormat,
    /// What to do with files that an earlier run has written
    #[arg(long, alias = "if_exists", value_enum, default_value_t = IfExists::Skip)]
    if_exists: IfExists,
    /// Decode the codes again and write OUT/reconstructions/<path>.png
    #[arg(long)]
    reconstruct: bool,
    /// Write one picture that shows originals, reconstructions and errors of the first images
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli tokenize photos -o out
  vqrae-cli tokenize photos -o out --reconstruct --sheet out/sheet.png
  vqrae-cli tokenize photos -o out --resolution 256,384x256
  vqrae-cli tokenize 'photos/**/*.jpg' -o out --model my-model --output-format npy --batch-size 32";

#[derive(ValueEnum, Debug, Clone, Copy)]
enum CodeFormat {
    /// One tensor "codes" i32 [h, w], the record in the header
    Safetensors,
    /// int32 [h, w] for numpy.load, the record in a .json beside it
    Npy,
}

impl From<CodeFormat> for Format {
    fn from(format: CodeFormat) -> Self {
        match format {
            CodeFormat::Safetensors => Self::Safetensors,
            CodeFormat::Npy => Self::Npy,
        }
    }
}

/// The checked plan, with everything opened.
struct Job {
    /// The same on every device.
    models: Vec<Vqrae>,
    reading: Reading,
    output: Output,
    extension: &'static str,
    reconstruct: bool,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let models = args.model.open_all()?;
    let model = one_kind(&models)?;
    let reading = Reading::new(&args.images, model)?;
    let output = Output::open(&args.inputs.output, model, &reading.views, args.if_exists)?;
    let (extension, reconstruct) = (Format::from(args.output_format).extension(), args.reconstruct);
    let job = Job { models, reading, output, extension, reconstruct, pace: args.inputs.pace() };

    let all = inputs.files.clone();
    let (left, resumed) = split_done(inputs.files, |input| job.is_done(input))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let read = |input: &Input| job.reading.load(input);
    let prepare = |batch: &mut [(&Input, Vec<Loaded>)]| {
        stack_alike(batch.iter_mut().flat_map(|(_, views)| views), job.model(), job.pace)
    };
    let job = &job;
    let computes = job.models.iter().map(|model| move |batch| job.compute(model, batch)).collect();
    let write = |batch: &[(&Input, Vec<Loaded>)], computed| job.write(batch, computed);
    let exit = each_batch(&left, job.pace, &mut progress, read, prepare, computes, write)?;
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &job.pairs(&all)?, all.len() * job.reading.views.len())?;
    }
    let device = device::names(job.models.iter().map(Vqrae::device));
    finish(progress, exit, device, Quality::default(), RUN_AGAIN)
}

/// One of models that give the same codes.
fn one_kind(models: &[Vqrae]) -> Result<&Vqrae> {
    let Some((first, others)) = models.split_first() else { bail!("there is no device to compute on") };
    if let Some(other) = others.iter().find(|other| other.precision() != first.precision()) {
        let [a, b] = [first, other].map(|model| device::name(model.device()));
        let (ours, theirs) = (first.precision(), other.precision());
        bail!("{a} computes in {ours} and {b} in {theirs}, which may give other codes; name devices of one kind");
    }
    Ok(first)
}

/// What comes of images of one size: the codes u32 `[B, h, w]` or `[B, h, w, c]` and, if wished, the pixels that they decode
/// to, f32 `[B, 3, H, W]`, all on their model's device.
type Computed = (Tensor, Option<Tensor>);

impl Job {
    /// Any of the models.
    fn model(&self) -> &Vqrae {
        &self.models[0]
    }

    fn code_file(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("codes", input, view, self.extension)
    }

    fn picture(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("reconstructions", input, view, "png")
    }

    /// Whether an earlier run has made all of an image's files.
    fn is_done(&self, input: &Input) -> Result<bool> {
        for view in &self.reading.views {
            let painted = !self.reconstruct || self.picture(input, view).exists();
            if !self.output.has(&self.code_file(input, view), view, origin)? || !painted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Codes and what they decode to, on a model's device.
    fn compute(&self, model: &Vqrae, batch: Alike<Tensor>) -> Result<Alike<Computed>> {
        let tokenize = |pixels: &Tensor| {
            let indices = model.encode_to_indices(&upload(pixels, model)?)?;
            let painted = self.reconstruct.then(|| model.decode_from_indices(&indices)).transpose()?;
            Ok((indices, painted))
        };
        batch.map(|pixels| memory::within(model.device(), &pixels, tokenize))
    }

    /// Writes the files of one batch, the code files last: where they are, the image is done.
    fn write(&self, batch: &[(&Input, Vec<Loaded>)], computed: Alike<Computed>) -> Result<()> {
        let computed = computed.into_items(|group| self.each_image(group))?;
        let views = || batch.iter().flat_map(|(input, _)| self.reading.views.iter().map(move |view| (*input, view)));
        let painted = views()
            .zip(&computed)
            .filter_map(|((input, view), (_, painted))| Some((self.picture(input, view), painted.as_ref()?)));
        save_pngs(painted)?;
        for ((input, view), (indices, _)) in views().zip(&computed) {
            self.codes(indices, input, view)?.write(self.code_file(input, view))?;
        }
        Ok(())
    }

    /// The codes and the picture of each image. What is on a GPU is copied at once, here rather than where it was computed: the
    /// GPU is at the next batch meanwhile.
    fn each_image(&self, (indices, painted): Computed) -> Result<Vec<(Tensor, Option<Rgb>)>> {
        let indices = indices.to_device(&Device::Cpu)?;
        let painted = painted.map(|painted| to_images(&painted, &self.reading.views[0].preprocessor)).transpose()?;
        let mut painted = painted.into_iter().flatten();
        (0..indices.dim(0)?).map(|i| Ok((indices.get(i)?, painted.next()))).collect()
    }

    /// The record of one image, from its indices `[h, w]` or `[h, w, c]`.
    fn codes(&self, indices: &Tensor, input: &Input, view: &View) -> Result<Codes> {
        let (h, w) = (indices.dim(0)?, indices.dim(1)?);
        let Origin { model_id, preprocessing, dtype } = self.output.origin(view);
        Ok(Codes {
            indices: indices.flatten_all()?.to_vec1()?,
            h,
            w,
            c: self.model().codes_per_token(),
            model_id,
            codebook_size: self.model().codebook_size(),
            source: input.source(),
            preprocessing,
            dtype,
        })
    }

    /// The first images and what their code files decode to, whichever run wrote those.
    fn pairs(&self, inputs: &[Input]) -> Result<Vec<(Rgb, Rgb)>> {
        let mut pairs = Vec::new();
        for input in
            inputs.iter().filter(|input| self.reading.views.iter().all(|view| self.code_file(input, view).exists()))
        {
            // An image that can no longer be read is left out.
            let Ok(loaded) = self.reading.load_beside(input) else { continue };
            for (view, (_, original)) in self.reading.views.iter().zip(loaded) {
                if pairs.len() == sheet::MOST {
                    return Ok(pairs);
                }
                let codes = Codes::read(self.code_file(input, view))?;
                let indices = super::stack_codes(&[&codes], self.model().device())?;
                let decoded = self.model().decode_from_indices(&indices)?;
                let reconstruction = to_images(&decoded, &view.preprocessor)?.swap_remove(0);
                pairs.push((original, reconstruction));
            }
        }
        Ok(pairs)
    }
}

/// Who made a code file.
fn origin(path: &Path) -> vqrae::Result<Origin> {
    let codes = Codes::read(path)?;
    Ok(Origin { model_id: codes.model_id, preprocessing: codes.preprocessing, dtype: codes.dtype })
}
