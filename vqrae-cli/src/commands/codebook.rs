//! `codebook`: what a model's codebook looks like, and what codes make of it.

mod plots;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use rayon::prelude::*;
use serde_json::{Value, json};
use vqrae::codebook::{Neighbour, Twins, Usage, neighbours, norms, quantile};
use vqrae::codes::{Codes, write_whole};
use vqrae::image::Rgb;
use vqrae::latent::Normalize;
use vqrae::metrics::CodeCounts;
use vqrae::{Error, Tensor, Vqrae};

use super::{resized, to_images};
use crate::atlas::{self, Atlas, Seen};
use crate::device;
use crate::inputs::{Input, Inputs};
use crate::interrupts::{catch_interrupts, interrupted};
use crate::output::save_png;
use crate::pipeline::{Pace, each_batch};
use crate::plan::{self, ModelArgs};
use crate::report::{self, Exit, Progress};

/// Describe a model's codebook, and how codes use it: figures, an atlas of its patches, plots
///
/// Without CODES the codebook alone is described; with them, also how often each code was chosen. Writes
///
///   OUT/codebook.json         all figures; under `codes` one array a figure, a number for each code
///   OUT/geometry.svg          histograms: norms, distance and angle to the nearest other code
///   OUT/atlas.png             every used code, decoded alone (without CODES every code): rows by brightness; within a
///                             row greys, then colours by hue; places of unused codes are dark
///   OUT/usage.svg             with CODES: tokens a code by rank, and codes by their number of tokens
///   OUT/atlas-in-context.png  with CODES: the most used codes, alone and where reconstructions have them
///
/// Codes of another model are refused; code files that cannot be read are named, and the others go on.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES, verbatim_doc_comment)]
pub(crate) struct Args {
    /// What tokenize wrote: code files, folders of them (searched recursively), or quoted globs
    codes: Vec<PathBuf>,
    /// Folder to write to
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Call two codes near-duplicates below this share of the median distance to the nearest other code
    #[arg(long, default_value = "0.25", value_name = "SHARE", value_parser = share)]
    near: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli codebook -o book
  vqrae-cli tokenize photos -o out && vqrae-cli codebook out/codes -o book
  vqrae-cli codebook out/codes more/codes -o book --model my-model --json";

/// Sides of the patches in the pictures: what a model paints larger is brought to this.
const PATCH: usize = 16;

/// A larger atlas, in bytes, is painted again in patches of half the size.
const LARGE: u64 = 4 << 20;

/// Codes shown in context: a photo's are told by the bits of one number.
const TOP: usize = u64::BITS as usize;

/// Photos that a code is shown in.
const CONTEXTS: usize = 8;

/// Photos that are reconstructed for all of these.
const PHOTOS: usize = 64;

/// A codebook and its figures; what there is one of for every code, by its index.
struct Book {
    model: Vqrae,
    width: usize,
    norms: Vec<f64>,
    neighbours: Vec<Neighbour>,
    twins: Twins,
    /// The share of the median that `twins` goes by.
    near: f64,
}

/// What codes say about a codebook.
struct Tally {
    files: usize,
    counts: CodeCounts,
    usage: Usage,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let inputs = match args.codes.as_slice() {
        [] => None,
        words => Some(plan::find_codes(words, &args.output)?),
    };
    let book = Book::new(args.model.open()?, args.near)?;
    catch_interrupts()?;
    std::fs::create_dir_all(&args.output).map_err(Error::io(&args.output))?;
    let (tally, exit) = match &inputs {
        None => (None, Exit::Success),
        Some(inputs) => {
            let (tally, exit) = book.count(inputs, &args.output)?;
            (Some(tally), exit)
        }
    };
    let files = inputs.map(|inputs| inputs.files).unwrap_or_default();
    if exit == Exit::Interrupted || !book.write(&args.output, tally.as_ref(), &files)? {
        report::say("interrupted: the same command starts from the beginning");
        return Ok(Exit::Interrupted);
    }
    let facts = rounded(&book.facts(tally.as_ref()));
    report::data(&if args.json { serde_json::to_string_pretty(&facts)? } else { report::table(&facts) });
    Ok(exit)
}

/// The patch in the centre of an image of a grid (h, w) of patches.
fn centre(image: &Rgb, (h, w): (usize, usize)) -> Rgb {
    let (height, width) = (image.height / h, image.width / w);
    let row = |y: usize| &image.data[3 * ((h / 2 * height + y) * image.width + w / 2 * width)..][..3 * width];
    Rgb { width, height, data: (0..height).flat_map(row).copied().collect() }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected: a number from 0 to 1".to_string()),
    }
}

