//! Training in the paper's two stages: the loop, a page to read from top to bottom.
//!
//! A run is a folder: `config.toml` (what was asked for, every default filled in), `log.jsonl`, `tensorboard/`,
//! `checkpoints/`, and `model/`, the model folder of the best validation so far.
//!
//! A step is a pure function of weights, moments, averages and its number: which photos it has, their crops and size, and
//! what the quantizer draws follow from (seed, step). So a run that goes on from a checkpoint ends with the same bits.

pub mod averaging;
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
pub mod ranks;
pub mod schedule;
pub mod stage;
pub mod start;
mod tensorboard;
mod trainer;
mod validation;
mod values;

pub use config::{Config, Groups, Run, Start};
pub use log::{Event, Observer, StepLog, ValidationLog};

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Instant;

use candle_core::Device;

use crate::error::{Error, Result};
use crate::image::Preprocessor;
use crate::model;
use crate::weights::Tensors;
use checkpoint::Checkpoint;
use data::{Batch, Crops, Photos, Sizes};
use ranks::Ranks;
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

/// Trains as `config` says, on the CPU; goes on from the newest checkpoint in the run's folder when `resume` is set.
///
/// # Errors
/// A config that makes no sense, photos that cannot be read, a checkpoint of another config, too many steps in a row whose
/// loss or gradient is not finite or far above the usual.
pub fn run(config: &Config, files: &Files, resume: bool, tell: Observer) -> Result<()> {
    run_on(&[Device::Cpu], config, files, resume, tell)
}

/// [`run`] on several devices, a rank each, among which every step's images are divided: see [`ranks`]. Checkpoints are the
/// same whatever the devices; a run may go on on others.
///
/// # Errors
/// As [`run`]'s; a number of images a step that does not divide; a rank that failed.
pub fn run_on(devices: &[Device], config: &Config, files: &Files, resume: bool, tell: Observer) -> Result<()> {
    config.train.check_ranks(devices.len())?;
    let photos = Photos::list(&files.train)?;
    let validation = (!files.validation.is_empty()).then(|| Photos::list(&files.validation)).transpose()?;
    std::fs::create_dir_all(&files.output).map_err(Error::io(&files.output))?;
    let found = if resume { checkpoint::newest(&files.output)? } else { None };
    let start = config.start_model(&photos, found.is_some(), tell)?;
    let beginnings = Mutex::new(vec![(start, found); devices.len()]);
    let run = Prepared { config, files, photos, validation, beginnings };
    let silent = |ranks| run.rank(ranks, &mut |_| ControlFlow::Continue(()));
    ranks::each(devices, |ranks| run.rank(ranks, tell), silent)
}

/// What [`Config::start_model`] gives, and a checkpoint to go on from.
type Beginning = ((model::Config, Preprocessor, Tensors), Option<Checkpoint>);

/// A run before its first step: what all ranks begin with.
struct Prepared<'a> {
    config: &'a Config,
    files: &'a Files,
    photos: Photos,
    validation: Option<Photos>,
    /// One for each rank, which takes it: once all have, its tensors are given back.
    beginnings: Mutex<Vec<Beginning>>,
}

impl Prepared<'_> {
    /// One rank's way from the first step to the last.
    fn rank(&self, ranks: Rc<dyn Ranks>, tell: Observer) -> Result<()> {
        let (config, photos, validation) = (self.config, &self.photos, self.validation.as_ref());
        let beginning = self.beginnings.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let (start, found) = beginning.ok_or_else(|| Error::Training("there are more ranks than devices".into()))?;
        let mut trainer = Trainer::new(ranks.clone(), config, start, &self.files.output, found)?;
        trainer.table(photos, tell);
        let steps = config.train.steps;
        if trainer.state.step == 0 && ranks.is_first() {
            trainer.validate(validation, tell)?;
        }
        std::thread::scope(|scope| {
            let (sender, batches) = mpsc::sync_channel(2);
            let (first, preprocessor, buckets) =
                (trainer.state.step, trainer.preprocessor.clone(), trainer.buckets.clone());
            let share = (ranks.rank(), ranks.size());
            scope.spawn(move || {
                let mut crops = Crops::new(photos, &preprocessor, config.train.crop, config.train.seed);
                feed(sender, config, &mut crops, &buckets, first, share);
            });
            for step in first..steps {
                let begin = Instant::now();
                let batch = batches.recv().map_err(|_| Error::Training("the photos ended".into()))??;
                let log = trainer.step(step, batch, begin.elapsed(), tell)?;
                let due = |every: usize| (every > 0 && (step + 1).is_multiple_of(every)) || step + 1 == steps;
                let stop = ranks.any(tell(log.as_ref().map_or(Event::Tick, Event::Step)).is_break())?;
                if due(config.train.validate_every) && ranks.is_first() {
                    trainer.validate(validation, tell)?;
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
}

/// Decodes a rank's share of the batches ahead of the steps, until nobody listens.
fn feed(
    sender: mpsc::SyncSender<Result<Batch>>,
    config: &Config,
    crops: &mut Crops,
    buckets: &[Sizes],
    first: usize,
    (rank, ranks): (usize, usize),
) {
    let (size, share) = (config.train.batch_size, config.train.batch_size / ranks);
    for step in first..config.train.steps {
        let bucket = data::bucket(config.train.seed, step, buckets.len());
        if sender.send(crops.batch(step * size + rank * share, share, buckets[bucket])).is_err() {
            return;
        }
    }
}
