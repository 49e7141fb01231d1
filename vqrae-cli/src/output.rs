//! The output folder: what it holds, what is done already, and files that appear whole.
//!
//! ```text
//! OUT/manifest.json                  model, preprocessing, dtype, grid: what all its files have in common
//! OUT/errors.jsonl                   files that the latest run could not read, if any
//! OUT/codes/<path>.safetensors       or .npy
//! OUT/reconstructions/<path>.png
//! OUT/features/<path>.safetensors
//! ```
//!
//! At several resolutions, `<path>` is marked with each: `codes/cats/tom.jpg@256x256.safetensors`.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vqrae::codes::CodeSet;
use vqrae::image::{ResizeMode, Rgb};
use vqrae::{Error, Vqrae, codes, files, image};
use walkdir::WalkDir;

use crate::inputs::Input;
use crate::view::View;

/// What to do where an earlier run has written.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfExists {
    /// Keep files that are whole and made the same way
    Skip,
    /// Do everything again
    Overwrite,
    /// Stop before doing anything
    Error,
}

/// What makes the files of two runs the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    pub(crate) model_id: String,
    pub(crate) preprocessing: String,
    pub(crate) dtype: String,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "model {} (preprocessing {}, dtype {})", self.model_id, self.preprocessing, self.dtype)
    }
}

impl Origin {
    /// Of a set of shards.
    pub(crate) fn of(header: &codes::Header) -> Self {
        let codes::Header { model_id, preprocessing, dtype, .. } = header.clone();
        Self { model_id, preprocessing, dtype }
    }

    /// Of files of all these views.
    pub(crate) fn new(model: &Vqrae, views: &[View]) -> Self {
        let mut preprocessing: Vec<_> = views.iter().map(View::preprocessing).collect();
        preprocessing.dedup();
        Self {
            model_id: model.id().to_string(),
            preprocessing: preprocessing.join(", "),
            dtype: model.precision().to_string(),
        }
    }
}

/// `manifest.json`.
#[derive(Serialize)]
struct Manifest<'a> {
    tool: &'static str,
    version: &'static str,
    #[serde(flatten)]
    origin: &'a Origin,
    /// Of several resolutions a list; left out where every image has its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_size: Option<Value>,
    codebook_size: usize,
    /// Left out where it is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    codebooks: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grid: Option<Value>,
    order: &'static str,
    index_base: usize,
}

/// An output folder that this run alone writes to.
pub(crate) struct Output {
    folder: PathBuf,
    origin: Origin,
    if_exists: IfExists,
    /// Held, not read: the lock ends with the process, however it ends.
    _lock: Option<File>,
}

