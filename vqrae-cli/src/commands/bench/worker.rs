//! A process of one model that does what it is told, a line at a time, and says how long that took.
//!
//! ```text
//! tokenize B            codes of B images, or of 256 tokens for each where only codes are searched
//! fast B                the same by the fast search of a GPU, and `products B` by cuBLAS's products alone
//! reconstruct B         images of B grids of codes
//! dump INPUT OUTPUT     of "pixels" f32 [B, 3, H, W] in a safetensors file: "hidden_states" [depth + 1, B, N, D], "indices"
//!                       u32 [B, h, w], "pixels_out" f32 [B, 3, H', W']
//! perceptual NETWORK WEIGHTS INPUT OUTPUT
//!                       of "images" and "others" f32 [B, 3, H, W] in a safetensors file: "values" (LPIPS of vgg16 or alex,
//!                       in −1..1, f32 [B]; or the logits of convnext, in 0..1, f32 [B, classes] of the images) and
//!                       "gradient" f32 [B, 3, H, W], of the sum of the values to the images
//! dump OUTPUT           where only codes are searched: "tokens" f32 [N, D], "codes" f32 [K, D], "indices" u32 [N], and of a
//!                       GPU "fast" u32 [N]
//! ```
//! The first line of its answers is [`Opened`], each of the others [`Done`], as JSON.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::Var;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vqrae::perceptual::{Backbone, ConvNext, Lpips};
use vqrae::weights::{self, Tensors};
use vqrae::{DType, Device, Tensor, Vqrae};
#[cfg(feature = "cuda")]
use vqrae_kernels::cuda::Mode;
use vqrae_kernels::{Codebook, Metric};

#[cfg(feature = "cuda")]
use super::cuda;
use super::inputs::noise;
use super::search::Wanted;
use super::shape::{self, TOKENS};
use crate::{device, report};

/// What a worker says when it is ready.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Opened {
    pub(super) dtype: String,
    pub(super) precision: String,
    pub(super) threads: usize,
    /// Whether codes become images again.
    pub(super) reconstructs: bool,
    /// Floating-point operations of tokenizing one image.
    pub(super) operations: f64,
    pub(super) open_seconds: f64,
}

/// What a worker says when it has done what it was told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Done {
    pub(super) seconds: f64,
    /// The most memory that the process has held so far.
    pub(super) peak_mib: Option<u64>,
    /// The most memory of a GPU that its tensors have taken so far.
    pub(super) peak_device_mib: Option<u64>,
}

/// What a worker works with.
pub(super) enum Subject {
    Model(Box<Vqrae>),
    Search {
        codebook: Box<Codebook>,
        tokens: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    GpuSearch(Box<cuda::Search>),
}

impl Subject {
    /// A search on a device.
    pub(super) fn search(wanted: &Wanted, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Ok(Self::GpuSearch(Box::new(cuda::Search::new(&cuda::gpu(device)?, wanted)?)));
        }
        if !device.is_cpu() {
            bail!("{} is no device that codes are searched on", device::name(device));
        }
        let (codes, d) = wanted.inputs.codes(wanted.k, wanted.d)?;
        let tokens = wanted.inputs.tokens(&codes, wanted.tokens.iter().copied().max().unwrap_or_default(), d, 0);
        Ok(Self::Search { codebook: Box::new(Codebook::new(codes, d, Metric::Cosine)?), tokens })
    }

    /// The most MiB that its tensors have taken of a GPU's memory.
    fn peak_device_mib(&self) -> Option<u64> {
        match self {
            Self::Model(model) => device::peak_mib(model.device()),
            Self::Search { .. } => None,
            #[cfg(feature = "cuda")]
            Self::GpuSearch(_) => None,
        }
    }

    fn opened(&self, open_seconds: f64) -> Result<Opened> {
        let (dtype, precision, reconstructs, operations) = match self {
            Self::Model(model) => {
                let (h, w) = model.preprocessor().size;
                let (h, w) = model.grid_of(h, w)?;
                let operations = shape::operations(model.config(), h * w);
                (model.dtype().as_str().to_string(), model.precision().to_string(), true, operations)
            }
            Self::Search { codebook, .. } => {
                let operations = shape::scores(TOKENS, codebook.len(), codebook.width());
                ("f32".to_string(), "exact".to_string(), false, operations)
            }
            #[cfg(feature = "cuda")]
            Self::GpuSearch(search) => {
                let operations = shape::scores(TOKENS, search.codebook.len(), search.codebook.width());
                ("f32".to_string(), "exact".to_string(), false, operations)
            }
        };
        let threads = rayon::current_num_threads();
        Ok(Opened { dtype, precision, threads, reconstructs, operations, open_seconds })
    }

