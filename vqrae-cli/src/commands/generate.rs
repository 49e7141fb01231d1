//! `generate`: a trained generator → new images, or new parts of one.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use vqrae::codes::Codes;
use vqrae::image::{self, Limits, Rgb};
use vqrae::{DType, Device, Error, Tensor, Vqrae, files};
use vqrae_generators::draw::{Wish, draw};
use vqrae_generators::masked::{Order, Plan};
use vqrae_generators::network::UNKNOWN;
use vqrae_generators::sampling::Sampling;
use vqrae_generators::{Config, Generator};

use super::{stack_codes, to_images};
use crate::interrupts::{catch_interrupts, interrupted};
use crate::output::{save_png, save_pngs};
use crate::plan::ModelArgs;
use crate::report::{self, Count, Exit};
use crate::sheet;

/// Draw new images with a trained generator, or new parts of an image
///
/// GENERATOR is a folder that a training of codes wrote (examples 04 and 05). Writes OUT/images/<class>/<number>.png and
/// OUT/sheet.png. An image follows from the seed and its number alone: the same in any batch, and a run that was stopped goes on.
/// With --image and --mask, codes under the mask's white pixels are drawn anew and all others are kept.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the generator
    generator: PathBuf,
    /// Folder to write to
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Images to draw
    #[arg(short = 'n', long, default_value = "16", value_name = "N")]
    count: NonZeroUsize,
    /// Class by name or number, or `any`; several are drawn in turn. Default: all classes in turn
    #[arg(short, long, value_name = "CLASS", value_delimiter = ',')]
    class: Vec<String>,
    /// What images follow from
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    #[command(flatten, next_help_heading = "Drawing")]
    drawing: DrawingArgs,
    #[command(flatten, next_help_heading = "Inpainting")]
    inpainting: InpaintingArgs,
    #[command(flatten, next_help_heading = "The tokenizer")]
    model: ModelArgs,
    /// Images at a time
    #[arg(long, alias = "batch_size", default_value = "8", value_name = "N")]
    batch_size: NonZeroUsize,
    /// Write the codes too: OUT/codes/<class>/<number>.safetensors
    #[arg(long, alias = "save_codes")]
    save_codes: bool,
    /// Draw again what an earlier run, or one with other settings, has left in OUT
    #[arg(long)]
    overwrite: bool,
}

#[derive(clap::Args, Debug)]
struct DrawingArgs {
    /// Steps of a masked generator, each a pass over the image
    #[arg(long, default_value = "12", value_name = "S")]
    steps: NonZeroUsize,
    /// Which codes of a step a masked generator keeps
    #[arg(long, value_enum, default_value_t = OrderName::Confidence)]
    order: OrderName,
    /// Noise on what `confidence` is surest of; more: more varied images
    #[arg(long, default_value_t = 6.0, value_name = "X")]
    noise: f32,
    /// Below 1 likelier codes, 0 the likeliest alone
    #[arg(long, default_value_t = 1.0, value_name = "T")]
    temperature: f32,
    /// Only the K likeliest codes; 0: all
    #[arg(long, alias = "top_k", default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Only the likeliest codes that together have probability P
    #[arg(long, alias = "top_p", default_value_t = 1.0, value_name = "P")]
    top_p: f32,
    /// Classifier-free guidance: 1 none; more: more like the class, less varied
    #[arg(long, alias = "cfg-scale", alias = "cfg_scale", default_value_t = 1.0, value_name = "W")]
    guidance: f32,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum OrderName {
    /// Those that it is surest of, as MaskGIT
    Confidence,
    /// Any, as masked diffusion reversed (MDLM)
    Ancestral,
}

#[derive(clap::Args, Debug)]
struct InpaintingArgs {
    /// Image to keep what is not masked of
    #[arg(long, value_name = "PHOTO", requires = "mask")]
    image: Option<PathBuf>,
    /// Image of the same size: where it is white, codes are drawn anew
    #[arg(long, value_name = "MASK", requires = "image")]
    mask: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli generate weights/clothes -o out
  vqrae-cli generate weights/clothes -o shirts --class t-shirt,longsleeve -n 32 --guidance 2 --temperature 0.9
  vqrae-cli generate my-generator -o out -n 1000 --seed 7 --save-codes
  vqrae-cli generate weights/clothes -o repaired --image photo.jpg --mask mask.png -n 4 --class pants";

/// What is drawn, and from what.
struct Job {
    generator: Generator,
    tokenizer: Vqrae,
    plan: Plan,
    seed: u64,
    /// Class, if any, by the number of an image, in turn.
    classes: Vec<Option<usize>>,
    /// Codes that every image starts from.
    known: Vec<u32>,
    output: PathBuf,
    save_codes: bool,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let config = Config::read(&args.generator)?;
    let plan = args.drawing.plan()?;
    let classes = classes(&config, &args.class)?;
    let tokenizer = args.model.open()?;
    let dtype = if tokenizer.dtype() == DType::F32 { DType::F32 } else { vqrae::auto_dtype(&Device::Cpu)? };
    let generator = Generator::open(&args.generator, &tokenizer, dtype)?;
    let inpainted = args.inpainting.read(&tokenizer, &config)?;
    let known = inpainted.as_ref().map_or_else(|| vec![UNKNOWN; config.tokens()], |inpainted| inpainted.codes.clone());
    let settings = args.settings(&tokenizer, dtype, &known)?;
    claim(&args.output, &settings, args.overwrite)?;
    catch_interrupts()?;
    let (seed, output, save_codes) = (args.seed, args.output.clone(), args.save_codes);
    let job = Job { generator, tokenizer, plan, seed, classes, known, output, save_codes };

