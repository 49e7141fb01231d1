//! `bench`: what this machine does: images a second, arithmetic, memory, each model in a process of its own.

mod shape;
mod worker;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use shape::Shape;
use vqrae::{DType, Device, Vqrae, auto_dtype};
use vqrae_kernels::cpu::Isa;
use worker::{Done, Subject, Worker};

use crate::interrupts::{catch_interrupts, interrupted};
use crate::plan::{self, Precision};
use crate::report::{self, Exit};

/// Measure what this machine does
///
/// Prints a table in Markdown: images a second from pixels to codes and from codes to pixels (best of the rounds, median
/// in brackets), the arithmetic that tokenizing reaches, the peak memory of a process that only tokenizes, and the
/// seconds from opening the model to the codes of a first image. Random weights are made in a temporary folder; those of
/// siglip-large take 2.6 GB there.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Models to measure; all but `shipped` have random weights
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES",
          default_values_t = [Shape::Shipped, Shape::SiglipBase, Shape::SiglipLarge, Shape::Nearest])]
    shapes: Vec<Shape>,
    /// Folder of a model to measure instead
    #[arg(long, value_name = "FOLDER", conflicts_with = "shapes")]
    model: Option<PathBuf>,
    /// Images that go through the model at once
    #[arg(long, value_delimiter = ',', default_value = "4", value_name = "N,N")]
    batch: Vec<NonZeroUsize>,
    /// Times that each is measured, after one that does not count
    #[arg(long, default_value = "3", value_name = "N")]
    rounds: NonZeroUsize,
    /// Number format to multiply in; by default f32, and then auto where that is another
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Threads that compute; by default as many as there are cores
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Print a JSON object a line
    #[arg(long)]
    json: bool,
    /// Write the random model of one shape to this folder and measure nothing
    #[arg(long, value_name = "FOLDER", requires = "shapes", conflicts_with = "model")]
    export: Option<PathBuf>,
    /// Do what stdin says, as a process that is measured (see worker.rs)
    #[arg(long, hide = true)]
    serve: bool,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli bench
  vqrae-cli bench --shapes siglip-large --batch 1,4,8 --rounds 5
  vqrae-cli bench --model my-model --dtype bf16 --json
  vqrae-cli bench --shapes siglip-base --export siglip-base

VQRAE_CPU=NAME uses other instructions than the best; a wrong NAME lists those of this machine.";

/// One line of the table.
#[derive(Serialize)]
struct Row {
    shape: String,
    dtype: String,
    precision: String,
    batch: usize,
    tokenize: Rate,
    reconstruct: Option<Rate>,
    /// 10⁹ operations a second of tokenizing.
    gflops: f64,
    peak_mib: Option<u64>,
    ready_seconds: f64,
    rounds: usize,
    threads: usize,
    instructions: &'static str,
    processor: String,
}

/// Images a second.
#[derive(Serialize)]
struct Rate {
    best: f64,
    median: f64,
}

pub(crate) fn execute(args: Args) -> Result<Exit> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads.get()).build_global()?;
    }
    if args.serve {
        return worker::serve(|| args.open()).map(|()| Exit::Success);
    }
    if let Some(folder) = &args.export {
        let [shape] = args.shapes[..] else { bail!("--export writes one model: name one shape with --shapes") };
        return shape.export(folder).map(|()| Exit::Success);
    }
    catch_interrupts()?;
    match args.measure() {
        Err(_) if interrupted() => Ok(Exit::Interrupted),
        result => result.map(|()| Exit::Success),
    }
}

impl Args {
    /// What a process that is measured works with.
    fn open(&self) -> Result<Subject> {
        let dtype = self.dtype.unwrap_or(Precision::Auto).on(&Device::Cpu)?;
        let model = match (&self.model, &self.shapes[..]) {
            (Some(folder), _) => Vqrae::from_pretrained(folder, &Device::Cpu, dtype)?,
            (None, [Shape::Shipped]) => plan::shipped(&Device::Cpu, dtype)?,
            (None, [Shape::Nearest]) => return Subject::search(),
            (None, _) => bail!("--serve takes --model FOLDER, or --shapes shipped or nearest"),
        };
        Ok(Subject::Model(Box::new(model)))
    }

    fn measure(&self) -> Result<()> {
        let instructions = Isa::detect()?.name();
        let mut rows = Vec::new();
        if let Some(folder) = &self.model {
            let words = ["--model".into(), folder.into()];
            let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
            for dtype in self.dtypes()? {
                rows.extend(self.rows(&name, &words, dtype)?);
            }
        } else {
            for &shape in &self.shapes {
                rows.extend(self.rows_of(shape)?);
            }
        }
        if !self.json {
            let threads = rows.first().map_or(0, |row| row.threads);
            report::data(&format!("{}, {threads} threads, {instructions}\n", processor()));
            report::data(&table(&rows));
        }
        Ok(())
    }

