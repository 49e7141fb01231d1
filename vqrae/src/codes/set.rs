//! A folder of shards: the codes of a data set.
//!
//! ```text
//! OUT/manifest.json           what all shards have in common
//! OUT/00000.parquet           the rows of a contiguous run of images, in the order of the bytes of their paths
//! OUT/00000_stats.json        written last: the shard is finished
//! ```
//!
//! ```no_run
//! use vqrae::codes::CodeSet;
//! # fn main() -> vqrae::Result<()> {
//! let set = CodeSet::open("out")?;
//! set.check_complete()?;
//! for row in set.rows() {
//!     let row = row?;
//!     if let Some(codes) = &row.codes {
//!         println!("{} {:?} {:?}", row.path, row.label, &codes[..4]); // codes: u32 of h · w · C
//!     }
//! }
//! # Ok(()) }
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::shard::{self, Layout, Reader, Stats};
use super::{Header, Row, read_bounded, write_whole};
use crate::{Error, Result};

/// The version of the folder's layout that this library reads and writes.
const FORMAT: &str = "vqrae-shards-1";

/// The name of the file.
const MANIFEST: &str = "manifest.json";

/// What all shards of a set have in common: `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `vqrae-shards-1`
    pub format: String,
    /// The program that made the set.
    pub tool: String,
    /// Its version.
    pub version: String,
    /// Model, preprocessing, number format, codebook, grid.
    #[serde(flatten)]
    pub header: Header,
    /// Where the model computed: `cpu` or `cuda`.
    pub device_kind: String,
    /// The shape of the model's input, `[B, 3, H, W]`, where a code could depend on it; `null` where it cannot.
    pub batch_shape: Option<Vec<usize>>,
    /// Rows and columns of the images as the model saw them, of several views a list; left out where every image has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<serde_json::Value>,
    /// Width of a row of the codebook.
    pub codebook_dim: usize,
    /// The order of the codes of a grid: `raster`, those of a token side by side.
    pub order: String,
    /// The number of the first code, 0.
    pub index_base: u32,
    /// The type of the codes in a shard: `uint16` or `uint32`.
    pub code_dtype: String,
    /// The files of the shards.
    pub layout: Layout,
    /// Images a numbered shard holds at most.
    pub samples_per_shard: usize,
    /// The names of the classes, where labels are those of folders: label i is the i-th.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<String>,
    /// What random numbers were drawn from; `null`: nothing is random.
    pub seed: Option<u64>,
    /// What was done to images beside preparing them: `flip`, `ten-crop-1.1`.
    pub augmentations: Vec<String>,
}

impl Manifest {
    /// The manifest of a set made by this library.
    pub fn new(tool: &str, version: &str, header: Header, layout: Layout) -> Self {
        Self {
            format: FORMAT.to_string(),
            tool: tool.to_string(),
            version: version.to_string(),
            device_kind: "cpu".to_string(),
            batch_shape: None,
            image_size: None,
            codebook_dim: 0,
            order: "raster".to_string(),
            index_base: 0,
            code_dtype: header.code_dtype().to_string(),
            layout,
            samples_per_shard: 0,
            classes: Vec::new(),
            seed: None,
            augmentations: Vec::new(),
            header,
        }
    }

    /// Where the manifest of a folder is.
    pub fn path(folder: &Path) -> PathBuf {
        folder.join(MANIFEST)
    }

    /// Reads the manifest of a folder; `None` if it has none.
    ///
    /// # Errors
    /// If the file is there, but cannot be read or is no manifest of shards.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = Self::path(folder);
        if !path.exists() {
            return Ok(None);
        }
        let manifest: Self = serde_json::from_slice(&read_bounded(&path)?)
            .map_err(|error| Error::codes(&path, format!("not the manifest of a set of code shards: {error}")))?;
        if manifest.format != FORMAT {
            return Err(Error::codes(&path, format!("a set of format {}, expected: {FORMAT}", manifest.format)));
        }
        Ok(Some(manifest))
    }

    /// Writes the manifest of a folder, making the folder as needed.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = Self::path(folder);
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::codes(&path, error.to_string()))? + "\n";
        write_whole(path, text.as_bytes())
    }
}

/// A folder of finished shards.
#[derive(Debug, Clone)]
pub struct CodeSet {
    folder: PathBuf,
    manifest: Manifest,
    shards: Vec<Stats>,
}

impl CodeSet {
    /// Whether a folder claims to be one.
    pub fn is(folder: impl AsRef<Path>) -> bool {
        Manifest::read(folder.as_ref()).is_ok_and(|manifest| manifest.is_some())
    }

    /// Opens a folder: its manifest and the statistics of its finished shards, not their rows.
    ///
    /// # Errors
    /// If there is no manifest, or the manifest or statistics are damaged.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let manifest = Manifest::read(folder)?
            .ok_or_else(|| Error::codes(folder, "no manifest.json: not a folder of code shards"))?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let name = entry.map_err(Error::io(folder))?.file_name();
            names.extend(name.to_str().and_then(|name| name.strip_suffix("_stats.json")).map(str::to_string));
        }
        // Numbers of more than five digits come after those of five.
        let number = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit()).then_some(name.len());
        names.sort_by(|a, b| (number(a), a).cmp(&(number(b), b)));
        let mut shards = Vec::with_capacity(names.len());
        for name in names {
            shards.extend(Stats::read(folder, &name)?);
        }
        Ok(Self { folder: folder.to_path_buf(), manifest, shards })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the shards have in common.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The finished shards, by name.
    pub fn shards(&self) -> &[Stats] {
        &self.shards
    }

    /// Rows of all finished shards.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.rows).sum()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file of a shard.
    pub fn file(&self, shard: &Stats) -> PathBuf {
        shard::file(&self.folder, &shard.shard, shard.layout)
    }

    /// The names of numbered shards that are not finished. Shards that are named after the files that they were made of do not say
    /// which others there should be.
    pub fn missing(&self) -> Vec<String> {
        let Some(count) = self.shards.iter().filter_map(|shard| shard.shards).max() else { return Vec::new() };
        let here: std::collections::HashSet<&str> = self.shards.iter().map(|shard| shard.shard.as_str()).collect();
        (0..count).map(numbered).filter(|name| !here.contains(name.as_str())).collect()
    }

    /// Refuses a set of which shards are missing.
    ///
    /// # Errors
    /// Names the first of them.
    pub fn check_complete(&self) -> Result<()> {
        let missing = self.missing();
        let Some(first) = missing.first() else { return Ok(()) };
        let count = missing.len() + self.shards.len();
        Err(Error::codes(
            &self.folder,
            format!("{} of {count} shards are not finished, the first: {first}; run tokenize again", missing.len()),
        ))
    }

    /// The rows of one shard.
    ///
    /// # Errors
    /// If the shard's file cannot be opened, or was made otherwise than the set.
    pub fn open_shard(&self, shard: &Stats) -> Result<Reader> {
        Reader::open_with(self.file(shard), Some(&self.manifest.header))
    }

    /// The rows of all shards, in order; memory holds a few at a time.
    pub fn rows(&self) -> impl Iterator<Item = Result<Row>> + '_ {
        self.shards.iter().flat_map(|shard| {
            let (rows, error) = match self.open_shard(shard) {
                Ok(rows) => (Some(rows), None),
                Err(error) => (None, Some(Err(error))),
            };
            rows.into_iter().flatten().chain(error)
        })
    }
}

/// The name of a numbered shard.
pub fn numbered(number: usize) -> String {
    format!("{number:05}")
}
