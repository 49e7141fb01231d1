//! Other projects' checkpoints to model folders, as a key map says ([`Map`], `weights/maps/`).
//!
//! Strict both ways: every tensor of the checkpoint becomes one of ours or is dropped by name, and every tensor of a part
//! (encoder, quantizer, decoder) that the checkpoint gives is made. Parts that it does not give come from a base model, or
//! are fresh.

mod checkpoint;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::image::Preprocessor;
use crate::model::{Config, Network, PREPROCESSOR, fresh_tensors, id, save};
use crate::weights::{self, Map, Plan, Store, TOWER, Tensors};
use checkpoint::{Checkpoint, Seen, read_json};

/// What is to be converted, and how.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The name of a map in the program, or a map's file; without it, the one map of the program that fits.
    pub map: Option<String>,
    /// The dict in a PyTorch file that holds the tensors; without it, the best of `ema`, `model` and the like.
    pub key: Option<String>,
    /// A model folder, or a pretrained encoder's as [`weights::encoder`] reads it, for the parts that the checkpoint lacks;
    /// without it, those are fresh.
    pub base: Option<PathBuf>,
    /// Parts that are fresh even so.
    pub fresh: Vec<String>,
    /// Values of `config.json` by their dotted keys, which count more than the map's.
    pub set: Vec<(String, Value)>,
    /// A `preprocessor_config.json`; without it, the one beside the checkpoint, the map's, or the base's.
    pub preprocessor: Option<PathBuf>,
    /// Seed of fresh weights.
    pub seed: u64,
}

/// What [`convert`] made.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The new model's folder.
    pub folder: PathBuf,
    /// Its id.
    pub id: String,
    /// The map that was used.
    pub map: String,
    /// The dict of a PyTorch file that the tensors are from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Tensors of the model that came from the checkpoint.
    pub converted: usize,
    /// Tensors of the model that the map fills in.
    pub filled: usize,
    /// Tensors of the checkpoint that have no use.
    pub dropped: usize,
    /// Where each part (encoder, quantizer, decoder, …) came from; what is fresh wants training.
    pub parts: BTreeMap<String, String>,
}

/// The first parts of our tensors' names. Not every model has `fusion` and `latent`.
const PARTS: [&str; 5] = ["encoder", "fusion", "latent", "quantizer", "decoder"];

