//! A shard of codes whose rows are inputs of their own. Of many shards the rows of a few are in memory: those asked for last.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use vqrae::codes::shard::Reader;
use vqrae::codes::{Codes, Header, Manifest, Row};

/// Shards whose rows are held at a time; threads that read ahead may be at the next one.
const HELD: usize = 3;

static RECENT: Mutex<VecDeque<Arc<Shard>>> = Mutex::new(VecDeque::new());

/// A file of rows.
#[derive(Debug)]
pub(crate) struct Shard {
    path: PathBuf,
    header: Header,
    rows: Mutex<Option<Arc<Vec<Row>>>>,
}

impl Shard {
    /// Opens a shard; the header of lines is that of the manifest beside them.
    ///
    /// # Errors
    /// If it is no shard of codes, or not of its folder's set.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        let manifest = path.parent().map(Manifest::read).transpose()?.flatten();
        let reader = Reader::open_with(path, manifest.as_ref().map(|manifest| &manifest.header))?;
        Ok(Arc::new(Self { path: path.to_path_buf(), header: reader.header().clone(), rows: Mutex::new(None) }))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The rows, read again if others were asked for meanwhile.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(crate) fn rows(self: &Arc<Self>) -> Result<Arc<Vec<Row>>> {
        let mut held = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rows) = held.as_ref() {
            return Ok(rows.clone());
        }
        let rows = Arc::new(Reader::open_with(&self.path, Some(&self.header))?.collect::<Result<Vec<_>, _>>()?);
        *held = Some(rows.clone());
        drop(held);
        let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push_back(self.clone());
        if recent.len() > HELD
            && let Some(oldest) = recent.pop_front()
        {
            drop(recent);
            *oldest.rows.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(rows)
    }

    /// The codes of a row.
    ///
    /// # Errors
    /// What is wrong with the file, or why the row has none.
    pub(crate) fn codes(self: &Arc<Self>, row: usize) -> Result<Codes, String> {
        let rows = self.rows().map_err(|error| error.to_string())?;
        let row = rows.get(row).ok_or("no such row")?;
        row.to_codes(&self.header).ok_or_else(|| row.error.clone().unwrap_or_default())
    }
}
