//! Files are read on worker threads ahead of the model, through bounded channels, and arrive in their order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use anyhow::{Context, Result};
use vqrae::image::{self, Limits, Preprocessor, Rgb};
use vqrae::{Device, Tensor};

use crate::plan::Input;
use crate::report::{Exit, Progress};

/// An image as the model takes it.
pub(crate) struct Loaded {
    /// Brought to the model's size.
    pub(crate) image: Rgb,
    /// The same, normalised, `[3, H, W]`.
    pub(crate) pixels: Vec<f32>,
}

/// Decodes and prepares one image, or says what is wrong with it.
pub(crate) fn load(input: &Input, preprocessor: &Preprocessor, limits: &Limits) -> Result<Loaded, String> {
    let image = image::open(&input.path, limits).map_err(|error| error.to_string())?;
    let image = preprocessor.prepare(&image).map_err(|error| error.to_string())?;
    Ok(Loaded { pixels: preprocessor.normalize(&image), image })
}

/// One batch of pixels, `[B, 3, H, W]`; the images are of one size.
pub(crate) fn stack<'a>(images: impl IntoIterator<Item = &'a Loaded>, device: &Device) -> Result<Tensor> {
    let mut pixels = Vec::new();
    let mut shape = (0, 3, 0, 0);
    for loaded in images {
        pixels.extend_from_slice(&loaded.pixels);
        shape = (shape.0 + 1, 3, loaded.image.height, loaded.image.width);
    }
    Ok(Tensor::from_vec(pixels, shape, device)?)
}

/// How a pass over files reads them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) workers: usize,
    pub(crate) batch_size: usize,
}

/// Reads `inputs` and hands them to `work` in batches, in order. A file that cannot be read is reported and left out;
/// after Ctrl-C the batch at hand is the last.
pub(crate) fn each_batch<T: Send>(
    inputs: &[Input],
    pace: Pace,
    progress: &mut Progress,
    read: impl Fn(&Input) -> Result<T, String> + Sync,
    mut work: impl FnMut(&[(&Input, T)]) -> Result<()>,
) -> Result<Exit> {
    std::thread::scope(|scope| {
        let queues = spawn_readers(scope, inputs, pace, &read);
        let mut batch = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            if interrupted() {
                return Ok(Exit::Interrupted);
            }
            match queues[i % pace.workers].recv().context("a reading thread ended early")? {
                Ok(loaded) => batch.push((input, loaded)),
                Err(reason) => progress.skip(input, &reason)?,
            }
            let last = i + 1 == inputs.len();
            if batch.len() == pace.batch_size || last && !batch.is_empty() {
                work(&batch)?;
                progress.advance(batch.len());
                batch.clear();
            }
        }
        Ok(Exit::Success)
    })
}

/// Worker k reads the files k, k + n, k + 2n, …: taking turns at the queues keeps the order, and bounds what waits.
fn spawn_readers<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    inputs: &'scope [Input],
    pace: Pace,
    read: &'scope (impl Fn(&Input) -> Result<T, String> + Sync),
) -> Vec<Receiver<Result<T, String>>> {
    let ahead = pace.batch_size.div_ceil(pace.workers);
    let spawn = |worker: usize| {
        let (sender, receiver) = sync_channel(ahead);
        scope.spawn(move || {
            for input in inputs.iter().skip(worker).step_by(pace.workers) {
                // Whatever a decoder does with a hostile file, the other files go on.
                let result = catch_unwind(AssertUnwindSafe(|| read(input)))
                    .unwrap_or_else(|_| Err("the decoder failed on it".to_string()));
                if sender.send(result).is_err() {
                    break;
                }
            }
        });
        receiver
    };
    (0..pace.workers).map(spawn).collect()
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C and SIGTERM end a run after the batch at hand; the second time, at once.
pub(crate) fn catch_interrupts() -> Result<()> {
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(Exit::Interrupted.code().into());
        }
    };
    ctrlc::set_handler(handler).context("the handler of Ctrl-C could not be set")
}

/// Whether Ctrl-C or SIGTERM has come.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