impl Book {
    fn new(model: Vqrae, near: f64) -> Result<Self> {
        let codebook = model.codebook()?;
        let &[k, width] = codebook.dims() else {
            bail!("this model has several codebooks, {:?}; `codebook` describes models of one", codebook.dims())
        };
        if k != model.codebook_size() {
            bail!(
                "this model's codebook has {k} rows for {} codes; `codebook` describes models of one codebook",
                model.codebook_size()
            )
        }
        let rows = codebook.flatten_all()?.to_vec1::<f32>()?;
        let neighbours = neighbours(&rows, width)?;
        let twins = Twins::of(&neighbours, near);
        Ok(Self { norms: norms(&rows, width)?, model, width, neighbours, twins, near })
    }

    /// Counts the codes of all files that can be read.
    fn count(&self, inputs: &Inputs, output: &Path) -> Result<(Tally, Exit)> {
        let total = inputs.files.len() + inputs.unreadable.len();
        let mut progress = Progress::new(total, 0, usize::MAX, Some(output.join("errors.jsonl")))?;
        for (input, reason) in &inputs.unreadable {
            progress.skip(input, reason)?;
        }
        let (mut files, mut counts) = (0, CodeCounts::new(self.norms.len(), 1));
        let workers = std::thread::available_parallelism().map_or(1, Into::into);
        let prepare = |batch: &mut [(&Input, Codes)]| {
            batch.iter().try_for_each(|(input, codes)| Ok(codes.check_model(&input.path, self.model.id())?))
        };
        let write = |_: &mut Progress, batch: &[(&Input, Codes)], ()| {
            files += batch.len();
            batch.iter().for_each(|(_, codes)| counts.add(&codes.indices));
            Ok(())
        };
        let read = |input: &Input| self.read(input);
        let pace = Pace { workers, batch_size: 64 };
        let exit = each_batch(&inputs.files, pace, &mut progress, read, prepare, vec![|()| Ok(())], write)?;
        let (_, skipped) = progress.finish(device::name(self.model.device()), report::Quality::default());
        if files == 0 && exit == Exit::Success {
            bail!("none of {total} code file(s) could be read; see {}", output.join("errors.jsonl").display());
        }
        let usage = Usage::of(&counts);
        Ok((Tally { files, counts, usage }, exit.merge(skipped)))
    }

    /// A code file that could be this model's.
    fn read(&self, input: &Input) -> Result<Codes, String> {
        let codes = input.codes()?;
        let (theirs, ours) = (codes.codebook_size, self.norms.len());
        if codes.model_id == self.model.id() && theirs != ours {
            return Err(format!("codes of a codebook of {theirs} codes, but the model has {ours}"));
        }
        Ok(codes)
    }

    /// Writes all files, `codebook.json` last: where it is, the others are. Tells whether it came so far.
    fn write(&self, output: &Path, tally: Option<&Tally>, files: &[Input]) -> Result<bool> {
        let shown = self.shown(tally);
        let Some(patches) = self.alone(&shown)? else { return Ok(false) };
        if let Some(tally) = tally {
            let Some(seen) = self.in_context(tally, files, &shown, &patches)? else { return Ok(false) };
            write_whole(output.join("usage.svg"), plots::usage(tally).svg().as_bytes())?;
            if let Some(page) = atlas::in_context(&seen, CONTEXTS) {
                save_png(&output.join("atlas-in-context.png"), &page)?;
            }
        }
        write_whole(output.join("geometry.svg"), plots::geometry(self).svg().as_bytes())?;
        let atlas = self.write_atlas(&output.join("atlas.png"), &patches)?;
        let mut facts = self.facts(tally);
        facts["atlas"] = json!({ "columns": atlas.columns, "patch": atlas.patch, "margin": atlas::MARGIN });
        facts["codes"] = self.columns(tally, &shown, &atlas);
        write_whole(output.join("codebook.json"), (facts.to_string() + "\n").as_bytes())?;
        Ok(true)
    }

