//! `verify`: whether a folder of shards is whole, is what its manifest says, and is what the model makes of the images.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vqrae::codes::shard::{Layout, Stats, Tally};
use vqrae::codes::{CodeSet, Row};
use vqrae::{Device, Vqrae};

use crate::crop::CropArgs;
use crate::inputs::{Format, ImageKeys, Input, Kind, Listing, Search};
use crate::load::{Reading, stack_alike, upload};
use crate::pipeline::Pace;
use crate::plan::ModelArgs;
use crate::report::{self, Exit};
use crate::shards::plan::Plan;
use crate::view::ImageArgs;

/// Check a folder of code shards: all there, whole, in range and, with --images, what the model makes of the images
///
/// Reads every shard: its hash, rows, grids, codes below the codebook's size, keys and order. With --images a sample of them is
/// encoded again and compared code by code. What is wrong is named on stderr, one a line; the last line on stdout is a summary in
/// JSON, with the codebook's use over the whole set.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder that tokenize wrote
    codes: PathBuf,
    /// The images that the codes were made of, in the words given to tokenize
    #[arg(long, value_name = "INPUT", num_args = 1..)]
    images: Vec<PathBuf>,
    /// How many rows to encode again, spread evenly over the set
    #[arg(long, value_name = "N", default_value = "32", requires = "images")]
    sample: usize,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    view: ImageArgs,
    #[command(flatten)]
    crops: CropArgs,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli verify out
  vqrae-cli verify out --images photos
  vqrae-cli verify out --images 'shards/*.tar' --sample 500 --model my-model

Exit codes: 0 all is right, 1 something is not.";

/// What was found wrong so far.
#[derive(Default)]
struct Findings {
    count: usize,
}

impl Findings {
    fn add(&mut self, text: &str) {
        self.count += 1;
        report::say(&format!("wrong: {text}"));
    }
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let set = CodeSet::open(&args.codes)?;
    let mut findings = Findings::default();
    check_shards_are_all_there(&set, &mut findings)?;

    let wanted: HashSet<usize> = match args.images.is_empty() {
        true => HashSet::new(),
        false => (0..args.sample).map(|i| i * set.len() / args.sample.max(1)).collect(),
    };
    let mut sample = Vec::new();
    let mut tally = Tally::new(&set.manifest().header);
    let (mut number, mut last) = (0, None);
    for stats in set.shards() {
        let mut each = |row: &Row| {
            if wanted.contains(&number) {
                sample.push(row.clone());
            }
            number += 1;
            tally.add(row);
        };
        if let Err(error) = check_shard(&set, stats, &mut last, &mut each) {
            findings.add(&format!("{error:#}"));
        }
    }
    let compared = if args.images.is_empty() { 0 } else { compare(&args, &set, &sample, &mut findings)? };
    if set.is_empty() {
        findings.add(&format!("{}: no finished shard", args.codes.display()));
    }
    let total = tally.stats("", set.manifest().layout, "", None, (0, String::new()));
    let summary = json!({
        "shards": set.shards().len(),
        "rows": set.len(),
        "ok": set.shards().iter().map(|stats| stats.ok).sum::<usize>(),
        "errors": set.shards().iter().map(|stats| stats.errors).sum::<usize>(),
        "bytes": set.shards().iter().map(|stats| stats.bytes).sum::<u64>(),
        "model_id": set.manifest().header.model_id,
        "codes": total.codes,
        "codes_in_use": total.codes_in_use,
        "perplexity": total.perplexity,
        "encoded_again": compared,
        "wrong": findings.count,
    });
    report::data(&summary.to_string());
    Ok(if findings.count == 0 { Exit::Success } else { Exit::Failure })
}

/// Against the numbers of the shards themselves, and against the plan if there is one.
fn check_shards_are_all_there(set: &CodeSet, findings: &mut Findings) -> Result<()> {
    for name in set.missing() {
        findings.add(&format!("{name}: not finished"));
    }
    let here: HashMap<&str, &Stats> = set.shards().iter().map(|stats| (stats.shard.as_str(), stats)).collect();
    if let Some(plan) = Plan::read(set.folder())? {
        let mut planned = HashSet::new();
        for i in 0..plan.len() {
            let shard = plan.shard(i)?;
            match here.get(shard.name.as_str()) {
                // Named already.
                None if shard.numbered.is_some() && !set.missing().is_empty() => {}
                None => findings.add(&format!("{}: planned, but not finished", shard.name)),
                Some(stats) if stats.inputs != shard.inputs => {
                    findings.add(&format!("{}: made of other images than planned", shard.name));
                }
                Some(_) => {}
            }
            planned.insert(shard.name);
        }
        for name in here.keys().filter(|name| !planned.contains(**name)) {
            findings.add(&format!("{name}: not in the plan"));
        }
    }
    let layout = set.manifest().layout;
    for entry in std::fs::read_dir(set.folder()).map_err(vqrae::Error::io(set.folder()))? {
        let path = entry.map_err(vqrae::Error::io(set.folder()))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if Layout::of(&path) == Some(layout) && name != "plan" && !here.contains_key(name.as_str()) {
            findings.add(&format!("{}: has no statistics, so nobody finished it", path.display()));
        }
    }
    Ok(())
}

