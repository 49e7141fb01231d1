//! Canonical shards → the files that other projects' loaders read, a layout a file.
//!
//! A layout gets the rows that have codes, one after the other, so memory holds one image (and eight bytes or fewer for each of those
//! before, where a reader wants an index). Beside what the reader wants stand `rows.jsonl`, the row of each document in their order, and
//! `export.json`: of which set this is, and how ids become codes again.

mod datatrove;
mod folder;
mod genie;
mod images;
mod llamagen;
mod lm;
mod megatron;
mod shards;
mod titok;
mod tokens;

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use vqrae::codes::shard::{self, Stats};
use vqrae::codes::{CodeSet, Format, Manifest, Row};

use crate::interrupts::interrupted;
use crate::report::{self, Count};
use folder::{Draft, OutFile};
use lm::LmArgs;
use tokens::{Documents, TokenArgs, TokenRule};

pub(crate) use self::lm::LmArgs as Language;
pub(crate) use self::tokens::TokenArgs as Tokens;

/// What `export.json` says first.
const FORMAT: &str = "vqrae-export-1";

/// The name of the file.
const RECORD: &str = "export.json";

/// Whose loader is to read the codes.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum To {
    /// LlamaGen, classes to images: NAME_codes/I.npy and NAME_labels/I.npy
    #[value(name = "llamagen-c2i")]
    LlamagenC2i,
    /// LlamaGen, captions to images: LIST.jsonl and LIST/LINE.npy
    #[value(name = "llamagen-t2i")]
    LlamagenT2i,
    /// TiTok's repository (RAR, MaskGIT): {"class_id": …, "tokens": […]} a line
    #[value(name = "titok-jsonl", aliases = ["titok", "rar", "maskgit"])]
    Titok,
    /// Megatron-LM, NeMo: NAME.bin and NAME.idx
    #[value(alias = "nemo")]
    Megatron,
    /// datatrove, nanotron: NAME.ds, .ds.index and .ds.metadata
    #[value(alias = "nanotron")]
    Datatrove,
    /// A language model that reads and writes images: text and codes as ids of a tokenizer, in Megatron's or datatrove's files
    #[value(alias = "llm")]
    Lm,
    /// 1xgpt: video.bin, segment_ids.bin and metadata.json
    #[value(name = "1xgpt", alias = "genie")]
    Genie,
    /// webdataset: tars of KEY.codes.npy and KEY.json
    #[value(name = "webdataset", alias = "wds")]
    WebDataset,
    /// numpy: codes/PATH.npy
    Npy,
    /// safetensors: codes/PATH.safetensors
    Safetensors,
    /// A row a line
    Jsonl,
    /// pyarrow, datasets: the canonical form, without the rows that have no codes
    Parquet,
}

impl To {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
    }
}

/// What is exported, and how.
pub(crate) struct Plan<'a> {
    pub(crate) set: &'a CodeSet,
    pub(crate) output: &'a Path,
    pub(crate) to: To,
    pub(crate) name: Option<String>,
    pub(crate) tokens: TokenArgs,
    pub(crate) language: LmArgs,
    pub(crate) hz: Option<f64>,
    pub(crate) overwrite: bool,
    pub(crate) allow_incomplete: bool,
}

/// The codes of one row.
pub(crate) struct Image<'a> {
    /// h · w · C codes in raster order, those of a token side by side.
    codes: &'a [u32],
    h: usize,
    w: usize,
}

/// A reader's files while they are written.
trait Layout {
    /// The rows of a shard follow.
    fn begin_shard(&mut self, _shard: &Stats) -> Result<()> {
        Ok(())
    }

    /// Adds a row that has codes.
    fn add(&mut self, row: &Row, image: &Image) -> Result<()>;

    /// Writes what makes a reader accept the files.
    fn finish(self: Box<Self>) -> Result<Written>;
}

/// What a layout has written.
#[derive(Default)]
struct Written {
    /// What the reader counts: documents, lines, arrays.
    documents: usize,
    /// Of all documents, those that are no codes included.
    tokens: u64,
    /// The type of a token in the files.
    dtype: &'static str,
    /// How codes became ids, where they did.
    rule: Option<TokenRule>,
    /// What else documents hold.
    language: Option<Value>,
    /// The views of every document, where there are several.
    views: Vec<String>,
    /// What the user of the reader should know.
    notes: Vec<String>,
}

impl Written {
    fn of(documents: usize) -> Self {
        Self { documents, ..Self::default() }
    }
}