/// Makes a model folder of a checkpoint: a .pt, .pth, .bin or .ckpt of PyTorch (nothing in it is run), a .safetensors, or
/// a folder with one of them and a config.json.
///
/// # Errors
/// If no map or more than one fits, a tensor of either side is left over (the error lists them), a file is broken, or the
/// config makes no sense.
pub fn convert(from: &Path, output: &Path, options: &Options) -> Result<Report> {
    let mut checkpoint = Checkpoint::open(from, options.key.as_deref())?;
    let map = match &options.map {
        Some(name) => Map::open(name)?,
        None => fitting(&checkpoint, from)?,
    };
    if let (None, Some(key)) = (&options.key, map.key()) {
        checkpoint = Checkpoint::open(from, Some(key))?;
    }
    let in_map = |reason: String| Error::config(from, format!("map {}: {reason}", map.name));
    let seen = checkpoint.seen_by(&map, from)?;
    let plan = map.plan(seen.names()).map_err(in_map)?;
    if !plan.fits() {
        return Err(Error::weights(from, misfit(&map, &plan, &seen)));
    }
    let base = options.base.as_deref().map(Base::open).transpose()?;
    let config = config(&checkpoint, &map, &seen, base.as_ref(), options).map_err(in_map)?;
    let config = Config::from_json(&config.to_string(), from)?;
    let preprocessor = preprocessor(&checkpoint, &map, &seen, base.as_ref(), options)?;

    let wanted = shapes(&config).map_err(|error| in_map(error.to_string()))?;
    let made = make(&plan, &seen, &config, &wanted, from)?;
    let converted = made.len();
    let touched: Vec<&str> = PARTS.into_iter().filter(|part| made.keys().any(|name| part_of(name) == *part)).collect();
    let is_touched = |part: &str| touched.contains(&part) || map.sections().any(|section| section == part);
    let mut given = made;
    for fill in map.fill().iter().filter(|fill| is_touched(part_of(&fill.to))) {
        if let (Some(shape), false) = (wanted.get(&fill.to), given.contains_key(&fill.to)) {
            let tensor = fill.tensor(shape).map_err(|error| in_map(error.to_string()))?;
            given.insert(fill.to.clone(), tensor);
        }
    }
    let filled = given.len() - converted;
    let missing: Vec<&String> =
        wanted.keys().filter(|name| is_touched(part_of(name)) && !given.contains_key(*name)).collect();
    if !missing.is_empty() {
        let reason = format!(
            "map {}: {} tensors of the model that nothing becomes: {}; add them to the map as [[tensors]] or [[fill]]",
            map.name,
            missing.len(),
            grouped(missing.into_iter().map(|name| (name, wanted[name].as_slice())))
        );
        return Err(Error::weights(from, reason));
    }
    let mut parts = BTreeMap::new();
    for part in PARTS.into_iter().filter(|part| wanted.keys().any(|name| part_of(name) == *part)) {
        let of_base = base.as_ref().filter(|base| !options.fresh.iter().any(|fresh| fresh == part) && base.has(part));
        let origin = match of_base {
            _ if is_touched(part) => "the checkpoint".to_string(),
            Some(base) => {
                given.extend(base.part(part, &wanted)?);
                base.folder.display().to_string()
            }
            None => "fresh, wants training".to_string(),
        };
        parts.insert(part.to_string(), origin);
    }
    let tensors = fresh_tensors(&config, given, options.seed).map_err(|error| Error::weights(from, error))?;
    save(output, &config, &preprocessor, &tensors)?;
    let id = id(&config, &preprocessor, &Store::of_tensors(tensors, output))?;
    let (folder, dropped) = (output.to_path_buf(), plan.dropped.len());
    Ok(Report { folder, id, map: map.name, key: checkpoint.key, converted, filled, dropped, parts })
}

/// The one map of the program that fits a checkpoint.
fn fitting(checkpoint: &Checkpoint, from: &Path) -> Result<Map> {
    let names = checkpoint.names();
    let wrong = |reason: String| Error::weights(from, reason);
    match Map::fitting(names.iter())? {
        Ok(mut maps) if maps.len() == 1 => Ok(maps.remove(0)),
        Ok(maps) => {
            let maps: Vec<_> = maps.iter().map(|map| format!("{} ({})", map.name, map.about())).collect();
            Err(wrong(format!("{} maps fit; choose one with --map: {}", maps.len(), maps.join(", "))))
        }
        Err((nearest, plan)) => {
            let seen = checkpoint.seen_by(&nearest, from)?;
            let all: Vec<_> = Map::built_in().collect();
            Err(wrong(format!(
                "no map of the program fits ({}). Write one (weights/README.md, maps) and name it with --map. The nearest: {}",
                all.join(", "),
                misfit(&nearest, &plan, &seen)
            )))
        }
    }
}

/// What a map lacks, and a checkpoint.
fn misfit(map: &Map, plan: &Plan, seen: &Seen) -> String {
    let mut problems = Vec::new();
    if !plan.unknown.is_empty() {
        let names = plan.unknown.iter().map(|name| (name, seen.shapes[name].as_slice()));
        problems.push(format!(
            "{} tensors of the checkpoint that it has no line for: {}; add them to the map as [[tensors]] or drop",
            plan.unknown.len(),
            grouped(names)
        ));
    }
    if !plan.unmet.is_empty() {
        problems.push(format!("the checkpoint has not: {}", plan.unmet.join("; ")));
    }
    format!("map {}: {}", map.name, problems.join("; "))
}

