//! Tensors ⇄ files, and where other projects' tensor names end.
//!
//! Loading is strict both ways: a tensor that is missing, has another shape, or is left over is an error that names it.

mod fresh;
mod loader;
mod map;
mod names;
mod pickle;
mod store;
mod torch;

pub use fresh::Fresh;
pub(crate) use fresh::IDENTITY;
pub use loader::Loader;
pub(crate) use map::put;
pub use map::{Constant, Fill, Map, Plan, Route, TOWER};
pub use store::{INDEX, Store, shards};
pub use torch::TorchFile;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};

use crate::encoder;
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

/// Reads one file of tensors, PyTorch's by its ending (.pt, .pth, .bin, .ckpt) and safetensors else.
pub(crate) fn read_any(path: &Path) -> Result<Tensors> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    if !["pt", "pth", "bin", "ckpt"].contains(&ending) {
        return read_file(path);
    }
    let file = TorchFile::open(path, None)?;
    file.names().map(|name| Ok((name.clone(), file.tensor(name)?))).collect()
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

/// Reads a folder of a pretrained encoder: its config, and the tensors of its vision tower under our names
/// (`encoder.…`).
///
/// | `model_type` | encoder |
/// |---|---|
/// | `siglip`, `siglip_vision_model` | SigLIP, SigLIP2 of a fixed size |
/// | `siglip2`, `siglip2_vision_model` | SigLIP2 NaFlex |
/// | `dinov2`, `dinov2_with_registers` | DINOv2 |
/// | `internvl_vision`, `internvl`, `intern_vit_6b` | InternViT |
/// | `vit_mae` | MAE |
///
/// Names are those of Hugging Face (transformers 4 and 5) or of the authors. A text tower, a pooling head and the like are
/// left out: a tokenizer has no use for them.
///
/// # Errors
/// If a file is missing or broken, or the model type is another one.
pub fn encoder(folder: &Path) -> Result<(encoder::Config, Tensors)> {
    let path = folder.join("config.json");
    let config = encoder_config(&path)?;
    let tensors = tower(read(folder)?, &config).map_err(|e| Error::weights(folder, e))?;
    Ok((config, tensors))
}

/// The tensors of a vision tower under our names (`encoder.…`), whichever of the names that [`encoder`] knows they have.
///
/// # Errors
/// If they do not fit the config.
pub fn tower(tensors: Tensors, config: &encoder::Config) -> candle_core::Result<Tensors> {
    let encoder::Config::Siglip(_) = config else {
        let tower = layout_tower(tensors, &config.layout())?;
        return Ok(tower.into_iter().map(|(name, tensor)| (format!("encoder.{name}"), tensor)).collect());
    };
    let mut ours = Tensors::new();
    for (name, tensor) in tensors {
        let name = name.strip_prefix("vision_model.").unwrap_or(&name);
        let other = ["text_model.", "head.", "logit_", "embeddings.position_ids"];
        if !other.iter().any(|prefix| name.starts_with(prefix)) {
            ours.insert(format!("encoder.vision_model.{name}"), tensor);
        }
    }
    Ok(ours)
}

/// The tensors of a tower of any layout under our names (`embeddings.…`, `layers.N.…`), without `encoder.` before them.
pub(crate) fn layout_tower(tensors: Tensors, layout: &encoder::Layout) -> candle_core::Result<Tensors> {
    names::of_tower(tensors, layout)
}

fn encoder_config(path: &Path) -> Result<encoder::Config> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut json: Value = serde_json::from_str(&text).map_err(|e| Error::config(path, e))?;
    let model_type = json["model_type"].as_str().unwrap_or("(none)").to_string();
    let (ours, mut vision) = match model_type.as_str() {
        "siglip" => ("siglip_vision_model", json["vision_config"].take()),
        "siglip2" => ("siglip2_vision_model", json["vision_config"].take()),
        "internvl" => ("internvl_vision", json["vision_config"].take()),
        "intern_vit_6b" => ("internvl_vision", authors_internvit(json)),
        "siglip_vision_model"
        | "siglip2_vision_model"
        | "dinov2"
        | "dinov2_with_registers"
        | "internvl_vision"
        | "vit_mae" => (model_type.as_str(), json),
        other => {
            return Err(Error::config(
                path,
                format!(
                    "model_type is `{other}`, expected: `siglip`, `siglip_vision_model`, `siglip2`, \
                     `siglip2_vision_model`, `dinov2`, `dinov2_with_registers`, `internvl_vision`, `internvl`, \
                     `intern_vit_6b` or `vit_mae`"
                ),
            ));
        }
    };
    if model_type == "dinov2_with_registers" && vision["num_register_tokens"].is_null() {
        vision["num_register_tokens"] = json!(4);
    }
    for key in ["image_size", "patch_size"] {
        let wants_pair = ours == "internvl_vision";
        if wants_pair && vision[key].is_number() {
            vision[key] = json!([vision[key], vision[key]]);
        }
    }
    vision["model_type"] = json!(ours);
    let config: encoder::Config = serde_json::from_value(vision).map_err(|e| Error::config(path, e))?;
    config.check().map_err(|reason| Error::config(path, reason))?;
    Ok(config)
}

/// OpenGVLab's own config of InternViT, under Hugging Face's keys.
fn authors_internvit(mut config: Value) -> Value {
    for (theirs, ours) in [("qkv_bias", "attention_bias"), ("qk_normalization", "use_qk_norm")] {
        if let Some(value) = config.as_object_mut().and_then(|config| config.remove(theirs)) {
            config[ours] = value;
        }
    }
    config
}
