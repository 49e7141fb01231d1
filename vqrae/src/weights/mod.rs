//! Tensors ⇄ files, and where other projects' tensor names end.
//!
//! Loading is strict both ways: a tensor that is missing, has another shape, or is left over is an error that names it.

mod fresh;
mod loader;
mod store;

pub use fresh::Fresh;
pub(crate) use fresh::IDENTITY;
pub use loader::Loader;
pub use store::{INDEX, Store, shards};

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Tensor;

use crate::encoder::SiglipConfig;
use crate::error::{Error, Result};
use crate::files;

/// Tensors by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

/// The file that a model folder keeps its tensors in.
pub const FILE: &str = "model.safetensors";

/// Reads `model.safetensors`, or the shards that `model.safetensors.index.json` lists, of a folder.
pub fn read(folder: &Path) -> Result<Tensors> {
    Store::open(folder)?.read()
}

/// Reads one safetensors file.
pub fn read_file(path: &Path) -> Result<Tensors> {
    Store::open_file(path)?.read()
}

/// Writes tensors to `path`, whole or not at all.
pub fn write(path: &Path, tensors: &Tensors, metadata: HashMap<String, String>) -> Result<()> {
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::weights(path, e))?;
    files::write_whole(path, &bytes).map_err(Error::io(path))
}

/// The first few names of a list.
fn some(names: &[&String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    shown.join(", ") + if names.len() > 5 { ", …" } else { "" }
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
