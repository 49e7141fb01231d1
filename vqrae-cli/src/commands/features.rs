//! `features`: images → the encoder's features, before quantization, or their mean and variance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vqrae::image::Preprocessor;
use vqrae::latent::Statistics;
use vqrae::{DType, Error, Tensor, Vqrae, codes};

use super::{RUN_AGAIN, begin, finish};
use crate::load::{Loaded, Pace, each_batch, load, stack};
use crate::output::{IfExists, Origin, Output, preprocessing, split_done};
use crate::plan::{FileArgs, ImageArgs, Input, Kind, ModelArgs};
use crate::report::Exit;

/// Write the encoder's continuous features of images
///
/// Writes OUT/features/<path>.safetensors with one tensor "features", f32 [N, D], N tokens in raster order; the header
/// says grid, model, source and preprocessing. Run again, it goes on where it stopped.
///
/// With --statistics, one file of the features' mean and variance over all images, f32: channel.mean and channel.var [D],
/// position.mean and position.var [h*w, D]. They are counted in binary64, an image after the other, so batch and threads
/// do not change them; init --latent-statistics puts them into a model.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    files: FileArgs,
    /// Folder to write to
    #[arg(short, long, alias = "output_folder", alias = "output-folder", value_name = "OUT")]
    #[arg(required_unless_present = "statistics")]
    output: Option<PathBuf>,
    /// Write mean and variance to this file, and no features
    #[arg(long, value_name = "FILE", conflicts_with_all = ["output", "if_exists"])]
    statistics: Option<PathBuf>,
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
  vqrae-cli features photos -o out --dtype bf16 --device cuda --batch-size 64
  vqrae-cli features photos --statistics stats.safetensors --model my-model";

/// The checked plan, with everything opened.
struct Job {
    model: Vqrae,
    preprocessor: Preprocessor,
    pace: Pace,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    match (&args.statistics, &args.output) {
        (Some(file), _) => count(&args, file),
        (None, Some(output)) => write(&args, output),
        (None, None) => anyhow::bail!("name a folder with -o, or a file with --statistics"),
    }
}

/// Writes the features of every image.
fn write(args: &Args, folder: &Path) -> Result<Exit> {
    let inputs = args.files.find(Kind::Images, folder)?;
    let job = Job::open(args)?;
    let output = Output::open(folder, &job.model, &job.preprocessor, args.if_exists)?;
    let path = |input: &Input| output.path("features", &input.relative, "safetensors");

    let (left, resumed) = split_done(inputs.files, |input| output.has(&path(input), origin))?;
    let mut progress = begin(&args.files, folder.join("errors.jsonl"), left.len(), resumed, &inputs.unreadable)?;
    let limits = args.images.limits();
    let read = |input: &Input| load(input, &job.preprocessor, &limits);
    let compute = |batch: &[(&Input, Loaded)]| job.compute(batch);
    let write = |batch: &[(&Input, Loaded)], features: Tensor| {
        for (i, (input, _)) in batch.iter().enumerate() {
            codes::write_whole(path(input), &job.file(&features.get(i)?, input, output.origin())?)?;
        }
        Ok(())
    };
    let exit = each_batch(&left, job.pace, &mut progress, read, compute, write)?;
    finish(progress, exit, None, RUN_AGAIN)
}

/// Writes mean and variance of the features of all images.
fn count(args: &Args, file: &Path) -> Result<Exit> {
    let inputs = args.files.find(Kind::Images, file)?;
    let job = Job::open(args)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut errors = file.as_os_str().to_owned();
    errors.push(".errors.jsonl");

    let mut progress = begin(&args.files, errors.into(), inputs.files.len(), 0, &inputs.unreadable)?;
    let limits = args.images.limits();
    let grid = job.grid()?;
    let mut statistics = Statistics::new(job.model.config().encoder.width());
    let read = |input: &Input| load(input, &job.preprocessor, &limits);
    let compute = |batch: &[(&Input, Loaded)]| job.compute(batch);
    let add = |batch: &[(&Input, Loaded)], features: Tensor| {
        for (i, (input, _)) in batch.iter().enumerate() {
            let features = features.get(i)?.flatten_all()?.to_vec1::<f32>()?;
            statistics.add(&features, grid).with_context(|| input.path.display().to_string())?;
        }
        Ok(())
    };
    let exit = each_batch(&inputs.files, job.pace, &mut progress, read, compute, add)?;
    if exit != Exit::Interrupted {
        let record = BTreeMap::from([
            ("model_id", job.model.id().to_string()),
            ("features", job.model.config().encoder.features().to_string()),
            ("preprocessing", preprocessing(&job.preprocessor)),
            ("dtype", job.model.precision().to_string()),
            ("images", statistics.images().to_string()),
            ("h", grid.0.to_string()),
            ("w", grid.1.to_string()),
        ]);
        statistics.write(file, &record).with_context(|| file.display().to_string())?;
    }
    finish(progress, exit, None, "no statistics were written; run the same command again")
}

impl Job {
    fn open(args: &Args) -> Result<Self> {
        let model = args.model.open()?;
        let preprocessor = args.images.preprocessor(&model)?;
        Ok(Self { model, preprocessor, pace: args.files.pace() })
    }

    fn grid(&self) -> Result<(usize, usize)> {
        Ok(self.model.grid_of(self.preprocessor.size.0, self.preprocessor.size.1)?)
    }

    /// The features f32 `[B, N, D]` of one batch.
    fn compute(&self, batch: &[(&Input, Loaded)]) -> Result<Tensor> {
        let pixels = stack(batch.iter().map(|(_, loaded)| loaded), &self.model, self.pace)?;
        Ok(self.model.encode(&pixels)?.to_dtype(DType::F32)?)
    }

    /// The bytes of one file, from the features `[N, D]` of one image.
    fn file(&self, features: &Tensor, input: &Input, origin: &Origin) -> Result<Vec<u8>> {
        let data: Vec<u8> = features.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
        let (h, w) = self.grid()?;
        let Origin { model_id, preprocessing, dtype } = origin.clone();
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