/// Exports a set; `None` if Ctrl-C or SIGTERM came first, which leaves nothing behind.
pub(crate) fn export(plan: &Plan) -> Result<Option<Value>> {
    let Plan { set, output, .. } = *plan;
    check_set(plan)?;
    let draft = Draft::new(output, plan.overwrite)?;
    let mut layout = layout(plan, &draft)?;
    let mut count = Count::new(set.len(), "rows");
    let mut left_out = 0;
    for shard in set.shards() {
        layout.begin_shard(shard)?;
        let Some(errors) = add_shard(set, shard, &mut *layout, &mut count)? else {
            report::say(&format!("interrupted: {} was not written; run the same command again", output.display()));
            return Ok(None);
        };
        left_out += errors;
    }
    let written = layout.finish()?;
    if written.documents == 0 {
        bail!("{}: none of {} rows has codes, so there is nothing to export", set.folder().display(), set.len());
    }
    let summary = count.finish(json!({
        "output": output,
        "layout": plan.to.name(),
        "documents": written.documents,
        "tokens": written.tokens,
        "left_out": left_out,
    }));
    draft.write(RECORD, format!("{:#}\n", record(plan, &written, left_out)).as_bytes())?;
    draft.publish()?;
    if left_out > 0 {
        let rows =
            if left_out == 1 { "1 row without codes was" } else { &format!("{left_out} rows without codes were") };
        report::say(&format!("{rows} left out"));
    }
    written.notes.iter().for_each(|note| report::say(&format!("note: {note}")));
    Ok(Some(summary))
}

/// Adds the rows of one shard and returns how many had no codes; `None` after Ctrl-C.
fn add_shard(set: &CodeSet, shard: &Stats, layout: &mut dyn Layout, count: &mut Count) -> Result<Option<usize>> {
    let (mut rows, mut errors) = (0, 0);
    for row in set.open_shard(shard)? {
        let row = row?;
        if interrupted() {
            return Ok(None);
        }
        rows += 1;
        match &row.codes {
            Some(codes) => layout.add(&row, &Image { codes, h: row.h as usize, w: row.w as usize })?,
            None => errors += 1,
        }
        count.advance(1);
    }
    if (rows, errors) != (shard.rows, shard.errors) {
        bail!(
            "{}: {rows} rows, {errors} of them without codes, but {}_stats.json says {} and {}; delete both and run tokenize again",
            set.file(shard).display(),
            shard.shard,
            shard.rows,
            shard.errors
        );
    }
    Ok(Some(errors))
}

/// Refuses what cannot be exported before anything is written.
fn check_set(plan: &Plan) -> Result<()> {
    let Plan { set, output, to, .. } = *plan;
    let (folder, manifest) = (set.folder().display(), set.manifest());
    if !plan.allow_incomplete
        && let Err(error) = set.check_complete()
    {
        bail!("{error}, or pass --allow-incomplete to leave them out: {}", missing(set));
    }
    if set.shards().is_empty() {
        bail!("{folder}: no shard is finished; run tokenize again");
    }
    if (manifest.order.as_str(), manifest.index_base) != ("raster", 0) {
        bail!("{folder}: codes in the order {} from {}, expected: raster from 0", manifest.order, manifest.index_base);
    }
    if output.exists() && output.canonicalize().ok() == set.folder().canonicalize().ok() {
        bail!("{folder} is the set itself; choose another --output");
    }
    let one_length = matches!(to, To::LlamagenC2i | To::LlamagenT2i | To::Titok);
    if one_length && manifest.header.grid.is_none() {
        bail!(
            "{} reads images of one grid, but every image of this set has its own; use megatron, datatrove, webdataset or jsonl",
            to.name()
        );
    }
    Ok(())
}

/// The first shards that are missing.
fn missing(set: &CodeSet) -> String {
    const SHOWN: usize = 10;
    let names = set.missing();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    names.into_iter().take(SHOWN).collect::<Vec<_>>().join(", ") + more
}