    /// The codes of the atlas: those in use, the most used first, or all; as many as fit on it.
    fn shown(&self, tally: Option<&Tally>) -> Vec<u32> {
        let mut codes: Vec<u32> = (0..self.norms.len() as u32).collect();
        if let Some(tally) = tally {
            let count = |code: &u32| tally.counts.counts()[*code as usize];
            codes.retain(|code| count(code) > 0);
            codes.sort_by_key(|code| std::cmp::Reverse(count(code)));
        }
        codes.truncate(atlas::MOST);
        codes
    }

    /// What each code paints as an image of its own, a 1×1 grid: a grid full of it has the same patch in its centre, to
    /// the eye, and takes the time of all its patches. A decoder that has statistics for its own grid alone gets that one,
    /// and the patch in the centre is shown. `None` after Ctrl-C.
    fn alone(&self, codes: &[u32]) -> Result<Option<Vec<Rgb>>> {
        let config = self.model.config();
        let by_place = |latent: &vqrae::latent::Config| latent.denormalize && latent.normalize == Normalize::Position;
        let (h, w) = config.latent.filter(by_place).map_or((1, 1), |latent| latent.grid(config.encoder.grid()));
        let mut patches = Vec::with_capacity(codes.len());
        for codes in codes.chunks(256usize.div_ceil(h * w)) {
            if interrupted() {
                return Ok(None);
            }
            let indices = codes.iter().flat_map(|&code| std::iter::repeat_n(code, h * w)).collect();
            let images = self.decode(indices, (codes.len(), h, w))?;
            patches.extend(images.iter().map(|image| centre(image, (h, w))));
        }
        let size = patches.first().map_or(PATCH, |patch| patch.width.min(PATCH));
        let patches = patches.par_iter().map(|patch| resized(patch, (size, size), self.model.preprocessor()));
        Ok(Some(patches.collect::<Result<_>>()?))
    }

    fn decode(&self, indices: Vec<u32>, shape: (usize, usize, usize)) -> Result<Vec<Rgb>> {
        let indices = Tensor::from_vec(indices, shape, self.model.device())?;
        to_images(&self.model.decode_from_indices(&indices)?, self.model.preprocessor())
    }

    /// Paints the atlas, in smaller patches where the file would be large.
    fn write_atlas(&self, path: &Path, patches: &[Rgb]) -> Result<Atlas> {
        let places = self.norms.len().min(atlas::MOST);
        let atlas = Atlas::new(patches, places);
        save_png(path, &atlas.image)?;
        let half = atlas.patch / 2;
        if half == 0 || std::fs::metadata(path).map_err(Error::io(path))?.len() <= LARGE {
            return Ok(atlas);
        }
        let smaller = patches.par_iter().map(|patch| resized(patch, (half, half), self.model.preprocessor()));
        let atlas = Atlas::new(&smaller.collect::<Result<Vec<_>>>()?, places);
        save_png(path, &atlas.image)?;
        Ok(atlas)
    }

    /// The most used codes, and reconstructions that hold them. `None` after Ctrl-C.
    fn in_context(&self, tally: &Tally, files: &[Input], shown: &[u32], patches: &[Rgb]) -> Result<Option<Vec<Seen>>> {
        let seen = |(&code, alone): (&u32, &Rgb)| {
            let count = tally.counts.counts()[code as usize];
            Seen { code, count, alone: alone.clone(), contexts: Vec::new() }
        };
        let mut top: Vec<Seen> = shown.iter().zip(patches).take(TOP).map(seen).collect();
        for input in choose(files, &top) {
            if interrupted() {
                return Ok(None);
            }
            // A file that went away since it was counted is done without.
            if let Ok(codes) = self.read(input) {
                self.add_contexts(codes, &mut top)?;
            }
        }
        Ok(Some(top))
    }

    /// Reconstructs one photo and cuts out where it has the codes that still lack contexts.
    fn add_contexts(&self, codes: Codes, top: &mut [Seen]) -> Result<()> {
        let patch = top.first().map_or(PATCH, |seen| seen.alone.width);
        let (h, w) = (codes.h, codes.w);
        let image = self.decode(codes.indices.clone(), (1, h, w))?.swap_remove(0);
        let image = resized(&image, (h * patch, w * patch), self.model.preprocessor())?;
        for seen in top.iter_mut().filter(|seen| seen.contexts.len() < CONTEXTS) {
            let places: Vec<_> = (0..h * w).filter(|&at| codes.indices[at] == seen.code).collect();
            if let Some(at) = places.get(places.len() / 2) {
                seen.contexts.push(atlas::surroundings(&image, patch, (at / w, at % w)));
            }
        }
        Ok(())
    }