    let (done, left): (Vec<usize>, Vec<usize>) =
        (0..args.count.get()).partition(|&number| !args.overwrite && job.is_done(number));
    let mut count = Count::new(left.len(), "images");
    let mut drawn = 0;
    for numbers in left.chunks(args.batch_size.get()) {
        if interrupted() {
            break;
        }
        job.draw(numbers)?;
        drawn += numbers.len();
        count.advance(numbers.len());
    }
    let whole = drawn == left.len();
    if whole {
        job.write_sheet(args.count.get(), inpainted)?;
    } else {
        report::say("stopped; run the same command again to go on from here");
    }
    let facts = json!({ "images": drawn, "resumed": done.len(), "output": job.output.display().to_string() });
    report::data(&count.finish(facts).to_string());
    Ok(if whole { Exit::Success } else { Exit::Interrupted })
}

impl Args {
    /// What makes the images of two runs the same, but for how many there are.
    fn settings(&self, tokenizer: &Vqrae, dtype: DType, known: &[u32]) -> Result<Value> {
        let DrawingArgs { steps, order, noise, temperature, top_k, top_p, guidance } = &self.drawing;
        let weights = std::fs::read(self.generator.join(vqrae::weights::FILE))
            .with_context(|| self.generator.display().to_string())?;
        Ok(json!({
            "generator": crate::load::content_hash(&weights),
            "tokenizer": tokenizer.id(),
            "dtype": dtype.as_str(),
            "arithmetic": tokenizer.precision(),
            "seed": self.seed,
            "class": self.class,
            "steps": steps,
            "order": format!("{order:?}").to_lowercase(),
            "noise": noise,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "guidance": guidance,
            "known": known.iter().map(|&code| (code != UNKNOWN).then_some(code)).collect::<Vec<_>>(),
        }))
    }
}

/// Makes the folder of such settings, or finds it so.
fn claim(folder: &Path, settings: &Value, overwrite: bool) -> Result<()> {
    let path = folder.join("generate.json");
    if path.exists() && !overwrite {
        let before: Value = serde_json::from_slice(&std::fs::read(&path).map_err(Error::io(&path))?)
            .with_context(|| format!("{}: not what generate wrote", path.display()))?;
        let differs = |(name, value): (&String, &Value)| (settings[name] != *value).then(|| name.clone());
        let names: Vec<String> = before.as_object().into_iter().flatten().filter_map(differs).collect();
        if !names.is_empty() {
            bail!(
                "{} holds images of other settings ({}); take another folder, or pass --overwrite",
                folder.display(),
                names.join(", ")
            );
        }
        return Ok(());
    }
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    files::write_whole(&path, (settings.to_string() + "\n").as_bytes()).map_err(Error::io(&path))?;
    Ok(())
}

/// The classes that were asked for, or all, or none if the generator has none.
fn classes(config: &Config, names: &[String]) -> Result<Vec<Option<usize>>> {
    match (names, config.classes.len()) {
        ([], 0) => Ok(vec![None]),
        ([], count) => Ok((0..count).map(Some).collect()),
        (names, _) => names
            .iter()
            .map(|name| match name.as_str() {
                "any" => Ok(None),
                name => config.class(name).map(Some).map_err(anyhow::Error::msg),
            })
            .collect(),
    }
}

impl DrawingArgs {
    fn plan(&self) -> Result<Plan> {
        let Self { steps, order, noise, temperature, top_k, top_p, guidance } = *self;
        let sampling = Sampling { temperature, top_k, top_p, guidance };
        sampling.check().map_err(anyhow::Error::msg)?;
        if !(0.0..=1e3).contains(&noise) {
            bail!("noise is {noise}, expected: 0 to 1000");
        }
        let order = match order {
            OrderName::Confidence => Order::Confidence { noise },
            OrderName::Ancestral => Order::Ancestral,
        };
        Ok(Plan { steps: steps.get(), order, sampling })
    }
}

/// An image of which parts are drawn anew.
struct Inpainted {
    /// Its codes, those under the mask unknown.
    codes: Vec<u32>,
    /// The image, and what of it is known.
    shown: [Rgb; 2],
}

impl InpaintingArgs {
    fn read(&self, tokenizer: &Vqrae, config: &Config) -> Result<Option<Inpainted>> {
        let (Some(photo_path), Some(mask_path)) = (&self.image, &self.mask) else { return Ok(None) };
        let photo = image::open(photo_path, &Limits::default())?;
        let mask = image::open(mask_path, &Limits::default())?;
        if (mask.width, mask.height) != (photo.width, photo.height) {
            bail!(
                "{}: the mask is {}×{}, but {} is {}×{}; a mask has the size of its image",
                mask_path.display(),
                mask.width,
                mask.height,
                photo_path.display(),
                photo.width,
                photo.height
            );
        }
        let preprocessor = tokenizer.preprocessor();
        let prepare =
            |image: &Rgb, path: &Path| preprocessor.prepare(image).with_context(|| path.display().to_string());
        let (photo, mask) = (prepare(&photo, photo_path)?, prepare(&mask, mask_path)?);
        let (h, w) = config.tokenizer.grid;
        let pixels = Tensor::from_vec(preprocessor.normalize(&photo), (1, 3, photo.height, photo.width), &Device::Cpu)?;
        let indices = tokenizer.encode_to_indices(&pixels.to_device(tokenizer.device())?)?;
        if indices.dims() != [1, h, w] {
            bail!(
                "{}: the tokenizer makes codes {:?} of it, the generator has {h}×{w}",
                photo_path.display(),
                indices.dims()
            );
        }
        let mut codes: Vec<u32> = indices.flatten_all()?.to_vec1()?;
        let (down, across) = (mask.height / h, mask.width / w);
        let mut known = photo.clone();
        for (place, code) in codes.iter_mut().enumerate() {
            let rows = place / w * down..(place / w + 1) * down;
            let row =
                |y: usize| 3 * (y * mask.width + place % w * across)..3 * (y * mask.width + (place % w + 1) * across);
            if rows.clone().any(|y| mask.data[row(y)].iter().any(|&level| level > 127)) {
                *code = UNKNOWN;
                rows.for_each(|y| known.data[row(y)].fill(128));
            }
        }
        if !codes.contains(&UNKNOWN) {
            bail!("{}: no pixel of the mask is white, so nothing is to be drawn", mask_path.display());
        }
        Ok(Some(Inpainted { codes, shown: [photo, known] }))
    }
}

impl Job {
    fn class(&self, number: usize) -> Option<usize> {
        self.classes[number % self.classes.len()]
    }

