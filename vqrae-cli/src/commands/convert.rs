//! `convert`: another project's checkpoint and a key map → a model folder.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::Value;
use vqrae::convert::{Options, convert};

use crate::hub;
use crate::report::{self, Exit};

/// Make a model folder from a checkpoint of another project
///
/// A key map says which of its tensors become which of ours; every one is used or dropped by name. Parts that the checkpoint
/// does not have come from --base, or are fresh and want training. A PyTorch file is read as data: nothing in it is run.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Checkpoint: .pt, .pth, .bin, .ckpt, .safetensors, or a folder with one and a config.json
    checkpoint: PathBuf,
    /// Key map: `auto` for the one of the program that fits, its name, or a file (weights/README.md says how to write one)
    #[arg(long, default_value = "auto", value_name = "NAME|FILE")]
    map: String,
    /// Model folder to write
    #[arg(short, long, value_name = "MODEL")]
    output: PathBuf,
    /// Model folder, or a pretrained encoder's, for the parts that the checkpoint lacks
    #[arg(long, value_name = "FOLDER|OWNER/NAME")]
    base: Option<PathBuf>,
    /// Parts of the base that are not taken: encoder, quantizer, decoder
    #[arg(long, value_name = "PART")]
    fresh: Vec<String>,
    /// Dict of a PyTorch file that holds the tensors, `OUTER/INNER` for one within another; else the best of ema, model,
    /// state_dict and the like
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Value of config.json in place of the map's, such as decoder.num_attention_heads=16
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    set: Vec<(String, Value)>,
    /// preprocessor_config.json in place of the one beside the checkpoint and of the map's
    #[arg(long, value_name = "FILE")]
    preprocessor: Option<PathBuf>,
    /// Seed of fresh weights
    #[arg(long, alias = "global-seed", alias = "global_seed", default_value_t = 0)]
    seed: u64,
}

const EXAMPLES: &str = "\
Maps of the program: fork-{siglip,dinov2,mae}[-vq] (hugoycj/RAE), fork-simvq, fork-vq, rae-{siglip,dinov2,mae}, rae-decoder \
(bytetriper/RAE), diffusers-rae-{siglip2,dinov2,mae} (AutoencoderRAE), vqp-{vq,vq-norm,simvq,fsq,lfq,residual-vq,\
grouped-residual-vq} (vector-quantize-pytorch).

Examples:
  vqrae-cli convert ep-0016.pt -o my-model
  vqrae-cli convert ep-0016.pt --key model --set quantizer.metric=euclidean -o my-model
  vqrae-cli convert RAE-dinov2-wReg-base-ViTXL-n08 -o my-model
  vqrae-cli convert decoder.pt --map rae-decoder --base my-model --fresh quantizer -o another
  vqrae-cli convert fsq.pt --map vqp-fsq --set quantizer.levels=[8,8,8,6,5] --base my-model -o another
  vqrae-cli convert unknown.safetensors --map my-map.toml -o my-model";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let Args { checkpoint, map, output, base, fresh, key, set, preprocessor, seed } = args;
    let base = base.map(|base| hub::folder(&base)).transpose()?;
    let map = (map != "auto").then_some(map);
    let report = convert(&checkpoint, &output, &Options { map, key, base, fresh, set, preprocessor, seed })?;
    report::data(&report::table(&serde_json::to_value(report)?));
    Ok(Exit::Success)
}

/// `KEY=VALUE`, the value as JSON where it is JSON, else as text.
fn setting(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((key.to_string(), value))
}
