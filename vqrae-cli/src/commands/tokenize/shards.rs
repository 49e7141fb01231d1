//! Shards: the images of a data set, by many in a file.

use std::path::PathBuf;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use vqrae::codes::shard::{Layout, Stats};
use vqrae::codes::{Header, Manifest, Row};
use vqrae::image::{ResizeMode, Rgb};
use vqrae::{Tensor, Vqrae};

use super::super::{RUN_AGAIN, finish};
use super::{Args, Computed, Engine, write_sheet_of};
use crate::alike::Alike;
use crate::inputs::{Archive, Input, Kind};
use crate::interrupts::{catch_interrupts, interrupted};
use crate::load::{Item, stack_alike};
use crate::output::{Origin, picture, save_pngs};
use crate::pipeline::each_batch;
use crate::report::{self, Exit, Progress, Quality};
use crate::shards::folder::Folder;
use crate::shards::journal::{Identity, Journal, sweep};
use crate::shards::plan::{Plan, Shard, Work};
use crate::shards::ranks::Rank;
use crate::sheet;

/// Lists the images once, for all processes.
pub(super) fn plan(args: &Args) -> Result<Exit> {
    let plan = list(args)?;
    let path = plan.write(&args.inputs.output)?;
    let whole = &plan.whole;
    report::data(
        &json!({ "plan": path, "shards": whole.shards, "images": whole.images, "classes": whole.classes.len() })
            .to_string(),
    );
    Ok(Exit::Success)
}

/// The words that a plan is made from.
fn words(args: &Args) -> Vec<String> {
    let files = &args.inputs.files;
    let list = files.files_from.iter().map(|list| format!("--files-from {}", list.display()));
    files.inputs.iter().map(|word| word.display().to_string()).chain(list).collect()
}

fn list(args: &Args) -> Result<Plan> {
    let mut listing = args.inputs.files.list(Kind::Images, &args.inputs.output)?;
    for (input, reason) in &listing.unreadable {
        report::say(&format!("skipped {}: {reason}", input.path.display()));
    }
    if listing.unreadable.len() > args.inputs.files.max_errors() {
        bail!("giving up: {} folders or links could not be followed", listing.unreadable.len());
    }
    for archive in listing.archives.iter_mut().filter(|archive| archive.is_stdin()) {
        archive.relative = PathBuf::from(&args.stdin_name);
    }
    Plan::of(listing, words(args), args.samples_per_shard.get(), args.labels)
}

/// The plan of the output folder if it has one, else what the words name now.
fn planned(args: &Args) -> Result<Plan> {
    let folder = &args.inputs.output;
    let Some(plan) = Plan::read(folder)? else { return list(args) };
    let path = Plan::path(folder).display().to_string();
    let (theirs, ours) = (plan.whole.words.join(" "), words(args).join(" "));
    if theirs != ours {
        bail!(
            "{path}: planned for {theirs}, but this run names {ours}; name the same, delete the plan, or plan again with --plan"
        );
    }
    if plan.whole.samples_per_shard != args.samples_per_shard.get() {
        let planned = plan.whole.samples_per_shard;
        bail!("{path}: planned with --samples-per-shard {planned}; say the same, or plan again with --plan");
    }
    report::say(&format!("{path}: {} shards, as planned; the inputs are not listed again", plan.len()));
    Ok(plan)
}

