//! `tokenize`: images → indices → code files, with reconstructions on request.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use vqrae::codes::{Codes, Format};
use vqrae::image::{Limits, Preprocessor, Rgb};
use vqrae::{Tensor, Vqrae};

use super::{RUN_AGAIN, beside, finish, start, to_images, write_sheet};
use crate::load::{Loaded, Pace, each_batch, load, stack};
use crate::output::{IfExists, Origin, Output, save_pngs, split_done};
use crate::plan::{ImageArgs, Input, InputArgs, Kind, ModelArgs};
use crate::report::Exit;
use crate::sheet;

/// Turn images into codes, one code file an image
///
/// Writes OUT/codes/<path>.safetensors for every image, OUT/manifest.json, and OUT/errors.jsonl when files could not be
/// read. Run again, it goes on where it stopped: files that are whole and were made by the same model from images
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
    preprocessor: Preprocessor,
    limits: Limits,
    output: Output,
    extension: &'static str,
    reconstruct: bool,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let model = args.model.open()?;
    let preprocessor = args.images.preprocessor(&model)?;
    let output = Output::open(&args.inputs.output, &model, &preprocessor, args.if_exists)?;
    let (extension, reconstruct) = (Format::from(args.output_format).extension(), args.reconstruct);
    let (limits, pace) = (args.images.limits(), args.inputs.pace());
    let job = Job { model, preprocessor, limits, output, extension, reconstruct, pace };

    let all = inputs.files.clone();
    let (left, resumed) = split_done(inputs.files, |input| job.is_done(input))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let read = |input: &Input| load(input, &job.preprocessor, &job.limits);
    let compute = |batch: &[(&Input, Loaded)]| job.compute(batch);
    let write = |batch: &[(&Input, Loaded)], computed| job.write(batch, computed);
    let exit = each_batch(&left, pace, &mut progress, read, compute, write)?;
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet(path, &job.pairs(&all)?, all.len())?;
    }
    finish(progress, exit, None, RUN_AGAIN)
}

impl Job {
    fn code_file(&self, input: &Input) -> PathBuf {
        self.output.path("codes", &input.relative, self.extension)
    }

    fn picture(&self, input: &Input) -> PathBuf {
        self.output.path("reconstructions", &input.relative, "png")
    }

    fn is_done(&self, input: &Input) -> Result<bool> {
        Ok(self.output.has(&self.code_file(input), origin)? && (!self.reconstruct || self.picture(input).exists()))
    }

    /// The codes u32 `[B, h, w]` or `[B, h, w, c]` of one batch and, if wished, what they decode to.
    fn compute(&self, batch: &[(&Input, Loaded)]) -> Result<(Tensor, Option<Tensor>)> {
        let pixels = stack(batch.iter().map(|(_, loaded)| loaded), &self.model, self.pace)?;
        let indices = self.model.encode_to_indices(&pixels)?;
        let decoded = self.reconstruct.then(|| self.model.decode_from_indices(&indices)).transpose()?;
        Ok((indices, decoded))
    }

    /// Writes the files of one batch, the code file last: where it is, the image is done.
    fn write(&self, batch: &[(&Input, Loaded)], (indices, decoded): (Tensor, Option<Tensor>)) -> Result<()> {
        if let Some(decoded) = decoded {
            let images = to_images(&decoded, &self.preprocessor)?;
            save_pngs(batch.iter().map(|(input, _)| self.picture(input)).zip(&images))?;
        }
        for (i, (input, _)) in batch.iter().enumerate() {
            self.codes(&indices.get(i)?, input)?.write(self.code_file(input))?;
        }
        Ok(())
    }

    /// The record of one image, from its indices `[h, w]` or `[h, w, c]`.
    fn codes(&self, indices: &Tensor, input: &Input) -> Result<Codes> {
        let (h, w) = (indices.dim(0)?, indices.dim(1)?);
        let Origin { model_id, preprocessing, dtype } = self.output.origin().clone();
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
        let tokenized = inputs.iter().filter(|input| self.code_file(input).exists());
        tokenized.take(sheet::MOST).filter_map(|input| self.pair(input).transpose()).collect()
    }

    /// `None` for an image that can no longer be read.
    fn pair(&self, input: &Input) -> Result<Option<(Rgb, Rgb)>> {
        let Ok(loaded) = load(input, &self.preprocessor, &self.limits) else { return Ok(None) };
        let indices = super::stack_codes(&[&Codes::read(self.code_file(input))?], self.model.device())?;
        let decoded = self.model.decode_from_indices(&indices)?;
        let reconstruction = to_images(&decoded, &self.preprocessor)?.swap_remove(0);
        Ok(Some((beside(&loaded.image, &reconstruction, &self.preprocessor)?, reconstruction)))
    }
}

/// Who made a code file.
fn origin(path: &Path) -> vqrae::Result<Origin> {
    let codes = Codes::read(path)?;
    Ok(Origin { model_id: codes.model_id, preprocessing: codes.preprocessing, dtype: codes.dtype })
}
