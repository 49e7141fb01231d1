//! What a run reads: one [`Input`] an image (or an image's codes), wherever it is kept.

mod find;
mod list;
mod shard;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vqrae::codes::Codes;
#[cfg(feature = "parquet")]
use vqrae::samples::Table;
use vqrae::samples::{Sample, Tar};

pub(crate) use find::{Archive, Format, Found, ImageKeys, Kind, Listing, Search, each_once};
pub(crate) use shard::Shard;

/// One image to work on, or the codes of one.
#[derive(Debug, Clone)]
pub(crate) struct Input {
    /// Where it is; of a tar's member or a table's row below that file's path.
    pub(crate) path: PathBuf,
    /// What its output is named after: the path below the folder or the glob that found it.
    pub(crate) relative: PathBuf,
    place: Place,
    about: Option<Arc<About>>,
}

/// Where an input's bytes are.
#[derive(Debug, Clone)]
enum Place {
    File,
    Member(Arc<Tar>, usize),
    #[cfg(feature = "parquet")]
    Row(Arc<Table>, usize),
    /// Codes in a shard.
    Codes(Arc<Shard>, usize),
    /// What cannot be read, and why.
    Broken(Arc<str>),
}

/// What a list or a folder's name says about an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct About {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) class: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) caption: Option<String>,
}

impl Input {
    /// A file of its own.
    pub(crate) fn file(path: PathBuf, relative: PathBuf) -> Self {
        Self { path, relative, place: Place::File, about: None }
    }

    /// The same with what is known about it.
    pub(crate) fn about(self, about: Option<Arc<About>>) -> Self {
        Self { about, ..self }
    }

    /// The images of a tar, whose path below the inputs is `relative`; where it is damaged, one more that says so.
    pub(crate) fn of_tar(tar: Tar, path: &Path, relative: &Path) -> Vec<Self> {
        let tar = Arc::new(tar);
        let member = |i: usize| {
            let name = tar.name(i);
            let place = Place::Member(tar.clone(), i);
            let name = find::safe(Path::new(name));
            Self { path: path.join(&name), relative: relative.join(&name), place, about: None }
        };
        let mut inputs: Vec<Self> = (0..tar.len()).map(member).collect();
        match tar.damage() {
            Some(damage) => inputs.push(Self::broken(path, relative, damage)),
            None if tar.is_empty() => inputs.push(Self::broken(path, relative, "no member is an image")),
            None => {}
        }
        inputs
    }

    /// The images of a table.
    #[cfg(feature = "parquet")]
    pub(crate) fn of_table(table: Table, path: &Path, relative: &Path) -> Vec<Self> {
        let table = Arc::new(table);
        let row = |i: usize| {
            let number = i.to_string();
            let place = Place::Row(table.clone(), i);
            Self { path: path.join(&number), relative: relative.join(&number), place, about: None }
        };
        (0..table.len()).map(row).collect()
    }

    /// The codes of a row of a shard.
    pub(crate) fn of_codes(shard: Arc<Shard>, row: usize, relative: PathBuf) -> Self {
        Self { path: shard.path().join(&relative), relative, place: Place::Codes(shard, row), about: None }
    }

    /// What was known about it before it was read.
    #[cfg(test)]
    pub(crate) fn known(&self) -> Option<&About> {
        self.about.as_deref()
    }

    /// What cannot be read at all.
    pub(crate) fn broken(path: &Path, relative: &Path, reason: &str) -> Self {
        let (path, relative) = (path.to_path_buf(), relative.to_path_buf());
        Self { path, relative, place: Place::Broken(reason.into()), about: None }
    }

    /// The relative path as it is written into files: separated by `/` on every system.
    pub(crate) fn source(&self) -> String {
        source(&self.relative)
    }

    /// The bytes of the image file, and what goes with it.
    ///
    /// # Errors
    /// Why they cannot be read, without the path.
    pub(crate) fn read(&self) -> Result<Sample, String> {
        let mut sample = match &self.place {
            Place::File => std::fs::read(&self.path)
                .map(|bytes| Sample { bytes, ..Sample::default() })
                .map_err(|error| format!("cannot be read: {error}")),
            Place::Member(tar, i) => tar.read(*i),
            #[cfg(feature = "parquet")]
            Place::Row(table, i) => table.read(*i),
            Place::Codes(..) => Err("codes, not an image".to_string()),
            Place::Broken(reason) => Err(reason.to_string()),
        }?;
        if let Some(about) = self.about.as_deref() {
            sample.class = about.class.clone().or(sample.class);
            sample.label = about.label.or(sample.label);
            sample.caption = about.caption.clone().or(sample.caption);
        }
        Ok(sample)
    }

    /// The codes, of a file of their own or of a shard.
    ///
    /// # Errors
    /// Why they cannot be read.
    pub(crate) fn codes(&self) -> Result<Codes, String> {
        match &self.place {
            Place::Codes(shard, row) => shard.codes(*row),
            _ => Codes::read(&self.path).map_err(|error| error.to_string()),
        }
    }

    /// Whether [`Input::codes`] is what it has, rather than an image.
    pub(crate) fn is_codes(&self) -> bool {
        match self.place {
            Place::Codes(..) => true,
            Place::File => vqrae::codes::Format::of(&self.path).is_some(),
            _ => false,
        }
    }

    /// Whether it says only why nothing can be read.
    fn is_broken(&self) -> bool {
        matches!(self.place, Place::Broken(_))
    }

    /// What the picture of codes is named after: a code file's name without its own extension, the path of a row's image.
    pub(crate) fn pictured(&self) -> PathBuf {
        match self.place {
            Place::Codes(..) => self.relative.clone(),
            _ => self.relative.with_extension(""),
        }
    }
}

/// A relative path with `/` on every system.
pub(crate) fn source(relative: &Path) -> String {
    let parts: Vec<_> = relative.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

/// The inputs of a run, in the order of the bytes of their relative paths.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    /// What there is to read.
    pub(crate) files: Vec<Input>,
    /// Folders and links that could not be followed, and why.
    pub(crate) unreadable: Vec<(Input, String)>,
}
