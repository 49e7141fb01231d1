//! Files are read on worker threads ahead of the model, put together to batches on another, computed on a thread for each
//! device, and written on one behind them: through bounded channels, and in their order.
//!
//! ```text
//! read ─┐                                       ┌─ compute on device 0 ─┐
//! read ─┼─▶ batch k, put together ─▶ device k%n ┼─ compute on device 1 ─┼─▶ write, in the order of the files
//! read ─┘                                       └─ …                    ─┘
//! ```
//! Which files make up a batch does not depend on the number of devices, so neither do results.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::inputs::Input;
use crate::interrupts::interrupted;
use crate::report::{Exit, Progress};

/// How a pass over files reads them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) workers: usize,
    pub(crate) batch_size: usize,
}

/// What the thread that writes is told, in the order of the files.
enum Event<'a, T> {
    Unreadable(&'a Input, String),
    /// Handed to the device of this number.
    Batch(usize, Vec<(&'a Input, T)>),
}

/// Batches that each device may be ahead of the thread that writes, beside the one that it computes.
const AHEAD: usize = 1;

/// Reads `inputs`, puts them together to batches by `prepare`, hands these to the `computes`, a device each, in turn, and
/// what comes of each to `write` on a thread of its own, all in order. A file that cannot be read is reported and left out;
/// after Ctrl-C the batches at hand are the last. Progress counts what is written, but for what `write` itself has skipped.
///
/// # Errors
/// The first in the order of the files; what comes before it is written.
pub(crate) fn each_batch<T: Send, P: Send, R: Send>(
    inputs: &[Input],
    pace: Pace,
    progress: &mut Progress,
    read: impl Fn(&Input) -> Result<T, String> + Sync,
    mut prepare: impl FnMut(&mut [(&Input, T)]) -> Result<P>,
    computes: Vec<impl FnMut(P) -> Result<R> + Send>,
    write: impl FnMut(&mut Progress, &[(&Input, T)], R) -> Result<()> + Send,
) -> Result<Exit> {
    if computes.is_empty() {
        bail!("there is no device to compute on");
    }
    std::thread::scope(|scope| {
        let queues = spawn_readers(scope, inputs, pace, &read);
        let (devices, results): (Vec<_>, Vec<_>) =
            computes.into_iter().map(|compute| spawn_device(scope, compute)).unzip();
        let (events, told) = sync_channel((AHEAD + 1) * devices.len());
        let writer = scope.spawn(move || write_in_order(told, &results, progress, write));

        let mut batch = Vec::new();
        let mut batches = 0;
        let mut collect = || -> Result<()> {
            for (i, input) in inputs.iter().enumerate() {
                if interrupted() {
                    break;
                }
                let unreadable = match queues[i % pace.workers].recv().context("a reading thread ended early")? {
                    Err(reason) => Some(Event::Unreadable(input, reason)),
                    Ok(loaded) => {
                        batch.push((input, loaded));
                        None
                    }
                };
                // A writer that hangs up has failed: its own error is the one to tell.
                if unreadable.is_some_and(|event| events.send(event).is_err()) {
                    break;
                }
                if batch.len() == pace.batch_size || i + 1 == inputs.len() && !batch.is_empty() {
                    let device = batches % devices.len();
                    batches += 1;
                    let mut batch = std::mem::take(&mut batch);
                    let prepared = prepare(&mut batch)?;
                    // A device that hangs up has failed or was interrupted, which the writer comes to know.
                    let handed = devices[device].send(prepared).is_ok();
                    if events.send(Event::Batch(device, batch)).is_err() || !handed {
                        break;
                    }
                }
            }
            Ok(())
        };
        let collected = collect();
        drop((events, devices, queues));
        let written = join(writer)?;
        collected?;
        let all = written == inputs.len();
        Ok(if interrupted() && !all { Exit::Interrupted } else { Exit::Success })
    })
}

/// Tells `write` what the devices made, in the order of the files, and returns how many files were settled.
fn write_in_order<T, R>(
    events: Receiver<Event<'_, T>>,
    results: &[Receiver<(Result<R>, Duration)>],
    progress: &mut Progress,
    mut write: impl FnMut(&mut Progress, &[(&Input, T)], R) -> Result<()>,
) -> Result<usize> {
    let mut settled = 0;
    for event in events {
        match event {
            Event::Unreadable(input, reason) => {
                progress.skip(input, &reason)?;
                settled += 1;
            }
            Event::Batch(device, batch) => match results[device].recv() {
                Ok((result, computed)) => {
                    progress.computed(computed / results.len() as u32);
                    let skipped = progress.skipped();
                    write(progress, &batch, result?)?;
                    progress.advance(batch.len() - (progress.skipped() - skipped));
                    settled += batch.len();
                }
                // Left out after Ctrl-C; another device may have been quicker with the next one.
                Err(_) if interrupted() => {}
                Err(_) => bail!("a computing thread ended early"),
            },
        }
    }
    Ok(settled)
}

/// A thread that computes what it is sent, until it fails or Ctrl-C comes.
fn spawn_device<'scope, P: Send + 'scope, R: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    mut compute: impl FnMut(P) -> Result<R> + Send + 'scope,
) -> (SyncSender<P>, Receiver<(Result<R>, Duration)>) {
    // Nothing waits in it: the next batch lies ready with the thread that puts batches together.
    let (batches, received) = sync_channel::<P>(0);
    let (sender, results) = sync_channel(AHEAD);
    scope.spawn(move || {
        for batch in received {
            if interrupted() {
                break;
            }
            let started = Instant::now();
            let result = compute(batch);
            let failed = result.is_err();
            if sender.send((result, started.elapsed())).is_err() || failed {
                break;
            }
        }
    });
    (batches, results)
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

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;

    use anyhow::anyhow;

    use super::*;

    fn inputs(count: usize) -> Vec<Input> {
        let name = |i: usize| PathBuf::from(format!("{i:03}"));
        (0..count).map(|i| Input::file(name(i), name(i))).collect()
    }

    fn number(input: &Input) -> usize {
        input.path.to_string_lossy().parse().unwrap()
    }

    /// Runs over `count` files, of which every `bad`th cannot be read, on so many devices, each as slow as it likes; returns the
    /// batches as they were written.
    fn run(
        count: usize,
        bad: usize,
        devices: usize,
        folder: &Path,
        fail: impl Fn(usize, &[usize]) -> Option<String> + Sync,
    ) -> (Result<Exit>, Vec<Vec<usize>>) {
        let inputs = inputs(count);
        let mut progress = Progress::new(count, 0, usize::MAX, Some(folder.join("errors.jsonl"))).unwrap();
        let read = |input: &Input| match number(input) {
            i if i % bad == bad - 1 => Err("is no image".to_string()),
            i => Ok(i),
        };
        let prepare = |batch: &mut [(&Input, usize)]| Ok(batch.iter().map(|(_, i)| *i).collect::<Vec<_>>());
        let fail = &fail;
        let compute = |device: usize| {
            move |batch: Vec<usize>| {
                // The first device is the slowest, so that others run ahead of it.
                std::thread::sleep(Duration::from_millis(if device == 0 { 4 } else { 0 }));
                match fail(device, &batch) {
                    Some(error) => Err(anyhow!(error)),
                    None => Ok((device, batch)),
                }
            }
        };
        let written = Mutex::new(Vec::new());
        let write = |_: &mut Progress, batch: &[(&Input, usize)], (device, computed): (usize, Vec<usize>)| {
            assert_eq!(batch.iter().map(|(input, _)| number(input)).collect::<Vec<_>>(), computed);
            let mut written = written.lock().unwrap();
            assert_eq!(written.len() % devices, device, "batches go to the devices in turn");
            written.push(computed);
            Ok(())
        };
        let pace = Pace { workers: 3, batch_size: 4 };
        let computes = (0..devices).map(compute).collect();
        let exit = each_batch(&inputs, pace, &mut progress, read, prepare, computes, write);
        (exit, written.into_inner().unwrap())
    }

    #[test]
    fn batches_are_the_same_and_in_order_on_any_number_of_devices() {
        let folder = tempfile::tempdir().unwrap();
        let (exit, expected) = run(83, 7, 1, folder.path(), |_, _| None);
        assert_eq!(exit.unwrap(), Exit::Success);
        let files: Vec<usize> = (0..83).filter(|i| i % 7 != 6).collect();
        assert_eq!(expected.concat(), files);
        assert!(expected[..expected.len() - 1].iter().all(|batch| batch.len() == 4));
        for devices in [2, 3, 5, 40] {
            let (exit, batches) = run(83, 7, devices, folder.path(), |_, _| None);
            assert_eq!(exit.unwrap(), Exit::Success);
            assert_eq!(batches, expected, "{devices} devices");
        }
    }

    #[test]
    fn the_first_error_in_the_order_of_files_ends_the_run_and_what_came_before_is_written() {
        let folder = tempfile::tempdir().unwrap();
        // Device 1 fails on its second batch, the fourth of all; device 2 on its second, which it reaches sooner.
        let fail =
            |device: usize, batch: &[usize]| (device > 0 && batch[0] >= 12).then(|| format!("device {device} is gone"));
        let (exit, batches) = run(83, 100, 3, folder.path(), fail);
        assert_eq!(exit.unwrap_err().to_string(), "device 1 is gone");
        assert_eq!(batches.concat(), (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn an_error_in_the_making_of_a_batch_or_in_writing_ends_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let inputs = inputs(40);
        for (at_prepare, at_write) in [(true, false), (false, true)] {
            let mut progress = Progress::new(40, 0, 0, Some(folder.path().join("errors.jsonl"))).unwrap();
            let prepare = |batch: &mut [(&Input, ())]| match at_prepare && number(batch[0].0) == 8 {
                true => Err(anyhow!("no memory")),
                false => Ok(()),
            };
            let mut written = 0;
            let write = |_: &mut Progress, batch: &[(&Input, ())], ()| {
                if at_write && number(batch[0].0) == 8 {
                    bail!("no space");
                }
                written += batch.len();
                Ok(())
            };
            let pace = Pace { workers: 2, batch_size: 4 };
            let computes = vec![|()| Ok(()); 2];
            let result = each_batch(&inputs, pace, &mut progress, |_| Ok(()), prepare, computes, write);
            assert_eq!(result.unwrap_err().to_string(), if at_prepare { "no memory" } else { "no space" });
            assert_eq!(written, 8);
        }
    }
}
