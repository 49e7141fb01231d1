//! Shards: the codes of many images in one file, and its statistics beside it.
//!
//! | layout | file | reader |
//! |---|---|---|
//! | [`Layout::Parquet`] | `00000.parquet`, a column a field of [`Row`] | pyarrow, datasets, polars, DuckDB, Spark; and this library |
//! | [`Layout::Jsonl`] | `00000.jsonl`, a [`Row`] a line | anything; and this library |
//! | [`Layout::WebDataset`] | `00000.tar`, `KEY.codes.npy` and `KEY.json` a row | webdataset |
//!
//! A shard is done when its `00000_stats.json` is there, which is written last. Bytes depend on rows and header alone: no
//! date, no host, no random order.

mod jsonl;
#[cfg(feature = "parquet")]
mod parquet;
mod stats;
mod webdataset;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Header, Row};
use crate::{Error, Result};

pub use stats::{Stats, Tally};

/// How a shard's file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// A column a field, codes as a list of uint16 or uint32: the canonical form.
    Parquet,
    /// A JSON object a line.
    Jsonl,
    /// A tar of two members a row.
    WebDataset,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::Parquet, Self::Jsonl, Self::WebDataset];

    /// The extension of this layout's files, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Parquet => "parquet",
            Self::Jsonl => "jsonl",
            Self::WebDataset => "tar",
        }
    }

    /// The layout that a file's extension names, if it names one.
    pub fn of(path: impl AsRef<Path>) -> Option<Self> {
        let extension = path.as_ref().extension()?;
        Self::ALL.into_iter().find(|layout| extension.eq_ignore_ascii_case(layout.extension()))
    }
}

/// Where a shard of this name and layout is.
pub fn file(folder: &Path, name: &str, layout: Layout) -> PathBuf {
    folder.join(format!("{name}.{}", layout.extension()))
}

/// Writes rows, one after the other, to any writer. What came so far is no shard before [`Writer::finish`].
pub struct Writer<W: Write + Send> {
    header: Header,
    form: Form<W>,
}

enum Form<W: Write + Send> {
    #[cfg(feature = "parquet")]
    Parquet(Box<parquet::Writer<W>>),
    Jsonl(jsonl::Writer<W>),
    WebDataset(webdataset::Writer<W>),
}

impl<W: Write + Send> Writer<W> {
    /// A shard without rows yet.
    ///
    /// # Errors
    /// If the library was built without this layout.
    pub fn new(out: W, header: &Header, layout: Layout) -> std::result::Result<Self, String> {
        let form = match layout {
            #[cfg(feature = "parquet")]
            Layout::Parquet => Form::Parquet(Box::new(parquet::Writer::new(out, header)?)),
            #[cfg(not(feature = "parquet"))]
            Layout::Parquet => return Err(NO_PARQUET.to_string()),
            Layout::Jsonl => Form::Jsonl(jsonl::Writer::new(out)),
            Layout::WebDataset => Form::WebDataset(webdataset::Writer::new(out, header)),
        };
        Ok(Self { header: header.clone(), form })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// If the row contradicts itself or the header, or what the system says.
    pub fn write(&mut self, row: &Row) -> std::result::Result<(), String> {
        row.check(&self.header)?;
        match &mut self.form {
            #[cfg(feature = "parquet")]
            Form::Parquet(writer) => writer.write(row),
            Form::Jsonl(writer) => writer.write(row),
            Form::WebDataset(writer) => writer.write(row),
        }
    }

    /// Writes what is still held back and returns the writer.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(self) -> std::result::Result<W, String> {
        match self.form {
            #[cfg(feature = "parquet")]
            Form::Parquet(writer) => writer.finish(),
            Form::Jsonl(writer) => Ok(writer.finish()),
            Form::WebDataset(writer) => writer.finish(),
        }
    }
}

#[cfg(not(feature = "parquet"))]
const NO_PARQUET: &str = "this build cannot read or write parquet; build with --features parquet";

/// The rows of a shard, read a few at a time, each checked against the header.
pub struct Reader {
    path: PathBuf,
    header: Header,
    rows: Box<dyn Iterator<Item = std::result::Result<Row, String>> + Send>,
    failed: bool,
}

impl Reader {
    /// Opens a parquet shard, which tells its own header.
    ///
    /// # Errors
    /// If the file is no shard of codes, or its layout is one that is only written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, None)
    }

    /// Opens a parquet or jsonl shard; the lines of the latter do not tell their `header`, which the set's manifest does.
    ///
    /// # Errors
    /// If the file is no shard of codes, its own header is another, or its layout is one that is only written.
    pub fn open_with(path: impl AsRef<Path>, header: Option<&Header>) -> Result<Self> {
        let path = path.as_ref();
        let (own, rows) = Self::parts(path, header)?;
        match header {
            Some(header) if *header != own => Err(Error::codes(
                path,
                format!(
                    "made by model {} ({}, {}), but the set is of model {} ({}, {})",
                    own.model_id, own.preprocessing, own.dtype, header.model_id, header.preprocessing, header.dtype
                ),
            )),
            _ => Ok(Self { path: path.to_path_buf(), header: own, rows, failed: false }),
        }
    }

    fn parts(path: &Path, header: Option<&Header>) -> Result<(Header, Rows)> {
        let refuse = |reason: &str| Error::codes(path, reason);
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(refuse("not a regular file"));
        }
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        match (Layout::of(path), header) {
            #[cfg(feature = "parquet")]
            (Some(Layout::Parquet), _) => parquet::read(file).map_err(|reason| Error::codes(path, reason)),
            #[cfg(not(feature = "parquet"))]
            (Some(Layout::Parquet), _) => Err(refuse(NO_PARQUET)),
            (Some(Layout::Jsonl), Some(header)) => Ok((header.clone(), Box::new(jsonl::rows(file)))),
            (Some(Layout::Jsonl), None) => {
                Err(refuse("lines alone do not say which model made them; name their folder"))
            }
            (Some(Layout::WebDataset), _) => {
                Err(refuse("a tar of codes is for webdataset; keep parquet shards to read them again here"))
            }
            (None, _) => Err(refuse("a shard of codes ends in .parquet, .jsonl or .tar")),
        }
    }

    /// What the rows have in common.
    pub fn header(&self) -> &Header {
        &self.header
    }
}

/// What [`Reader`] reads from.
type Rows = Box<dyn Iterator<Item = std::result::Result<Row, String>> + Send>;

impl Iterator for Reader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let row = self.rows.next()?.and_then(|row| row.check(&self.header).map(|()| row));
        self.failed = row.is_err();
        Some(row.map_err(|reason| Error::codes(&self.path, reason)))
    }
}
