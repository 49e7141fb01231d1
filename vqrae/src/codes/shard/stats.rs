//! `00000_stats.json`: what a finished shard holds. It is written last, so where it is, the shard is whole.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Layout;
use crate::codes::{Header, Row, read_bounded, write_whole};
use crate::metrics::CodeCounts;
use crate::{Error, Result};

/// What a finished shard holds; nothing of when, where or by whom it was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The shard's name.
    pub shard: String,
    /// The shard's file.
    pub layout: Layout,
    /// How many shards the set has, where they are numbered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shards: Option<usize>,
    /// What the shard was made of, as a hash: names of images, labels, captions; or a tar's name and size.
    pub inputs: String,
    /// Rows, those without codes included.
    pub rows: usize,
    /// Rows with codes.
    pub ok: usize,
    /// Rows with an error.
    pub errors: usize,
    /// Codes of all rows.
    pub codes: u64,
    /// Share of the codebook's rows that occur.
    pub codes_in_use: f64,
    /// exp of the entropy of the codes.
    pub perplexity: f64,
    /// Length of the shard's file.
    pub bytes: u64,
    /// BLAKE3 of the shard's file.
    pub blake3: String,
}

impl Stats {
    /// Where the statistics of a shard of this name are.
    pub fn path(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!("{name}_stats.json"))
    }

    /// Reads the statistics of a shard, which says that it is finished; `None` if there are none.
    ///
    /// # Errors
    /// If the file is there, but cannot be read or says something else.
    pub fn read(folder: &Path, name: &str) -> Result<Option<Self>> {
        let path = Self::path(folder, name);
        if !path.exists() {
            return Ok(None);
        }
        let stats: Self = serde_json::from_slice(&read_bounded(&path)?)
            .map_err(|error| Error::codes(&path, format!("not the statistics of a shard: {error}")))?;
        if stats.shard != name {
            return Err(Error::codes(&path, format!("statistics of the shard {}", stats.shard)));
        }
        Ok(Some(stats))
    }

    /// Writes the statistics: from here on the shard is finished.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::codes(folder, error.to_string()))? + "\n";
        write_whole(Self::path(folder, &self.shard), text.as_bytes())
    }
}

/// Counts the rows of a shard.
pub struct Tally {
    rows: usize,
    ok: usize,
    codes: u64,
    counts: CodeCounts,
}

impl Tally {
    /// Nothing counted yet.
    pub fn new(header: &Header) -> Self {
        let counts = CodeCounts::new(header.codebook_size, header.codes_per_token);
        Self { rows: 0, ok: 0, codes: 0, counts }
    }

    /// Counts a row.
    pub fn add(&mut self, row: &Row) {
        self.rows += 1;
        if let Some(codes) = &row.codes {
            self.ok += 1;
            self.codes += codes.len() as u64;
            self.counts.add(codes);
        }
    }

    /// How often each code was met.
    pub fn counts(&self) -> &CodeCounts {
        &self.counts
    }

    /// The statistics of a shard of these rows, whose file has this length and hash.
    pub fn stats(
        &self,
        shard: &str,
        layout: Layout,
        inputs: &str,
        shards: Option<usize>,
        file: (u64, String),
    ) -> Stats {
        // Six digits: what stands in a file is the same on every machine.
        let round = |value: f64| (value * 1e6).round() / 1e6;
        Stats {
            shard: shard.to_string(),
            layout,
            shards,
            inputs: inputs.to_string(),
            rows: self.rows,
            ok: self.ok,
            errors: self.rows - self.ok,
            codes: self.codes,
            codes_in_use: round(self.counts.usage()),
            perplexity: round(self.counts.perplexity()),
            bytes: file.0,
            blake3: file.1,
        }
    }
}