/// Names with their shapes, those that differ in a number put together: as a map would name them.
fn grouped<'a>(names: impl Iterator<Item = (&'a String, &'a [usize])>) -> String {
    let mut groups: Vec<(String, &[usize], usize)> = Vec::new();
    for (name, shape) in names {
        let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let parts: Vec<&str> = name.split('.').map(|part| if number(part) { "{n}" } else { part }).collect();
        let template = parts.join(".");
        match groups.iter_mut().find(|(other, _, _)| *other == template) {
            Some((_, _, count)) => *count += 1,
            None => groups.push((template, shape, 1)),
        }
    }
    let group = |(name, shape, count): &(String, &[usize], usize)| match count {
        1 => format!("`{name}` {shape:?}"),
        count => format!("`{name}` {shape:?} ×{count}"),
    };
    groups.iter().map(group).collect::<Vec<_>>().join(", ")
}

/// Encoder, quantizer or decoder.
fn part_of(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// Where the other parts come from.
struct Base {
    folder: PathBuf,
    config: Value,
    tensors: Tensors,
}

impl Base {
    fn open(folder: &Path) -> Result<Self> {
        let config = read_json(&folder.join("config.json"))?;
        let (config, tensors) = if config["model_type"] == "vqrae" {
            (config, weights::read(folder)?)
        } else {
            let (encoder, tensors) = weights::encoder(folder)?;
            (json!({ "model_type": "vqrae", "format": 1, "encoder": encoder }), tensors)
        };
        Ok(Self { folder: folder.to_path_buf(), config, tensors })
    }

    fn has(&self, part: &str) -> bool {
        self.tensors.keys().any(|name| part_of(name) == part)
    }

    /// The tensors of a part, if they are those that the new model wants.
    fn part(&self, part: &str, wanted: &BTreeMap<String, Vec<usize>>) -> Result<Tensors> {
        let mut tensors = self.tensors.clone();
        // A pretrained encoder's norm is no part of a model whose features come before it.
        tensors.retain(|name, _| part_of(name) == part && (part != "encoder" || wanted.contains_key(name)));
        let shape = |name: &String| tensors.get(name).map(Tensor::dims);
        for (name, expected) in wanted.iter().filter(|(name, _)| part_of(name) == part) {
            if shape(name) != Some(expected) {
                let found = shape(name).map_or("none".to_string(), |shape| format!("{shape:?}"));
                let reason = format!(
                    "tensor `{name}` of the base has shape {found}, and the model that comes of the checkpoint needs \
                     {expected:?}; start this part anew with --fresh {part}, or take another base"
                );
                return Err(Error::weights(&self.folder, reason));
            }
        }
        Ok(tensors)
    }
}

/// `config.json`: the base's sections, the map's in their place, and what is set.
fn config(
    checkpoint: &Checkpoint,
    map: &Map,
    seen: &Seen,
    base: Option<&Base>,
    options: &Options,
) -> std::result::Result<Value, String> {
    if let Some(part) = options.fresh.iter().find(|part| !PARTS.contains(&part.as_str())) {
        return Err(format!("--fresh {part}: expected: {}", PARTS.join(", ")));
    }
    let mut config = base.map_or_else(|| json!({ "model_type": "vqrae", "format": 1 }), |base| base.config.clone());
    // What is set of a section that the map does not have changes the base's.
    let of_map = |key: &str| map.sections().any(|section| section == part_of(key));
    let (of_map, of_base): (Vec<_>, Vec<_>) = options.set.iter().cloned().partition(|(key, _)| of_map(key));
    for (key, value) in of_base {
        weights::put(&mut config, &key, value)?;
    }
    for (section, value) in map.config(&checkpoint.config, &seen.shapes, &of_map)? {
        config[section] = value;
    }
    if config["encoder"].is_null() {
        let hint = "name a model folder or a pretrained encoder's with --base";
        return Err(format!("it makes no encoder; {hint}"));
    }
    if config["quantizer"].is_null() {
        config["quantizer"] = json!({ "type": "simvq" });
    }
    Ok(config)
}

fn preprocessor(
    checkpoint: &Checkpoint,
    map: &Map,
    seen: &Seen,
    base: Option<&Base>,
    options: &Options,
) -> Result<Preprocessor> {
    let beside = checkpoint.folder.join(PREPROCESSOR);
    if let Some(path) = options.preprocessor.as_ref().or(beside.exists().then_some(&beside)) {
        return Ok(Preprocessor::from_file(path)?);
    }
    // A checkpoint without an encoder has its images prepared for the base's.
    let of_base = base.map(|base| base.folder.join(PREPROCESSOR)).filter(|path| path.exists());
    let own = map.sections().any(|section| section == "encoder");
    if let (Some(path), false) = (&of_base, own) {
        return Ok(Preprocessor::from_file(path)?);
    }
    let wrong = |reason: String| Error::config(&beside, reason);
    match map.preprocessor(&checkpoint.config, &seen.shapes).map_err(wrong)? {
        Some(value) => Preprocessor::from_json(&value.to_string()).map_err(|error| wrong(error.to_string())),
        None => match of_base {
            Some(path) => Ok(Preprocessor::from_file(&path)?),
            None => Err(wrong("is missing, and the map has no [preprocessor]; name a file with --preprocessor".into())),
        },
    }
}

/// The model's tensors that come from the checkpoint.
fn make(
    plan: &Plan,
    seen: &Seen,
    config: &Config,
    wanted: &BTreeMap<String, Vec<usize>>,
    from: &Path,
) -> Result<Tensors> {
    let mut made = Tensors::new();
    let mut add = |name: String, tensor: Tensor, origin: &str, optional: bool| -> Result<()> {
        let wrong = |reason: String| Err(Error::weights(from, format!("{origin}: {reason}")));
        let found = tensor.dims();
        match wanted.get(&name) {
            None if optional => return Ok(()),
            None => return wrong(format!("becomes `{name}` {found:?}, which config.json has no use for")),
            Some(expected) if expected != found => {
                return wrong(format!("becomes `{name}` with shape {found:?}, expected: {expected:?}"));
            }
            Some(_) => {}
        }
        match made.insert(name.clone(), tensor.to_dtype(DType::F32)?) {
            None => Ok(()),
            Some(_) => wrong(format!("becomes `{name}`, which another tensor becomes too")),
        }
    };
    for route in &plan.routes {
        let origin = route.from.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let tensors = route.from.iter().map(|name| Ok(seen.tensor(name)?.to_dtype(DType::F32)?));
        let pieces = route.apply(tensors.collect::<Result<_>>()?);
        let pieces = pieces.map_err(|error| Error::weights(from, format!("{origin}: {error}")))?;
        for (name, tensor) in route.to.iter().zip(pieces) {
            add(name.clone(), tensor, &origin, route.optional)?;
        }
    }
    let bare = |name: &String| name.strip_prefix(TOWER).unwrap_or(name).to_string();
    // In f32, since some are added up.
    let tower = plan.tower.iter().map(|name| Ok((bare(name), seen.tensor(name)?.to_dtype(DType::F32)?)));
    let tower = tower.collect::<Result<Tensors>>()?;
    if !tower.is_empty() {
        let tower = weights::tower(tower, &config.encoder).map_err(|error| Error::weights(from, error))?;
        for (name, tensor) in tower {
            // The final norm of a tower whose features come before it.
            let unused = !config.encoder.layout().features.has_norm() && name.contains("post_layernorm.");
            add(name.clone(), tensor, "the vision tower", unused)?;
        }
    }
    Ok(made)
}

/// The names and shapes of a model's tensors.
fn shapes(config: &Config) -> candle_core::Result<BTreeMap<String, Vec<usize>>> {
    let shapes = Arc::default();
    let backend = Box::new(Shapes(Arc::clone(&shapes)));
    Network::load(VarBuilder::from_backend(backend, DType::F32, Device::Cpu), config)?;
    let mut shapes = shapes.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut *shapes))
}

/// Remembers what is asked for; gives zeros that take no memory.
struct Shapes(Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for Shapes {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let mut shapes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shapes.insert(name.to_string(), shape.dims().to_vec());
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("tensor `{name}` needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
