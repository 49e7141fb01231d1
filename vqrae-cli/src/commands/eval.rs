//! `eval`: how good reconstructions are, by a named protocol.

mod gallery;
mod judge;
mod outcome;
mod page;
mod pairs;
mod protocol;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use vqrae::image::{self, Limits, Preprocessor, Rgb};
use vqrae::metrics::CodeCounts;
use vqrae::perceptual::FidInput;
use vqrae::{Error, Tensor, Vqrae};

use self::gallery::Gallery;
use self::judge::{Judge, Metric, Networks, Pair};
use self::outcome::{Codes, Outcome, Subject};
use self::pairs::Pairs;
use self::protocol::{Preset, Protocol, to_levels, words};
use super::{begin, finish, resized};
use crate::alike::Alike;
use crate::device;
use crate::inputs::{Input, Kind};
use crate::load::{Loaded, Reading, stack_alike, upload};
use crate::memory;
use crate::output::save_pngs;
use crate::pipeline::each_batch;
use crate::plan::{self, FileArgs, ModelArgs};
use crate::report::{Exit, Progress, Quality};
use crate::sheet;
use crate::view::ImageArgs;

/// Measure reconstructions: a model's of photos, or one folder of images against another
///
/// PSNR, SSIM and MS-SSIM always; LPIPS and rFID with the files of their networks; with a model
/// also codes in use, perplexity and bits per pixel. The protocol (resize, crop, rounding, data
/// range, reference, the FID's input) is printed beside the figures. Writes
///
///   OUT/eval.json     the protocol, all figures, and those of every image, the worst first
///   OUT/report.html   the same as a page that needs no other file: histograms, the worst
///                     images, a sample, a table to sort
///   OUT/worst.png     the worst images: original, reconstruction, error (x4)
///   OUT/errors/       with --error-maps: the error of every image, <path>.png
///
/// Two folders are paired by relative path, or by it up to the extension: a.jpg with a.png, or
/// with a.jpg.png. Images without a partner are named and counted as files that could not be read.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES, verbatim_doc_comment)]
#[command(mut_arg("inputs", |arg| arg.required(false).required_unless_present("reference")))]
pub(crate) struct Args {
    #[command(flatten)]
    files: FileArgs,
    /// Originals, instead of a model's photos: folders, files or quoted globs
    #[arg(long, value_name = "INPUT", num_args = 1.., requires = "images", conflicts_with_all = ["inputs", "model"])]
    reference: Vec<PathBuf>,
    /// What is compared with them
    #[arg(long, value_name = "INPUT", num_args = 1.., requires = "reference")]
    images: Vec<PathBuf>,
    /// Folder to write to
    #[arg(short, long, default_value = "eval", value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// What others publish by; without it, native, or what --resolution, --resize-mode and --resample say
    #[arg(long, value_enum, value_name = "NAME")]
    protocol: Option<Preset>,
    #[command(flatten)]
    view: ImageArgs,
    /// VGG16 of LPIPS; `python weights/convert_lpips.py FOLDER` makes lpips_vgg16.safetensors
    #[arg(long, alias = "lpips_vgg", value_name = "FILE")]
    lpips_vgg: Option<PathBuf>,
    /// AlexNet of LPIPS; the same makes lpips_alex.safetensors
    #[arg(long, alias = "lpips_alex", value_name = "FILE")]
    lpips_alex: Option<PathBuf>,
    /// Inception v3 of the FID, safetensors or pytorch-fid's .pth; `python weights/convert_inception.py FILE` makes it
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
    /// How images come to the FID's network: as TensorFlow 1 and torch-fidelity do it, the default, or as pytorch-fid does
    #[arg(long, alias = "fid_input", value_enum, value_name = "WAY")]
    fid_input: Option<Input299>,
    /// What makes an image one of the worst
    #[arg(long, alias = "worst_by", value_enum, default_value = "psnr", value_name = "METRIC")]
    worst_by: Metric,
    /// How many of the worst images are shown
    #[arg(long, default_value = "24", value_name = "N")]
    worst: NonZeroUsize,
    /// Write the error of every image, four times as strong
    #[arg(long, alias = "error_maps")]
    error_maps: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli eval photos
  vqrae-cli eval photos --model my-model --protocol titok -o figures --lpips-vgg lpips_vgg16.safetensors
  vqrae-cli eval imagenet/val --model my-model --protocol titok --inception inception.safetensors
  vqrae-cli eval --reference photos --images out/reconstructions --protocol titok";

/// Most of the worst images: their pixels are kept.
const MOST_SHOWN: usize = 256;

#[derive(ValueEnum, Debug, Clone, Copy)]
enum Input299 {
    /// TensorFlow 1's bilinear, (x - 128) / 128
    Tf1,
    /// PyTorch's bilinear, 2 x - 1
    Pytorch,
}

impl From<Input299> for FidInput {
    fn from(input: Input299) -> Self {
        match input {
            Input299::Tf1 => Self::TensorFlow,
            Input299::Pytorch => Self::PyTorch,
        }
    }
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    if args.protocol.is_some_and(|preset| preset != Preset::Native) && args.view.says_anything() {
        bail!(
            "a --protocol decides resize and crop; leave out --resolution, --resize-mode and --resample, or --protocol"
        );
    }
    match args.reference.as_slice() {
        [] => of_model(&args),
        _ => of_folders(&args),
    }
}

/// What is measured and remembered, a batch at a time.
struct Bench {
    judge: Judge,
    gallery: Gallery,
    error_maps: Option<PathBuf>,
}

impl Bench {
    /// For so many images; refuses to look for the worst by what cannot be measured.
    fn new(args: &Args, protocol: &Protocol, device: &vqrae::Device, total: usize) -> Result<Self> {
        let files = [&args.lpips_vgg, &args.lpips_alex, &args.inception].map(Option::as_ref);
        let networks = Networks::open(files, protocol.fid_input, device)?;
        if !networks.metrics().contains(&args.worst_by) {
            bail!("--worst-by {} wants its weights: pass --{0} FILE", args.worst_by.key().replace('_', "-"));
        }
        std::fs::create_dir_all(&args.output).map_err(Error::io(&args.output))?;
        Ok(Self {
            judge: Judge::new(networks, device.clone()),
            gallery: Gallery::new(args.worst_by, args.worst.get().min(MOST_SHOWN), total),
            error_maps: args.error_maps.then(|| args.output.join("errors")),
        })
    }

