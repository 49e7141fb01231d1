//! `features`: images → the encoder's features, before quantization.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use vqrae::{DType, Error, Tensor, Vqrae, codes};

use super::{RUN_AGAIN, finish, start};
use crate::load::{Loaded, Pace, each_alike, each_batch, load, stack};
use crate::output::{IfExists, Origin, Output, split_done};
use crate::plan::{Input, InputArgs, Kind, ModelArgs};
use crate::report::{Exit, Quality};
use crate::view::{ImageArgs, View};

/// Write the encoder's continuous features of images
///
/// Writes OUT/features/<path>.safetensors (at several resolutions <path>@256x256.safetensors and so on) with one tensor "features", f32 [N, D], N tokens in raster order; the header
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
  vqrae-cli features photos -o out --resolution 224,448
  vqrae-cli features photos -o out --dtype bf16 --device cuda --batch-size 64";

/// The checked plan, with everything opened.
struct Job {
    model: Vqrae,
    views: Vec<View>,
    output: Output,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let model = args.model.open()?;
    let views = args.images.views(&model)?;
    let output = Output::open(&args.inputs.output, &model, &views, args.if_exists)?;
    let pace = args.inputs.pace();
    let job = Job { model, views, output, pace };

    let (left, resumed) = split_done(inputs.files, |input| job.is_done(input))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let limits = args.images.limits();
    let read = |input: &Input| load(input, &job.views, &limits);
    let compute = |batch: &[(&Input, Vec<Loaded>)]| job.compute(batch);
    let write = |batch: &[(&Input, Vec<Loaded>)], features: Vec<Tensor>| job.write(batch, &features);
    let exit = each_batch(&left, pace, &mut progress, read, compute, write)?;
    finish(progress, exit, Quality::default(), RUN_AGAIN)
}

impl Job {
    fn path(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("features", input, view, "safetensors")
    }

    fn is_done(&self, input: &Input) -> Result<bool> {
        for view in &self.views {
            if !self.output.has(&self.path(input, view), view, origin)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The features f32 `[N, D]` of each image and each view of it.
    fn compute(&self, batch: &[(&Input, Vec<Loaded>)]) -> Result<Vec<Tensor>> {
        let images: Vec<&Loaded> = batch.iter().flat_map(|(_, views)| views).collect();
        each_alike(
            &images,
            self.pace.batch_size,
            |image| image.size,
            |alike| {
                let pixels = stack(alike.iter().map(|image| **image), &self.model, self.pace)?;
                let features = self.model.encode(&pixels)?.to_dtype(DType::F32)?;
                (0..alike.len()).map(|i| Ok(features.get(i)?)).collect()
            },
        )
    }

    fn write(&self, batch: &[(&Input, Vec<Loaded>)], features: &[Tensor]) -> Result<()> {
        let images = batch.iter().flat_map(|(input, loaded)| self.views.iter().zip(loaded).map(move |of| (*input, of)));
        for ((input, (view, loaded)), features) in images.zip(features) {
            codes::write_whole(self.path(input, view), &self.file(features, input, view, loaded.size)?)?;
        }
        Ok(())
    }

    /// The bytes of one file, from the features `[N, D]` of an image of a size.
    fn file(&self, features: &Tensor, input: &Input, view: &View, size: (usize, usize)) -> Result<Vec<u8>> {
        let data: Vec<u8> = features.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
        let (h, w) = self.model.grid_of(size.0, size.1)?;
        let Origin { model_id, preprocessing, dtype } = self.output.origin(view);
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