    /// Does one thing for `batch` images and returns its seconds, without those that making its input took.
    fn run(&mut self, verb: &str, batch: usize) -> Result<f64> {
        let begin;
        match (self, verb) {
            (Self::Model(model), "tokenize") => {
                let (h, w) = model.preprocessor().size;
                let pixels = Tensor::from_vec(noise(batch * 3 * h * w, 0), (batch, 3, h, w), model.device())?;
                model.device().synchronize()?;
                begin = Instant::now();
                model.encode_to_indices(&pixels)?.to_device(&Device::Cpu)?;
            }
            (Self::Model(model), "reconstruct") => {
                let (h, w) = model.preprocessor().size;
                let (h, w) = model.grid_of(h, w)?;
                let k = model.codebook_size() as f32;
                let codes = noise(batch * h * w, 0).into_iter().map(|x| ((x + 1.0) / 2.0 * k) as u32 % k as u32);
                let codes = Tensor::from_vec(codes.collect(), (batch, h, w), model.device())?;
                model.device().synchronize()?;
                begin = Instant::now();
                model.decode_from_indices(&codes)?;
                model.device().synchronize()?;
            }
            (Self::Search { codebook, tokens }, "tokenize") => {
                let tokens = tokens.get(..batch * TOKENS * codebook.width()).context("so many tokens were not made")?;
                begin = Instant::now();
                codebook.nearest(tokens)?;
            }
            #[cfg(feature = "cuda")]
            (Self::GpuSearch(search), _) => {
                let work = match verb {
                    "tokenize" => cuda::Work::Exact,
                    "fast" => cuda::Work::Fast,
                    "products" => cuda::Work::Products,
                    _ => bail!("{verb}: expected: tokenize, fast, products or dump"),
                };
                return search.time(work, batch * TOKENS);
            }
            _ => bail!("{verb}: expected: tokenize, reconstruct or dump"),
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn dump(&self, files: &[&str]) -> Result<()> {
        let (output, tensors) = match (self, files) {
            (Self::Model(model), [input, output]) => (output, everything(model, Path::new(input))?),
            (Self::Search { codebook, tokens }, [output]) => {
                let indices = [("indices", codebook.nearest(tokens)?)];
                (output, searched(tokens, codebook.rows(), codebook.width(), indices)?)
            }
            #[cfg(feature = "cuda")]
            (Self::GpuSearch(search), [output]) => {
                let (d, n) = (search.codebook.width(), search.tokens.len() / search.codebook.width());
                let codes = |mode| anyhow::Ok(search.codes(mode, n)?.0);
                let indices = [("indices", codes(Mode::Exact)?), ("fast", codes(Mode::Fast)?)];
                // The rows as they are searched.
                let rows = Codebook::new(search.rows.clone(), d, Metric::Cosine)?;
                (output, searched(&search.tokens, rows.rows(), d, indices)?)
            }
            _ => bail!("dump: expected: INPUT OUTPUT of a model, OUTPUT of a search"),
        };
        Ok(weights::write(Path::new(output), &tensors, HashMap::new())?)
    }
}

/// What was searched, and what was found.
fn searched<const N: usize>(tokens: &[f32], codes: &[f32], d: usize, found: [(&str, Vec<u32>); N]) -> Result<Tensors> {
    let rows = |values: &[f32]| Tensor::from_slice(values, (values.len() / d.max(1), d), &Device::Cpu);
    let mut tensors = Tensors::from([("tokens".to_string(), rows(tokens)?), ("codes".to_string(), rows(codes)?)]);
    for (name, indices) in found {
        let n = indices.len();
        tensors.insert(name.to_string(), Tensor::from_vec(indices, n, &Device::Cpu)?);
    }
    Ok(tensors)
}

/// All that a model makes of a file's pixels.
fn everything(model: &Vqrae, input: &Path) -> Result<Tensors> {
    let pixels = weights::read_file(input)?.remove("pixels").context("the file holds no tensor `pixels`")?;
    let hidden_states = Tensor::stack(&model.hidden_states(&pixels)?, 0)?.to_dtype(DType::F32)?;
    let indices = model.encode_to_indices(&pixels)?;
    let pixels_out = model.decode_from_indices(&indices)?.to_dtype(DType::F32)?;
    let tensors = [("hidden_states", hidden_states), ("indices", indices), ("pixels_out", pixels_out)];
    Ok(tensors.map(|(name, tensor)| (name.to_string(), tensor)).into())
}

/// What a network of the losses makes of a file's images, and the seconds of both ways.
fn perceptual(network: &str, weights: &str, input: &str, output: &str) -> Result<f64> {
    let mut tensors = weights::read_file(Path::new(input))?;
    let mut take = |name: &str| tensors.remove(name).with_context(|| format!("the file holds no tensor `{name}`"));
    let images = Var::from_tensor(&take("images")?)?;
    let weights = Path::new(weights);
    let backbone = match network {
        "vgg16" => Some(Backbone::Vgg16),
        "alex" => Some(Backbone::Alex),
        "convnext" => None,
        _ => bail!("{network}: expected: vgg16, alex or convnext"),
    };
    let (values, begin) = match backbone {
        Some(backbone) => {
            let (lpips, others) = (Lpips::open(weights, backbone, &Device::Cpu)?, take("others")?);
            let begin = Instant::now();
            (lpips.forward(&images, &others)?, begin)
        }
        None => {
            let convnext = ConvNext::open(weights, &Device::Cpu)?;
            let begin = Instant::now();
            (convnext.forward(&images)?, begin)
        }
    };
    let gradients = values.sum_all()?.backward()?;
    let seconds = begin.elapsed().as_secs_f64();
    let gradient = gradients.get(&images).context("the images have no gradient")?.clone();
    let made = [("values", values), ("gradient", gradient)].map(|(name, tensor)| (name.to_string(), tensor));
    vqrae::weights::write(Path::new(output), &made.into(), HashMap::new())?;
    Ok(seconds)
}

/// Opens what it works with and does what stdin says, to its end.
pub(super) fn serve(open: impl FnOnce() -> Result<Subject>) -> Result<()> {
    let begin = Instant::now();
    let mut subject = open()?;
    report::data(&serde_json::to_string(&subject.opened(begin.elapsed().as_secs_f64())?)?);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let seconds = match words.as_slice() {
            ["perceptual", network, weights, input, output] => perceptual(network, weights, input, output)?,
            ["dump", files @ ..] => {
                let begin = Instant::now();
                subject.dump(files)?;
                begin.elapsed().as_secs_f64()
            }
            [verb, batch] => {
                subject.run(verb, batch.parse().with_context(|| format!("{line}: no number of images"))?)?
            }
            _ => bail!("{line:?}: expected: tokenize B, reconstruct B or dump FILES"),
        };
        report::data(&serde_json::to_string(&Done {
            seconds,
            peak_mib: peak_mib(),
            peak_device_mib: subject.peak_device_mib(),
        })?);
    }
    Ok(())
}

/// The most memory that this process has held, where the system tells.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
}

/// A worker as the one sees it that tells it what to do.
pub(super) struct Worker {
    process: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    /// Starts this program once more, as `bench --serve` with more `words`.
    pub(super) fn start(words: &[OsString]) -> Result<(Self, Opened)> {
        let program = std::env::current_exe().context("this program's own file was not found")?;
        let mut command = Command::new(program);
        command.args(["bench", "--serve"]).args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().context("this program could not be started once more")?;
        let (Some(orders), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            bail!("a pipe is missing")
        };
        let mut worker = Self { process, orders, answers: BufReader::new(answers).lines() };
        let opened = worker.answer()?;
        Ok((worker, opened))
    }

    /// Lets it do one thing.
    pub(super) fn run(&mut self, verb: &str, batch: usize) -> Result<Done> {
        writeln!(self.orders, "{verb} {batch}").context("a measuring process ended early")?;
        self.answer()
    }

    fn answer<T: DeserializeOwned>(&mut self) -> Result<T> {
        let line = self.answers.next().context("a measuring process ended early")??;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}
