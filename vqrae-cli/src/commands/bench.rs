//! `bench`: what this machine does: images a second, arithmetic, memory, each model in a process of its own; on a GPU also
//! the search for the nearest code beside the products that it cannot do without.

#[cfg(feature = "cuda")]
mod cuda;
mod inputs;
mod search;
mod shape;
mod table;
mod worker;

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use search::SearchArgs;
use serde::Serialize;
use shape::Shape;
use table::{markdown, median, or_dash, three_digits};
use vqrae::{DType, Device, Vqrae, auto_dtype};
use vqrae_kernels::cpu::Isa;
use worker::{Done, Subject, Worker};

use crate::device::{self, DeviceArgs};
use crate::interrupts::{catch_interrupts, interrupted};
use crate::plan::{self, Precision};
use crate::report::{self, Exit};

/// Measure what this machine does
///
/// Prints a table in Markdown: images a second from pixels to codes and from codes to pixels (best of the rounds, median
/// in brackets), the arithmetic that tokenizing reaches, the peak memory of a process that only tokenizes, and the
/// seconds from opening the model to the codes of a first image. Random weights are made in a temporary folder; those of
/// siglip-large take 2.6 GB there. On a GPU the shape `nearest` is a table of its own: searches of many sizes, exact and fast,
/// beside cuBLAS's products alone, with the codes that differ from those of binary64.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    devices: DeviceArgs,
    /// Models to measure; all but `shipped` have random weights; by default shipped, siglip-base, siglip-large and nearest, on a
    /// GPU so400m too
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    shapes: Vec<Shape>,
    /// Folder of a model to measure instead
    #[arg(long, value_name = "FOLDER", conflicts_with = "shapes")]
    model: Option<PathBuf>,
    /// Images that go through the model at once; by default 4, on a GPU 1,16,64,256
    #[arg(long, value_delimiter = ',', value_name = "N,N")]
    batch: Vec<NonZeroUsize>,
    /// Times that each is measured, after one that does not count; by default 3, on a GPU 20
    #[arg(long, value_name = "N")]
    rounds: Option<NonZeroUsize>,
    /// Number format to multiply in; by default f32, and then auto where that is another; on a GPU auto alone
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Threads that compute; by default as many as there are cores
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Print a JSON object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    search: SearchArgs,
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
  vqrae-cli bench --device cuda --shapes nearest --tokens 8192 --widths 64,1536 --inputs random,cone,power-law,shipped
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
    /// The most of a GPU's memory that the process's tensors took, at this batch and smaller ones.
    peak_device_mib: Option<u64>,
    ready_seconds: f64,
    rounds: usize,
    threads: usize,
    /// `cpu`, or `cuda:0`.
    device: String,
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
    let device = args.devices.device.open_one()?;
    if device.is_cpu() {
        args.search.refuse()?;
    }
    catch_interrupts()?;
    match args.measure(&device) {
        Err(_) if interrupted() => Ok(Exit::Interrupted),
        result => result.map(|()| Exit::Success),
    }
}

impl Args {
    /// What a process that is measured works with.
    fn open(&self) -> Result<Subject> {
        let device = self.devices.device.open_one()?;
        let dtype = self.dtype.unwrap_or(Precision::Auto).on(&device)?;
        let model = match (&self.model, &self.shapes[..]) {
            (Some(folder), _) => Vqrae::from_pretrained(folder, &device, dtype)?,
            (None, [Shape::Shipped]) => plan::shipped(&device, dtype)?,
            (None, [Shape::Nearest]) => return Subject::search(&self.search.one(), &device),
            (None, _) => bail!("--serve takes --model FOLDER, or --shapes shipped or nearest"),
        };
        Ok(Subject::Model(Box::new(model)))
    }

    fn measure(&self, device: &Device) -> Result<()> {
        let mut rows = Vec::new();
        let mut searches = Vec::new();
        if let Some(folder) = &self.model {
            let words = ["--model".into(), folder.into()];
            let name = folder.file_name().unwrap_or(folder.as_os_str()).to_string_lossy().into_owned();
            for dtype in self.dtypes(device)? {
                rows.extend(self.rows(&name, &words, dtype, device)?);
            }
        } else {
            for shape in self.shapes(device) {
                match shape {
                    Shape::Nearest if !device.is_cpu() => searches.extend(self.searches(device)?),
                    shape => rows.extend(self.rows_of(shape, device)?),
                }
            }
        }
        if self.json {
            return Ok(());
        }
        let threads = rows.first().map_or_else(rayon::current_num_threads, |row| row.threads);
        report::data(&format!("{}, {threads} threads, {}\n", processor(device)?, Isa::detect()?.name()));
        if !rows.is_empty() {
            report::data(&table(&rows));
        }
        if !searches.is_empty() {
            report::data(&format!("{}{}", if rows.is_empty() { "" } else { "\n" }, search::table(&searches)));
        }
        Ok(())
    }

    /// The models to measure.
    fn shapes(&self, device: &Device) -> Vec<Shape> {
        let mut shapes = self.shapes.clone();
        if shapes.is_empty() {
            shapes.extend([Shape::Shipped, Shape::SiglipBase, Shape::SiglipLarge]);
            shapes.extend((!device.is_cpu()).then_some(Shape::So400m));
            shapes.push(Shape::Nearest);
        }
        shapes
    }