    fn rows_of(&self, shape: Shape) -> Result<Vec<Row>> {
        let name = shape.name();
        let folder = tempfile::tempdir().context("a temporary folder could not be made")?;
        let words: [OsString; 2] = if shape.is_random() {
            report::say(&format!("{name}: making random weights in {}", folder.path().display()));
            export(&name, folder.path().into())?;
            ["--model".into(), folder.path().into()]
        } else {
            ["--shapes".into(), name.clone().into()]
        };
        // A search has one precision.
        let dtypes = if shape == Shape::Nearest { vec![Precision::F32] } else { self.dtypes()? };
        let mut rows = Vec::new();
        for dtype in dtypes {
            rows.extend(self.rows(&name, &words, dtype)?);
        }
        Ok(rows)
    }

    /// The number formats to measure.
    fn dtypes(&self) -> Result<Vec<Precision>> {
        Ok(match self.dtype {
            Some(dtype) => vec![dtype],
            None if auto_dtype(&Device::Cpu)? == DType::F32 => vec![Precision::F32],
            None => vec![Precision::F32, Precision::Auto],
        })
    }

    /// One model in one number format, at every batch size. Everything is tokenized before anything is reconstructed, the
    /// smallest batch first: the peak memory at each is its own.
    fn rows(&self, name: &str, words: &[OsString], dtype: Precision) -> Result<Vec<Row>> {
        let mut words = words.to_vec();
        if let Some(value) = dtype.to_possible_value() {
            words.extend(["--dtype".into(), value.get_name().into()]);
        }
        if let Some(threads) = self.threads {
            words.extend(["--threads".into(), threads.to_string().into()]);
        }
        let (mut worker, opened) = Worker::start(&words)?;
        report::say(&format!("{name}: measuring {}", opened.precision));
        let ready_seconds = opened.open_seconds + worker.run("tokenize", 1)?.seconds;

        let mut batches: Vec<usize> = self.batch.iter().map(|batch| batch.get()).collect();
        batches.sort_unstable();
        batches.dedup();
        let mut rows = Vec::new();
        for &batch in &batches {
            let (tokenize, peak_mib) = self.rate(&mut worker, "tokenize", batch)?;
            rows.push(Row {
                shape: name.to_string(),
                dtype: opened.dtype.clone(),
                precision: opened.precision.clone(),
                batch,
                gflops: tokenize.best * opened.operations / 1e9,
                tokenize,
                reconstruct: None,
                peak_mib,
                ready_seconds,
                rounds: self.rounds.get(),
                threads: opened.threads,
                instructions: Isa::detect()?.name(),
                processor: processor(),
            });
        }
        for row in rows.iter_mut().filter(|_| opened.reconstructs) {
            row.reconstruct = Some(self.rate(&mut worker, "reconstruct", row.batch)?.0);
        }
        for row in rows.iter().filter(|_| self.json) {
            report::data(&serde_json::to_string(row)?);
        }
        Ok(rows)
    }

    /// Images a second over the rounds, and the peak memory after them.
    fn rate(&self, worker: &mut Worker, verb: &str, batch: usize) -> Result<(Rate, Option<u64>)> {
        let mut last: Done = worker.run(verb, batch)?;
        let mut seconds = Vec::new();
        for _ in 0..self.rounds.get() {
            if interrupted() {
                bail!("interrupted");
            }
            last = worker.run(verb, batch)?;
            seconds.push(last.seconds);
        }
        seconds.sort_by(f64::total_cmp);
        let rate = |seconds: f64| batch as f64 / seconds;
        Ok((Rate { best: rate(seconds[0]), median: rate(seconds[seconds.len() / 2]) }, last.peak_mib))
    }
}

/// Makes a random model in a process of its own, which gives its memory back.
fn export(shape: &str, folder: OsString) -> Result<()> {
    let program = std::env::current_exe().context("this program's own file was not found")?;
    let status = Command::new(program).args(["bench", "--shapes", shape, "--export"]).arg(folder).status()?;
    if !status.success() {
        bail!("{shape}: its random weights could not be made");
    }
    Ok(())
}

/// The processor's name, where the system tells.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH, |(_, name)| name.trim()).to_string()
}

/// The rows in Markdown, in columns.
fn table(rows: &[Row]) -> String {
    let heads = [
        "shape",
        "precision",
        "batch",
        "tokenize, images/s",
        "reconstruct, images/s",
        "GFLOP/s",
        "peak MiB",
        "ready, s",
    ];
    let cells = |row: &Row| {
        let rate = |rate: &Rate| format!("{} ({})", three_digits(rate.best), three_digits(rate.median));
        [
            row.shape.clone(),
            row.precision.clone(),
            row.batch.to_string(),
            rate(&row.tokenize),
            row.reconstruct.as_ref().map_or_else(|| "–".to_string(), rate),
            format!("{:.0}", row.gflops),
            row.peak_mib.map_or_else(|| "–".to_string(), |mib| mib.to_string()),
            format!("{:.2}", row.ready_seconds),
        ]
    };
    let mut lines = vec![heads.map(str::to_string)];
    lines.extend(rows.iter().map(cells));
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; 8] = std::array::from_fn(width);
    let line = |cells: &[String; 8]| {
        let cells: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("| {} |", cells.join(" | "))
    };
    let mut text: Vec<_> = lines.iter().map(line).collect();
    text.insert(1, line(&widths.map(|width| "-".repeat(width))));
    text.join("\n")
}

fn three_digits(number: f64) -> String {
    let decimals = if number >= 100.0 { 0 } else { usize::from(number < 10.0) + 1 };
    format!("{number:.decimals$}")
}