impl Output {
    /// Makes or enters the folder, and refuses one that holds another model's work.
    pub(crate) fn open(folder: &Path, model: &Vqrae, views: &[View], if_exists: IfExists) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let origin = Origin::new(model, views);
        if CodeSet::is(folder) {
            bail!("{}: this folder holds code shards; choose another --output", folder.display());
        }
        let output = Self { folder: folder.to_path_buf(), origin, if_exists, _lock: lock(folder)? };
        output.check_manifest()?;
        output.remove_partial_files();
        output.write_manifest(model, views)?;
        Ok(output)
    }

    /// What the files of one view are made by.
    pub(crate) fn origin(&self, view: &View) -> Origin {
        Origin { preprocessing: view.preprocessing(), ..self.origin.clone() }
    }

    /// Where the output for `input` goes: its extension is added to the whole name, so that a.jpg and a.png differ.
    pub(crate) fn path(&self, kind: &str, input: &Input, view: &View, extension: &str) -> PathBuf {
        with_extension(self.folder.join(kind).join(view.name(&input.relative)), extension)
    }

    /// Whether an earlier run has made the file of a view at `path`; `read` opens it and tells its origin.
    pub(crate) fn has(&self, path: &Path, view: &View, read: impl Fn(&Path) -> vqrae::Result<Origin>) -> Result<bool> {
        let (shown, wanted) = (path.display(), self.origin(view));
        match self.if_exists {
            IfExists::Overwrite => return Ok(false),
            _ if !path.exists() => return Ok(false),
            IfExists::Error => {
                bail!("{shown} exists; pass --if-exists skip to keep what is there, or --if-exists overwrite")
            }
            IfExists::Skip => {}
        }
        match read(path) {
            Ok(origin) if origin == wanted => Ok(true),
            Ok(origin) => bail!(
                "{shown} was made by {origin}, but this run is {wanted}; pass --if-exists overwrite to do it again, \
                 {}choose another --output",
                as_before(&origin, &wanted)
            ),
            // Damaged: made again.
            Err(_) => Ok(false),
        }
    }

    fn check_manifest(&self) -> Result<()> {
        let path = self.folder.join("manifest.json");
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(Error::io(&path))?,
        };
        let next_step = "choose another --output, or pass --if-exists overwrite to do it again";
        match serde_json::from_str::<Origin>(&text) {
            _ if self.if_exists == IfExists::Overwrite => Ok(()),
            Ok(origin) if origin == self.origin => Ok(()),
            Ok(origin) => bail!(
                "{}: this folder holds the work of {origin}, but this run is {}; {}{next_step}",
                path.display(),
                self.origin,
                as_before(&origin, &self.origin)
            ),
            Err(error) => bail!("{}: not a manifest of this program ({error}); {next_step}", path.display()),
        }
    }

    fn write_manifest(&self, model: &Vqrae, views: &[View]) -> Result<()> {
        let fixed = views.iter().filter(|view| view.preprocessor.resize_mode != ResizeMode::Naflex);
        let sizes: Vec<_> = fixed.map(|view| view.preprocessor.size).collect();
        let grids = sizes.iter().map(|&(h, w)| model.grid_of(h, w)).collect::<Result<Vec<_>, _>>()?;
        let listed = |sizes: Vec<(usize, usize)>| match sizes.as_slice() {
            [] => None,
            [one] => Some(json!(one)),
            several => Some(json!(several)),
        };
        let manifest = Manifest {
            tool: env!("CARGO_PKG_NAME"),
            version: env!("CARGO_PKG_VERSION"),
            origin: &self.origin,
            image_size: listed(sizes),
            codebook_size: model.codebook_size(),
            codebooks: Some(model.codes_per_token()).filter(|&codebooks| codebooks > 1),
            grid: listed(grids),
            order: "raster",
            index_base: 0,
        };
        let text = serde_json::to_string_pretty(&manifest)? + "\n";
        Ok(codes::write_whole(self.folder.join("manifest.json"), text.as_bytes())?)
    }

    /// What a killed run left half written. The lock says that nobody is still writing them.
    fn remove_partial_files(&self) {
        let here = WalkDir::new(&self.folder).max_depth(1).into_iter();
        let below = KINDS.map(|kind| WalkDir::new(self.folder.join(kind)).into_iter());
        for entry in here.chain(below.into_iter().flatten()).filter_map(Result::ok) {
            files::sweep(entry.path());
        }
    }
}

fn with_extension(path: PathBuf, extension: &str) -> PathBuf {
    let mut path = path.into_os_string();
    path.push(".");
    path.push(extension);
    path.into()
}

/// Where the reconstruction of a view of an image goes.
pub(crate) fn picture(folder: &Path, relative: &Path, view: &View) -> PathBuf {
    with_extension(folder.join("reconstructions").join(view.name(relative)), "png")
}

/// How to go on in the number format of before, where that is all that differs.
pub(crate) fn as_before(origin: &Origin, wanted: &Origin) -> String {
    let format = |dtype: &str| dtype.split('/').next().unwrap_or_default().to_string();
    let (before, now) = (format(&origin.dtype), format(&wanted.dtype));
    if (Origin { dtype: wanted.dtype.clone(), ..origin.clone() }) == *wanted && before != now {
        format!("pass --dtype {before} to go on as before, ")
    } else {
        String::new()
    }
}

/// The folders that this program fills.
const KINDS: [&str; 3] = ["codes", "reconstructions", "features"];

/// Locks the folder itself; where the system cannot lock a folder, two runs at once are the user's care.
fn lock(folder: &Path) -> Result<Option<File>> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!(
                "{}: another run is writing to this folder; wait for it, or choose another --output",
                folder.display()
            )
        }
        Err(std::fs::TryLockError::Error(_)) => Ok(None),
    }
}

/// Writes an image as PNG, whole or not at all, making folders as needed.
pub(crate) fn save_png(path: &Path, image: &Rgb) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    Ok(image::save_png(path, image).map_err(Error::from)?)
}

/// [`save_png`] for several images at once: packing them takes longer than painting them does.
pub(crate) fn save_pngs<'a>(images: impl Iterator<Item = (PathBuf, &'a Rgb)>) -> Result<()> {
    let images: Vec<_> = images.collect();
    images.par_iter().try_for_each(|(path, image)| save_png(path, image))
}

/// The inputs that are still to do, and how many are done.
pub(crate) fn split_done(
    inputs: Vec<Input>,
    mut is_done: impl FnMut(&Input) -> Result<bool>,
) -> Result<(Vec<Input>, usize)> {
    let total = inputs.len();
    let mut left = Vec::new();
    for input in inputs {
        if !is_done(&input)? {
            left.push(input);
        }
    }
    let done = total - left.len();
    Ok((left, done))
}