/// What all shards of a run have in common.
fn manifest(args: &Args, engine: &Engine, plan: &Plan, layout: Layout) -> Result<Manifest> {
    let (model, views) = (engine.model(), &engine.reading.views);
    let fixed = views.iter().all(|view| view.preprocessor.resize_mode != ResizeMode::Naflex);
    let sizes: Vec<_> = views.iter().map(|view| view.preprocessor.size).collect();
    let grids = sizes.iter().map(|&(h, w)| model.grid_of(h, w)).collect::<Result<Vec<_>, _>>()?;
    let same = grids.iter().all(|grid| *grid == grids[0]);
    let Origin { model_id, preprocessing, dtype } = Origin::new(model, views);
    let header = Header {
        model_id,
        preprocessing,
        dtype,
        codebook_size: model.codebook_size(),
        codes_per_token: model.codes_per_token(),
        grid: (fixed && same).then(|| grids[0]),
    };
    let mut manifest = Manifest::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"), header, layout);
    manifest.device_kind = if model.device().is_cpu() { "cpu" } else { "cuda" }.to_string();
    if !model.is_batch_invariant() {
        let (h, w) = sizes[0];
        manifest.batch_shape = Some(vec![engine.pace.batch_size, 3, h, w]);
    }
    manifest.augmentations = args.crops.names();
    let mut sizes = sizes;
    sizes.dedup();
    manifest.image_size = match sizes.as_slice() {
        _ if !fixed => None,
        [one] => Some(json!(one)),
        several => Some(json!(several)),
    };
    manifest.codebook_dim = codebook_dim(model)?;
    manifest.samples_per_shard = plan.whole.samples_per_shard;
    manifest.classes = plan.whole.classes.clone();
    Ok(manifest)
}

/// Width of a row of the codebook; 0 where the quantizer has no table of rows.
fn codebook_dim(model: &Vqrae) -> Result<usize> {
    Ok(model.codebook().and_then(|codebook| codebook.dim(1)).unwrap_or_default())
}

pub(super) fn run(args: &Args, layout: Layout) -> Result<Exit> {
    let rank = Rank::of(&args.rank)?;
    let engine = Engine::open(args)?;
    let plan = planned(args)?;
    let part = rank.part(plan.len());
    if let Some(said_by) = &rank.said_by {
        let (i, n) = (rank.index, rank.count);
        report::say(&format!(
            "process {i} of {n} ({said_by}): shards {} to {} of {}",
            part.start,
            part.end,
            plan.len()
        ));
    }
    let manifest = manifest(args, &engine, &plan, layout)?;
    let folder = Folder::open(&args.inputs.output, manifest, args.if_exists, args.retry_errors)?;
    folder.check_rest(plan.whole.numbered)?;
    catch_interrupts()?;
    let progress = Progress::new(0, 0, args.inputs.files.max_errors(), None)?;
    let mut run =
        Run { args, engine: &engine, plan: &plan, folder: &folder, progress, writing: None, left: Left::default() };
    let exit = run.all(part.clone());
    // What is being written is settled, however the run ended.
    let written = run.settle();
    let exit = exit?;
    written?;
    sweep(&folder.path)?;
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        let first = run.first_inputs(part)?;
        write_sheet_of(&engine, path, &first, plan.whole.images.max(first.len()))?;
    }
    finish(run.progress, exit, engine.devices(), Quality::default(), RUN_AGAIN)
}

/// A run over the shards of this process.
struct Run<'a> {
    args: &'a Args,
    engine: &'a Engine,
    plan: &'a Plan,
    folder: &'a Folder,
    progress: Progress,
    /// The shard before is written while the next one is computed.
    writing: Option<JoinHandle<Result<Stats>>>,
    left: Left,
}

/// What is still to do, to tell how long that takes. How many images an archive holds is not known before it is opened.
#[derive(Default)]
struct Left {
    files: usize,
    archive_bytes: u64,
    opened_bytes: u64,
    opened_images: usize,
    done: usize,
}

impl Left {
    fn total(&self) -> usize {
        let a_byte = self.opened_images as f64 / self.opened_bytes.max(1) as f64;
        self.done + self.files + (self.archive_bytes as f64 * a_byte) as usize
    }
}

