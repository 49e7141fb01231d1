//! Files are read on worker threads ahead of the model and written on another behind it, through bounded channels, and in
//! their order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use anyhow::{Context, Result, bail};
use vqrae::image::{self, Limits, Rgb};
use vqrae::{Tensor, Vqrae};

use crate::plan::Input;
use crate::report::{Exit, Progress};
use crate::view::View;

/// An image as the model takes it.
pub(crate) struct Loaded {
    /// Rows and columns.
    pub(crate) size: (usize, usize),
    /// Normalised, `[3, H, W]`.
    pub(crate) pixels: Vec<f32>,
}

/// Decodes one image and prepares it for each view, or says what is wrong with it.
pub(crate) fn load(input: &Input, views: &[View], limits: &Limits) -> Result<Vec<Loaded>, String> {
    let image = image::open(&input.path, limits).map_err(|error| error.to_string())?;
    let load = |view: &View| Ok(prepare(&image, view)?.0);
    views.iter().map(load).collect::<Result<_, image::ErrorKind>>().map_err(|error| error.to_string())
}

fn prepare(image: &Rgb, view: &View) -> Result<(Loaded, Rgb), image::ErrorKind> {
    let prepared = view.preprocessor.prepare(image)?;
    let size = (prepared.height, prepared.width);
    Ok((Loaded { size, pixels: view.preprocessor.normalize(&prepared) }, prepared))
}

/// [`load`], and the same views at the sizes of their reconstructions, to compare with.
pub(crate) fn load_beside(input: &Input, views: &[View], limits: &Limits) -> Result<Vec<(Loaded, Rgb)>, String> {
    let image = image::open(&input.path, limits).map_err(|error| error.to_string())?;
    let load = |view: &View| {
        let (loaded, prepared) = prepare(&image, view)?;
        let painted = view.painted(loaded.size);
        let original = if painted == loaded.size { prepared } else { view.preprocessor.prepare_at(&image, painted)? };
        Ok((loaded, original))
    };
    views.iter().map(load).collect::<Result<_, image::ErrorKind>>().map_err(|error| error.to_string())
}

/// What `compute` makes of each of `items`, in their order. It is given items of one `kind` at a time, `most` at most: a
/// batch holds images of one size, and the photos of one folder may have many.
pub(crate) fn each_alike<T, K: PartialEq, R>(
    items: &[T],
    most: usize,
    kind: impl Fn(&T) -> K,
    mut compute: impl FnMut(&[&T]) -> Result<Vec<R>>,
) -> Result<Vec<R>> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let mut left: Vec<usize> = (0..items.len()).collect();
    while let Some(&first) = left.first() {
        let wanted = kind(&items[first]);
        let (alike, others): (Vec<_>, Vec<_>) = left.into_iter().partition(|&i| kind(&items[i]) == wanted);
        for chunk in alike.chunks(most.max(1)) {
            let made = compute(&chunk.iter().map(|&i| &items[i]).collect::<Vec<_>>())?;
            if made.len() != chunk.len() {
                bail!("{} results of {} items", made.len(), chunk.len());
            }
            chunk.iter().zip(made).for_each(|(&i, made)| results[i] = Some(made));
        }
        left = others;
    }
    Ok(results.into_iter().flatten().collect())
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
        size = loaded.size;
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