    fn add(&mut self, inputs: &[&Input], pairs: &[&Pair]) -> Result<()> {
        let first = self.judge.records.len();
        self.judge.add(inputs.iter().map(|input| input.source()).collect(), pairs)?;
        for (record, pair) in self.judge.records[first..].iter().zip(pairs) {
            self.gallery.offer(record, pair)?;
        }
        if let Some(folder) = &self.error_maps {
            let maps: Vec<Rgb> = pairs.iter().map(|(original, image)| sheet::error_map(original, image)).collect();
            save_pngs(inputs.iter().map(|input| map_of(folder, &input.relative)).zip(&maps))?;
        }
        Ok(())
    }

    /// Ends the run: all figures, or after Ctrl-C none.
    fn finish(
        self,
        args: &Args,
        (progress, exit): (Progress, Exit),
        device: String,
        (protocol, subject, codes): (Protocol, Subject, Option<Codes>),
    ) -> Result<Exit> {
        if exit == Exit::Interrupted {
            return finish(progress, exit, device, Quality::default(), "the same command starts from the beginning");
        }
        if self.judge.records.is_empty() {
            bail!("not one image could be measured; see {}", args.output.join("errors.jsonl").display());
        }
        let outcome = Outcome::of(self.judge, self.gallery, args.worst_by, protocol, subject, codes)?;
        let (summary, skipped) = progress.finish(device, Quality::default());
        outcome.write(&args.output)?;
        outcome.tell(&args.output, &summary)?;
        Ok(exit.merge(skipped))
    }
}

fn map_of(folder: &Path, relative: &Path) -> PathBuf {
    let mut path = folder.join(relative).into_os_string();
    path.push(".png");
    path.into()
}

/// An image for the model, and what its reconstruction is compared with: one view.
type Views = Vec<(Loaded, Rgb)>;

fn of_model(args: &Args) -> Result<Exit> {
    let inputs = args.files.find(Kind::Images, &args.output)?;
    let preset = args.protocol.unwrap_or(Preset::Native);
    let model = args.model.open()?;
    let reading = reading(args, preset, &model)?;
    let view = &reading.views[0];
    let protocol = preset.protocol(resize_of(&reading), args.fid_input.map(FidInput::from))?;
    let rounding = protocol.rounding;
    let mut bench = Bench::new(args, &protocol, model.device(), inputs.files.len())?;
    let mut codes = Codes::new(CodeCounts::new(model.codebook_size(), model.codes_per_token()));

    let mut progress = begin(&args.files, args.output.join("errors.jsonl"), inputs.files.len(), 0, &inputs.unreadable)?;
    let pace = args.files.pace();
    let read = |input: &Input| reading.load_beside(input);
    let prepare = |batch: &mut [(&Input, Views)]| {
        let images = batch.iter_mut().flat_map(|(_, views)| views.iter_mut().map(|(loaded, _)| loaded));
        stack_alike(images, &model, pace)
    };
    let compute = |batch: Alike<Tensor>| {
        let through = |pixels: &Tensor| {
            let codes = model.encode_to_indices(&upload(pixels, &model)?)?;
            let decoded = model.decode_from_indices(&codes)?;
            Ok((codes, decoded))
        };
        batch.map(|pixels| memory::within(model.device(), &pixels, through))
    };
    let write = |_: &mut Progress, batch: &[(&Input, Views)], made: Alike<(Tensor, Tensor)>| {
        let split = |(codes, decoded): (Tensor, Tensor)| {
            let codes = codes.flatten_from(1)?.to_vec2::<u32>()?;
            let images = to_levels(&decoded, &view.preprocessor, rounding)?;
            Ok(codes.into_iter().zip(images).collect())
        };
        let (mut inputs, mut pairs) = (Vec::new(), Vec::new());
        for ((input, views), (indices, image)) in batch.iter().zip(made.into_items(split)?) {
            let Some((_, original)) = views.first() else { continue };
            codes.add(&indices, original);
            let image = resized(&image, (original.height, original.width), &view.preprocessor)?;
            inputs.push(*input);
            pairs.push((original.clone(), image));
        }
        bench.add(&inputs, &pairs.iter().collect::<Vec<_>>())
    };
    let exit = each_batch(&inputs.files, pace, &mut progress, read, prepare, vec![compute], write)?;
    let subject = Subject::Model { id: model.id().to_string(), dtype: model.precision().to_string() };
    let device = device::name(model.device());
    bench.finish(args, (progress, exit), device, (protocol, subject, Some(codes)))
}

/// How photos are read for a model: as it takes them, or by way of a preset's preparation.
fn reading(args: &Args, preset: Preset, model: &Vqrae) -> Result<Reading> {
    let reading = match preset.preparation() {
        None => Reading::new(&args.view, model)?,
        Some(reference) => Reading::with(vec![args.view.by_way_of(reference, model)?], args.view.limits(), model),
    };
    if reading.views.len() != 1 {
        bail!("eval measures at one --resolution at a time; run it once for each");
    }
    Ok(reading)
}

fn resize_of(reading: &Reading) -> String {
    let view = &reading.views[0];
    let own = words(&view.preprocessor);
    match &view.reference {
        None => own,
        Some(reference) if reference.size == view.preprocessor.size => words(reference),
        Some(reference) => format!("{}, then {own} for the model, and what it paints back", words(reference)),
    }
}

fn of_folders(args: &Args) -> Result<Exit> {
    let originals = plan::find_images(&args.reference, &args.output)?;
    let images = plan::find_images(&args.images, &args.output)?;
    let mut unreadable = originals.unreadable;
    unreadable.extend(images.unreadable);
    let pairs = Pairs::of(originals.files, images.files);
    unreadable.extend(pairs.alone.iter().cloned());
    if pairs.images.is_empty() {
        bail!(
            "no image has an original: the paths below --reference and --images are to be the same up to the extension"
        );
    }
    let preset = args.protocol.unwrap_or(Preset::Native);
    let preparation = match preset.preparation() {
        None => args.view.without_model()?,
        preparation => preparation,
    };
    let resize = preparation.as_ref().map_or("none: the images as they are".to_string(), words);
    let protocol = preset.protocol(resize, args.fid_input.map(FidInput::from))?;
    let device = args.model.device()?;
    let mut bench = Bench::new(args, &protocol, &device, pairs.images.len())?;

    let total = pairs.images.len();
    let mut progress = begin(&args.files, args.output.join("errors.jsonl"), total, 0, &unreadable)?;
    let limits = args.view.limits();
    let read = |input: &Input| read_pair(input, &pairs, preparation.as_ref(), &limits);
    let write = |_: &mut Progress, batch: &[(&Input, Pair)], ()| {
        let (inputs, pairs): (Vec<&Input>, Vec<&Pair>) = batch.iter().map(|(input, pair)| (*input, pair)).unzip();
        bench.add(&inputs, &pairs)
    };
    let pace = args.files.pace();
    let exit = each_batch(&pairs.images, pace, &mut progress, read, |_| Ok(()), vec![|()| Ok(())], write)?;
    bench.finish(args, (progress, exit), device::name(&device), (protocol, Subject::Folders, None))
}

/// An image's original and the image, of one size.
fn read_pair(
    input: &Input,
    pairs: &Pairs,
    preparation: Option<&Preprocessor>,
    limits: &Limits,
) -> Result<Pair, String> {
    let open = |input: &Input| {
        let image = image::decode(&input.read()?.bytes, limits).map_err(|error| error.to_string())?;
        match preparation {
            Some(preparation) => preparation.prepare(&image).map_err(|error| error.to_string()),
            None => Ok(image),
        }
    };
    let original = pairs.originals.get(&input.relative).ok_or("has no original")?;
    let named = |reason| format!("its original, {}: {reason}", original.path.display());
    let (original, image) = (open(original).map_err(named)?, open(input)?);
    if (original.width, original.height) != (image.width, image.height) {
        return Err(format!(
            "is {}x{}, but its original {}x{}; bring both to one size by --protocol or --resolution",
            image.width, image.height, original.width, original.height
        ));
    }
    Ok((original, image))
}
