//! Tensors ⇄ files, and where other projects' tensor names end.
//!
//! Loading is strict both ways: a tensor that is missing, has another shape, or is left over is an error that names it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, safetensors::Load};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use safetensors::SafeTensors;

use crate::encoder::SiglipConfig;
use crate::error::{Error, Result};
use crate::files;

/// Tensors by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

/// The file that a model folder keeps its tensors in.
pub const FILE: &str = "model.safetensors";
/// The file that tells which shard holds which tensor, where there is more than one.
const INDEX: &str = "model.safetensors.index.json";

/// The initialiser that makes a fresh square matrix the identity. candle's [`Init`] has none, so a normal distribution
/// with this mean and no spread, which nobody would ask for, stands for it.
pub(crate) const IDENTITY: Init = Init::Randn { mean: f64::INFINITY, stdev: 0.0 };

/// Reads `model.safetensors`, or the shards that `model.safetensors.index.json` lists, of a folder.
pub fn read(folder: &Path) -> Result<Tensors> {
    let single = folder.join(FILE);
    if single.exists() {
        return read_file(&single);
    }
    let index = folder.join(INDEX);
    if !index.exists() {
        return Err(Error::weights(folder, format!("neither {FILE} nor {INDEX} is in this folder")));
    }
    let mut tensors = Tensors::new();
    for shard in shards(&index)? {
        tensors.extend(read_file(&folder.join(shard))?);
    }
    Ok(tensors)
}

fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::weights(index, e))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    match shards.iter().find(|shard| Path::new(shard).components().count() != 1 || shard.starts_with('.')) {
        Some(shard) => Err(Error::weights(index, format!("shard `{shard}` is not a file of this folder"))),
        None => Ok(shards),
    }
}

/// Reads one safetensors file.
pub fn read_file(path: &Path) -> Result<Tensors> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    read_bytes(&bytes, path)
}

/// Reads safetensors from memory; `path` is for messages.
pub fn read_bytes(bytes: &[u8], path: &Path) -> Result<Tensors> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| Error::weights(path, format!("not a whole safetensors file: {e}; fetch or copy it again")))?;
    let load = |(name, view): (String, safetensors::tensor::TensorView)| {
        let tensor = view.load(&Device::Cpu).map_err(|e| Error::weights(path, format!("tensor `{name}`: {e}")))?;
        Ok((name, tensor))
    };
    file.tensors().into_iter().map(load).collect()
}

/// Writes tensors to `path`, whole or not at all.
pub fn write(path: &Path, tensors: &Tensors, metadata: HashMap<String, String>) -> Result<()> {
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::weights(path, e))?;
    files::write_whole(path, &bytes).map_err(Error::io(path))
}

/// A hash of a text and of every tensor's name, dtype, shape and bits.
pub fn id(text: &str, tensors: &Tensors) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(text.as_bytes());
    for (name, tensor) in tensors {
        part(name.as_bytes());
        part(format!("{:?} {:?}", tensor.dtype(), tensor.dims()).as_bytes());
        part(&bits(tensor)?);
    }
    Ok(hasher.finalize().to_hex()[..32].to_string())
}

fn bits(tensor: &Tensor) -> Result<Vec<u8>> {
    use safetensors::View;
    Ok(tensor.data().into_owned())
}

/// Gives a model its tensors, and remembers which were asked for.
pub struct Loader {
    path: PathBuf,
    tensors: Arc<Tensors>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Loader {
    /// Over `tensors` that came from `path`.
    pub fn new(tensors: Tensors, path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), tensors: Arc::new(tensors), asked: Arc::default() }
    }

    /// What a model loads itself from.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let backend = Strict { tensors: self.tensors.clone(), asked: self.asked.clone() };
        VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
    }

    /// Turns a failed load into an error that names the file, and left-over tensors into an error too.
    pub fn finish<T>(&self, loaded: candle_core::Result<T>) -> Result<T> {
        let loaded = loaded.map_err(|e| Error::weights(&self.path, e))?;
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<&String> = self.tensors.keys().filter(|name| !asked.contains(*name)).collect();
        if left.is_empty() {
            return Ok(loaded);
        }
        Err(Error::weights(
            &self.path,
            format!("{} tensors that config.json has no use for: {}", left.len(), some(&left)),
        ))
    }
}

