//! Everything that a run needs to go on: weights, the optimizer's moments and the step, as a folder that appears whole.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::train::guard;
use crate::weights::{self, Tensors};

/// What a checkpoint says about itself, in `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps that are done.
    pub step: usize,
    /// The best validation PSNR in dB so far, and its step.
    pub best: Option<(f64, usize)>,
    /// The run's config as JSON: a checkpoint of another config is refused.
    pub config: serde_json::Value,
    /// What the guard against spikes has seen.
    #[serde(default)]
    pub guard: guard::Seen,
    /// The hash of the distillation's teacher, whose tensors the checkpoint does not repeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
}

/// A checkpoint as it was read.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What it says about itself.
    pub state: State,
    /// The model's tensors.
    pub model: Tensors,
    /// The optimizer's moments.
    pub optimizer: Tensors,
    /// The moving average of the weights, if the run keeps one.
    pub average: Option<Tensors>,
    /// The adversarial part, if the run has one: see [`Gan::state`](super::gan::Gan::state).
    pub gan: Option<Tensors>,
}

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const AVERAGE: &str = "average.safetensors";
const GAN: &str = "gan.safetensors";
const STATE: &str = "state.json";

fn folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// Writes `checkpoints/step-N` of the run's folder and removes all but the newest `keep`.
pub fn write(run: &Path, checkpoint: &Checkpoint, keep: usize) -> Result<()> {
    let Checkpoint { state, model, optimizer, average, gan } = checkpoint;
    let folder = folder(run);
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let temporary = tempfile::Builder::new().prefix(".partial-").tempdir_in(&folder).map_err(Error::io(&folder))?;
    weights::write(&temporary.path().join(MODEL), model, HashMap::new())?;
    weights::write(&temporary.path().join(OPTIMIZER), optimizer, HashMap::new())?;
    for (file, tensors) in [(AVERAGE, average), (GAN, gan)] {
        if let Some(tensors) = tensors {
            weights::write(&temporary.path().join(file), tensors, HashMap::new())?;
        }
    }
    let text = serde_json::to_string_pretty(state).map_err(|e| Error::config(folder.join(STATE), e))?;
    let path = temporary.path().join(STATE);
    files::write_whole(&path, text.as_bytes()).map_err(Error::io(&path))?;
    let target = folder.join(format!("step-{:08}", state.step));
    if target.exists() {
        std::fs::remove_dir_all(&target).map_err(Error::io(&target))?;
    }
    let temporary = temporary.keep();
    std::fs::rename(&temporary, &target).map_err(Error::io(&target))?;
    prune(&folder, keep)
}

fn prune(folder: &Path, keep: usize) -> Result<()> {
    let all = list(folder)?;
    for old in all.iter().rev().skip(keep.max(1)) {
        std::fs::remove_dir_all(old).map_err(Error::io(old))?;
    }
    remove_partial(folder)
}

/// What a killed run left half written.
fn remove_partial(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(".partial-") {
            std::fs::remove_dir_all(entry.path()).map_err(Error::io(entry.path()))?;
        }
    }
    Ok(())
}

/// The whole checkpoints, oldest first.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("step-") && path.join(STATE).exists() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The folder of a run's newest checkpoint, if it has one.
pub fn newest_folder(run: &Path) -> Result<Option<PathBuf>> {
    let folder = folder(run);
    if folder.exists() { Ok(list(&folder)?.pop()) } else { Ok(None) }
}

/// The newest checkpoint of a run, if it has one.
pub fn newest(run: &Path) -> Result<Option<Checkpoint>> {
    let Some(newest) = newest_folder(run)? else { return Ok(None) };
    let path = newest.join(STATE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let state = serde_json::from_str(&text).map_err(|e| Error::config(&path, e))?;
    let model = weights::read_file(&newest.join(MODEL))?;
    let optimizer = weights::read_file(&newest.join(OPTIMIZER))?;
    let optional = |file: &str| {
        let path = newest.join(file);
        path.exists().then(|| weights::read_file(&path)).transpose()
    };
    let (average, gan) = (optional(AVERAGE)?, optional(GAN)?);
    Ok(Some(Checkpoint { state, model, optimizer, average, gan }))
}
