//! `tokenize`: images → indices → code files, with reconstructions on request.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use vqrae::codes::{Codes, Format};
use vqrae::image::{Limits, Rgb};
use vqrae::{Tensor, Vqrae};

use super::{RUN_AGAIN, finish, start, to_images, write_sheet};
use crate::load::{Loaded, Pace, each_alike, each_batch, load, load_beside, stack};
use crate::output::{IfExists, Origin, Output, save_pngs, split_done};
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
    model: Vqrae,
    views: Vec<View>,
    limits: Limits,
    output: Output,
    extension: &'static str,
    reconstruct: bool,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let model = args.model.open()?;
    let views = args.images.views(&model)?;
    let output = Output::open(&args.inputs.output, &model, &views, args.if_exists)?;
    let (extension, reconstruct) = (Format::from(args.output_format).extension(), args.reconstruct);
    let (limits, pace) = (args.images.limits(), args.inputs.pace());
    let job = Job { model, views, limits, output, extension, reconstruct, pace };

    let all = inputs.files.clone();
    let (left, resumed) = split_done(inputs.files, |input| job.is_done(input))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let read = |input: &Input| load(input, &job.views, &job.limits);
    let compute = |batch: &[(&Input, Vec<Loaded>)]| job.compute(batch);
    let write = |batch: &[(&Input, Vec<Loaded>)], computed| job.write(batch, computed);
    let exit = each_batch(&left, pace, &mut progress, read, compute, write)?;
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &job.pairs(&all)?, all.len() * job.views.len())?;
    }
    finish(progress, exit, Quality::default(), RUN_AGAIN)
}

impl Job {
    fn code_file(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("codes", input, view, self.extension)
    }

    fn picture(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("reconstructions", input, view, "png")
    }

    /// Whether an earlier run has made all of an image's files.
    fn is_done(&self, input: &Input) -> Result<bool> {
        for view in &self.views {
            let painted = !self.reconstruct || self.picture(input, view).exists();
            if !self.output.has(&self.code_file(input, view), view, origin)? || !painted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Of each image and each view of it the codes u32 `[h, w]` or `[h, w, c]` and, if wished, what they decode to.
    fn compute(&self, batch: &[(&Input, Vec<Loaded>)]) -> Result<Vec<(Tensor, Option<Rgb>)>> {
        let images: Vec<&Loaded> = batch.iter().flat_map(|(_, views)| views).collect();
        each_alike(
            &images,
            self.pace.batch_size,
            |image| image.size,
            |alike| {
                let pixels = stack(alike.iter().map(|image| **image), &self.model, self.pace)?;
                let indices = self.model.encode_to_indices(&pixels)?;
                let mut painted = Vec::new();
                if self.reconstruct {
                    painted = to_images(&self.model.decode_from_indices(&indices)?, &self.views[0].preprocessor)?;
                }
                let mut painted = painted.into_iter();
                (0..alike.len()).map(|i| Ok((indices.get(i)?, painted.next()))).collect()
            },
        )
    }

    /// Writes the files of one batch, the code files last: where they are, the image is done.
    fn write(&self, batch: &[(&Input, Vec<Loaded>)], computed: Vec<(Tensor, Option<Rgb>)>) -> Result<()> {
        let views = || batch.iter().flat_map(|(input, _)| self.views.iter().map(move |view| (*input, view)));
        let painted = views()
            .zip(&computed)
            .filter_map(|((input, view), (_, painted))| Some((self.picture(input, view), painted.as_ref()?)));
        save_pngs(painted)?;
        for ((input, view), (indices, _)) in views().zip(&computed) {
            self.codes(indices, input, view)?.write(self.code_file(input, view))?;
        }
        Ok(())
    }

    /// The record of one image, from its indices `[h, w]` or `[h, w, c]`.
    fn codes(&self, indices: &Tensor, input: &Input, view: &View) -> Result<Codes> {
        let (h, w) = (indices.dim(0)?, indices.dim(1)?);
        let Origin { model_id, preprocessing, dtype } = self.output.origin(view);
        Ok(Codes {
            indices: indices.flatten_all()?.to_vec1()?,
            h,
            w,
            c: self.model.codes_per_token(),
            model_id,
            codebook_size: self.model.codebook_size(),
            source: input.source(),
            preprocessing,
            dtype,
        })
    }

    /// The first images and what their code files decode to, whichever run wrote those.
    fn pairs(&self, inputs: &[Input]) -> Result<Vec<(Rgb, Rgb)>> {
        let mut pairs = Vec::new();
        for input in inputs.iter().filter(|input| self.views.iter().all(|view| self.code_file(input, view).exists())) {
            // An image that can no longer be read is left out.
            let Ok(loaded) = load_beside(input, &self.views, &self.limits) else { continue };
            for (view, (_, original)) in self.views.iter().zip(loaded) {
                if pairs.len() == sheet::MOST {
                    return Ok(pairs);
                }
                let codes = Codes::read(self.code_file(input, view))?;
                let indices = super::stack_codes(&[&codes], self.model.device())?;
                let decoded = self.model.decode_from_indices(&indices)?;
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
