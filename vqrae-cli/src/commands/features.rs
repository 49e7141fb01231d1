//! `features`: images → the encoder's features, before quantization, or their mean and variance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vqrae::latent::Statistics;
use vqrae::{DType, Device, Error, Tensor, Vqrae, codes};

use super::{RUN_AGAIN, begin, finish};
use crate::alike::Alike;
use crate::device;
use crate::inputs::{Input, Kind};
use crate::load::{Loaded, Reading, stack_alike, upload};
use crate::memory;
use crate::output::{IfExists, Origin, Output, split_done};
use crate::pipeline::{Pace, each_batch};
use crate::plan::{FileArgs, ModelArgs};
use crate::report::{Exit, Progress, Quality};
use crate::view::{ImageArgs, View};

/// Write the encoder's continuous features of images
///
/// Writes OUT/features/<path>.safetensors (at several resolutions <path>@256x256.safetensors and so on) with one tensor
/// "features", f32 [N, D], N tokens in raster order; the header says grid, model, source and preprocessing. Run again, it
/// goes on where it stopped.
///
/// With --statistics, one file of the features' mean and variance over all images, f32: channel.mean and channel.var [D],
/// position.mean and position.var [h*w, D] where all images have one grid. They are counted in binary64, an image after the other, so batch and threads
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
  vqrae-cli features photos -o out --resolution 224,448
  vqrae-cli features photos -o out --dtype bf16 --device cuda --batch-size 64
  vqrae-cli features photos --statistics stats.safetensors --model my-model";

/// The checked plan, with everything opened.
struct Job {
    model: Vqrae,
    reading: Reading,
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
    let output = Output::open(folder, &job.model, &job.reading.views, args.if_exists)?;
    let path = |input: &Input, view: &View| output.path("features", input, view, "safetensors");
    let is_done = |input: &Input| {
        job.reading.views.iter().try_fold(true, |done, view| Ok(done && output.has(&path(input, view), view, origin)?))
    };

    let (left, resumed) = split_done(inputs.files, is_done)?;
    let mut progress = begin(&args.files, folder.join("errors.jsonl"), left.len(), resumed, &inputs.unreadable)?;
    let write = |_: &mut Progress, batch: &[(&Input, Vec<Loaded>)], features: Alike<Tensor>| {
        for ((input, view, loaded), features) in job.images(batch).zip(each_image(features)?) {
            codes::write_whole(path(input, view), &job.file(&features, input, output.origin(view), loaded.size)?)?;
        }
        Ok(())
    };
    let exit = job.each(&left, &mut progress, write)?;
    finish(progress, exit, device::name(job.model.device()), Quality::default(), RUN_AGAIN)
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
    let mut statistics = Statistics::new(job.model.config().encoder.width());
    let add = |_: &mut Progress, batch: &[(&Input, Vec<Loaded>)], features: Alike<Tensor>| {
        for ((input, _, loaded), features) in job.images(batch).zip(each_image(features)?) {
            let grid = job.model.grid_of(loaded.size.0, loaded.size.1)?;
            let features = features.flatten_all()?.to_vec1::<f32>()?;
            statistics.add(&features, grid).with_context(|| input.path.display().to_string())?;
        }
        Ok(())
    };
    let exit = job.each(&inputs.files, &mut progress, add)?;
    if exit != Exit::Interrupted {
        let Origin { model_id, preprocessing, dtype } = Origin::new(&job.model, &job.reading.views);
        let mut record = BTreeMap::from([
            ("model_id", model_id),
            ("features", job.model.config().encoder.features().to_string()),
            ("preprocessing", preprocessing),
            ("dtype", dtype),
            ("images", statistics.images().to_string()),
        ]);
        if let Some((h, w)) = statistics.grid() {
            record.extend([("h", h.to_string()), ("w", w.to_string())]);
        }
        statistics.write(file, &record).with_context(|| file.display().to_string())?;
    }
    let device = device::name(job.model.device());
    finish(progress, exit, device, Quality::default(), "no statistics were written; run the same command again")
}

impl Job {
    fn open(args: &Args) -> Result<Self> {
        let model = args.model.open()?;
        let reading = Reading::new(&args.images, &model)?;
        Ok(Self { model, reading, pace: args.files.pace() })
    }

    /// Hands the features of all images to `write`, in the order of the files.
    fn each(
        &self,
        inputs: &[Input],
        progress: &mut Progress,
        write: impl FnMut(&mut Progress, &[(&Input, Vec<Loaded>)], Alike<Tensor>) -> Result<()> + Send,
    ) -> Result<Exit> {
        let read = |input: &Input| self.reading.load(input);
        let prepare = |batch: &mut [(&Input, Vec<Loaded>)]| {
            stack_alike(batch.iter_mut().flat_map(|(_, views)| views), &self.model, self.pace)
        };
        each_batch(inputs, self.pace, progress, read, prepare, vec![|batch| self.compute(batch)], write)
    }

    /// The images of a batch, every view of each.
    fn images<'a>(
        &'a self,
        batch: &'a [(&Input, Vec<Loaded>)],
    ) -> impl Iterator<Item = (&'a Input, &'a View, &'a Loaded)> {
        let views = |(input, loaded): &'a (&Input, Vec<Loaded>)| {
            self.reading.views.iter().zip(loaded).map(move |(view, loaded)| (*input, view, loaded))
        };
        batch.iter().flat_map(views)
    }

    /// The features f32 `[B, N, D]` of each group of images, on the model's device.
    fn compute(&self, batch: Alike<Tensor>) -> Result<Alike<Tensor>> {
        let encode = |pixels: &Tensor| Ok(self.model.encode(&upload(pixels, &self.model)?)?.to_dtype(DType::F32)?);
        batch.map(|pixels| memory::within(self.model.device(), &pixels, encode))
    }

    /// The bytes of one file, from the features `[N, D]` of an image of a size.
    fn file(&self, features: &Tensor, input: &Input, origin: Origin, size: (usize, usize)) -> Result<Vec<u8>> {
        let data: Vec<u8> = features.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
        let (h, w) = self.model.grid_of(size.0, size.1)?;
        let Origin { model_id, preprocessing, dtype } = origin;
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

/// The features f32 `[N, D]` of each image and each view of it.
fn each_image(features: Alike<Tensor>) -> Result<Vec<Tensor>> {
    features.into_items(|features| {
        let features = features.to_device(&Device::Cpu)?;
        (0..features.dim(0)?).map(|i| Ok(features.get(i)?)).collect()
    })
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