fn layout<'a>(plan: &Plan, draft: &'a Draft) -> Result<Box<dyn Layout + 'a>> {
    let manifest = plan.set.manifest();
    let header = &manifest.header;
    match plan.to {
        To::Titok | To::Megatron | To::Datatrove => {}
        To::Lm => plan.tokens.check_absent("lm takes ids from the tokenizer")?,
        to => plan.tokens.check_absent(&format!("{} holds codes as they are", to.name()))?,
    }
    if plan.to != To::Lm {
        plan.language.check_absent(&plan.to.name())?;
    }
    if plan.hz.is_some() && plan.to != To::Genie {
        bail!("--hz is for 1xgpt");
    }
    let name = plan.name.as_deref().unwrap_or("codes");
    let rule = || TokenRule::new(&plan.tokens, header);
    let codes = || Ok::<_, anyhow::Error>(Documents::Codes(rule()?));
    let megatron = |documents| Ok::<_, anyhow::Error>(Box::new(megatron::Megatron::new(draft, name, documents)?));
    let datatrove = |documents| datatrove::Datatrove::new(draft, name, &header.model_id, documents).map(Box::new);
    let shards = |layout| Box::new(shards::Shards::new(draft, manifest, layout));
    Ok(match plan.to {
        To::LlamagenC2i => {
            let name = plan.name.clone().unwrap_or_else(|| imagenet(manifest));
            Box::new(llamagen::ClassToImage::new(draft, &name)?)
        }
        To::LlamagenT2i => Box::new(llamagen::TextToImage::new(draft)),
        To::Titok => Box::new(titok::Titok::new(draft, name, rule()?)?),
        To::Megatron => megatron(codes()?)?,
        To::Datatrove => datatrove(codes()?)?,
        To::Lm => {
            let documents = Documents::Interleaved(Box::new(lm::Interleaved::new(&plan.language, header)?));
            match plan.language.files() {
                lm::Files::Megatron => megatron(documents)?,
                lm::Files::Datatrove => datatrove(documents)?,
            }
        }
        To::Genie => Box::new(genie::Genie::new(draft, header, plan.hz)?),
        To::WebDataset => shards(shard::Layout::WebDataset),
        To::Jsonl => shards(shard::Layout::Jsonl),
        To::Parquet => shards(shard::Layout::Parquet),
        To::Npy => Box::new(images::Images::new(draft, header, Format::Npy)?),
        To::Safetensors => Box::new(images::Images::new(draft, header, Format::Safetensors)?),
    })
}

/// The name that LlamaGen's reader looks for: `imagenet` and the images' side.
fn imagenet(manifest: &Manifest) -> String {
    let side = manifest.image_size.as_ref().filter(|size| size[0] == size[1]).and_then(|size| size[0].as_u64());
    side.map_or_else(|| "imagenet".to_string(), |side| format!("imagenet{side}"))
}

/// `export.json`.
fn record(plan: &Plan, written: &Written, left_out: usize) -> Value {
    let set = plan.set;
    let shards: Vec<_> = set
        .shards()
        .iter()
        .map(
            |shard| json!({ "shard": shard.shard, "rows": shard.rows, "errors": shard.errors, "blake3": shard.blake3 }),
        )
        .collect();
    let mut record = json!({
        "format": FORMAT,
        "tool": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "layout": plan.to.name(),
        "documents": written.documents,
        "tokens": written.tokens,
        "left_out": left_out,
        "dtype": written.dtype,
        "order": "the set's: its shards by name, their rows; raster in an image, codes of a token side by side",
        "manifest": set.manifest(),
        "shards": shards,
    });
    if let Some(rule) = &written.rule {
        record["ids"] = json!(rule);
        let which = match written.language {
            Some(_) => "of ids from id_offset to the last of visual_tokens.codes",
            None => "leave out begin, row_end and end",
        };
        let code = match rule.separates_codebooks() {
            true => "code of codebook j = id - id_offset - j * codebook_size",
            false => "code = id - id_offset",
        };
        record["undo"] = format!("{which}; {code}").into();
    }
    if let Some(language) = &written.language {
        record["language"] = language.clone();
    }
    if !written.views.is_empty() {
        record["views"] = json!(written.views);
    }
    if !set.missing().is_empty() {
        record["missing_shards"] = json!(set.missing());
    }
    record
}

/// `rows.jsonl`: of which row a document is, in the order of the documents.
struct RowIndex(OutFile);

impl RowIndex {
    fn new(draft: &Draft) -> Result<Self> {
        Ok(Self(draft.create("rows.jsonl")?))
    }

    fn add(&mut self, row: &Row) -> Result<()> {
        self.0.put_line(&Row { codes: None, ..row.clone() })
    }

    fn finish(self) -> Result<()> {
        self.0.finish()
    }
}

/// The number of a row's class, which class-conditional generators look up.
fn label(row: &Row) -> Result<i64> {
    match row.label {
        Some(label) if label >= 0 => Ok(label),
        Some(label) => bail!("row {} ({}) has the label {label}; generators look up labels from 0", row.key, row.path),
        None => bail!(
            "row {} ({}) has no label, which this layout needs; tokenize with --labels folders, or inputs that tell labels; or \
             export to a layout without",
            row.key,
            row.path
        ),
    }
}