    /// The searches on a GPU, in this process.
    #[cfg(feature = "cuda")]
    fn searches(&self, device: &Device) -> Result<Vec<search::Row>> {
        let (gpu, rounds) = (cuda::gpu(device)?, self.rounds(device));
        let mut rows = Vec::new();
        for wanted in self.search.all() {
            report::say(&format!("nearest: measuring {} codes, width {}", wanted.inputs.name(), wanted.d));
            let mut done = |row: search::Row| {
                if self.json {
                    report::data(&row.json()?);
                }
                rows.push(row);
                Ok(())
            };
            cuda::measure(&gpu, &wanted, rounds, &mut done)?;
        }
        Ok(rows)
    }

    #[cfg(not(feature = "cuda"))]
    fn searches(&self, _: &Device) -> Result<Vec<search::Row>> {
        bail!("this program was built without CUDA; build it with `cargo build --release --features cuda`")
    }

    /// Times that each is measured.
    fn rounds(&self, device: &Device) -> usize {
        self.rounds.map_or(if device.is_cpu() { 3 } else { 20 }, NonZeroUsize::get)
    }

    /// The sizes of batches, the smallest first.
    fn batches(&self, device: &Device) -> Vec<usize> {
        let mut batches: Vec<usize> = self.batch.iter().map(|batch| batch.get()).collect();
        if batches.is_empty() {
            batches = if device.is_cpu() { vec![4] } else { vec![1, 16, 64, 256] };
        }
        batches.sort_unstable();
        batches.dedup();
        batches
    }

    fn rows_of(&self, shape: Shape, device: &Device) -> Result<Vec<Row>> {
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
        let dtypes = if shape == Shape::Nearest { vec![Precision::F32] } else { self.dtypes(device)? };
        let mut rows = Vec::new();
        for dtype in dtypes {
            rows.extend(self.rows(&name, &words, dtype, device)?);
        }
        Ok(rows)
    }

    /// The number formats to measure.
    fn dtypes(&self, device: &Device) -> Result<Vec<Precision>> {
        Ok(match self.dtype {
            Some(dtype) => vec![dtype],
            None if !device.is_cpu() => vec![Precision::Auto],
            None if auto_dtype(&Device::Cpu)? == DType::F32 => vec![Precision::F32],
            None => vec![Precision::F32, Precision::Auto],
        })
    }

    /// One model in one number format, at every batch size. Everything is tokenized before anything is reconstructed, the
    /// smallest batch first: the peak memory at each is its own.
    fn rows(&self, name: &str, words: &[OsString], dtype: Precision, device: &Device) -> Result<Vec<Row>> {
        let mut words = words.to_vec();
        words.extend(["--device".into(), device::name(device).into()]);
        if let Some(value) = dtype.to_possible_value() {
            words.extend(["--dtype".into(), value.get_name().into()]);
        }
        if let Some(threads) = self.threads {
            words.extend(["--threads".into(), threads.to_string().into()]);
        }
        let (mut worker, opened) = Worker::start(&words)?;
        report::say(&format!("{name}: measuring {}", opened.precision));
        let ready_seconds = opened.open_seconds + worker.run("tokenize", 1)?.seconds;

        let rounds = self.rounds(device);
        let mut rows = Vec::new();
        for batch in self.batches(device) {
            let (tokenize, last) = rate(&mut worker, "tokenize", batch, rounds)?;
            rows.push(Row {
                shape: name.to_string(),
                dtype: opened.dtype.clone(),
                precision: opened.precision.clone(),
                batch,
                gflops: tokenize.best * opened.operations / 1e9,
                tokenize,
                reconstruct: None,
                peak_mib: last.peak_mib,
                peak_device_mib: last.peak_device_mib,
                ready_seconds,
                rounds,
                threads: opened.threads,
                device: device::name(device),
                instructions: Isa::detect()?.name(),
                processor: processor(device)?,
            });
        }
        for row in rows.iter_mut().filter(|_| opened.reconstructs) {
            row.reconstruct = Some(rate(&mut worker, "reconstruct", row.batch, rounds)?.0);
        }
        for row in rows.iter().filter(|_| self.json) {
            report::data(&serde_json::to_string(row)?);
        }
        Ok(rows)
    }
}

/// Images a second over the rounds, and what the last of them said: the peak memory after it.
fn rate(worker: &mut Worker, verb: &str, batch: usize, rounds: usize) -> Result<(Rate, Done)> {
    let mut last: Done = worker.run(verb, batch)?;
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        if interrupted() {
            bail!("interrupted");
        }
        last = worker.run(verb, batch)?;
        seconds.push(last.seconds);
    }
    let median = batch as f64 / median(&mut seconds);
    Ok((Rate { best: batch as f64 / seconds[0], median }, last))
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

/// The name of what computes: the GPU's, else the processor's.
fn processor(device: &Device) -> Result<String> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return cuda::gpu_name(device);
    }
    if !device.is_cpu() {
        bail!("{} is no device that is measured", device::name(device));
    }
    Ok(cpu_name())
}

/// The processor's name, where the system tells.
fn cpu_name() -> String {
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
    let rate = |rate: &Rate| format!("{} ({})", three_digits(rate.best), three_digits(rate.median));
    let cells = |row: &Row| {
        [
            row.shape.clone(),
            row.precision.clone(),
            row.batch.to_string(),
            rate(&row.tokenize),
            or_dash(row.reconstruct.as_ref().map(rate)),
            format!("{:.0}", row.gflops),
            or_dash(row.peak_mib) + &row.peak_device_mib.map_or_else(String::new, |mib| format!(", GPU {mib}")),
            format!("{:.2}", row.ready_seconds),
        ]
    };
    markdown(heads, rows.iter().map(cells))
}