impl Run<'_> {
    fn all(&mut self, part: std::ops::Range<usize>) -> Result<Exit> {
        let of = part.len();
        let mut to_do = Vec::new();
        for i in part {
            let shard = self.plan.shard(i)?;
            match self.folder.done(&shard)? {
                Some(stats) if self.has_pictures(&shard) => self.left.done += stats.rows / self.views(),
                _ => {
                    match &shard.work {
                        Work::Files(files) => self.left.files += files.len(),
                        Work::Archive(archive) => self.left.archive_bytes += archive.bytes().unwrap_or_default(),
                    }
                    to_do.push(i);
                }
            }
        }
        self.progress.expect(self.left.total());
        self.progress.shards(of - to_do.len(), of);
        if self.left.done > 0 {
            self.progress.resume(self.left.done);
            let (done, left) = (of - to_do.len(), to_do.len());
            self.progress.note(&format!("{done} of {of} shards were done before, {left} to go"));
        }
        for i in to_do {
            if interrupted() || self.one(self.plan.shard(i)?)? == Exit::Interrupted {
                return Ok(Exit::Interrupted);
            }
        }
        Ok(Exit::Success)
    }

    fn views(&self) -> usize {
        self.engine.reading.views.len()
    }

    /// Whether the reconstructions that were asked for are there too.
    fn has_pictures(&self, shard: &Shard) -> bool {
        let Work::Files(files) = &shard.work else { return !self.engine.reconstruct };
        let painted = |input: &Input| {
            let of = |view| picture(&self.folder.path, &input.relative, view).exists();
            self.engine.reading.views.iter().all(of)
        };
        !self.engine.reconstruct || files.iter().any(painted)
    }

    /// Makes one shard.
    fn one(&mut self, shard: Shard) -> Result<Exit> {
        let inputs = match &shard.work {
            Work::Files(files) => files.clone(),
            Work::Archive(archive) => match self.open(archive)? {
                Some(inputs) => inputs,
                None => return Ok(Exit::Success),
            },
        };
        let identity = Identity {
            name: shard.name.clone(),
            inputs: shard.inputs,
            shards: shard.numbered,
            pictures: self.engine.reconstruct,
            header: self.folder.manifest.header.clone(),
            layout: self.folder.manifest.layout,
        };
        let views = self.views();
        let in_shard = if shard.numbered.is_some() { self.plan.whole.samples_per_shard } else { inputs.len() };
        let keys = Keys::new(&shard.name, in_shard, views);
        let fits = |i: usize, row: &Row| {
            inputs
                .get(i / views)
                .is_some_and(|input| row.key == keys.of(i / views, i % views) && row.path == input.source())
        };
        let mut journal = Journal::open(&self.folder.path, &identity, views, fits)?;
        let done = journal.rows() / views;
        if done > 0 {
            self.progress.resume(done);
            self.progress.note(&format!("{}: {done} of {} images were done before", shard.name, inputs.len()));
        }
        let engine = self.engine;
        let read = |input: &Input| Ok(engine.reading.load_row(input));
        let prepare = |batch: &mut [(&Input, Item)]| {
            stack_alike(batch.iter_mut().flat_map(|(_, item)| &mut item.views), engine.model(), engine.pace)
        };
        let folder = self.folder;
        let mut at = done;
        let write = |progress: &mut Progress, batch: &[(&Input, Item)], computed: Alike<Computed>| {
            let rows = rows(engine, folder, progress, batch, computed, |i, view| keys.of(at + i, view))?;
            at += batch.len();
            journal.append(&rows)
        };
        let exit =
            each_batch(&inputs[done..], engine.pace, &mut self.progress, read, prepare, engine.computes(), write)?;
        if exit == Exit::Interrupted {
            return Ok(exit);
        }
        if journal.rows() != inputs.len() * views {
            bail!("{}: {} rows of {} images", shard.name, journal.rows(), inputs.len());
        }
        self.settle()?;
        self.writing = Some(std::thread::spawn(move || journal.finish(&identity)));
        Ok(Exit::Success)
    }

    /// The images of an archive; `None` if it cannot be opened, which another run may do better.
    fn open(&mut self, archive: &Archive) -> Result<Option<Vec<Input>>> {
        let bytes = archive.bytes().unwrap_or_default();
        self.left.archive_bytes = self.left.archive_bytes.saturating_sub(bytes);
        let opened = archive.open(&self.args.inputs.files.keys(), &self.folder.path);
        match &opened {
            Ok(inputs) => {
                self.left.opened_bytes += bytes;
                self.left.opened_images += inputs.len();
                self.left.files += inputs.len();
            }
            Err(error) => {
                let input = Input::file(archive.path.clone(), archive.relative.clone());
                self.progress.skip(&input, &error.to_string())?;
                self.left.done += 1;
            }
        }
        self.progress.expect(self.left.total());
        Ok(opened.ok())
    }

    /// Waits for the shard that is being written.
    fn settle(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let stats = writing.join().map_err(|_| anyhow!("the thread that writes shards ended early"))??;
        self.progress.shard(&stats);
        Ok(())
    }

    /// The first images, for a sheet.
    fn first_inputs(&self, part: std::ops::Range<usize>) -> Result<Vec<Input>> {
        let mut inputs = Vec::new();
        for i in part {
            inputs.extend(match self.plan.shard(i)?.work {
                Work::Files(files) => files,
                Work::Archive(archive) if archive.is_stdin() => Vec::new(),
                Work::Archive(archive) => archive.open(&self.args.inputs.files.keys(), &self.folder.path)?,
            });
            if inputs.len() >= sheet::MOST {
                break;
            }
        }
        Ok(inputs)
    }
}

