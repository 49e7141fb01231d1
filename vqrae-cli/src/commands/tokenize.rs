//! `tokenize`: images → indices → shards or code files, with reconstructions on request.

mod files;
mod shards;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use vqrae::codes::Format;
use vqrae::codes::shard::Layout;
use vqrae::image::Rgb;
use vqrae::{Device, Tensor, Vqrae};

use super::{to_images, write_sheet};
use crate::alike::Alike;
use crate::crop::CropArgs;
use crate::device;
use crate::inputs::Input;
use crate::load::{Reading, upload};
use crate::memory;
use crate::output::IfExists;
use crate::pipeline::Pace;
use crate::plan::{InputArgs, ModelArgs};
use crate::report::Exit;
use crate::shards::plan::Labels;
use crate::shards::ranks::RankArgs;
use crate::sheet;
use crate::view::ImageArgs;

/// Turn images into codes, in shards of many or one file an image
///
/// Writes OUT/00000.parquet, a row an image in the order of their paths' bytes, and OUT/00000_stats.json last, which says that the
/// shard is done; then 00001 and so on, and OUT/manifest.json. Tars and parquet files become a shard each, named after them.
/// Images that cannot be read have a row that says why. Run again, it goes on where it stopped, to the same bytes; several
/// processes share the work by --shard-index and --num-shards. Formats of a file an image write OUT/codes/<path>.safetensors
/// instead, and OUT/errors.jsonl. The last line on stdout is a summary in JSON.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    crops: CropArgs,
    /// How codes are written
    #[arg(long, alias = "output_format", value_enum, default_value_t = CodeFormat::of_build())]
    output_format: CodeFormat,
    /// Images a shard holds; tars and parquet files are shards as they are
    #[arg(long, aliases = ["samples_per_shard", "number_sample_per_shard"], value_name = "N", default_value = "10000")]
    samples_per_shard: NonZeroUsize,
    /// Where labels of image files come from
    #[arg(long, value_enum, default_value_t = Labels::Auto)]
    labels: Labels,
    #[command(flatten)]
    rank: RankArgs,
    /// Write OUT/plan.jsonl, the list of shards that all processes then work on, and stop
    #[arg(long)]
    plan: bool,
    /// Name of the shard that a tar on standard input becomes
    #[arg(long, value_name = "NAME", default_value = "stdin")]
    stdin_name: String,
    /// What to do with what an earlier run has written
    #[arg(long, aliases = ["if_exists", "incremental_mode"], value_enum, default_value_t = IfExists::Skip)]
    if_exists: IfExists,
    /// Do shards again that have images which could not be read
    #[arg(long)]
    retry_errors: bool,
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
  vqrae-cli tokenize 'shards/*.tar' -o out --model my-model --batch-size 32
  vqrae-cli tokenize train-*.parquet -o out --image-key image --label-key label
  vqrae-cli tokenize --files-from list.jsonl -o out --output-format webdataset
  aws s3 cp s3://bucket/00012.tar - | vqrae-cli tokenize - --stdin-name 00012 -o out
  vqrae-cli tokenize imagenet/train -o out --ten-crop --samples-per-shard 2000
  vqrae-cli tokenize photos -o out --plan
  vqrae-cli tokenize photos -o out --shard-index 3 --num-shards 8
  vqrae-cli tokenize photos -o out --output-format safetensors --resolution 256,384x256";

#[derive(ValueEnum, Debug, Clone, Copy)]
enum CodeFormat {
    /// Shards: a column of codes and what is known of each image; what `export` and `reconstruct` read
    Parquet,
    /// Shards: tars with KEY.codes.npy and KEY.json
    #[value(alias = "wds")]
    Webdataset,
    /// Shards: a JSON object a line
    Jsonl,
    /// A file an image: one tensor "codes" i32 [h, w], the record in the header
    Safetensors,
    /// A file an image: int32 [h, w] for numpy.load, the record in a .json beside it
    Npy,
}

