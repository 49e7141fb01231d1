//! `train`: photos and a TOML file → a model folder, in steps that can be stopped and gone on with.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use vqrae::train::{Config, Event, StepLog, ValidationLog, run};

use super::write_sheet;
use crate::load::{catch_interrupts, interrupted};
use crate::report::{self, Exit};

/// Train a model on folders of images
///
/// Writes DIR/config.toml, DIR/log.jsonl, DIR/checkpoints, the best model so far as DIR/model, and a picture of the first
/// validation images as DIR/sheet.png. The last validation goes to stdout as JSON.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Settings of the run
    #[arg(long, value_name = "FILE.toml")]
    config: PathBuf,
    /// Folder of images to train on
    #[arg(long, alias = "data-path", alias = "data_path", value_name = "FOLDER")]
    data: PathBuf,
    /// Folder of images to validate on
    #[arg(long, value_name = "FOLDER")]
    val: Option<PathBuf>,
    /// Folder to write to
    #[arg(short, long, alias = "output_dir", value_name = "DIR")]
    output_dir: PathBuf,
    /// Whether to go on from the newest checkpoint in that folder
    #[arg(long, value_enum, default_value_t = Resume::Auto)]
    resume: Resume,
    /// Replace a setting of the file, such as train.steps=200; may be given many times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli train --config train.toml --data photos --output-dir run
  vqrae-cli train --config train.toml --data photos --val held-out --output-dir run --set train.steps=200
  vqrae-cli train --config train.toml --data photos --output-dir run \\
    --set 'loss.perceptual={ weight = 1.0, weights = \"lpips_vgg16.safetensors\" }'";

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// From the newest checkpoint, if there is one
    Auto,
    /// From the beginning
    Never,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let config = Config::read(&args.config, &args.set)?;
    catch_interrupts()?;
    let (mut last, mut stopped) = (None, false);
    let sheet = args.output_dir.join("sheet.png");
    let mut tell = |event: Event| {
        match event {
            Event::Note(text) => report::say(text),
            Event::Tick => stopped = interrupted(),
            Event::Step(log) => {
                report::say(&step_line(log));
                stopped = interrupted() && log.step < log.steps;
            }
            Event::Validation(log, pairs) => {
                report::say(&validation_line(log));
                show(&sheet, pairs);
                last = Some(log.clone());
            }
        }
        if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    run(&config, &args.data, args.val.as_deref(), &args.output_dir, args.resume == Resume::Auto, &mut tell)?;
    if let Some(log) = last {
        report::data(&serde_json::to_string(&log)?);
    }
    if stopped {
        report::say("interrupted: a checkpoint is written; run the same command again to go on from here");
        return Ok(Exit::Interrupted);
    }
    Ok(Exit::Success)
}

/// A picture that cannot be written does not end a long run.
fn show(sheet: &Path, pairs: &[(vqrae::image::Rgb, vqrae::image::Rgb)]) {
    if let Err(error) = write_sheet(sheet, pairs, pairs.len()) {
        report::failure(&error);
    }
}

fn step_line(log: &StepLog) -> String {
    let left = (log.steps - log.step) * log.images_per_step;
    let minutes = left as f64 / log.images_per_second / 60.0;
    let terms: Vec<String> = log.terms.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    format!(
        "step {}/{}  loss {:.4} ({})  PSNR {:.2} dB  codes in use {:.1} %  perplexity {:.0}  gradient {:.3}  {:.1} images/s  {minutes:.0} min left",
        log.step,
        log.steps,
        log.loss,
        terms.join(", "),
        log.psnr,
        100.0 * log.usage,
        log.perplexity,
        log.gradient_norm,
        log.images_per_second
    )
}

fn validation_line(log: &ValidationLog) -> String {
    format!(
        "validation after step {}: PSNR {:.2} dB, codes in use {:.1} %, perplexity {:.0}",
        log.step,
        log.validation_psnr,
        100.0 * log.validation_usage,
        log.validation_perplexity
    )
}
