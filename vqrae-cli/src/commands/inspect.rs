//! `inspect`: what a folder of a model or generator, or a code file, says about itself.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use vqrae::codes::shard::{Layout, Reader, Stats, Tally};
use vqrae::codes::{CodeSet, Codes, Format};
use vqrae::image::ResizeMode;
use vqrae::metrics::CodeCounts;
use vqrae::weights::Store;
use vqrae::{Device, Vqrae};
use vqrae_generators::Config as Generator;

use crate::plan;
use crate::report::{self, Exit};
use crate::view::preprocessing;

/// Show what a model folder, a generator's, a code file or a folder of code files holds
///
/// Without a path, the model that ships with the program. Of a folder of code files or shards: how many there are, and how much
/// of the codebook they use.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of a model or of a generator, or what tokenize wrote: a code file or a folder of them
    path: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli inspect
  vqrae-cli inspect my-model --json
  vqrae-cli inspect weights/clothes
  vqrae-cli inspect out
  vqrae-cli inspect out/00000.parquet
  vqrae-cli inspect out/codes/cat.jpg.safetensors";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let facts = match &args.path {
        None => model(&plan::shipped(&Device::Cpu, vqrae::DType::F32)?)?,
        Some(path) if path.is_dir() && CodeSet::is(path) => code_set(path)?,
        Some(path) if path.is_dir() && !path.join("config.json").exists() => code_folder(path)?,
        Some(path) if path.is_dir() && Generator::is(path) => generator(path)?,
        Some(path) if path.is_dir() => model(&Vqrae::from_pretrained(path, &Device::Cpu, vqrae::DType::F32)?)?,
        Some(path) if Format::of(path).is_some() => codes(path)?,
        Some(path) if path.is_file() && Layout::of(path).is_some() => code_shard(path)?,
        Some(path) if path.exists() => bail!("{}: neither a model folder nor a code file", path.display()),
        Some(path) => bail!("{}: no such file or folder", path.display()),
    };
    report::data(&if args.json { serde_json::to_string_pretty(&facts)? } else { report::table(&facts) });
    Ok(Exit::Success)
}

fn model(model: &Vqrae) -> Result<Value> {
    let preprocessor = model.preprocessor();
    let (h, w) = model.grid_of(preprocessor.size.0, preprocessor.size.1)?;
    let naflex = preprocessor.naflex.filter(|_| preprocessor.resize_mode == ResizeMode::Naflex);
    let mut facts = json!({
        "id": model.id(),
        "parameters": model.parameters(),
        "codebook_size": model.codebook_size(),
        "codes_per_token": model.codes_per_token(),
        "image_size": [preprocessor.size.0, preprocessor.size.1],
        "grid": [h, w],
        "features": model.config().encoder.features().to_string(),
        "preprocessing": preprocessing(preprocessor),
        "config": model.config(),
    });
    // Size and grid are then those of a square image.
    if let Some(naflex) = naflex {
        facts["max_num_patches"] = json!(naflex.max_num_patches);
    }
    Ok(facts)
}

fn generator(folder: &Path) -> Result<Value> {
    let config = Generator::read(folder)?;
    let mut facts = json!({ "parameters": Store::open(folder)?.parameters() });
    merge(&mut facts, serde_json::to_value(config)?);
    Ok(facts)
}

fn codes(path: &Path) -> Result<Value> {
    let codes = Codes::read(path)?;
    let mut counts: HashMap<u32, usize> = HashMap::new();
    for &index in &codes.indices {
        *counts.entry(index).or_default() += 1;
    }
    Ok(json!({
        "grid": [codes.h, codes.w],
        "model_id": codes.model_id,
        "codebook_size": codes.codebook_size,
        "codes_per_token": codes.c,
        "distinct_codes": counts.len(),
        "smallest_index": codes.indices.iter().min(),
        "largest_index": codes.indices.iter().max(),
        "source": codes.source,
        "preprocessing": codes.preprocessing,
        "dtype": codes.dtype,
    }))
}

fn code_shard(path: &Path) -> Result<Value> {
    let reader = Reader::open(path)?;
    let header = reader.header().clone();
    let mut tally = Tally::new(&header);
    for row in reader {
        tally.add(&row?);
    }
    let counted = tally.stats("", Layout::Parquet, "", None, (0, String::new()));
    let mut facts = json!({
        "rows": counted.rows,
        "ok": counted.ok,
        "errors": counted.errors,
        "codes_in_use": counted.codes_in_use,
        "perplexity": counted.perplexity,
    });
    merge(&mut facts, serde_json::to_value(header)?);
    Ok(facts)
}

/// What the statistics of finished shards say; `verify` reads the shards themselves.
fn code_set(folder: &Path) -> Result<Value> {
    let set = CodeSet::open(folder)?;
    let sum = |field: fn(&Stats) -> u64| set.shards().iter().map(field).sum::<u64>();
    let mut facts = json!({
        "shards": set.shards().len(),
        "missing_shards": set.missing().len(),
        "rows": set.len(),
        "ok": sum(|stats| stats.ok as u64),
        "errors": sum(|stats| stats.errors as u64),
        "codes": sum(|stats| stats.codes),
        "bytes": sum(|stats| stats.bytes),
    });
    merge(&mut facts, serde_json::to_value(set.manifest())?);
    Ok(facts)
}

fn merge(facts: &mut Value, more: Value) {
    if let (Value::Object(facts), Value::Object(more)) = (facts, more) {
        facts.extend(more);
    }
}

fn code_folder(folder: &Path) -> Result<Value> {
    let (mut files, mut size, mut models) = (0, 0, BTreeSet::new());
    let mut counts = CodeCounts::new(0, 1);
    for entry in walkdir::WalkDir::new(folder).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_file() || Format::of(entry.path()).is_none() {
            continue;
        }
        let codes = Codes::read(entry.path())?;
        if files == 0 {
            size = codes.codebook_size;
            counts = CodeCounts::new(size, codes.c);
        }
        files += 1;
        models.insert(codes.model_id);
        counts.add(&codes.indices);
    }
    if files == 0 {
        bail!("{}: neither a model folder (no config.json) nor a folder of code files", folder.display());
    }
    if models.len() > 1 {
        let models: Vec<_> = models.into_iter().collect();
        bail!("{}: codes of {} models: {}", folder.display(), models.len(), models.join(", "));
    }
    Ok(json!({
        "files": files,
        "model_id": models.first(),
        "codebook_size": size,
        "codes_per_token": counts.codebooks(),
        "codes_in_use": counts.usage(),
        "perplexity": counts.perplexity(),
    }))
}
