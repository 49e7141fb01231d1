//! What a run says of itself, in three places: its observer, `log.jsonl`, and TensorBoard's files.

use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::tensorboard::Events;
use crate::error::{Error, Result};
use crate::files;
use crate::image::Rgb;
use crate::metrics::CodeCounts;

/// What a run tells while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// Something a person may want to know.
    Note(&'a str),
    /// A step is done; a chance to end the run.
    Tick,
    /// A step is done and a line of the log is due.
    Step(&'a StepLog),
    /// A validation, with the first photos and their reconstructions.
    Validation(&'a ValidationLog, &'a [(Rgb, Rgb)]),
}

/// Hears what a run tells, and may end it after the step at hand.
pub type Observer<'a> = &'a mut dyn FnMut(Event) -> ControlFlow<()>;

/// A line of `log.jsonl`: means over the steps since the last one.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StepLog {
    /// Steps that are done, and of how many.
    pub step: usize,
    /// Steps of the whole run.
    pub steps: usize,
    /// What is minimised.
    pub loss: f64,
    /// Its terms by name, before their weights.
    pub terms: BTreeMap<String, f64>,
    /// PSNR in dB of the batch's mean squared error.
    pub psnr: f64,
    /// Share of the codebook that these steps chose.
    pub usage: f64,
    /// exp of the entropy of the codes that these steps chose.
    pub perplexity: f64,
    /// Norm of the gradients before clipping, of the last step that was taken.
    pub gradient_norm: f64,
    /// The same of each group of parameters.
    pub gradient_norms: BTreeMap<String, f64>,
    /// Learning rates of the groups.
    pub rates: BTreeMap<String, f64>,
    /// Steps of the whole run that were skipped, since their loss or gradient was not finite or far above the usual.
    pub skipped_steps: usize,
    /// Photos that could not be used, since the run or its last resumption began.
    pub skipped_photos: usize,
    /// Images a step.
    pub images_per_step: usize,
    /// Images a second.
    pub images_per_second: f64,
    /// Share of the time in which steps waited for photos.
    pub waiting: f64,
}

/// A validation's line of `log.jsonl`.
#[derive(Debug, Clone, Serialize)]
pub struct ValidationLog {
    /// Steps that are done.
    pub step: usize,
    /// Mean over the photos of the PSNR in dB of 8-bit images.
    pub validation_psnr: f64,
    /// Share of the codebook in use over the validation photos.
    pub validation_usage: f64,
    /// exp of the entropy of their codes.
    pub validation_perplexity: f64,
}

/// Sums since the last line of the log.
#[derive(Debug)]
pub(super) struct Window {
    begin: Instant,
    waited: Duration,
    steps: usize,
    taken: usize,
    loss: f64,
    terms: BTreeMap<&'static str, f64>,
    codes: CodeCounts,
}

impl Window {
    pub(super) fn now(codes: CodeCounts) -> Self {
        let (begin, waited) = (Instant::now(), Duration::ZERO);
        Self { begin, waited, steps: 0, taken: 0, loss: 0.0, terms: BTreeMap::new(), codes }
    }

    /// A step begins, for which photos were waited for.
    pub(super) fn begin(&mut self, waited: Duration) {
        self.steps += 1;
        self.waited += waited;
    }

    /// A step was taken.
    pub(super) fn take(&mut self, loss: f64, terms: &BTreeMap<&'static str, f64>, codes: &[u32]) {
        self.taken += 1;
        self.loss += loss;
        for (name, value) in terms {
            *self.terms.entry(name).or_default() += value;
        }
        self.codes.add(codes);
    }

    /// Mean of a term over the steps that were taken.
    pub(super) fn mean(&self, term: &str) -> f64 {
        self.terms.get(term).map_or(f64::NAN, |sum| sum / self.taken as f64)
    }

    /// What the window alone tells of a line of the log.
    pub(super) fn log(&self, images_per_step: usize) -> StepLog {
        let seconds = self.begin.elapsed().as_secs_f64();
        StepLog {
            loss: self.loss / self.taken as f64,
            terms: self.terms.keys().map(|name| ((*name).to_string(), self.mean(name))).collect(),
            usage: self.codes.usage(),
            perplexity: self.codes.perplexity(),
            images_per_step,
            images_per_second: (self.steps * images_per_step) as f64 / seconds,
            waiting: (self.waited.as_secs_f64() / seconds).min(1.0),
            ..StepLog::default()
        }
    }
}

/// `log.jsonl` and, if the run wants them, TensorBoard's files.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    events: Option<Events>,
}

impl Journal {
    /// Of a run that goes on from `step`.
    pub(super) fn open(output: &Path, step: usize, tensorboard: bool) -> Result<Self> {
        let path = output.join("log.jsonl");
        trim(&path, step)?;
        let folder = output.join("tensorboard");
        let create = || Events::create(&folder, step).map_err(Error::io(&folder));
        Ok(Self { path, events: tensorboard.then(create).transpose()? })
    }

    /// One line more; its numbers become scalars.
    pub(super) fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(line).map_err(|e| Error::config(&self.path, e))?;
        let path = &self.path;
        // The struct and not the value: its order of keys is for people.
        let text = serde_json::to_string(line).map_err(|e| Error::config(path, e))?;
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(Error::io(path))?;
        writeln!(file, "{text}").map_err(Error::io(path))?;
        let Some(events) = &mut self.events else { return Ok(()) };
        let mut scalars = Vec::new();
        numbers("", &value, &mut scalars);
        let step = value["step"].as_u64().unwrap_or_default() as usize;
        let scalars = scalars.into_iter().filter(|(name, _)| name != "step" && name != "steps");
        events.scalars(step, scalars).map_err(Error::io(path.with_file_name("tensorboard")))
    }
}

/// The numbers of a line, nested ones by their names with a slash between.
fn numbers(name: &str, value: &Value, found: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(field, value)| {
            let slash = if name.is_empty() { "" } else { "/" };
            numbers(&format!("{name}{slash}{field}"), value, found);
        }),
        other => found.extend(other.as_f64().map(|number| (name.to_string(), number))),
    }
}

/// Drops the lines of steps that will be done again, and a line that a kill cut in half.
fn trim(path: &Path, step: usize) -> Result<()> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(()) };
    let kept = |line: &&str| {
        let parsed: Value = serde_json::from_str(line).unwrap_or_default();
        step > 0 && parsed["step"].as_u64().is_some_and(|s| s as usize <= step)
    };
    let lines: String = text.lines().filter(kept).map(|line| format!("{line}\n")).collect();
    files::write_whole(path, lines.as_bytes()).map_err(Error::io(path))
}