/// Reads a shard and hands its rows to `each`; `last` is the path before, of numbered shards in the order of bytes.
fn check_shard(set: &CodeSet, stats: &Stats, last: &mut Option<String>, each: &mut dyn FnMut(&Row)) -> Result<()> {
    let path = set.file(stats);
    let (bytes, hash) = hash(&path)?;
    if (bytes, &hash) != (stats.bytes, &stats.blake3) {
        bail!(
            "{}: {bytes} bytes of hash {hash}, but its statistics say {} of {}; delete both and tokenize again",
            path.display(),
            stats.bytes,
            stats.blake3
        );
    }
    if stats.layout == Layout::WebDataset {
        return Ok(());
    }
    let (mut rows, mut ok, mut keys) = (0, 0, HashSet::new());
    for row in set.open_shard(stats)? {
        let row = row?;
        let shown = || format!("{}: row {}", path.display(), row.key);
        if !row.key.starts_with(&stats.shard) || !keys.insert(row.key.clone()) {
            bail!("{}: a key twice, or of another shard", shown());
        }
        if stats.shards.is_some() && last.as_ref().is_some_and(|last| *last > row.path) {
            bail!("{}: {} does not come after {}", shown(), row.path, last.as_deref().unwrap_or_default());
        }
        (rows, ok) = (rows + 1, ok + usize::from(row.codes.is_some()));
        each(&row);
        *last = Some(row.path).filter(|_| stats.shards.is_some());
    }
    if (rows, ok) != (stats.rows, stats.ok) {
        let path = path.display();
        bail!("{path}: {rows} rows, {ok} of them with codes, but its statistics say {} and {}", stats.rows, stats.ok);
    }
    Ok(())
}

fn hash(path: &Path) -> Result<(u64, String)> {
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).map_err(vqrae::Error::io(path))?;
    hasher.update_reader(file).map_err(vqrae::Error::io(path))?;
    Ok((hasher.count(), hasher.finalize().to_hex().to_string()))
}

/// Encodes the images of some rows again; tells how many were compared.
fn compare(args: &Args, set: &CodeSet, sample: &[Row], findings: &mut Findings) -> Result<usize> {
    let model = args.model.open()?;
    let header = &set.manifest().header;
    if header.model_id != model.id() {
        bail!(
            "the codes are of model {}, but the model at hand is {}; name theirs with --model",
            header.model_id,
            model.id()
        );
    }
    if header.dtype != model.precision() {
        let (theirs, ours) = (&header.dtype, model.precision());
        bail!(
            "the codes were computed in {theirs}, here it is {ours}, which may give others; pass --dtype or VQRAE_CPU"
        );
    }
    let reading = Reading::of_crops(&args.view, &args.crops, &model)?;
    let origin = crate::output::Origin::new(&model, &reading.views);
    if header.preprocessing != origin.preprocessing {
        let (theirs, ours) = (&header.preprocessing, &origin.preprocessing);
        bail!(
            "the images were prepared by {theirs}, here it is {ours}; pass --resolution, --resize-mode and --resample as then"
        );
    }
    let images = find(args, sample)?;
    let mut compared = 0;
    for row in sample {
        let Some(input) = images.get(&row.path) else {
            findings.add(&format!("{}: not among the images", row.path));
            continue;
        };
        match differs(&model, &reading, input, row) {
            Ok(None) => {}
            Ok(Some(difference)) => findings.add(&format!("{} ({}): {difference}", row.path, row.key)),
            Err(error) => return Err(error.context(row.path.clone())),
        }
        compared += 1;
    }
    Ok(compared)
}

/// The images of some rows, by path.
fn find(args: &Args, sample: &[Row]) -> Result<HashMap<String, Input>> {
    let wanted: HashSet<&str> = sample.iter().map(|row| row.path.as_str()).collect();
    let (words, format, kind) = (args.images.as_slice(), Format::Auto, Kind::Images);
    let listing = Listing::of(&Search { words, files_from: None, nul: false, format, kind, output: &args.codes })?;
    let mut images = HashMap::new();
    for input in listing.files.iter().map(|found| listing.input(found)) {
        let source = input.source();
        if wanted.contains(source.as_str()) {
            images.insert(source, input);
        }
    }
    for archive in &listing.archives {
        for input in archive.open(&ImageKeys::default(), &std::env::temp_dir())? {
            let source = input.source();
            if wanted.contains(source.as_str()) {
                images.insert(source, input);
            }
        }
    }
    Ok(images)
}

/// What differs between a row and what comes of its image now.
fn differs(model: &Vqrae, reading: &Reading, input: &Input, row: &Row) -> Result<Option<String>> {
    let mut item = reading.load_row(input);
    if item.row.content_hash != row.content_hash {
        return Ok(Some("the image is another one than was tokenized".to_string()));
    }
    match (&row.error, &item.row.error) {
        (None, None) => {}
        (Some(_), Some(_)) => return Ok(None),
        (Some(before), None) => return Ok(Some(format!("can be read now, but could not be: {before}"))),
        (None, Some(now)) => return Ok(Some(format!("cannot be read any more: {now}"))),
    }
    let at = reading.views.iter().position(|view| view.label() == row.view);
    let at = at.context("a view that these settings do not make")?;
    let pace = Pace { workers: 1, batch_size: 1 };
    let pixels = stack_alike(std::iter::once(&mut item.views[at]), model, pace)?;
    let indices =
        pixels.map(|pixels| Ok(model.encode_to_indices(&upload(&pixels, model)?)?.to_device(&Device::Cpu)?))?;
    let indices = indices.into_items(|indices| Ok(vec![indices.get(0)?.flatten_all()?.to_vec1::<u32>()?]))?;
    let [now] = indices.as_slice() else { bail!("one image, but {} grids", indices.len()) };
    let before = row.codes.as_deref().unwrap_or_default();
    let count = before.iter().zip(now).filter(|(a, b)| a != b).count() + before.len().abs_diff(now.len());
    Ok((count > 0).then(|| format!("{count} of {} codes are others now", now.len())))
}