/// The first few names of a list.
fn some(names: &[&String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    shown.join(", ") + if names.len() > 5 { ", …" } else { "" }
}

struct Strict {
    tensors: Arc<Tensors>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl SimpleBackend for Strict {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            candle_core::bail!("tensor `{name}` has shape {:?}, expected: {shape:?}", tensor.dims());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string());
        let Some(tensor) = self.tensors.get(name) else {
            let held: Vec<&String> = self.tensors.keys().collect();
            candle_core::bail!("tensor `{name}` is missing; the file holds {} tensors: {}", held.len(), some(&held));
        };
        tensor.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}

/// Makes the tensors that a model asks for, each from its own generator keyed by (seed, name), so that what one layer
/// gets does not depend on the others.
pub struct Fresh {
    seed: u64,
    given: Tensors,
    made: Arc<Mutex<Tensors>>,
}

impl Fresh {
    /// Fresh tensors, but for those that are `given`.
    pub fn new(seed: u64, given: Tensors) -> Self {
        Self { seed, given, made: Arc::default() }
    }

    /// Lets `load` ask for its tensors, in f32; returns them.
    pub fn make<T>(self, load: impl FnOnce(VarBuilder) -> candle_core::Result<T>) -> candle_core::Result<Tensors> {
        let made = self.made.clone();
        load(VarBuilder::from_backend(Box::new(self), DType::F32, Device::Cpu))?;
        let made = std::mem::take(&mut *made.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(made)
    }

    fn fresh(&self, shape: &Shape, name: &str, init: Init) -> candle_core::Result<Tensor> {
        let key = blake3::keyed_hash(blake3::hash(&self.seed.to_le_bytes()).as_bytes(), name.as_bytes());
        let mut random = ChaCha8Rng::from_seed(*key.as_bytes());
        let n = shape.elem_count();
        let values: Vec<f32> = match init {
            Init::Randn { mean, .. } if mean.is_infinite() => {
                return Tensor::eye(shape.dims2()?.0, DType::F32, &Device::Cpu);
            }
            Init::Const(value) => vec![value as f32; n],
            Init::Randn { mean, stdev } => {
                let mut draw = || random.sample::<f64, _>(StandardNormal) * stdev + mean;
                (0..n).map(|_| draw() as f32).collect()
            }
            Init::Uniform { lo, up } => (0..n).map(|_| random.random_range(lo..up) as f32).collect(),
            Init::Kaiming { .. } => candle_core::bail!("tensor `{name}` asks for an initialiser that no layer uses"),
        };
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

impl SimpleBackend for Fresh {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = match self.given.get(name) {
            Some(tensor) if tensor.shape() == &shape => tensor.to_dtype(DType::F32)?,
            Some(tensor) => {
                candle_core::bail!("tensor `{name}` has shape {:?}, expected: {shape:?}", tensor.dims())
            }
            None if self.given.keys().any(|given| same_module(given, name)) => {
                let held: Vec<&String> = self.given.keys().collect();
                candle_core::bail!("tensor `{name}` is missing; the file holds {} tensors: {}", held.len(), some(&held))
            }
            None => self.fresh(&shape, name, init)?,
        };
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), tensor.clone());
        tensor.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("a fresh tensor `{name}` needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// Whether two tensors belong to the same of encoder, quantizer, decoder: if some of one are given, all must be.
fn same_module(a: &str, b: &str) -> bool {
    a.split('.').next() == b.split('.').next()
}

/// Reads a SigLIP (or fixed-size SigLIP2) folder of the Hugging Face hub: its vision config, and the tensors of its
/// vision tower under our names (`encoder.vision_model.…`).
///
/// Accepts a whole `SiglipModel` (beside `text_model.…`, `logit_scale`, `logit_bias`), a lone `SiglipVisionModel`, and
/// transformers 5's form of the latter without the prefix. The text tower and the pooling head (`head.…`) are left out:
/// a tokenizer has no use for them.
pub fn siglip(folder: &Path) -> Result<(SiglipConfig, Tensors)> {
    let config = siglip_config(&folder.join("config.json"))?;
    let mut tensors = Tensors::new();
    for (name, tensor) in read(folder)? {
        let name = name.strip_prefix("vision_model.").unwrap_or(&name);
        let other = ["text_model.", "head.", "logit_", "embeddings.position_ids"];
        if !other.iter().any(|prefix| name.starts_with(prefix)) {
            tensors.insert(format!("encoder.vision_model.{name}"), tensor);
        }
    }
    Ok((config, tensors))
}

fn siglip_config(path: &Path) -> Result<SiglipConfig> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut json: serde_json::Value = serde_json::from_str(&text).map_err(|e| Error::config(path, e))?;
    let model_type = json["model_type"].as_str().unwrap_or("(none)").to_string();
    let vision = match model_type.as_str() {
        "siglip" => json["vision_config"].take(),
        "siglip_vision_model" => json,
        other => {
            return Err(Error::config(
                path,
                format!("model_type is `{other}`, expected: `siglip` or `siglip_vision_model`"),
            ));
        }
    };
    serde_json::from_value(vision).map_err(|e| Error::config(path, e))
}
