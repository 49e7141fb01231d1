//! `cache`: what was downloaded from the Hugging Face hub.

use anyhow::Result;
use indicatif::HumanBytes;

use crate::hub::{self, Cached};
use crate::report::{self, Exit};

/// Show what was downloaded from the Hugging Face hub
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    List(ListArgs),
}

/// List the models of the cache, their sizes and folders
///
/// The cache is shared with Python's huggingface_hub: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
struct ListArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli cache list
  vqrae-cli cache list --json
  HF_HOME=/data/huggingface vqrae-cli cache list";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let Command::List(args) = args.command;
    let models = hub::cached()?;
    if args.json {
        report::data(&serde_json::to_string_pretty(&models)?);
    } else if models.is_empty() {
        report::say(&format!("no models in {}", hub::cache_folder()?.display()));
    } else {
        report::data(&table(&models));
    }
    Ok(Exit::Success)
}

/// One model a line: its name, type, size, what is missing, and its folder.
fn table(models: &[Cached]) -> String {
    let row = |model: &Cached| {
        let revision = if model.revisions.is_empty() { model.commit.clone() } else { model.revisions.join(",") };
        let state = match model.missing.as_slice() {
            [] => "whole".to_string(),
            missing => format!("lacks {}", missing.join(", ")),
        };
        [
            format!("{}@{revision}", model.repository),
            model.model_type.clone().unwrap_or_else(|| "-".to_string()),
            HumanBytes(model.bytes).to_string(),
            state,
            model.folder.display().to_string(),
        ]
    };
    let rows: Vec<_> = models.iter().map(row).collect();
    let widths: [usize; 5] = std::array::from_fn(|i| rows.iter().map(|row| row[i].len()).max().unwrap_or_default());
    let line = |row: &[String; 5]| {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_string()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}
