//! Indices ⇄ disk: the codes of one image in one file, or of many in a shard.
//!
//! A [`CodeSet`] is a folder of [`shard`]s, which hold a [`Row`] for every image: what `vqrae-cli tokenize` writes for a data set, and
//! what a generator reads. The rest of this page is about the files of single images.
//!
//! A code file says what is needed to decode it years later: the grid (images of one model may differ in size), the
//! model's id, the size of its codebook, the image it came from and how that image was prepared. Two formats hold the same
//! record:
//!
//! | format | the indices | the record |
//! |---|---|---|
//! | `.safetensors` | one tensor `codes`, i32 `[h, w]` or `[h, w, c]` | the header's metadata |
//! | `.npy` | int32 `[h, w]` or `[h, w, c]`, `numpy.load` opens it | a JSON object in the sibling file, `a.npy` and `a.json` |
//!
//! `[h, w, c]` is what a quantizer with c > 1 codes a token makes (`residual`, `product`): the record then says
//! `codebooks`, and `codebook_size` is that of each. Indices are in raster order and start at 0. The bytes depend on the codes alone: no date, no random order.
//! A checksum over indices and record is kept in the record, so a damaged file is refused rather than decoded.
//!
//! ```
//! # fn main() -> vqrae::Result<()> {
//! use vqrae::codes::Codes;
//!
//! let codes = Codes {
//!     indices: vec![3, 1, 4, 1, 5, 9],
//!     h: 2,
//!     w: 3,
//!     c: 1,
//!     model_id: "0f3a".to_string(),
//!     codebook_size: 16,
//!     source: "cats/tom.jpg".to_string(),
//!     preprocessing: "squash-bicubic-32x48".to_string(),
//!     dtype: "f32".to_string(),
//! };
//! let folder = tempfile::tempdir().map_err(vqrae::Error::io("the temporary folder"))?;
//! let file = folder.path().join("cats/tom.jpg.safetensors");
//! codes.write(&file)?;
//! assert_eq!(Codes::read(&file)?, codes);
//! # Ok(())
//! # }
//! ```

mod npy;
mod row;
mod safetensors;
mod set;
pub mod shard;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::{Error, Result, files};

pub use npy::{NpyType, npy_array};
pub use row::{Header, Row};
pub use safetensors::single_tensor;
pub use set::{CodeSet, Manifest, numbered};

/// The most indices that one file may hold: with one code a token an image of 65,536 × 65,536 pixels in patches of 16.
pub const MAX_INDICES: usize = 1 << 24;

/// More than the largest valid file, so that reading a hostile one takes bounded memory.
const MAX_BYTES: u64 = 4 * MAX_INDICES as u64 + (1 << 20);

/// What the record's `format` must say.
const FORMAT: &str = "vqrae-codes-1";

/// What stands in the record of a code file; all values are text, in both formats.
type Record = BTreeMap<String, String>;

/// The codes of one image, and what is needed to decode them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Codes {
    /// `h × w × c` rows of the codebook, in raster order, those of a token side by side, counted from 0.
    pub indices: Vec<u32>,
    /// Rows of the grid.
    pub h: usize,
    /// Columns of the grid.
    pub w: usize,
    /// Codes a token; files of 1 hold `[h, w]`.
    pub c: usize,
    /// The id of the model that made the codes.
    pub model_id: String,
    /// Rows in that model's codebook, or in each of its codebooks: every index is below it.
    pub codebook_size: usize,
    /// The image's path, relative to the input folder.
    pub source: String,
    /// How the image was prepared, as [`Preprocessor::tag`](crate::image::Preprocessor::tag) says it.
    pub preprocessing: String,
    /// What the model computed in, as [`crate::Vqrae::precision`] says it: `f32`, `bf16/avx512-bf16`, …
    pub dtype: String,
}

/// The formats of a code file, told apart by the file's extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One tensor and its record in one file.
    Safetensors,
    /// An array for numpy, the record beside it.
    Npy,
}

impl Format {
    /// The format that a file's extension names, if it names one.
    pub fn of(path: impl AsRef<Path>) -> Option<Self> {
        let extension = path.as_ref().extension()?;
        [Self::Safetensors, Self::Npy].into_iter().find(|format| extension.eq_ignore_ascii_case(format.extension()))
    }

    /// The extension of this format, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Npy => "npy",
        }
    }

    /// [`Format::of`], for a path that has to name one.
    fn named_by(path: &Path) -> Result<Self> {
        Self::of(path).ok_or_else(|| Error::codes(path, "a code file ends in .safetensors or .npy"))
    }
}

