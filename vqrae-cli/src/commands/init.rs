//! `init`: a pretrained encoder and a config → a model folder that can be trained.

use std::path::PathBuf;

use anyhow::Result;

use crate::hub;
use crate::report::{self, Exit};

/// Make a new model folder from a pretrained encoder
///
/// The encoder's weights are taken over, quantizer and decoder start at random: train the model before using it.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of the encoder as the Hugging Face hub lays it out, with config.json and model.safetensors; or its
    /// OWNER/NAME[@REVISION] there
    #[arg(long, value_name = "FOLDER|OWNER/NAME")]
    encoder: PathBuf,
    /// What the new model is to be: TOML or JSON with the sections quantizer, decoder, encoder and latent, or a recipe of
    /// `train`, whose [model] section says it
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Replace a setting of the file, such as model.decoder.num_hidden_layers=2; may be given many times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Mean and variance of the encoder's features, for a config with a section `latent`: a file that `features
    /// --statistics` wrote, or RAE's
    #[arg(long, alias = "latent_statistics", value_name = "FILE")]
    latent_statistics: Option<PathBuf>,
    /// Model folder to write
    #[arg(short, long, value_name = "MODEL")]
    output: PathBuf,
    /// Seed of the random weights
    #[arg(long, alias = "global-seed", alias = "global_seed", default_value_t = 0)]
    seed: u64,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli init --encoder siglip2-base-patch16-224 --config config.json -o my-model
  vqrae-cli init --encoder siglip2-base-patch16-224 --config config.json -o my-model --seed 7
  vqrae-cli init --encoder google/siglip2-base-patch16-256 --config config.json -o my-model
  vqrae-cli init --encoder facebook/dinov2-with-registers-base --config weights/recipes/seed-dinov2-b.toml -o my-model
  vqrae-cli init --encoder dinov2-base --config normalised.json --latent-statistics stats.safetensors -o my-model";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let (encoder, statistics) = (hub::folder(&args.encoder)?, args.latent_statistics.as_deref());
    let report = vqrae::init(&encoder, &args.config, &args.set, statistics, &args.output, args.seed)?;
    report::data(&report::table(&serde_json::to_value(report)?));
    Ok(Exit::Success)
}