    /// All figures but those of single codes.
    fn facts(&self, tally: Option<&Tally>) -> Value {
        let of = |value: fn(&Neighbour) -> Option<f64>| spread(self.neighbours.iter().filter_map(value).collect());
        let mut facts = json!({
            "model_id": self.model.id(),
            "codebook_size": self.norms.len(),
            "codebook_dim": self.width,
            "norm": spread(self.norms.clone()),
            "nearest": {
                "distance": of(|neighbour| Some(neighbour.distance)),
                "angle": of(|neighbour| neighbour.angle),
            },
            "duplicates": {
                "identical": self.twins.identical,
                "near": self.twins.near,
                "near_is_below": self.twins.below,
                "near_share_of_median": self.near,
            },
        });
        if let Some(tally) = tally {
            facts["usage"] = json!(tally.usage);
            facts["usage"]["files"] = json!(tally.files);
        }
        facts
    }

    /// One array a figure, a value for every code.
    fn columns(&self, tally: Option<&Tally>, shown: &[u32], atlas: &Atlas) -> Value {
        let mut cells = vec![None; self.norms.len()];
        shown.iter().zip(&atlas.cells).for_each(|(&code, &cell)| cells[code as usize] = Some(cell));
        let single = |value: f64| value as f32;
        let mut columns = json!({
            "norm": self.norms.iter().copied().map(single).collect::<Vec<_>>(),
            "nearest": self.neighbours.iter().map(|neighbour| neighbour.code).collect::<Vec<_>>(),
            "distance": self.neighbours.iter().map(|neighbour| single(neighbour.distance)).collect::<Vec<_>>(),
            "angle": self.neighbours.iter().map(|neighbour| neighbour.angle.map(single)).collect::<Vec<_>>(),
            "atlas_cell": cells,
        });
        if let Some(tally) = tally {
            columns["count"] = json!(tally.counts.counts());
        }
        columns
    }
}

/// Few files that show each of the codes often enough: again and again the one that has most of those still wanting.
fn choose<'a>(files: &'a [Input], top: &[Seen]) -> Vec<&'a Input> {
    let held = |input: &Input| {
        let Ok(codes) = input.codes() else { return 0 };
        let mut indices = codes.indices;
        indices.sort_unstable();
        let bits = top.iter().enumerate().filter(|(_, seen)| indices.binary_search(&seen.code).is_ok());
        bits.fold(0u64, |held, (bit, _)| held | 1 << bit)
    };
    let mut held: Vec<u64> = files.par_iter().map(held).collect();
    let (mut wanting, mut shown, mut chosen) = (u64::MAX, [0; TOP], Vec::new());
    while chosen.len() < PHOTOS {
        let gain = |i: &usize| (held[*i] & wanting).count_ones();
        let Some(best) = (0..files.len()).rev().max_by_key(gain).filter(|best| gain(best) > 0) else { break };
        for (bit, shown) in shown.iter_mut().enumerate().filter(|(bit, _)| held[best] >> bit & 1 == 1) {
            *shown += 1;
            if *shown >= CONTEXTS {
                wanting &= !(1 << bit);
            }
        }
        held[best] = 0;
        chosen.push(&files[best]);
    }
    chosen
}

/// Smallest, median and largest of some values; `null` of none.
fn spread(mut values: Vec<f64>) -> Value {
    values.sort_by(f64::total_cmp);
    match [0.0, 0.5, 1.0].map(|q| quantile(&values, q)) {
        [Some(min), Some(median), Some(max)] => json!({ "min": min, "median": median, "max": max }),
        _ => Value::Null,
    }
}

/// The same facts with six digits, for people.
fn rounded(facts: &Value) -> Value {
    match facts {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), rounded(value))).collect(),
        Value::Number(number) if number.is_f64() => {
            json!(number.as_f64().and_then(|value| format!("{value:.5e}").parse::<f64>().ok()))
        }
        other => other.clone(),
    }
}
