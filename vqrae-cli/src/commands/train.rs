//! `train`: photos and a TOML file → a model folder, in steps that can be stopped and gone on with.

mod curves;
mod devices;
mod memory;
mod plan;

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use vqrae::train::plan::Plan;
use vqrae::train::{Config, Event, Files, StepLog, ValidationLog, run_on};

use self::devices::RankArgs;
use super::write_sheet;
use crate::interrupts::{catch_interrupts, interrupted};
use crate::report::{self, Exit};

/// Train a model on photos
///
/// Writes DIR/config.toml, DIR/log.jsonl, DIR/tensorboard, DIR/checkpoints, the best model so far as DIR/model, a picture of
/// the first validation images as DIR/sheet.png, and the curves of the log as DIR/curves.svg. The last validation goes to
/// stdout as JSON.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Settings of the run
    #[arg(long, value_name = "FILE.toml")]
    config: PathBuf,
    /// Photos to train on: folders, tars, FILE.txt with a photo a line, or patterns such as 'shards/{000..127}.tar'
    #[arg(long, alias = "data-path", alias = "data_path", value_name = "PHOTOS", num_args = 1.., required_unless_present = "dry_run")]
    data: Vec<PathBuf>,
    /// Photos to validate on
    #[arg(long, value_name = "PHOTOS", num_args = 1..)]
    val: Vec<PathBuf>,
    /// Folder to write to
    #[arg(short, long, alias = "output_dir", value_name = "DIR", required_unless_present = "dry_run")]
    output_dir: Option<PathBuf>,
    /// Start from the best model of another run, as stage 2 does from stage 1's; or from a model folder
    #[arg(long, value_name = "RUN")]
    from: Option<PathBuf>,
    /// Whether to go on from the newest checkpoint in that folder
    #[arg(long, value_enum, default_value_t = Resume::Auto)]
    resume: Resume,
    /// Replace a setting of the file, such as train.steps=200; may be given many times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    devices: RankArgs,
    /// Print parameters by group, an estimate of the memory and the schedule, and end
    #[arg(long)]
    dry_run: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli train --config train.toml --data photos --output-dir run
  vqrae-cli train --config train.toml --data photos --val held-out --output-dir run --set train.steps=200
  vqrae-cli train --config train.toml --data photos --output-dir run \\
    --set 'loss.perceptual={ weight = 1.0, weights = \"lpips_vgg16.safetensors\" }'
  vqrae-cli train --config stage2.toml --from run --data photos --val held-out --output-dir run2
  vqrae-cli train --config train.toml --data photos --output-dir run --device cuda:0,1,2,3
  vqrae-cli train --config train.toml --dry-run";

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// From the newest checkpoint, if there is one
    Auto,
    /// From the beginning
    Never,
}

/// Left alone, glibc comes to keep freed memory of up to 32 MiB a piece, which is most of what a step frees, and its peak is a fifth
/// higher; far below this limit the system has to clear every tensor's pages anew, which is a quarter of a step's time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_large_tensors_back() {
    const LIMIT: libc::c_int = 8 << 20;
    // SAFETY: a setting of the allocator, which may be changed at any time; a refusal leaves it as it was.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LIMIT);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_large_tensors_back() {}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let config = Config::read(&args.config, &wishes(&args)?)?;
    if args.dry_run {
        report::data(&plan::text(&config, &Plan::of(&config)?));
        return Ok(Exit::Success);
    }
    give_large_tensors_back();
    let devices = args.devices.open()?;
    catch_interrupts()?;
    let (mut last, mut stopped) = (None, false);
    let output = args.output_dir.unwrap_or_default();
    let (sheet, log_file, curves) = (output.join("sheet.png"), output.join("log.jsonl"), output.join("curves.svg"));
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
                show(write_sheet(&sheet, pairs, pairs.len()));
                show(curves::draw(&log_file, &curves));
                last = Some(log.clone());
            }
        }
        if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let files = Files { train: args.data, validation: args.val, output };
    run_on(&devices, &config, &files, args.resume == Resume::Auto, &mut tell)
        .map_err(|error| memory::explained(error.into(), &config, &devices))?;
    show(curves::draw(&log_file, &curves));
    if let Some(log) = last {
        report::data(&serde_json::to_string(&log)?);
    }
    if stopped {
        report::say("interrupted: a checkpoint is written; run the same command again to go on from here");
        return Ok(Exit::Interrupted);
    }
    Ok(Exit::Success)
}

/// The overrides, with `--from` as the last word on where the run starts.
fn wishes(args: &Args) -> Result<Vec<String>> {
    let mut wishes = args.set.clone();
    if let Some(run) = &args.from {
        let model = run.join("model");
        let folder = if model.join("config.json").exists() { &model } else { run };
        // A JSON string is a TOML string.
        let path = serde_json::to_string(&folder.display().to_string())?;
        wishes.push(format!("start={{from=\"folder\",path={path}}}"));
    }
    Ok(wishes)
}

/// A picture that cannot be written does not end a long run.
fn show(written: Result<()>) {
    if let Err(error) = written {
        report::failure(&error);
    }
}

fn step_line(log: &StepLog) -> String {
    let left = (log.steps - log.step) * log.images_per_step;
    let minutes = left as f64 / log.images_per_second / 60.0;
    let terms: Vec<String> = log.terms.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
    let skipped = match log.skipped_steps {
        0 => String::new(),
        steps => format!("  {steps} steps skipped"),
    };
    format!(
        "step {}/{}  loss {:.4} ({})  PSNR {:.2} dB  codes in use {:.1} %  perplexity {:.0}  gradient {:.3}  {:.1} images/s  \
         waiting {:.0} %{skipped}  {minutes:.0} min left",
        log.step,
        log.steps,
        log.loss,
        terms.join(", "),
        log.psnr,
        100.0 * log.usage,
        log.perplexity,
        log.gradient_norm,
        log.images_per_second,
        100.0 * log.waiting
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