    /// Where what is made of an image goes, below a folder.
    fn place(&self, folder: &str, number: usize, extension: &str) -> PathBuf {
        let class = self.class(number).map_or("any", |class| self.generator.config().classes[class].as_str());
        // A class is a folder's name, but a generator's file might say anything.
        let class: String =
            class.chars().map(|c| if c == '/' || c == '\\' || c.is_control() { '_' } else { c }).collect();
        let class = if class.starts_with('.') { format!("_{class}") } else { class };
        self.output.join(folder).join(class).join(format!("{number:05}.{extension}"))
    }

    fn picture(&self, number: usize) -> PathBuf {
        self.place("images", number, "png")
    }

    fn is_done(&self, number: usize) -> bool {
        self.picture(number).exists() && (!self.save_codes || self.place("codes", number, "safetensors").exists())
    }

    /// Draws, paints and writes some images.
    fn draw(&self, numbers: &[usize]) -> Result<()> {
        let wish = |&number: &usize| Wish {
            codes: self.known.clone(),
            ..Wish::new(&self.generator, self.class(number), self.seed, number as u64)
        };
        let mut wishes: Vec<Wish> = numbers.iter().map(wish).collect();
        draw(&self.generator, &mut wishes, &self.plan).map_err(anyhow::Error::msg)?;
        let codes: Vec<Codes> = wishes.into_iter().map(|wish| self.codes(wish)).collect();
        let indices = stack_codes(&codes.iter().collect::<Vec<_>>(), self.tokenizer.device())?;
        let painted = to_images(&self.tokenizer.decode_from_indices(&indices)?, self.tokenizer.preprocessor())?;
        if self.save_codes {
            for (codes, &number) in codes.iter().zip(numbers) {
                codes.write(self.place("codes", number, "safetensors"))?;
            }
        }
        save_pngs(numbers.iter().map(|&number| self.picture(number)).zip(&painted))
    }

    /// Writes one picture of the first images and, of a photo that parts of were drawn anew, the photo and what was kept.
    fn write_sheet(&self, count: usize, inpainted: Option<Inpainted>) -> Result<()> {
        let mut cells: Vec<Rgb> = inpainted.map(|inpainted| inpainted.shown).into_iter().flatten().collect();
        let shown = count.min(sheet::MOST_ALONE);
        for number in 0..shown {
            cells.push(image::open(&self.picture(number), &Limits::default())?);
        }
        let path = self.output.join("sheet.png");
        let Some(sheet) = sheet::grid(&cells) else { return Ok(()) };
        save_png(&path, &sheet)?;
        report::say(&format!("{}: {shown} of {count} images", path.display()));
        Ok(())
    }

    fn codes(&self, wish: Wish) -> Codes {
        let tokenizer = &self.generator.config().tokenizer;
        let (h, w) = tokenizer.grid;
        Codes {
            indices: wish.codes,
            h,
            w,
            c: 1,
            model_id: tokenizer.model_id.clone(),
            codebook_size: tokenizer.codebook_size,
            source: "generate".to_string(),
            preprocessing: tokenizer.preprocessing.clone(),
            dtype: tokenizer.dtype.clone(),
        }
    }
}