/// The keys of a shard's rows: its name and the image's number in it, in digits enough for all, at least four.
struct Keys {
    start: String,
    digits: usize,
    views: usize,
}

impl Keys {
    fn new(shard: &str, images: usize, views: usize) -> Self {
        let digits = images.saturating_sub(1).to_string().len().max(4);
        // As img2dataset: 00003 and 0012 make 000030012.
        let numbered = shard.bytes().all(|byte| byte.is_ascii_digit());
        Self { start: format!("{shard}{}", if numbered { "" } else { "-" }), digits, views }
    }

    fn of(&self, image: usize, view: usize) -> String {
        let Self { start, digits, views } = self;
        let view = if *views > 1 { format!("-{view}") } else { String::new() };
        format!("{start}{image:0digits$}{view}")
    }
}

/// The rows of a batch, of which pictures are written first: where a row is, its picture is too.
fn rows(
    engine: &Engine,
    folder: &Folder,
    progress: &mut Progress,
    batch: &[(&Input, Item)],
    computed: Alike<Computed>,
    key: impl Fn(usize, usize) -> String,
) -> Result<Vec<Row>> {
    let mut computed = computed.into_items(|group| engine.each_image(group))?.into_iter();
    let (mut rows, mut pictures): (Vec<Row>, Vec<(PathBuf, Rgb)>) = (Vec::new(), Vec::new());
    let views = &engine.reading.views;
    for (i, (input, item)) in batch.iter().enumerate() {
        if let Some(reason) = &item.row.error {
            progress.skip(input, reason)?;
        }
        for (v, view) in views.iter().enumerate() {
            let mut row = Row { key: key(i, v), ..item.row.clone() };
            row.view = view.label();
            if row.error.is_none() {
                let (indices, painted) = computed.next().context("fewer codes than images")?;
                set_codes(&mut row, &indices)?;
                pictures.extend(painted.map(|painted| (picture(&folder.path, &input.relative, view), painted)));
            }
            rows.push(row);
        }
    }
    save_pngs(pictures.iter().map(|(path, image)| (path.clone(), image)))?;
    Ok(rows)
}

/// Sets the codes `[h, w]` or `[h, w, c]` of a row.
fn set_codes(row: &mut Row, indices: &Tensor) -> Result<()> {
    (row.h, row.w) = (u32::try_from(indices.dim(0)?)?, u32::try_from(indices.dim(1)?)?);
    row.codes = Some(indices.flatten_all()?.to_vec1()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_shard_and_the_number_in_it() {
        assert_eq!(Keys::new("00003", 10_000, 1).of(12, 0), "000030012");
        assert_eq!(Keys::new("00003", 10_001, 1).of(12, 0), "0000300012");
        assert_eq!(Keys::new("train-7", 5, 2).of(4, 1), "train-7-0004-1");
    }

    #[test]
    fn what_is_left_of_archives_is_told_by_those_that_were_opened() {
        let left = Left { files: 100, archive_bytes: 3000, opened_bytes: 1000, opened_images: 50, done: 7 };
        assert_eq!(left.total(), 7 + 100 + 150);
        assert_eq!(Left { archive_bytes: 10, ..Left::default() }.total(), 0);
    }
}
