//! Training in the paper's two stages: the loop, a page to read from top to bottom.
//!
//! A run is a folder: `config.toml` (what was asked for, every default filled in), `log.jsonl`, `tensorboard/`,
//! `checkpoints/`, and `model/`, the model folder of the best validation so far.
//!
//! A step is a pure function of weights, moments, averages and its number: which photos it has, their crops and size, and
//! what the quantizer draws follow from (seed, step). So a run that goes on from a checkpoint ends with the same bits.

mod averaging;
mod blocks;
pub mod checkpoint;
mod config;
pub mod data;
pub mod gan;
pub mod guard;
mod log;
pub mod loss;
pub mod optimizer;
mod parameters;
pub mod plan;
pub mod schedule;
pub mod stage;
pub mod start;
mod tensorboard;
mod trainer;
mod validation;

pub use config::{Config, Groups, Run, Start};
pub use log::{Event, Observer, StepLog, ValidationLog};

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use crate::error::{Error, Result};
use data::{Batch, Crops, Photos, Sizes};
use trainer::Trainer;

/// The files of a run.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Photos to train on: what [`Photos::list`] takes.
    pub train: Vec<PathBuf>,
    /// Photos to validate on; none for no validation.
    pub validation: Vec<PathBuf>,
    /// The run's folder.
    pub output: PathBuf,
}

/// Trains as `config` says; goes on from the newest checkpoint in the run's folder when `resume` is set.
///
/// # Errors
/// A config that makes no sense, photos that cannot be read, a checkpoint of another config, too many steps in a row whose
/// loss or gradient is not finite or far above the usual.
pub fn run(config: &Config, files: &Files, resume: bool, tell: Observer) -> Result<()> {
    let photos = Photos::list(&files.train)?;
    let validation = (!files.validation.is_empty()).then(|| Photos::list(&files.validation)).transpose()?;
    std::fs::create_dir_all(&files.output).map_err(Error::io(&files.output))?;
    let found = if resume { checkpoint::newest(&files.output)? } else { None };
    let mut trainer = Trainer::new(config, &photos, &files.output, found, tell)?;
    trainer.table(&photos, tell);
    let steps = config.train.steps;
    if trainer.state.step == 0 {
        trainer.validate(validation.as_ref(), tell)?;
    }
    std::thread::scope(|scope| {
        let (sender, batches) = mpsc::sync_channel(2);
        let (first, preprocessor, buckets) =
            (trainer.state.step, trainer.preprocessor.clone(), trainer.buckets.clone());
        let photos = &photos;
        scope.spawn(move || {
            let mut crops = Crops::new(photos, &preprocessor, config.train.crop, config.train.seed);
            feed(sender, config, &mut crops, &buckets, first);
        });
        for step in first..steps {
            let begin = Instant::now();
            let batch = batches.recv().map_err(|_| Error::Training("the photos ended".into()))??;
            let log = trainer.step(step, batch, begin.elapsed(), tell)?;
            let due = |every: usize| (every > 0 && (step + 1).is_multiple_of(every)) || step + 1 == steps;
            let stop = tell(log.as_ref().map_or(Event::Tick, Event::Step)).is_break();
            if due(config.train.validate_every) {
                trainer.validate(validation.as_ref(), tell)?;
            }
            if due(config.train.checkpoint_every) || stop {
                trainer.checkpoint()?;
            }
            if stop {
                return Ok(());
            }
        }
        Ok(())
    })
}

/// Decodes ahead of the steps, until nobody listens.
fn feed(sender: mpsc::SyncSender<Result<Batch>>, config: &Config, crops: &mut Crops, buckets: &[Sizes], first: usize) {
    let size = config.train.batch_size;
    for step in first..config.train.steps {
        let bucket = data::bucket(config.train.seed, step, buckets.len());
        if sender.send(crops.batch(step * size, size, buckets[bucket])).is_err() {
            return;
        }
    }
}