impl Codes {
    /// Reads a code file and checks everything that it says about itself.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let codes = match Format::named_by(path)? {
            Format::Safetensors => safetensors::from_bytes(&read_bounded(path)?),
            Format::Npy => npy::from_bytes(&read_bounded(path)?, &read_bounded(&record_beside(path))?),
        };
        codes.map_err(|reason| Error::codes(path, reason))
    }

    /// Writes the codes in the format that the extension names, making folders as needed.
    ///
    /// The file appears whole or not at all. Beside an `.npy`, the record is written first: where the array is, the
    /// record is too, and the checksum tells whether they belong together.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.check().map_err(|reason| Error::codes(path, reason))?;
        match Format::named_by(path)? {
            Format::Safetensors => write_whole(path, &safetensors::to_bytes(self)),
            Format::Npy => {
                let (array, record) = npy::to_bytes(self);
                write_whole(record_beside(path), &record)?;
                write_whole(path, &array)
            }
        }
    }

    /// Refuses codes that another model made: `path` is where they were read from.
    pub fn check_model(&self, path: impl AsRef<Path>, model_id: &str) -> Result<()> {
        if self.model_id == model_id {
            return Ok(());
        }
        Err(Error::OtherModel {
            path: path.as_ref().to_path_buf(),
            codes: self.model_id.clone(),
            model: model_id.to_string(),
        })
    }

    /// Refuses codes of another shape than a model's: `codebooks` codes a token, each of `codebook_size`. Codes of the
    /// model's own id always have it, unless the file was made up.
    pub fn check_shape(&self, path: impl AsRef<Path>, codebooks: usize, codebook_size: usize) -> Result<()> {
        if (self.c, self.codebook_size) == (codebooks, codebook_size) {
            return Ok(());
        }
        Err(Error::codes(
            path,
            format!(
                "{} codes a token of codebooks of {} rows, but the model has {codebooks} of {codebook_size}; decode them \
                 with the model that made them, or tokenize the image again",
                self.c, self.codebook_size
            ),
        ))
    }

    /// What must hold of any codes, read or about to be written.
    fn check(&self) -> std::result::Result<(), String> {
        let (grid, count) = (self.grid(), self.indices.len());
        match self.h.checked_mul(self.w).and_then(|tokens| tokens.checked_mul(self.c)) {
            Some(0) => return Err(format!("an empty grid, {grid}")),
            Some(expected) if expected == count && count <= MAX_INDICES => {}
            Some(expected) if expected <= MAX_INDICES => {
                return Err(format!("the grid is {grid}, but there are {count} indices"));
            }
            _ => return Err(format!("a grid of {grid} is more than {MAX_INDICES} indices")),
        }
        let size = self.codebook_size;
        if size > 1 << 31 {
            return Err(format!("a codebook of {size} rows does not fit into i32 indices; take several codes a token"));
        }
        match self.indices.iter().position(|&index| index as usize >= size) {
            Some(at) => Err(format!("index {} at position {at}, but the codebook has {size} rows", self.indices[at])),
            None => Ok(()),
        }
    }

    /// The shape of the indices: `[h, w]`, or `[h, w, c]` where c is not 1.
    fn shape(&self) -> Vec<usize> {
        if self.c == 1 { vec![self.h, self.w] } else { vec![self.h, self.w, self.c] }
    }

    /// The same for messages.
    fn grid(&self) -> String {
        self.shape().iter().map(usize::to_string).collect::<Vec<_>>().join("x")
    }

    /// The record without its checksum.
    fn statement(&self) -> Record {
        let codebooks = (self.c != 1).then(|| ("codebooks", self.c.to_string()));
        let entries = [
            ("format", FORMAT.to_string()),
            ("model_id", self.model_id.clone()),
            ("codebook_size", self.codebook_size.to_string()),
            ("source", self.source.clone()),
            ("preprocessing", self.preprocessing.clone()),
            ("dtype", self.dtype.clone()),
            ("order", "raster".to_string()),
            ("index_base", "0".to_string()),
        ];
        entries.into_iter().chain(codebooks).map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// The record as it is written.
    fn record(&self) -> Record {
        let mut record = self.statement();
        record.insert("checksum".to_string(), self.checksum(&record));
        record
    }

    /// BLAKE3 over grid, indices and statement.
    fn checksum(&self, statement: &Record) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(self.h as u64).to_le_bytes());
        hasher.update(&(self.w as u64).to_le_bytes());
        hasher.update(&self.index_bytes());
        for text in statement.iter().flat_map(|(key, value)| [key, value]) {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The indices as little-endian i32, the way both formats hold them.
    fn index_bytes(&self) -> Vec<u8> {
        self.indices.iter().flat_map(|index| index.to_le_bytes()).collect()
    }

    /// The codes that a file holds, or why it cannot be believed.
    fn from_parts(shape: &[usize], data: &[u8], record: &Record) -> std::result::Result<Self, String> {
        let text = |key: &str| record.get(key).cloned().ok_or_else(|| format!("{key} is missing from the record"));
        let format = text("format")?;
        if format != FORMAT {
            return Err(format!("a record of format {format}, expected: {FORMAT}"));
        }
        let size = text("codebook_size")?;
        let (h, w, c) = match *shape {
            [h, w] => (h, w, 1),
            [h, w, c] => (h, w, c),
            _ => return Err(format!("an array of the shape {shape:?}, expected: [h, w] or [h, w, c]")),
        };
        let codebooks = record.get("codebooks").map_or("1", String::as_str);
        if codebooks != c.to_string() {
            return Err(format!("the array has the shape {shape:?}, but the record says {codebooks} codes a token"));
        }
        let codes = Self {
            indices: data.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect(),
            h,
            w,
            c,
            model_id: text("model_id")?,
            codebook_size: size.parse().map_err(|_| format!("codebook_size is {size:?}, expected: a number"))?,
            source: text("source")?,
            preprocessing: text("preprocessing")?,
            dtype: text("dtype")?,
        };
        codes.check()?;
        if *record != codes.record() {
            return Err("the checksum does not match: the file was damaged or edited".to_string());
        }
        Ok(codes)
    }
}

/// Writes `bytes` to a temporary sibling and renames it to `path`, making folders as needed: no reader ever sees half
/// a file. A killed process may leave the sibling behind: see [`files::sweep`].
pub fn write_whole(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    files::write_whole(path, bytes).map_err(Error::io(path))
}

/// Where the record of an `.npy` stands.
fn record_beside(path: &Path) -> PathBuf {
    path.with_extension("json")
}

/// A regular file's bytes, unless it is longer than any code file.
fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    // Asked before opening: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::codes(path, "not a regular file"));
    }
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::codes(path, format!("longer than any code file, {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}
