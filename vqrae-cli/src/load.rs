//! Files are read on worker threads ahead of the model and written on another behind it, through bounded channels, and in
//! their order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use anyhow::{Context, Result};
use vqrae::image::{self, Limits, Preprocessor, Rgb};
use vqrae::{Tensor, Vqrae};

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

/// One batch of pixels, `[B, 3, H, W]`, of images of one size. Where results could depend on the batch, the last one is
/// filled up with black to the size of the others: take the first images of what comes out.
pub(crate) fn stack<'a>(
    images: impl ExactSizeIterator<Item = &'a Loaded>,
    model: &Vqrae,
    pace: Pace,
) -> Result<Tensor> {
    let count = if model.is_batch_invariant() { images.len() } else { images.len().max(pace.batch_size) };
    let mut pixels = Vec::new();
    let mut size = (0, 0);
    for loaded in images {
        pixels.extend_from_slice(&loaded.pixels);
        size = (loaded.image.height, loaded.image.width);
    }
    pixels.resize(count * 3 * size.0 * size.1, 0.0);
    Ok(Tensor::from_vec(pixels, (count, 3, size.0, size.1), model.device())?)
}

/// How a pass over files reads them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) workers: usize,
    pub(crate) batch_size: usize,
}

/// What the thread that writes is told, in the order of the files.
enum Event<'a, T, R> {
    Unreadable(&'a Input, String),
    Computed(Vec<(&'a Input, T)>, R),
}

/// Reads `inputs`, hands them to `compute` in batches, and what comes of each to `write` on a thread of its own, all in
/// order. A file that cannot be read is reported and left out; after Ctrl-C the batch at hand is the last. Progress counts
/// what is written.
pub(crate) fn each_batch<T: Send, R: Send>(
    inputs: &[Input],
    pace: Pace,
    progress: &mut Progress,
    read: impl Fn(&Input) -> Result<T, String> + Sync,
    mut compute: impl FnMut(&[(&Input, T)]) -> Result<R>,
    mut write: impl FnMut(&[(&Input, T)], R) -> Result<()> + Send,
) -> Result<Exit> {
    std::thread::scope(|scope| {
        let queues = spawn_readers(scope, inputs, pace, &read);
        let (events, received) = sync_channel(1);
        let writer = scope.spawn(move || {
            for event in received {
                match event {
                    Event::Unreadable(input, reason) => progress.skip(input, &reason)?,
                    Event::Computed(batch, result) => {
                        write(&batch, result)?;
                        progress.advance(batch.len());
                    }
                }
            }
            anyhow::Ok(())
        });
        let mut exit = Exit::Success;
        let mut batch = Vec::new();
        for (i, input) in inputs.iter().enumerate() {
            if interrupted() {
                exit = Exit::Interrupted;
                break;
            }
            let event = match queues[i % pace.workers].recv().context("a reading thread ended early")? {
                Err(reason) => Some(Event::Unreadable(input, reason)),
                Ok(loaded) => {
                    batch.push((input, loaded));
                    None
                }
            };
            // A writer that hangs up has failed: its own error is the one to tell.
            if event.is_some_and(|event| events.send(event).is_err()) {
                break;
            }
            let last = i + 1 == inputs.len();
            if batch.len() == pace.batch_size || last && !batch.is_empty() {
                let batch = std::mem::take(&mut batch);
                let result = compute(&batch)?;
                if events.send(Event::Computed(batch, result)).is_err() {
                    break;
                }
            }
        }
        drop(events);
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(exit)
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
