//! A checkpoint of another project: its tensors, wherever they lie, and its config.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::weights::{self, Map, Store, TorchFile};

/// Tensors in files, read when they are asked for.
pub(super) struct Checkpoint {
    /// Where other files may stand.
    pub(super) folder: PathBuf,
    /// Its `config.json`, or null.
    pub(super) config: Value,
    /// The dict that the tensors of a PyTorch file are from.
    pub(super) key: Option<String>,
    files: Vec<TensorFile>,
}

enum TensorFile {
    Safetensors(Store),
    Torch(TorchFile),
}

/// What a folder's tensors may be called; the first that is there counts.
const FILES: [&str; 4] =
    ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin"];

impl Checkpoint {
    /// A file, or a folder with one of [`FILES`] or its index.
    pub(super) fn open(from: &Path, key: Option<&str>) -> Result<Self> {
        if !from.exists() {
            return Err(Error::weights(from, "no such file or folder; download the checkpoint first"));
        }
        let (folder, paths) = if from.is_dir() {
            (from.to_path_buf(), files(from)?)
        } else {
            (from.parent().unwrap_or(Path::new("")).to_path_buf(), vec![from.to_path_buf()])
        };
        let config = folder.join("config.json");
        let config = if config.exists() { read_json(&config)? } else { Value::Null };
        let files = paths.iter().map(|path| TensorFile::open(path, key)).collect::<Result<Vec<_>>>()?;
        let key = files.iter().find_map(|file| match file {
            TensorFile::Torch(file) => file.key().map(str::to_string),
            TensorFile::Safetensors(_) => None,
        });
        Ok(Self { folder, config, key, files })
    }

    /// The names in its files.
    pub(super) fn names(&self) -> Vec<String> {
        self.files.iter().flat_map(|file| file.names().into_iter().cloned()).collect()
    }

    /// The tensors as a map sees them.
    pub(super) fn seen_by(&self, map: &Map, path: &Path) -> Result<Seen<'_>> {
        let mut seen = Seen { places: BTreeMap::new(), shapes: BTreeMap::new() };
        for file in &self.files {
            for name in file.names() {
                let renamed = map.renamed(name);
                if let Some((_, other)) = seen.places.insert(renamed.clone(), (file, name)) {
                    let reason =
                        format!("`{other}` and `{name}` are both `{renamed}` with the map's prefixes; change those");
                    return Err(Error::weights(path, reason));
                }
                seen.shapes.insert(renamed, file.shape(name).unwrap_or_default().to_vec());
            }
        }
        Ok(seen)
    }
}

/// A checkpoint's tensors by the names that a map gives them.
pub(super) struct Seen<'a> {
    places: BTreeMap<String, (&'a TensorFile, &'a String)>,
    pub(super) shapes: BTreeMap<String, Vec<usize>>,
}

impl Seen<'_> {
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.shapes.keys()
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.places.get(name) {
            Some((TensorFile::Safetensors(file), name)) => file.tensor(name),
            Some((TensorFile::Torch(file), name)) => file.tensor(name),
            None => Err(candle_core::Error::Msg(format!("there is no tensor `{name}`")).into()),
        }
    }
}

impl TensorFile {
    fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return match key {
                None => Ok(Self::Safetensors(Store::open_file(path)?)),
                Some(key) => {
                    Err(Error::weights(path, format!("a safetensors file has no dicts; leave out --key {key}")))
                }
            };
        }
        Ok(Self::Torch(TorchFile::open(path, key)?))
    }

    fn names(&self) -> Vec<&String> {
        match self {
            Self::Safetensors(file) => file.names().collect(),
            Self::Torch(file) => file.names().collect(),
        }
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        match self {
            Self::Safetensors(file) => file.shape(name),
            Self::Torch(file) => file.shape(name),
        }
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    for name in FILES {
        if folder.join(name).exists() {
            return Ok(vec![folder.join(name)]);
        }
        let index = folder.join(format!("{name}.index.json"));
        if index.exists() {
            return Ok(weights::shards(&index)?.into_iter().map(|shard| folder.join(shard)).collect());
        }
    }
    Err(Error::weights(folder, format!("none of {} is in this folder; name the file itself", FILES.join(", "))))
}

/// A JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::config(path, error))
}