impl CodeFormat {
    /// Parquet, unless the program was built without it.
    fn of_build() -> Self {
        if cfg!(feature = "parquet") { Self::Parquet } else { Self::Jsonl }
    }
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let layout = match args.output_format {
        CodeFormat::Parquet => Ok(Layout::Parquet),
        CodeFormat::Webdataset => Ok(Layout::WebDataset),
        CodeFormat::Jsonl => Ok(Layout::Jsonl),
        CodeFormat::Safetensors => Err(Format::Safetensors),
        CodeFormat::Npy => Err(Format::Npy),
    };
    match layout {
        Ok(_) if args.plan => shards::plan(&args),
        Ok(layout) => shards::run(&args, layout),
        Err(_) if args.plan || args.rank.is_given() => {
            bail!(
                "a file an image is written by one process; leave --plan and ranks out, or take --output-format parquet"
            )
        }
        Err(format) => files::run(&args, &Engine::open(&args)?, format),
    }
}

/// What computes codes, opened.
struct Engine {
    /// The same on every device.
    models: Vec<Vqrae>,
    reading: Reading,
    reconstruct: bool,
    pace: Pace,
}

/// What comes of images of one size: the codes u32 `[B, h, w]` or `[B, h, w, c]` and, if wished, the pixels that they decode
/// to, f32 `[B, 3, H, W]`, all on their model's device.
type Computed = (Tensor, Option<Tensor>);

impl Engine {
    fn open(args: &Args) -> Result<Self> {
        let models = args.model.open_all()?;
        let reading = Reading::of_crops(&args.images, &args.crops, one_kind(&models)?)?;
        Ok(Self { models, reading, reconstruct: args.reconstruct, pace: args.inputs.pace() })
    }

    /// Any of the models.
    fn model(&self) -> &Vqrae {
        &self.models[0]
    }

    /// What the devices are called.
    fn devices(&self) -> String {
        device::names(self.models.iter().map(Vqrae::device))
    }

    /// A worker for each device.
    fn computes(&self) -> Vec<impl FnMut(Alike<Tensor>) -> Result<Alike<Computed>> + Send + '_> {
        self.models.iter().map(|model| move |batch| self.compute(model, batch)).collect()
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

    /// The codes and the picture of each image. What is on a GPU is copied at once, here rather than where it was computed: the
    /// GPU is at the next batch meanwhile.
    fn each_image(&self, (indices, painted): Computed) -> Result<Vec<(Tensor, Option<Rgb>)>> {
        let indices = indices.to_device(&Device::Cpu)?;
        let preprocessor = &self.reading.views[0].preprocessor;
        let painted = painted.map(|painted| to_images(&painted, preprocessor)).transpose()?;
        let mut painted = painted.into_iter().flatten();
        (0..indices.dim(0)?).map(|i| Ok((indices.get(i)?, painted.next()))).collect()
    }
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

/// A sheet of the first images and what their codes decode to.
fn write_sheet_of(engine: &Engine, path: &Path, inputs: &[Input], total: usize) -> Result<()> {
    let mut pairs = Vec::new();
    for input in inputs {
        // An image that cannot be read is left out.
        let Ok(loaded) = engine.reading.load_beside(input) else { continue };
        for (view, (mut loaded, original)) in engine.reading.views.iter().zip(loaded) {
            let pixels = crate::load::stack_alike(std::iter::once(&mut loaded), engine.model(), engine.pace)?;
            let painted = pixels.map(|pixels| {
                let indices = engine.model().encode_to_indices(&upload(&pixels, engine.model())?)?;
                Ok(engine.model().decode_from_indices(&indices)?)
            })?;
            let painted = painted.into_items(|painted| to_images(&painted, &view.preprocessor))?;
            pairs.extend(painted.into_iter().map(|painted| (original.clone(), painted)));
        }
        if pairs.len() >= sheet::MOST {
            break;
        }
    }
    pairs.truncate(sheet::MOST);
    write_sheet(path, &pairs, total * engine.reading.views.len())
}
