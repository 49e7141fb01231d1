//! `features`: images → the encoder's features, before quantization.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use vqrae::image::Preprocessor;
use vqrae::{DType, Error, Tensor, Vqrae, codes};

use super::{RUN_AGAIN, finish, start};
use crate::load::{Loaded, Pace, each_batch, load, stack};
use crate::output::{IfExists, Origin, Output, split_done};
use crate::plan::{ImageArgs, Input, InputArgs, Kind, ModelArgs};
use crate::report::Exit;

/// Write the encoder's continuous features of images
///
/// Writes OUT/features/<path>.safetensors with one tensor "features", f32 [N, D], N tokens in raster order; the header
/// says grid, model, source and preprocessing. Run again, it goes on where it stopped.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    /// What to do with files that an earlier run has written
    #[arg(long, alias = "if_exists", value_enum, default_value_t = IfExists::Skip)]
    if_exists: IfExists,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli features photos -o out
  vqrae-cli features photos -o out --dtype bf16 --device cuda --batch-size 64";

/// The checked plan, with everything opened.
struct Job {
    model: Vqrae,
    preprocessor: Preprocessor,
    output: Output,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let model = args.model.open()?;
    let preprocessor = args.images.preprocessor(&model)?;
    let output = Output::open(&args.inputs.output, &model, &preprocessor, args.if_exists)?;
    let pace = args.inputs.pace();
    let job = Job { model, preprocessor, output, pace };

    let (left, resumed) = split_done(inputs.files, |input| job.output.has(&job.path(input), origin))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let limits = args.images.limits();
    let read = |input: &Input| load(input, &job.preprocessor, &limits);
    let compute = |batch: &[(&Input, Loaded)]| job.compute(batch);
    let write = |batch: &[(&Input, Loaded)], features: Tensor| job.write(batch, &features);
    let exit = each_batch(&left, pace, &mut progress, read, compute, write)?;
    finish(progress, exit, None, RUN_AGAIN)
}

impl Job {
    fn path(&self, input: &Input) -> PathBuf {
        self.output.path("features", &input.relative, "safetensors")
    }

    /// The features f32 `[B, N, D]` of one batch.
    fn compute(&self, batch: &[(&Input, Loaded)]) -> Result<Tensor> {
        let pixels = stack(batch.iter().map(|(_, loaded)| loaded), &self.model, self.pace)?;
        Ok(self.model.encode(&pixels)?.to_dtype(DType::F32)?)
    }

    fn write(&self, batch: &[(&Input, Loaded)], features: &Tensor) -> Result<()> {
        for (i, (input, _)) in batch.iter().enumerate() {
            codes::write_whole(self.path(input), &self.file(&features.get(i)?, input)?)?;
        }
        Ok(())
    }

    /// The bytes of one file, from the features `[N, D]` of one image.
    fn file(&self, features: &Tensor, input: &Input) -> Result<Vec<u8>> {
        let data: Vec<u8> = features.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
        let (h, w) = self.model.grid_of(self.preprocessor.size.0, self.preprocessor.size.1)?;
        let Origin { model_id, preprocessing, dtype } = self.output.origin().clone();
        let entries = [
            ("model_id", model_id),
            ("preprocessing", preprocessing),
            ("dtype", dtype),
            ("source", input.source()),
            ("h", h.to_string()),
            ("w", w.to_string()),
            ("order", "raster".to_string()),
        ];
        let record: BTreeMap<_, _> = entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        Ok(codes::single_tensor("features", "F32", features.dims(), &data, &record))
    }
}

/// Who made a file of features.
fn origin(path: &Path) -> vqrae::Result<Origin> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|error| Error::codes(path, error))?;
    let entry = |key: &str| {
        let value = header.metadata().as_ref().and_then(|metadata| metadata.get(key)).cloned();
        value.ok_or_else(|| Error::codes(path, format!("{key} is missing from the header")))
    };
    Ok(Origin { model_id: entry("model_id")?, preprocessing: entry("preprocessing")?, dtype: entry("dtype")? })
}
